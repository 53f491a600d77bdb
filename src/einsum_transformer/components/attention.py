"""Attention: softmax(q k^T / sqrt(h) + mask) v over k key/value heads with g query heads each.

MHA, GQA and MQA are one set of equations; only the sizes of `k` and `g` differ, and K and V are never
repeated. Queries go block by block, so that the scores of t x s positions are never held whole (Dao et al.,
2022); the backward pass recomputes each block's scores from the saved log of its softmax sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from einsum_transformer.components.kv_cache import LayerCache
from einsum_transformer.components.rope import Rotation
from einsum_transformer.engine import einsum, phase, weight_grad
from einsum_transformer.engine.parallel import for_each
from einsum_transformer.tree import static

Array = np.ndarray
Saved = tuple[Array, Array, Array, Array, Array, Array, Array, "Mask"]

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
class Attention:
    """Weights in checkpoint layout, heads viewed apart. A gradient is another Attention."""

    q_proj: Annotated[Array, "(k g h) d"]
    k_proj: Annotated[Array, "(k h) d"]
    v_proj: Annotated[Array, "(k h) d"]
    o_proj: Annotated[Array, "d (k g h)"]
    q_bias: Annotated[Array, "(k g h)"] | None = None
    k_bias: Annotated[Array, "(k h)"] | None = None
    v_bias: Annotated[Array, "(k h)"] | None = None
    o_bias: Annotated[Array, "d"] | None = None
    scale: float = static(default=1.0)
    window: int | None = static(default=None)
    query_block: int = static(default=128)
    """Queries per tile: 128 keep one head's scores for 2,048 keys in a core's second-level cache."""

    def forward(
        self,
        x: Array,
        rotation: Rotation,
        queries: Array,
        pads: Array | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[Array, Saved]:
        """x: (b, t, d); queries: (t,) the positions of x in the sequence, padding included; pads: (b,) or
        None."""
        with phase("qkv"):
            q = einsum("btd,kghd->btkgh", x, self.q_proj)
            k = einsum("btd,khd->btkh", x, self.k_proj)
            v = einsum("btd,khd->btkh", x, self.v_proj)
            if self.q_bias is not None:
                q += self.q_bias
                k += self.k_bias
                v += self.v_bias
        with phase("rope"):
            q, k = rotation.forward(q), rotation.forward(k)
            q *= np.asarray(self.scale, q.dtype)
        index = queries
        if cache is not None:
            with phase("cache"):
                k, v, index = cache.append(k, v)
        mask = Mask(queries, index, self.window, pads)
        mixed, sums, shifts = self._mix(q, k, v, mask)
        with phase("output"):
            y = einsum("btkgh,dkgh->btd", mixed, self.o_proj)
            if self.o_bias is not None:
                y += self.o_bias
        return y, (x, q, k, v, mixed, sums, shifts, mask)

    def _mix(self, q: Array, k: Array, v: Array, mask: Mask) -> tuple[Array, Array, Array]:
        """softmax(scores) v, tile by tile, with each row's softmax sum and the shift of its exponents (b, t,
        k, g)."""
        mixed, sums, shifts = np.empty_like(q), np.empty_like(q[..., 0]), np.zeros_like(q[..., 0])

        def tile(block: slice, keys: slice, hidden: Hidden, heads: tuple[slice, slice]) -> None:
            here, there = (slice(None), block, *heads), (slice(None), keys, heads[0])
            with phase("scores"):
                p = hide(einsum("btkgh,bskh->bkgts", q[here], k[there]), hidden)
                total = exponentials(p)
                if total is None:
                    p = hide(einsum("btkgh,bskh->bkgts", q[here], k[there]), hidden)
                    total, shift = shifted_exponentials(p)
                    shifts[here] = shift.transpose(0, 3, 1, 2)
                total = sums[here] = total.transpose(0, 3, 1, 2)
            with phase("mix"):
                part = einsum("bkgts,bskh->btkgh", p, v[there])
                np.divide(part, total[..., None], out=mixed[here])

        # Tiles of a cache's size, one a thread, beat the threads of BLAS from about a millisecond on.
        for_each(tile, tiles(q, mask, self.query_block), coarse=q[..., 0].size * k.shape[1] >= 1 << 20)
        return mixed, sums, shifts

    def backward(self, dy: Array, saved: Saved, rotation: Rotation) -> tuple[Array, Attention]:
        x, q, k, v, mixed, sums, shifts, mask = saved
        with phase("output"):
            # y = einsum("btkgh,dkgh->btd", mixed, o_proj) + o_bias
            dmixed = einsum("btd,dkgh->btkgh", dy, self.o_proj)
            do_proj = weight_grad("btd,btkgh->dkgh", dy, mixed, self.o_proj)
            do_bias = weight_grad("btd->d", dy, self.o_bias)
        with phase("scores"):
            dq, dk, dv = self._mix_backward(dmixed, q, k, v, mixed, np.log(sums) + shifts, mask)
        with phase("rope"):
            # q, k = rotation(q) * scale, rotation(k)
            dq *= np.asarray(self.scale, q.dtype)
            dq, dk = rotation.backward(dq), rotation.backward(dk)
        with phase("qkv"):
            # q = einsum("btd,kghd->btkgh", x, q_proj) + q_bias, k and v = einsum("btd,khd->btkh", ...) + bias
            dx = einsum("btkgh,kghd->btd", dq, self.q_proj)
            dx += einsum("btkh,khd->btd", dk, self.k_proj)
            dx += einsum("btkh,khd->btd", dv, self.v_proj)
            dq_proj = weight_grad("btkgh,btd->kghd", dq, x, self.q_proj)
            dk_proj = weight_grad("btkh,btd->khd", dk, x, self.k_proj)
            dv_proj = weight_grad("btkh,btd->khd", dv, x, self.v_proj)
            dq_bias = weight_grad("btkgh->kgh", dq, self.q_bias)
            dk_bias = weight_grad("btkh->kh", dk, self.k_bias)
            dv_bias = weight_grad("btkh->kh", dv, self.v_bias)
        gradients = (dq_proj, dk_proj, dv_proj, do_proj, dq_bias, dk_bias, dv_bias, do_bias)
        return dx, Attention(*gradients, self.scale, self.window, self.query_block)

    def _mix_backward(
        self, dmixed: Array, q: Array, k: Array, v: Array, mixed: Array, lse: Array, mask: Mask
    ) -> tuple[Array, Array, Array]:
        # dscores = p * (dp - sum_s p dp), and sum_s p dp = sum_h dmixed mixed
        along = einsum("btkgh,btkgh->bkgt", dmixed, mixed)
        # Every query head has a dk and dv of its own until the end, so that no two boxes write to one place.
        dq, dk, dv = np.empty_like(q), np.zeros_like(q), np.zeros_like(q)

        def box(blocks: list[Block], rows: slice, kv_heads: slice, group: slice) -> None:
            for block, keys, hidden in blocks:
                here, there = (rows, block, kv_heads, group), (rows, keys, kv_heads)
                qb, kb, vb, db = q[here], k[there], v[there], dmixed[here]
                # p = softmax(einsum("btkgh,bskh->bkgts", q, k) + mask)
                p = hide(einsum("btkgh,bskh->bkgts", qb, kb), hidden, rows)
                p -= lse[here].transpose(0, 2, 3, 1)[..., None]
                np.exp(p, out=p)
                # mixed = einsum("bkgts,bskh->btkgh", p, v)
                dv[*there, group] += einsum("bkgts,btkgh->bskh", p, db)[..., None, :]
                dscores = einsum("btkgh,bskh->bkgts", db, vb)
                dscores -= along[rows, kv_heads, group, block, None]
                dscores *= p
                # scores = einsum("btkgh,bskh->bkgts", q, k)
                dq[here] = einsum("bkgts,bskh->btkgh", dscores, kb)
                dk[*there, group] += einsum("bkgts,btkgh->bskh", dscores, qb)[..., None, :]

        tasks = boxes(q, list(query_blocks(q, mask, self.query_block)))
        for_each(box, tasks, coarse=q[..., 0].size * k.shape[1] >= 1 << 18)
        return dq, dk.sum(axis=3), dv.sum(axis=3)


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
