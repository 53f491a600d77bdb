"""The core of attention: softmax(scale q k^T + mask) v over k key/value heads with g query heads each.

MHA, GQA and MQA share one set of equations; only the sizes of `k` and `g` differ, and K and V are never
repeated. Both passes run tile by tile (see tiles.py); the backward pass recomputes each tile's attention
weights from the saved log-sum-exp.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from einsum_transformer.components.masks import Mask, add_mask, alibi_slopes
from einsum_transformer.components.tiles import TILE_BYTES, Box, Tile, tiling
from einsum_transformer.engine import einsum, phase, requested, tap, tap_gradient, weight_grad
from einsum_transformer.engine.blas import FEW, follow_load
from einsum_transformer.engine.parallel import for_each
from einsum_transformer.engine.recorder import gradient_requested
from einsum_transformer.engine.replay import condition
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
    shifts: Array | float
    """(b, t, k, g): what was subtracted from the scores; 0 if nothing."""
    mask: Mask

    @property
    def lse(self) -> Array:
        """(b, t, k, g): log-sum-exp of each query's scores."""
        return np.log(self.sums) + self.shifts


class Kept(NamedTuple):
    """What a recorder requests of all tiles (b, k, g, t, s); None: not requested."""

    scores: Array | None
    """Before the softmax, with mask and biases; -inf where a query does not attend to a key."""
    pattern: Array | None
    """Attention weights."""

    @staticmethod
    def of(q: Array, k: Array) -> Kept:
        """The arrays that are requested of queries (b, t, k, g, h) and keys (b, s, k, h)."""
        b, t, kv_heads, groups, _ = q.shape
        shape = b, kv_heads, groups, t, k.shape[1]
        scores = np.full_like(q, -np.inf, shape=shape) if requested("scores") else None
        return Kept(scores, np.zeros_like(q, shape=shape) if requested("pattern") else None)

    def replaced(self, mixed: Array, v: Array, sinks: Array | None) -> Array:
        """The result, or that of the scores or attention weights that a reader returns in place of these."""
        pattern = self.pattern
        if self.scores is not None and (scores := tap("scores", self.scores, True)) is not self.scores:
            p = np.array(scores)
            total, _ = shifted_exponentials(p, None if sinks is None else sinks[..., None])
            pattern = p / total[..., None]
            mixed = einsum("bkgts,bskh->btkgh", pattern, v)
        if pattern is None or self.pattern is None:
            return mixed
        if (replaced := tap("pattern", pattern, requested=True)) is pattern:
            return mixed
        return einsum("bkgts,bskh->btkgh", replaced, v)


class Biases(NamedTuple):
    """What is added to the scores of all heads."""

    mask: Mask
    slopes: Array | None
    """(k, g): ALiBi slopes; None without ALiBi."""
    sinks: Array | None
    """(k, g): attention sinks, scores of an extra key; None without sinks."""


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
        kept = Kept.of(q, k)
        biases = Biases(mask, self._slopes(q), sinks)
        tiles, parts = tiling(mask, q, self.query_block, TILE_BYTES, q.shape[3])
        if len(tiles) == len(parts) == 1:
            return self._whole(q, k, v, parts[0], tiles[0], biases, kept)
        mixed = np.empty_like(q, shape=(*q.shape[:-1], v.shape[-1]))
        sums, shifts = np.empty_like(q[..., 0]), np.zeros_like(q[..., 0])

        def run(box: Box, tile: Tile) -> None:
            q_index, k_index = box.of_queries(tile), box.of_keys(tile)
            with phase("scores"):
                p, total, shift = self._weights(q[q_index], k[k_index], box, tile, biases, kept)
                if shift is not None:
                    shifts[q_index] = shift
                sums[q_index] = total
            with phase("mix"):
                part = einsum("bkgts,bskh->btkgh", p, v[k_index])
                np.divide(part, total[..., None], out=mixed[q_index])
            if kept.pattern is not None:
                kept.pattern[box.of_scores(tile)] = _normalized(p, total)

        # Above about a millisecond of work, one cache-sized tile per thread is faster than threaded BLAS.
        coarse = q[..., 0].size * k.shape[1] >= 1 << 20
        for_each(run, [(box, tile) for tile in tiles for box in parts], coarse)
        mixed = tap("z", kept.replaced(mixed, v, biases.sinks), requested=True)
        return mixed, Saved(q, k, v, mixed, sums, shifts, mask)

    def _whole(
        self, q: Array, k: Array, v: Array, box: Box, tile: Tile, biases: Biases, kept: Kept
    ) -> tuple[Array, Saved]:
        """`forward` with a single tile, as in a decode step."""
        follow_load(q.shape[0] * q.shape[1] > FEW)
        if tile.keys.start or tile.keys.stop != k.shape[1]:
            k_index = box.of_keys(tile)
            kb, vb = k[k_index], v[k_index]
        else:
            kb, vb = k, v
        with phase("scores"):
            p, total, shift = self._weights(q, kb, box, tile, biases, kept)
        with phase("mix"):
            mixed = einsum("bkgts,bskh->btkgh", p, vb)
            mixed /= total[..., None]
        if kept.pattern is not None:
            kept.pattern[box.of_scores(tile)] = _normalized(p, total)
        mixed = tap("z", kept.replaced(mixed, v, biases.sinks), requested=True)
        return mixed, Saved(q, k, v, mixed, total, 0.0 if shift is None else shift, biases.mask)

    def _weights(
        self, q: Array, k: Array, box: Box, tile: Tile, biases: Biases, kept: Kept
    ) -> tuple[Array, Array, Array | None]:
        """exp(scores - shift) of a tile (b, k, g, t, s), its sums and the shift (b, t, k, g); None for 0."""
        q = q * q.dtype.type(self.scale)
        p = self._biased(self._scores(q, k), box, tile, biases)
        if kept.scores is not None:
            kept.scores[box.of_scores(tile)] = p
        sink = None if biases.sinks is None else biases.sinks[box.kv_heads, box.groups, None]
        total = exponentials(p, sink)
        if total is not None:
            return p, total.transpose(0, 3, 1, 2), None
        p = self._biased(self._scores(q, k), box, tile, biases)
        total, shift = shifted_exponentials(p, sink)
        return p, total.transpose(0, 3, 1, 2), shift.transpose(0, 3, 1, 2)

    def backward(self, dmixed: Array, saved: Saved) -> tuple[Array, Array, Array]:
        """The gradients with respect to q, k and v."""
        q, k, v, mixed, *_, mask = saved
        lse, scale, biases = saved.lse, q.dtype.type(self.scale), Biases(mask, self._slopes(q), None)
        tap_gradient("z", dmixed)
        of_scores = q.shape[0], *q.shape[2:4], q.shape[1], k.shape[1]
        dpattern = np.zeros_like(q, shape=of_scores) if gradient_requested("pattern") else None
        dkept = np.zeros_like(q, shape=of_scores) if gradient_requested("scores") else None
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
                p = self._biased(p, box, tile, biases)
                p -= lse[q_index].transpose(0, 2, 3, 1)[..., None]
                np.exp(p, out=p)
                # mixed = einsum("bkgts,bskh->btkgh", p, v)
                dv[*k_index, box.groups] += einsum("bkgts,btkgh->bskh", p, db)[..., None, :]
                dscores = einsum("btkgh,bskh->bkgts", db, vb)
                if dpattern is not None:
                    dpattern[box.of_scores(tile)] = dscores
                dscores -= p_dp[box.rows, box.kv_heads, box.groups, tile.queries, None]
                dscores *= p
                if dkept is not None:
                    dkept[box.of_scores(tile)] = dscores
                if slope is not None:
                    dscores *= slope
                # scores = einsum("btkgh,bskh->bkgts", scale * q, k)
                dq[q_index] = einsum("bkgts,bskh->btkgh", dscores, kb)
                dk[*k_index, box.groups] += einsum("bkgts,btkgh->bskh", dscores, qb)[..., None, :]

        coarse = q[..., 0].size * k.shape[1] >= 1 << 18
        # Half of TILE_BYTES, as a tile has scores and their gradient; one query group per box, as in dk and
        # dv, and at least two boxes per group.
        tiles, parts = tiling(mask, q, self.query_block, TILE_BYTES // 2, 1, least=2 * q.shape[3])
        for_each(run, [(box,) for box in parts], coarse)
        for name, gradient in (("pattern", dpattern), ("scores", dkept)):
            if gradient is not None:
                tap_gradient(name, gradient)
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

    def _biased(self, scores: Array, box: Box, tile: Tile, biases: Biases) -> Array:
        """Add the ALiBi bias and the mask to the scores of one tile, in place."""
        if biases.slopes is not None:
            slopes = biases.slopes[box.kv_heads, box.groups]
            scores += biases.mask.biases(tile.queries, tile.keys, slopes)
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
        total = einsum("bkgts,s->bkgt", scores, _ones(scores.shape[-1], scores.dtype))
        if sink is not None:
            total += np.exp(sink)
    return total if condition(_accurate, total) else None


def _accurate(total: Array) -> bool:
    """Whether all sums are in [1e-30, 1e30], which NaN is not."""
    if isinstance(total, Array) and 0 < total.size <= 64:  # lists are faster than two reductions
        values = total.ravel().tolist()
        return min(values) >= 1e-30 and sum(values) <= 1e30
    return bool(np.minimum.reduce(total, axis=None) >= 1e-30 and np.maximum.reduce(total, axis=None) <= 1e30)


def _ones(count: int, dtype: np.dtype) -> Array:
    """Ones, as a view of the same memory for all counts between two powers of two."""
    return _many_ones(1 << max(12, (count - 1).bit_length()), dtype)[:count]


@lru_cache(maxsize=32)
def _many_ones(count: int, dtype: np.dtype) -> Array:
    ones = np.ones(count, dtype)
    ones.flags.writeable = False
    return ones


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


def _normalized(p: Array, total: Array) -> Array:
    """p (b, k, g, t, s) divided by its sums (b, t, k, g)."""
    return p / total.transpose(0, 2, 3, 1)[..., None]
