"""What travels with every layer of a pass, beside its activations."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from einsum_transformer.components.kv_cache import LayerCache
from einsum_transformer.components.rope import Rotation

Array = np.ndarray


class Context(NamedTuple):
    """Where the tokens of a pass are in their sequence, and what came before them, as one layer sees it."""

    positions: Array
    """(t,) of the queries in the sequence, one after the other, padding included."""
    rotation: Rotation | None = None
    """The layer's RoPE at these positions; None: NoPE."""
    pads: Array | None = None
    """(b,) padding tokens at the left of each row, or None."""
    cache: LayerCache | None = None
    """Keys and values of earlier tokens, which the layer extends by its own."""
