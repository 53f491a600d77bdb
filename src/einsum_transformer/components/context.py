"""The inputs of a layer other than its activations: positions, RoPE, padding and KV cache."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from einsum_transformer.components.kv_cache import LayerCache
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
