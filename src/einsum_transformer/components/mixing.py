"""The core of attention: softmax(scale q k^T + mask) v over k key/value heads with g query heads each.

MHA, GQA and MQA share one set of equations; only the sizes of `k` and `g` differ, and K and V are never
repeated. Both passes run tile by tile (see tiles.py); the backward pass recomputes each tile's attention
weights from the saved log-sum-exp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from einsum_transformer.components.masks import Mask, add_mask, alibi_slopes
from einsum_transformer.components.tiles import TILE_BYTES, Box, Tile, boxes, query_tiles
from einsum_transformer.engine import einsum, phase, requested, tap, weight_grad
from einsum_transformer.engine.parallel import for_each
from einsum_transformer.numerics.softcap import softcap, softcap_derivative

Array = np.ndarray


class Saved(NamedTuple):
    """Activations saved for `Mixing.backward`."""

    q: Array
    k: Array
    v: Array
    mixed: Array
    sums: Array
    """(b, t, k, g): sum of exp(scores - shifts), plus exp(sinks - shifts)."""
    shifts: Array
    mask: Mask

    @property
    def lse(self) -> Array:
        """(b, t, k, g): log-sum-exp of each query's scores."""
        return np.log(self.sums) + self.shifts


@dataclass(frozen=True, slots=True)
class Mixing:
    """Scaled dot-product attention. Contains settings only, no weights."""

    scale: float = 1.0
    window: int | None = None
    """Sliding window: number of keys a query attends to, its own included; None: no window."""
    softcap: float | None = None
    """Soft cap of the scores: softcap * tanh(scores / softcap)."""
    alibi_bias_max: float | None = None
    """ALiBi: adds slope * (key position - query position) to the scores, with one slope per query head."""
    query_block: int = 128
    """Queries per tile: with 128, one head's scores for 2,048 keys fit in a core's L2 cache."""

    def forward(
        self, q: Array, k: Array, v: Array, mask: Mask, sinks: Array | None = None
    ) -> tuple[Array, Saved]:
        """q (b, t, k, g, h); k, v (b, s, k, h) -> (b, t, k, g, h), where the last axis has the size of v's.

        sinks (k, g): for each query head, the score of an extra key whose value is zero (Xiao et al., 2024).
        """
        mixed = np.empty_like(q, shape=(*q.shape[:-1], v.shape[-1]))
        sums, shifts = np.empty_like(q[..., 0]), np.zeros_like(q[..., 0])
        slopes = self._slopes(q)
        pattern = _empty_pattern(q, k) if requested("pattern") else None
        scale = q.dtype.type(self.scale)

        def run(box: Box, tile: Tile) -> None:
            q_index, k_index = box.of_queries(tile), box.of_keys(tile)
            with phase("scores"):
                qb, kb = q[q_index] * scale, k[k_index]
                p = self._masked(self._scores(qb, kb), slopes, box, tile, mask)
                sink = None if sinks is None else sinks[box.kv_heads, box.groups, None]
                total = exponentials(p, sink)
                if total is None:
                    p = self._masked(self._scores(qb, kb), slopes, box, tile, mask)
                    total, shift = shifted_exponentials(p, sink)
                    shifts[q_index] = shift.transpose(0, 3, 1, 2)
                total = sums[q_index] = total.transpose(0, 3, 1, 2)
            with phase("mix"):
                part = einsum("bkgts,bskh->btkgh", p, v[k_index])
                np.divide(part, total[..., None], out=mixed[q_index])
            if pattern is not None:
                pattern[box.of_scores(tile)] = p / total.transpose(0, 2, 3, 1)[..., None]

        tiles = list(query_tiles(mask, q.shape[1], self.query_block, q.dtype))
        parts = boxes(q, tiles, TILE_BYTES, q.shape[3])
        # Above about a millisecond of work, one cache-sized tile per thread is faster than threaded BLAS.
        coarse = q[..., 0].size * k.shape[1] >= 1 << 20
        for_each(run, [(box, tile) for tile in tiles for box in parts], coarse)
        if pattern is not None and (replaced := tap("pattern", pattern, requested=True)) is not pattern:
            mixed = einsum("bkgts,bskh->btkgh", replaced, v)
        return mixed, Saved(q, k, v, mixed, sums, shifts, mask)

    def backward(self, dmixed: Array, saved: Saved) -> tuple[Array, Array, Array]:
        """The gradients with respect to q, k and v."""
        q, k, v, mixed, *_, mask = saved
        slopes, lse, scale = self._slopes(q), saved.lse, q.dtype.type(self.scale)
        # dscores = p * (dp - sum_s p dp), and sum_s p dp = sum_h dmixed mixed
        p_dp = einsum("btkgh,btkgh->bkgt", dmixed, mixed)
        # dk and dv are separate for each query head until the end, so that boxes write to disjoint memory.
        dq, dk = np.empty_like(q), np.zeros_like(q, shape=(*k.shape[:3], *q.shape[3:]))
        dv = np.zeros_like(q, shape=(*k.shape[:3], q.shape[3], v.shape[-1]))

        def run(box: Box) -> None:
            for tile in tiles:
                q_index, k_index = box.of_queries(tile), box.of_keys(tile)
                qb, kb, vb, db = q[q_index] * scale, k[k_index], v[k_index], dmixed[q_index]
                # p = exp(softcap(einsum("btkgh,bskh->bkgts", scale * q, k)) + bias + mask - lse)
                p = self._scores(qb, kb)
                slope = None if self.softcap is None else softcap_derivative(p, self.softcap)
                p = self._masked(p, slopes, box, tile, mask)
                p -= lse[q_index].transpose(0, 2, 3, 1)[..., None]
                np.exp(p, out=p)
                # mixed = einsum("bkgts,bskh->btkgh", p, v)
                dv[*k_index, box.groups] += einsum("bkgts,btkgh->bskh", p, db)[..., None, :]
                dscores = einsum("btkgh,bskh->bkgts", db, vb)
                dscores -= p_dp[box.rows, box.kv_heads, box.groups, tile.queries, None]
                dscores *= p
                if slope is not None:
                    dscores *= slope
                # scores = einsum("btkgh,bskh->bkgts", scale * q, k)
                dq[q_index] = einsum("bkgts,bskh->btkgh", dscores, kb)
                dk[*k_index, box.groups] += einsum("bkgts,btkgh->bskh", dscores, qb)[..., None, :]

        tiles = list(query_tiles(mask, q.shape[1], self.query_block, q.dtype))
        coarse = q[..., 0].size * k.shape[1] >= 1 << 18
        # Half of TILE_BYTES, as a tile has scores and their gradient; one query group per box, as in dk and
        # dv, and at least two boxes per group.
        parts = boxes(q, tiles, TILE_BYTES // 2, 1, least=2 * q.shape[3])
        for_each(run, [(box,) for box in parts], coarse)
        dq *= scale
        return dq, dk.sum(axis=3), dv.sum(axis=3)

    def sinks_backward(self, dmixed: Array, saved: Saved, sinks: Array) -> Any:
        """The gradient of the sinks (k, g): the gradient of the score of a key whose value is zero."""
        # p = exp(sink - lse), dp = 0, dsink = sum_bt p * (dp - sum_s p dp)
        p = np.exp(sinks - saved.lse)
        return weight_grad(sinks, "btkg,btkg->kg", p, -einsum("btkgh,btkgh->btkg", dmixed, saved.mixed))

    def _scores(self, q: Array, k: Array) -> Array:
        """softcap(q . k) of one tile; q is already scaled."""
        scores = einsum("btkgh,bskh->bkgts", q, k)
        return scores if self.softcap is None else softcap(scores, self.softcap)

    def _masked(self, scores: Array, slopes: Array | None, box: Box, tile: Tile, mask: Mask) -> Array:
        """Add the ALiBi bias and the mask to the scores of one tile, in place."""
        if slopes is not None:
            scores += mask.biases(tile.queries, tile.keys, slopes[box.kv_heads, box.groups])
        return add_mask(scores, tile.masked, box.rows)

    def _slopes(self, q: Array) -> Array | None:
        """The ALiBi slope of every query head (k, g); None without ALiBi."""
        if self.alibi_bias_max is None:
            return None
        kv_heads, groups = q.shape[2:4]
        return alibi_slopes(kv_heads * groups, self.alibi_bias_max).astype(q.dtype).reshape(kv_heads, groups)


def exponentials(scores: Array, sink: Array | None = None) -> Array | None:
    """Compute exp(scores) in place and return its sums (b, k, g, t), plus exp(sink), or None if a sum is
    outside of the accurate range.

    A softmax usually subtracts each row's maximum so that exp cannot overflow. Scores of trained models are
    far from that, so the sums are checked afterwards instead: with a sum in [1e-30, 1e30] no term overflowed,
    and a term that underflowed is below 1e-8 of the sum.
    """
    with np.errstate(over="ignore"):
        np.exp(scores, out=scores)
        total = einsum("bkgts,s->bkgt", scores, np.ones(scores.shape[-1], scores.dtype))
        if sink is not None:
            total += np.exp(sink)
    # NaN fails the comparison too.
    in_range = np.minimum.reduce(total, axis=None) >= 1e-30 and np.maximum.reduce(total, axis=None) <= 1e30
    return total if in_range else None


def shifted_exponentials(scores: Array, sink: Array | None = None) -> tuple[Array, Array]:
    """Compute exp(scores - max) in place; return the sums, plus exp(sink - max), and max, both (b, k, g, t).

    A fully masked row (padding) becomes zeros: its maximum is -inf, so the lowest finite value is subtracted.
    """
    top = scores.max(axis=-1)
    least = np.finfo(scores.dtype).min
    np.maximum(top, least if sink is None else np.maximum(sink, least), out=top)
    scores -= top[..., None]
    np.exp(scores, out=scores)
    total = scores.sum(axis=-1)
    if sink is not None:
        total += np.exp(sink - top)
    np.maximum(total, np.finfo(scores.dtype).tiny, out=total)
    return total, top


def _empty_pattern(q: Array, k: Array) -> Array:
    """Zeros (b, k, g, t, s) for the attention weights, allocated only if a recorder requests them."""
    b, t, kv_heads, groups, _ = q.shape
    return np.zeros_like(q, shape=(b, kv_heads, groups, t, k.shape[1]))
