"""Tiling of attention: boxes of batch rows and heads, each a sequence of tiles of queries and their keys.

The t x s score matrix is never materialized (Dao et al., 2022). Boxes do not share a query head of a row, so
they can run in parallel in both passes; the backward pass sums the gradients of keys and values over the
tiles of a box.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from einsum_transformer.components.masks import Mask, Masked

Array = np.ndarray

TILE_BYTES = 1 << 20
"""Size of a tile's scores, so that they stay in a core's L2 cache between the two products."""


class Tile(NamedTuple):
    """A block of queries, the keys that they may attend to, and the mask of those keys."""

    queries: slice
    keys: slice
    masked: Masked

    @property
    def size(self) -> int:
        """Number of scores of one head of one row."""
        return (self.queries.stop - self.queries.start) * (self.keys.stop - self.keys.start)


class Box(NamedTuple):
    """Batch rows and heads of q (b, t, k, g, h)."""

    rows: slice
    kv_heads: slice
    groups: slice

    def of_queries(self, tile: Tile) -> tuple[slice, slice, slice, slice]:
        """The index of a tile's queries in arrays (b, t, k, g, ...)."""
        return self.rows, tile.queries, self.kv_heads, self.groups

    def of_scores(self, tile: Tile) -> tuple[slice, slice, slice, slice, slice]:
        """The index of a tile's scores in arrays (b, k, g, t, s)."""
        return self.rows, self.kv_heads, self.groups, tile.queries, tile.keys

    def of_keys(self, tile: Tile) -> tuple[slice, slice, slice]:
        """The index of a tile's keys in arrays (b, s, k, ...)."""
        return self.rows, tile.keys, self.kv_heads


_ONE_BOX = [Box(slice(None), slice(None), slice(None))]


def tiling(
    mask: Mask, q: Array, query_block: int, most_bytes: int, most_groups: int, least: int = 1
) -> tuple[list[Tile], list[Box]]:
    """The tiles and boxes of queries q (b, t, k, g, h); the mask keeps them for other layers. See `boxes`."""
    key = q.shape[:4], q.dtype.num, query_block, most_bytes, most_groups, least
    found = mask.tilings.get(key)
    if found is None:
        tiles = list(query_tiles(mask, q.shape[1], query_block, q.dtype))
        found = mask.tilings[key] = tiles, boxes(q, tiles, most_bytes, most_groups, least)
    return found


def query_tiles(mask: Mask, t: int, query_block: int, dtype: np.dtype) -> Iterator[Tile]:
    """The tiles of t queries, the largest first, for load balance."""
    for start in reversed(range(0, t, query_block)):
        block = slice(start, min(start + query_block, t))
        keys = mask.keys(block)
        yield Tile(block, keys, mask.parts(block, keys, dtype))


def boxes(q: Array, tiles: list[Tile], most_bytes: int, most_groups: int, least: int = 1) -> list[Box]:
    """Split the rows and heads of q (b, t, k, g, h) into boxes whose largest tile has about most_bytes of
    scores, and into at least `least` boxes if there are enough heads; query groups are split last."""
    b, _, kv_heads, groups, _ = q.shape
    largest = tiles[0].size if len(tiles) == 1 else max(tile.size for tile in tiles)
    fit = min(most_bytes // (largest * q.dtype.itemsize), b * kv_heads * groups // least)
    if fit >= b * kv_heads * groups and most_groups >= groups:
        return _ONE_BOX
    step_g = max(1, min(most_groups, groups, fit))
    step_k = max(1, min(kv_heads, fit // step_g))
    step_b = max(1, min(b, fit // (step_g * step_k)))
    return [
        Box(slice(row, row + step_b), slice(k, k + step_k), slice(g, g + step_g))
        for row in range(0, b, step_b)
        for k in range(0, kv_heads, step_k)
        for g in range(0, groups, step_g)
    ]
