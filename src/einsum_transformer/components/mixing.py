"""The core of attention: softmax(scale q k^T + mask) v over k key/value heads with g query heads each.

MHA, GQA and MQA are one set of equations; only the sizes of `k` and `g` differ, and K and V are never
repeated. Queries go block by block, so that the scores of t x s positions are never held whole (Dao et al.,
2022); the backward pass recomputes each block's scores from the saved log of its softmax sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from einsum_transformer.engine import einsum, phase
from einsum_transformer.engine.parallel import for_each
from einsum_transformer.numerics.softcap import softcap, softcap_derivative

Array = np.ndarray
Saved = tuple[Array, Array, Array, Array, Array, Array, "Mask"]

TILE_BYTES = 1 << 20
"""Scores of a tile, so that they stay in a core's second-level cache between the two products."""


@dataclass(frozen=True, slots=True)
class Mask:
    """Which keys a query may look at: those at or before it, inside the window, and not padding.

    queries: (t,) positions in the sequence, one after the other; index: (s,) the keys', likewise, except in a
    ring, which holds just what its one query may see; pads: (b,) number of padding tokens at the left of each
    row, or None.
    """

    queries: Array
    index: Array
    window: int | None = None
    pads: Array | None = None

    def keys(self, block: slice) -> slice:
        """The run of keys that some query of the block may see."""
        if self._is_ring():
            return slice(0, len(self.index))
        first, last = int(self.queries[block.start]), int(self.queries[block.stop - 1])
        start = int(self.index[0])
        low = 0 if self.window is None else max(0, first - self.window + 1 - start)
        return slice(low, last + 1 - start)

    def parts(self, block: slice, keys: slice, dtype: np.dtype) -> list[tuple[slice, Array]]:
        """(where, what to add to the scores there): 0 where a key is visible, -inf where not.

        `where` are keys of the tile (counted from keys.start) that some query may not see: at most the
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
        """slopes (k, g) times the distance of each key from each query of the tile -> (k, g, t, s)."""
        queries, index = self.queries[block], self.index[keys]
        # Keys outermost in memory, as in the scores.
        distances = (index[:, None] - queries).astype(slopes.dtype).T
        return slopes[..., None, None] * distances

    def _added(self, block: slice, keys: slice, where: slice, dtype: np.dtype) -> Array:
        # Keys outermost in memory, as in the scores, and one mask for all heads.
        queries, index = self.queries[block], self.index[keys][where, None]
        hidden = (index > queries)[None]
        if self.window is not None:
            hidden = hidden | (index <= queries - self.window)
        if self.pads is not None:
            hidden = hidden | (index < self.pads[:, None, None])
        return np.where(hidden, -np.inf, 0).astype(dtype).transpose(0, 2, 1)[:, None, None]

    def _is_ring(self) -> bool:
        return len(self.queries) == 1 and int(self.index[-1]) != int(self.queries[0])


@dataclass(frozen=True, slots=True)
class Mixing:
    """How scores become weights of the values: settings, no weights of a model."""

    scale: float = 1.0
    window: int | None = None
    """A query sees so many keys, itself included."""
    softcap: float | None = None
    """Scores become softcap * tanh(scores / softcap)."""
    alibi_bias_max: float | None = None
    """Scores get slope * (key position - query position), each query head with a slope of its own."""
    query_block: int = 128
    """Queries per tile: 128 keep one head's scores for 2,048 keys in a core's second-level cache."""

    def forward(self, q: Array, k: Array, v: Array, mask: Mask) -> tuple[Array, Saved]:
        """q (b, t, k, g, h), overwritten; k, v (b, s, k, h) -> (b, t, k, g, h), the last axis that of v."""
        q *= np.asarray(self.scale, q.dtype)
        mixed = np.empty_like(q, shape=(*q.shape[:-1], v.shape[-1]))
        sums, shifts = np.empty_like(q[..., 0]), np.zeros_like(q[..., 0])
        slopes = self._slopes(q)

        def tile(block: slice, keys: slice, hidden: Hidden, heads: tuple[slice, slice]) -> None:
            here, there = (slice(None), block, *heads), (slice(None), keys, heads[0])
            bias = None if slopes is None else mask.biases(block, keys, slopes[heads])
            with phase("scores"):
                p = hide(self._biased(einsum("btkgh,bskh->bkgts", q[here], k[there]), bias), hidden)
                total = exponentials(p)
                if total is None:
                    p = hide(self._biased(einsum("btkgh,bskh->bkgts", q[here], k[there]), bias), hidden)
                    total, shift = shifted_exponentials(p)
                    shifts[here] = shift.transpose(0, 3, 1, 2)
                total = sums[here] = total.transpose(0, 3, 1, 2)
            with phase("mix"):
                part = einsum("bkgts,bskh->btkgh", p, v[there])
                np.divide(part, total[..., None], out=mixed[here])

        # Tiles of a cache's size, one a thread, beat the threads of BLAS from about a millisecond on.
        for_each(tile, tiles(q, mask, self.query_block), coarse=q[..., 0].size * k.shape[1] >= 1 << 20)
        return mixed, (q, k, v, mixed, sums, shifts, mask)

    def backward(self, dmixed: Array, saved: Saved) -> tuple[Array, Array, Array]:
        """The gradients by q, k and v."""
        q, k, v, mixed, sums, shifts, mask = saved
        lse = np.log(sums) + shifts
        slopes = self._slopes(q)
        # dscores = p * (dp - sum_s p dp), and sum_s p dp = sum_h dmixed mixed
        along = einsum("btkgh,btkgh->bkgt", dmixed, mixed)
        # Every query head has a dk and dv of its own until the end, so that no two boxes write to one place.
        dq, dk = np.empty_like(q), np.zeros_like(q)
        dv = np.zeros_like(q, shape=(*q.shape[:-1], v.shape[-1]))

        def box(blocks: list[Block], rows: slice, kv_heads: slice, group: slice) -> None:
            for block, keys, hidden in blocks:
                here, there = (rows, block, kv_heads, group), (rows, keys, kv_heads)
                qb, kb, vb, db = q[here], k[there], v[there], dmixed[here]
                bias = None if slopes is None else mask.biases(block, keys, slopes[kv_heads, group])
                # p = softmax(softcap(einsum("btkgh,bskh->bkgts", q, k)) + bias + mask)
                scores = self._biased(einsum("btkgh,bskh->bkgts", qb, kb), None)
                slope = None if self.softcap is None else softcap_derivative(scores, self.softcap)
                p = hide(scores if bias is None else np.add(scores, bias, out=scores), hidden, rows)
                p -= lse[here].transpose(0, 2, 3, 1)[..., None]
                np.exp(p, out=p)
                # mixed = einsum("bkgts,bskh->btkgh", p, v)
                dv[*there, group] += einsum("bkgts,btkgh->bskh", p, db)[..., None, :]
                dscores = einsum("btkgh,bskh->bkgts", db, vb)
                dscores -= along[rows, kv_heads, group, block, None]
                dscores *= p
                if slope is not None:
                    dscores *= slope
                # scores = einsum("btkgh,bskh->bkgts", q, k)
                dq[here] = einsum("bkgts,bskh->btkgh", dscores, kb)
                dk[*there, group] += einsum("bkgts,btkgh->bskh", dscores, qb)[..., None, :]

        tasks = boxes(q, list(query_blocks(q, mask, self.query_block)))
        for_each(box, tasks, coarse=q[..., 0].size * k.shape[1] >= 1 << 18)
        # q came in unscaled
        dq *= np.asarray(self.scale, q.dtype)
        return dq, dk.sum(axis=3), dv.sum(axis=3)

    def _biased(self, scores: Array, bias: Array | None) -> Array:
        """Scores after the soft cap and with ALiBi's bias, in place."""
        if self.softcap is not None:
            scores = softcap(scores, self.softcap)
        return scores if bias is None else np.add(scores, bias, out=scores)

    def _slopes(self, q: Array) -> Array | None:
        """ALiBi's slope of every query head (k, g)."""
        if self.alibi_bias_max is None:
            return None
        kv_heads, groups = q.shape[2:4]
        return alibi_slopes(kv_heads * groups, self.alibi_bias_max).astype(q.dtype).reshape(kv_heads, groups)


def alibi_slopes(heads: int, bias_max: float = 8.0) -> Array:
    """2^(-bias_max i / n) for i = 1 ... n, n the power of two from `heads` on (Press et al., 2022).

    Where `heads` is none, every second slope comes first (i = 2, 4, ...), then the others, as many as needed.
    """
    n = 1 << (heads - 1).bit_length()
    slopes = 2.0 ** (-bias_max / n * np.arange(1, n + 1))
    return slopes if n == heads else np.concatenate([slopes[1::2], slopes[::2]])[:heads]


Hidden = list[tuple[slice, Array]]
Block = tuple[slice, slice, Hidden]
Heads = tuple[slice, slice]


def query_blocks(q: Array, mask: Mask, query_block: int) -> Iterator[Block]:
    """(query block, its keys, what they hide); the longest first, so that threads end together."""
    t = q.shape[1]
    for start in reversed(range(0, t, query_block)):
        block = slice(start, min(start + query_block, t))
        keys = mask.keys(block)
        yield block, keys, mask.parts(block, keys, q.dtype)


def tiles(q: Array, mask: Mask, query_block: int) -> list[tuple[slice, slice, Hidden, Heads]]:
    """(query block, its keys, what they hide, heads): as many heads at once as keep the scores near
    TILE_BYTES."""
    b, _, kv_heads, groups, _ = q.shape
    found = []
    for block, keys, hidden in query_blocks(q, mask, query_block):
        one_head = b * (block.stop - block.start) * (keys.stop - keys.start) * q.dtype.itemsize
        fit = TILE_BYTES // max(one_head, 1)
        step_k = kv_heads if fit >= kv_heads * groups else max(1, fit // groups)
        step_g = groups if fit >= groups else max(1, fit)
        for k in range(0, kv_heads, step_k):
            for g in range(0, groups, step_g):
                found.append((block, keys, hidden, (slice(k, k + step_k), slice(g, g + step_g))))
    return found


def boxes(q: Array, blocks: list[Block]) -> list[tuple[list[Block], slice, slice, slice]]:
    """(the query blocks, rows, key/value heads, one group): parts that share no query head of a row, whose
    scores in a block and their gradient together are near TILE_BYTES."""
    b, _, kv_heads, groups, _ = q.shape
    block, keys, _ = blocks[0]
    fit = TILE_BYTES // 2 // ((block.stop - block.start) * (keys.stop - keys.start) * q.dtype.itemsize)
    # At least two in each group, one a thread, where there are as many rows or heads.
    rows = max(1, min(b // 2, fit))
    heads = max(1, min(kv_heads if b > 1 else kv_heads // 2, fit // rows))
    return [
        (blocks, slice(row, row + rows), slice(head, head + heads), slice(group, group + 1))
        for row in range(0, b, rows)
        for head in range(0, kv_heads, heads)
        for group in range(groups)
    ]


def hide(scores: Array, hidden: Hidden, rows: slice = slice(None)) -> Array:
    """Add -inf, in place, to the scores (b, k, g, t, s) of keys that a query may not see; rows: which of the
    batch these are."""
    for where, added in hidden:
        scores[..., where] += added if len(added) == 1 else added[rows]
    return scores


def exponentials(scores: Array) -> Array | None:
    """exp(scores) in place and its sums (b, k, g, t), or None if a sum leaves the range where that is exact.

    The usual subtraction of each row's maximum keeps exp from overflowing; scores of trained models lie far
    inside the range of float32, so it is left out and checked afterwards: with a sum in [1e-30, 1e30] no term
    overflowed, and a term that underflowed is below 1e-8 of the sum.
    """
    with np.errstate(over="ignore"):
        np.exp(scores, out=scores)
        total = einsum("bkgts,s->bkgt", scores, np.ones(scores.shape[-1], scores.dtype))
    # NaN fails the comparison too.
    in_range = np.minimum.reduce(total, axis=None) >= 1e-30 and np.maximum.reduce(total, axis=None) <= 1e30
    return total if in_range else None


def shifted_exponentials(scores: Array) -> tuple[Array, Array]:
    """exp(scores - max) in place; returns the sums and the shifts max, both (b, k, g, t).

    A row that sees no key (padding) becomes zeros: its maximum is -inf, and the lowest number is subtracted.
    """
    top = scores.max(axis=-1)
    np.maximum(top, np.finfo(scores.dtype).min, out=top)
    scores -= top[..., None]
    np.exp(scores, out=scores)
    total = scores.sum(axis=-1)
    np.maximum(total, np.finfo(scores.dtype).tiny, out=total)
    return total, top
