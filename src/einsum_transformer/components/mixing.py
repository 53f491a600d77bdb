"""The core of attention: softmax(scale q k^T + mask) v over k key/value heads with g query heads each.

MHA, GQA and MQA are one set of equations; only the sizes of `k` and `g` differ, and K and V are never
repeated. Both directions go tile by tile (see tiles.py); the backward pass recomputes each tile's scores from
the saved log of its softmax sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from einsum_transformer.components.masks import Mask, add_mask, alibi_slopes
from einsum_transformer.components.tiles import TILE_BYTES, Box, Tile, boxes, query_tiles
from einsum_transformer.engine import asked_for, einsum, phase, tap, weight_grad
from einsum_transformer.engine.parallel import for_each
from einsum_transformer.numerics.softcap import softcap, softcap_derivative

Array = np.ndarray


class Saved(NamedTuple):
    """What the backward pass needs."""

    q: Array
    k: Array
    v: Array
    mixed: Array
    sums: Array
    """(b, t, k, g): of exp(scores - shifts), and of exp(sinks - shifts)."""
    shifts: Array
    mask: Mask

    @property
    def lse(self) -> Array:
        """(b, t, k, g): the log of the sum of the exponentials of each query's scores."""
        return np.log(self.sums) + self.shifts


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

    def forward(
        self, q: Array, k: Array, v: Array, mask: Mask, sinks: Array | None = None
    ) -> tuple[Array, Saved]:
        """q (b, t, k, g, h); k, v (b, s, k, h) -> (b, t, k, g, h), the last axis that of v.

        sinks (k, g): the score of one more key of each query head, whose value is zero (Xiao et al., 2024).
        """
        mixed = np.empty_like(q, shape=(*q.shape[:-1], v.shape[-1]))
        sums, shifts = np.empty_like(q[..., 0]), np.zeros_like(q[..., 0])
        slopes = self._slopes(q)
        pattern = _empty_pattern(q, k) if asked_for("pattern") else None
        scale = q.dtype.type(self.scale)

        def run(box: Box, tile: Tile) -> None:
            here, there = box.of_queries(tile), box.of_keys(tile)
            with phase("scores"):
                qb, kb = q[here] * scale, k[there]
                p = self._masked(self._scores(qb, kb), slopes, box, tile, mask)
                sink = None if sinks is None else sinks[box.kv_heads, box.groups, None]
                total = exponentials(p, sink)
                if total is None:
                    p = self._masked(self._scores(qb, kb), slopes, box, tile, mask)
                    total, shift = shifted_exponentials(p, sink)
                    shifts[here] = shift.transpose(0, 3, 1, 2)
                total = sums[here] = total.transpose(0, 3, 1, 2)
            with phase("mix"):
                part = einsum("bkgts,bskh->btkgh", p, v[there])
                np.divide(part, total[..., None], out=mixed[here])
            if pattern is not None:
                pattern[box.of_scores(tile)] = p / total.transpose(0, 2, 3, 1)[..., None]

        tiles = list(query_tiles(mask, q.shape[1], self.query_block, q.dtype))
        parts = boxes(q, tiles, TILE_BYTES, q.shape[3])
        # Tiles of a cache's size, one a thread, beat the threads of BLAS from about a millisecond on.
        coarse = q[..., 0].size * k.shape[1] >= 1 << 20
        for_each(run, [(box, tile) for tile in tiles for box in parts], coarse)
        if pattern is not None and (replaced := tap("pattern", pattern, asked=True)) is not pattern:
            mixed = einsum("bkgts,bskh->btkgh", replaced, v)
        return mixed, Saved(q, k, v, mixed, sums, shifts, mask)

    def backward(self, dmixed: Array, saved: Saved) -> tuple[Array, Array, Array]:
        """The gradients by q, k and v."""
        q, k, v, mixed, *_, mask = saved
        slopes, lse, scale = self._slopes(q), saved.lse, q.dtype.type(self.scale)
        # dscores = p * (dp - sum_s p dp), and sum_s p dp = sum_h dmixed mixed
        p_dp = einsum("btkgh,btkgh->bkgt", dmixed, mixed)
        # Every query head has a dk and dv of its own until the end, so that no two boxes write to one place.
        dq, dk = np.empty_like(q), np.zeros_like(q, shape=(*k.shape[:3], *q.shape[3:]))
        dv = np.zeros_like(q, shape=(*k.shape[:3], q.shape[3], v.shape[-1]))

        def run(box: Box) -> None:
            for tile in tiles:
                here, there = box.of_queries(tile), box.of_keys(tile)
                qb, kb, vb, db = q[here] * scale, k[there], v[there], dmixed[here]
                # p = exp(softcap(einsum("btkgh,bskh->bkgts", scale * q, k)) + bias + mask - lse)
                p = self._scores(qb, kb)
                slope = None if self.softcap is None else softcap_derivative(p, self.softcap)
                p = self._masked(p, slopes, box, tile, mask)
                p -= lse[here].transpose(0, 2, 3, 1)[..., None]
                np.exp(p, out=p)
                # mixed = einsum("bkgts,bskh->btkgh", p, v)
                dv[*there, box.groups] += einsum("bkgts,btkgh->bskh", p, db)[..., None, :]
                dscores = einsum("btkgh,bskh->bkgts", db, vb)
                dscores -= p_dp[box.rows, box.kv_heads, box.groups, tile.queries, None]
                dscores *= p
                if slope is not None:
                    dscores *= slope
                # scores = einsum("btkgh,bskh->bkgts", scale * q, k)
                dq[here] = einsum("bkgts,bskh->btkgh", dscores, kb)
                dk[*there, box.groups] += einsum("bkgts,btkgh->bskh", dscores, qb)[..., None, :]

        tiles = list(query_tiles(mask, q.shape[1], self.query_block, q.dtype))
        coarse = q[..., 0].size * k.shape[1] >= 1 << 18
        # A tile's scores and their gradient are held at once; one group in a box, as dk and dv are, and two
        # boxes for each.
        parts = boxes(q, tiles, TILE_BYTES // 2, 1, least=2 * q.shape[3])
        for_each(run, [(box,) for box in parts], coarse)
        dq *= scale
        return dq, dk.sum(axis=3), dv.sum(axis=3)

    def sinks_backward(self, dmixed: Array, saved: Saved, sinks: Array) -> Any:
        """The gradient by the sinks (k, g): that of a score, for a key whose value is zero."""
        # p = exp(sink - lse), dp = 0, dsink = sum_bt p * (dp - sum_s p dp)
        p = np.exp(sinks - saved.lse)
        return weight_grad(sinks, "btkg,btkg->kg", p, -einsum("btkgh,btkgh->btkg", dmixed, saved.mixed))

    def _scores(self, q: Array, k: Array) -> Array:
        """softcap(q . k) of one tile, whose queries are scaled already."""
        scores = einsum("btkgh,bskh->bkgts", q, k)
        return scores if self.softcap is None else softcap(scores, self.softcap)

    def _masked(self, scores: Array, slopes: Array | None, box: Box, tile: Tile, mask: Mask) -> Array:
        """The scores of one tile with ALiBi's bias and the mask, in place."""
        if slopes is not None:
            scores += mask.biases(tile.queries, tile.keys, slopes[box.kv_heads, box.groups])
        return add_mask(scores, tile.masked, box.rows)

    def _slopes(self, q: Array) -> Array | None:
        """ALiBi's slope of every query head (k, g)."""
        if self.alibi_bias_max is None:
            return None
        kv_heads, groups = q.shape[2:4]
        return alibi_slopes(kv_heads * groups, self.alibi_bias_max).astype(q.dtype).reshape(kv_heads, groups)


def exponentials(scores: Array, sink: Array | None = None) -> Array | None:
    """exp(scores) in place and its sums (b, k, g, t), with exp(sink) added, or None if a sum leaves the range
    where that is exact.

    The usual subtraction of each row's maximum keeps exp from overflowing; scores of trained models lie far
    inside the range of float32, so it is left out and checked afterwards: with a sum in [1e-30, 1e30] no term
    overflowed, and a term that underflowed is below 1e-8 of the sum.
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
    """exp(scores - max) in place; returns the sums, with exp(sink - max) added, and the shifts max, both (b,
    k, g, t).

    A row that sees no key (padding) becomes zeros: its maximum is -inf, and the lowest number is subtracted.
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
    """Zeros (b, k, g, t, s) for the weights of all values, held whole only if they are asked for."""
    b, t, kv_heads, groups, _ = q.shape
    return np.zeros_like(q, shape=(b, kv_heads, groups, t, k.shape[1]))
