"""The inputs of a layer other than its activations: positions, RoPE, padding and KV cache."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from einsum_transformer.components.kv_cache import LayerCache
from einsum_transformer.components.masks import Mask
from einsum_transformer.components.rope import Rotation

Array = np.ndarray


class Context(NamedTuple):
    """Positions, RoPE, padding and KV cache of one layer in a forward pass."""

    positions: Array
    """(t,) consecutive positions of the queries in the sequence, padding included."""
    rotation: Rotation | None = None
    """The layer's RoPE at these positions; None: NoPE (no position encoding)."""
    pads: Array | None = None
    """(b,) number of left-padding tokens of each row; None: no padding."""
    cache: LayerCache | None = None
    """The layer's KV cache, to which it appends the keys and values of this pass."""
    masks: dict[Any, Mask] | None = None
    """The masks of this pass, for all layers."""

    def mask(self, index: Array, window: int | None) -> Mask:
        """The mask of the queries of this pass for keys at the positions `index`; layers with equal keys and
        windows share it."""
        if self.masks is None:
            return Mask(self.positions, index, window, self.pads)
        key = window, len(index), index.item(0), index.item(-1)
        mask = self.masks.get(key)
        if mask is None:
            mask = self.masks[key] = Mask(self.positions, index, window, self.pads)
        return mask
