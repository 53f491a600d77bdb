"""Attention masks (causal, sliding window, padding) and the ALiBi bias."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray
Masked = list[tuple[slice, Array]]
"""Pairs (keys of a tile, mask to add to their scores)."""


@dataclass(frozen=True, slots=True)
class Mask:
    """The keys that a query may attend to: not after it, inside the window, and not padding.

    queries: (t,) consecutive positions in the sequence; index: (s,) those of the keys, also consecutive
    except in a `RingCache`, which contains exactly the keys that its one query may attend to; pads: (b,)
    number of left-padding tokens of each row, or None.
    """

    queries: Array
    index: Array
    window: int | None = None
    pads: Array | None = None
    tilings: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    """Tiles and boxes by the sizes of the queries (`tiles.tiling`)."""

    def keys(self, block: slice) -> slice:
        """The range of keys that the queries of the block may attend to."""
        if self._is_ring():
            return slice(0, len(self.index))
        first, last = int(self.queries[block.start]), int(self.queries[block.stop - 1])
        start = int(self.index[0])
        low = 0 if self.window is None else max(0, first - self.window + 1 - start)
        return slice(low, last + 1 - start)

    def parts(self, block: slice, keys: slice, dtype: np.dtype) -> Masked:
        """Pairs (where, mask to add to the scores there): 0 for visible keys, -inf for masked ones.

        `where`: keys of the tile (relative to keys.start) that are masked for some query: at most the
        diagonal and the window's edge, or all keys if rows are padded.
        """
        count = keys.stop - keys.start
        if self.pads is not None and self.pads.any():
            ranges = [slice(0, count)]
        elif block.stop - block.start == 1 or self._is_ring():
            return []
        else:
            first, last = int(self.queries[block.start]), int(self.queries[block.stop - 1])
            start = int(self.index[keys.start])
            edge = 0 if self.window is None else min(count, max(0, last - self.window + 1 - start))
            ranges = [slice(0, edge), slice(max(edge, first + 1 - start), count)]
        return [
            (where, self._added(block, keys, where, dtype)) for where in ranges if where.start < where.stop
        ]

    def biases(self, block: slice, keys: slice, slopes: Array) -> Array:
        """ALiBi bias of a tile: slopes (k, g) times (key position - query position) -> (k, g, t, s)."""
        queries, index = self.queries[block], self.index[keys]
        # Keys outermost in memory, as in the scores.
        distances = (index[:, None] - queries).astype(slopes.dtype).T
        return slopes[..., None, None] * distances

    def _added(self, block: slice, keys: slice, where: slice, dtype: np.dtype) -> Array:
        # Keys outermost in memory, as in the scores, and one mask for all heads.
        queries, index = self.queries[block], self.index[keys][where, None]
        masked = (index > queries)[None]
        if self.window is not None:
            masked = masked | (index <= queries - self.window)
        if self.pads is not None:
            masked = masked | (index < self.pads[:, None, None])
        return np.where(masked, -np.inf, 0).astype(dtype).transpose(0, 2, 1)[:, None, None]

    def _is_ring(self) -> bool:
        return len(self.queries) == 1 and int(self.index[-1]) != int(self.queries[0])


def add_mask(scores: Array, masked: Masked, rows: slice = slice(None)) -> Array:
    """Add the mask to scores (b, k, g, t, s) in place. rows: the batch rows of these scores."""
    for where, added in masked:
        scores[..., where] += added if len(added) == 1 else added[rows]
    return scores


def alibi_slopes(heads: int, bias_max: float = 8.0) -> Array:
    """2^(-bias_max i / n) for i = 1 ... n, with n the smallest power of two >= `heads` (Press et al., 2022).

    If `heads` is not a power of two: the first `heads` of the slopes i = 2, 4, ..., n, 1, 3, ..., n - 1.
    """
    n = 1 << (heads - 1).bit_length()
    slopes = 2.0 ** (-bias_max / n * np.arange(1, n + 1))
    return slopes if n == heads else np.concatenate([slopes[1::2], slopes[::2]])[:heads]
