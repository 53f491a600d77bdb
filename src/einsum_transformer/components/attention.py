"""Attention: softmax(q k^T / sqrt(h) + mask) v over k key/value heads with g query heads each.

MHA, GQA and MQA are one set of equations; only the sizes of `k` and `g` differ, and K and V are never repeated. Queries
go block by block, so that the scores of t x s positions are never held whole (Dao et al., 2022); the backward pass
recomputes each block's scores from the saved log of its softmax sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np

from einsum_transformer.components.kv_cache import LayerCache
from einsum_transformer.components.rope import Rotation
from einsum_transformer.engine import einsum, phase, weight_grad
from einsum_transformer.engine.parallel import for_each
from einsum_transformer.tree import static

Array = np.ndarray
Saved = tuple[Array, Array, Array, Array, Array, Array, "Mask"]

@dataclass(frozen=True, slots=True)
class Mask:
    """Which keys a query may look at: those at or before it, inside the window, and not padding.

    index: (s,) position in the sequence of each key, ascending except in a ring; queries: (t,) likewise;
    pads: (b,) number of padding tokens at the left of each row, or None.
    """

    queries: Array
    index: Array
    window: int | None = None
    pads: Array | None = None

    def keys(self, block: slice) -> slice:
        """The run of keys that some query of the block may see."""
        first, last = self.queries[block][[0, -1]]
        if len(self.index) and self.index[-1] - self.index[0] != len(self.index) - 1:
            return slice(0, len(self.index))
        start = self.index[0] if len(self.index) else 0
        low = 0 if self.window is None else max(0, int(first - self.window + 1 - start))
        return slice(low, int(last + 1 - start))

    def tile(self, block: slice, keys: slice, dtype: np.dtype) -> tuple[slice, Array] | None:
        """(where, what to add to the scores): 0 where a key is visible, -inf where not; None if all are.

        `where` is the part of the tile's keys that needs it, from the first key that some query may not see.
        """
        queries, index = self.queries[block][:, None], self.index[keys]
        hidden = index > queries
        if self.window is not None:
            hidden |= index <= queries - self.window
        hidden = hidden[None]
        if self.pads is not None and self.pads.any():
            hidden = hidden | (index < self.pads[:, None])[:, None]
        columns = hidden.any(axis=(0, 1))
        if not columns.any():
            return None
        where = slice(int(columns.argmax()), len(columns) - int(columns[::-1].argmax()))
        # Keys outermost in memory, as in the scores, and one mask for all heads.
        added = np.zeros((hidden.shape[0], where.stop - where.start, hidden.shape[1]), dtype)
        added[hidden[..., where].transpose(0, 2, 1)] = -np.inf
        return where, added.transpose(0, 2, 1)[:, None, None]


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
        self, x: Array, rotation: Rotation, queries: Array, pads: Array | None = None, cache: LayerCache | None = None
    ) -> tuple[Array, Saved]:
        """x: (b, t, d); queries: (t,) the positions of x in the sequence, padding included; pads: (b,) or None."""
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
        index = queries
        if cache is not None:
            with phase("cache"):
                k, v, index = cache.append(k, v)
        mask = Mask(queries, index, self.window, pads)
        mixed, lse = self._mix(q, k, v, mask)
        with phase("output"):
            y = einsum("btkgh,dkgh->btd", mixed, self.o_proj)
            if self.o_bias is not None:
                y += self.o_bias
        return y, (x, q, k, v, mixed, lse, mask)

    def _mix(self, q: Array, k: Array, v: Array, mask: Mask) -> tuple[Array, Array]:
        """(softmax(scores) v, log of each row's softmax sum), tile by tile."""
        mixed = np.empty_like(q)
        lse = np.empty_like(q[..., 0])
        q = q * np.asarray(self.scale, q.dtype)

        def tile(block: slice, heads: slice) -> None:
            keys = mask.keys(block)
            with phase("scores"):
                scores = einsum("btkgh,bskh->bkgts", q[:, block, heads], k[:, keys, heads])
                hide(scores, mask, block, keys)
                total = softmax_tile(scores, lse[:, block, heads])
            with phase("mix"):
                part = einsum("bkgts,bskh->btkgh", scores, v[:, keys, heads])
                np.multiply(part, total.transpose(0, 3, 1, 2)[..., None], out=mixed[:, block, heads])

        # A tile of a million scores takes about a millisecond: less is not worth a thread's waking.
        tasks = tiles(q, k, self.query_block)
        for_each(tile, tasks, coarse=q[..., 0].size * k.shape[1] >= 1 << 20)
        return mixed, lse

    def backward(self, dy: Array, saved: Saved, rotation: Rotation) -> tuple[Array, Attention]:
        x, q, k, v, mixed, lse, mask = saved
        # y = einsum("btkgh,dkgh->btd", mixed, o_proj)
        dmixed = einsum("btd,dkgh->btkgh", dy, self.o_proj)
        do_proj = weight_grad("btd,btkgh->dkgh", dy, mixed, self.o_proj)
        dq, dk, dv = self._mix_backward(dmixed, q, k, v, mixed, lse, mask)
        # q, k = rotation(q), rotation(k)
        dq, dk = rotation.backward(dq), rotation.backward(dk)
        # q, k, v = einsum("btd,kghd->btkgh", x, q_proj), einsum("btd,khd->btkh", x, k_proj / v_proj)
        dx = einsum("btkgh,kghd->btd", dq, self.q_proj)
        dx += einsum("btkh,khd->btd", dk, self.k_proj)
        dx += einsum("btkh,khd->btd", dv, self.v_proj)
        return dx, Attention(
            weight_grad("btkgh,btd->kghd", dq, x, self.q_proj),
            weight_grad("btkh,btd->khd", dk, x, self.k_proj),
            weight_grad("btkh,btd->khd", dv, x, self.v_proj),
            do_proj,
            None if self.q_bias is None else einsum("btkgh->kgh", dq),
            None if self.k_bias is None else einsum("btkh->kh", dk),
            None if self.v_bias is None else einsum("btkh->kh", dv),
            None if self.o_bias is None else einsum("btd->d", dy),
            self.scale,
            self.window,
            self.query_block,
        )

    def _mix_backward(
        self, dmixed: Array, q: Array, k: Array, v: Array, mixed: Array, lse: Array, mask: Mask
    ) -> tuple[Array, Array, Array]:
        dq, dk, dv = np.empty_like(q), np.zeros_like(k), np.zeros_like(v)
        scale = np.asarray(self.scale, q.dtype)
        # dscores = p * (dp - sum_s p dp), and sum_s p dp = sum_h dmixed mixed
        along = einsum("btkgh,btkgh->bkgt", dmixed, mixed)
        for block, heads in tiles(q, k, self.query_block):
            keys = mask.keys(block)
            qb, kb, vb, db = q[:, block, heads] * scale, k[:, keys, heads], v[:, keys, heads], dmixed[:, block, heads]
            # p = softmax(einsum("btkgh,bskh->bkgts", q * scale, k) + mask)
            p = einsum("btkgh,bskh->bkgts", qb, kb)
            hide(p, mask, block, keys)
            p -= lse[:, block, heads].transpose(0, 2, 3, 1)[..., None]
            np.exp(p, out=p)
            # mixed = einsum("bkgts,bskh->btkgh", p, v)
            dv[:, keys, heads] += einsum("bkgts,btkgh->bskh", p, db)
            dscores = einsum("btkgh,bskh->bkgts", db, vb)
            dscores -= along[:, heads, :, block, None]
            dscores *= p
            # scores = einsum("btkgh,bskh->bkgts", q * scale, k)
            dq[:, block, heads] = einsum("bkgts,bskh->btkgh", dscores, kb)
            dk[:, keys, heads] += einsum("bkgts,btkgh->bskh", dscores, qb)
        dq *= scale
        return dq, dk, dv


def tiles(q: Array, k: Array, query_block: int) -> list[tuple[slice, slice]]:
    """(query block, key/value heads) pairs: all heads at once for a few queries, else one key/value head at a time."""
    t, heads = q.shape[1], q.shape[2]
    if t < query_block or k.shape[1] < 2 * query_block:
        groups = [slice(0, heads)]
    else:
        groups = [slice(i, i + 1) for i in range(heads)]
    blocks = [slice(i, min(i + query_block, t)) for i in range(0, t, query_block)]
    return [(block, group) for block in reversed(blocks) for group in groups]


def hide(scores: Array, mask: Mask, block: slice, keys: slice) -> None:
    """Add -inf, in place, to the scores (b, k, g, t, s) of keys that a query may not see."""
    tile = mask.tile(block, keys, scores.dtype)
    if tile is not None:
        where, added = tile
        scores[..., where] += added


def softmax_tile(scores: Array, lse: Array) -> Array:
    """exp(scores - max) in place; returns 1 / sum (b, k, g, t) and writes log(sum) + max to lse (b, t, k, g).

    A row that sees no key (padding) becomes zeros: its maximum is -inf, and 0 is subtracted instead.
    """
    top = scores.max(axis=-1)
    np.maximum(top, np.finfo(scores.dtype).min, out=top)
    scores -= top[..., None]
    np.exp(scores, out=scores)
    total = scores.sum(axis=-1)
    np.maximum(total, np.finfo(scores.dtype).tiny, out=total)
    lse[...] = (np.log(total) + top).transpose(0, 3, 1, 2)
    return np.reciprocal(total, out=total)
