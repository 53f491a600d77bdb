"""Multi-head latent attention (DeepSeek-V2, 2024): keys and values of all heads come from one latent.

    c, r   = split(kv_a(x)),  c = norm(c)            the cache stores c, and r rotated by RoPE
    k_n, v = split(kv_b(c)) for every head;  k = (k_n, r),  q = (q_n, q_r) with q_r rotated by RoPE
    y      = o(softmax(q k^T scale + mask) v)

Two equivalent forms. *Expanded*: compute k and v of every position, then attend. *Absorbed*: as
q_n . kv_b(c) = (q_n kv_b) . c, attend to the latents directly, with one key head of size c + r whose values
are the latents, and apply kv_b to the attention output. The cost of expanding grows with the number of
cached positions, that of absorbing with the number of queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np

from einsum_transformer.components import mixing as core
from einsum_transformer.components.context import Context
from einsum_transformer.components.masks import Mask
from einsum_transformer.components.mixing import Mixing
from einsum_transformer.components.rmsnorm import RMSNorm
from einsum_transformer.engine import einsum, phase, tap, weight_grad
from einsum_transformer.tree import static

Array = np.ndarray
Form = Literal["auto", "expanded", "absorbed"]


class QuerySaved(NamedTuple):
    """Activations saved for `LatentQuery.backward`."""

    x: Array
    normed: Array
    norm: Any


@dataclass(frozen=True, slots=True)
class LatentQuery:
    """q = q_b(norm(q_a(x))): queries from a latent. Gradients are returned as a LatentQuery."""

    q_a_proj: Annotated[Array, "c d"]
    q_a_layernorm: RMSNorm
    q_b_proj: Annotated[Array, "(k h) c"]
    q_a_bias: Annotated[Array, "c"] | None = None

    def forward(self, x: Array) -> tuple[Array, QuerySaved]:
        latent = einsum("btd,cd->btc", x, self.q_a_proj)
        if self.q_a_bias is not None:
            latent += self.q_a_bias
        normed, saved_norm = self.q_a_layernorm.forward(latent)
        normed = tap("q_a_layernorm", normed)
        return einsum("btc,khc->btkh", normed, self.q_b_proj), QuerySaved(x, normed, saved_norm)

    def backward(self, dq: Array, saved: QuerySaved) -> tuple[Array, LatentQuery]:
        x, normed, saved_norm = saved
        # q = einsum("btc,khc->btkh", normed, q_b_proj)
        dnormed = einsum("btkh,khc->btc", dq, self.q_b_proj)
        dq_b_proj = weight_grad(self.q_b_proj, "btkh,btc->khc", dq, normed)
        dlatent, dnorm = self.q_a_layernorm.backward(dnormed, saved_norm)
        # latent = einsum("btd,cd->btc", x, q_a_proj) + q_a_bias
        dx = einsum("btc,cd->btd", dlatent, self.q_a_proj)
        return dx, LatentQuery(
            q_a_proj=weight_grad(self.q_a_proj, "btc,btd->cd", dlatent, x),
            q_a_layernorm=dnorm,
            q_b_proj=dq_b_proj,
            q_a_bias=weight_grad(self.q_a_bias, "btc->c", dlatent),
        )


@dataclass(frozen=True, slots=True)
class DirectQuery:
    """q = q_proj(x). Gradients are returned as a DirectQuery."""

    q_proj: Annotated[Array, "(k h) d"]

    def forward(self, x: Array) -> tuple[Array, Any]:
        return einsum("btd,khd->btkh", x, self.q_proj), x

    def backward(self, dq: Array, saved: Any) -> tuple[Array, DirectQuery]:
        # q = einsum("btd,khd->btkh", x, q_proj)
        dx = einsum("btkh,khd->btd", dq, self.q_proj)
        return dx, DirectQuery(q_proj=weight_grad(self.q_proj, "btkh,btd->khd", dq, saved))


class ExpandedSaved(NamedTuple):
    """Activations saved for the backward pass of the expanded form."""

    latent: Array
    nope: int
    """Key dimensions without RoPE."""
    mix: core.Saved


class AbsorbedSaved(NamedTuple):
    """Activations saved for the backward pass of the absorbed form."""

    q_plain: Array
    mixed: Array
    mix: core.Saved


class Saved(NamedTuple):
    """Activations saved for `LatentAttention.backward`."""

    x: Array
    query: Any
    norm: Any
    mixed: Array
    form: ExpandedSaved | AbsorbedSaved


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Weights in checkpoint layout with split head axes. Gradients are returned as a LatentAttention."""

    query: LatentQuery | DirectQuery
    kv_a_proj: Annotated[Array, "j d"]
    kv_a_layernorm: RMSNorm
    kv_b_proj: Annotated[Array, "(k h) c"]
    o_proj: Annotated[Array, "d (k h)"]
    kv_a_bias: Annotated[Array, "j"] | None = None
    o_bias: Annotated[Array, "d"] | None = None
    rope_size: int = static(default=64)
    """Dimensions of each query, and of the key shared by all heads, that RoPE rotates."""
    form: Form = static(default="auto")
    """"expanded", "absorbed", or "auto": absorbed if there are more key positions than queries."""
    mixing: Mixing = static(default=Mixing())
    rope: int | None = static(default=0)

    def forward(self, x: Array, context: Context) -> tuple[Array, Saved]:
        """x: (b, t, d) -> (b, t, d)"""
        rotation = context.rotation
        assert rotation is not None
        with phase("qkv", scope="query"):
            q, saved_q = self.query.forward(x)
        with phase("qkv"):
            joined = einsum("btd,jd->btj", x, self.kv_a_proj)
            if self.kv_a_bias is not None:
                joined += self.kv_a_bias
            size = joined.shape[-1] - self.rope_size
            latent, saved_norm = self.kv_a_layernorm.forward(joined[..., :size])
            latent = tap("kv_a_layernorm", latent)
        with phase("rope"):
            nope = q.shape[-1] - self.rope_size
            q_plain, q_rotated = q[..., :nope], rotation.forward(q[..., nope:])
            keys = _side_by_side(latent, rotation.forward(joined[..., None, size:])[:, :, 0])
        index = context.positions
        if context.cache is not None:
            with phase("cache"):
                cached, _, index = context.cache.append(keys[:, :, None], keys[:, :, None, :0])
                keys = cached[:, :, 0]
        mask = context.mask(index, self.mixing.window)
        absorbed = self.form == "absorbed" or (self.form == "auto" and keys.shape[1] > x.shape[1])
        attend = self._absorbed if absorbed else self._expanded
        mixed, saved_form = attend(q_plain, q_rotated, keys, mask)
        with phase("output"):
            y = einsum("btkh,dkh->btd", mixed, self.o_proj)
            if self.o_bias is not None:
                y += self.o_bias
        return y, Saved(x, saved_q, saved_norm, mixed, saved_form)

    def backward(self, dy: Array, saved: Saved, context: Context) -> tuple[Array, LatentAttention]:
        x, mixed, rotation = saved.x, saved.mixed, context.rotation
        assert rotation is not None
        with phase("output"):
            # y = einsum("btkh,dkh->btd", mixed, o_proj) + o_bias
            dmixed = einsum("btd,dkh->btkh", dy, self.o_proj)
            do_proj = weight_grad(self.o_proj, "btd,btkh->dkh", dy, mixed)
            do_bias = weight_grad(self.o_bias, "btd->d", dy)
        if isinstance(saved.form, AbsorbedSaved):
            dq_plain, dq_rotated, dkeys, dkv_b_proj = self._absorbed_backward(dmixed, saved.form)
        else:
            dq_plain, dq_rotated, dkeys, dkv_b_proj = self._expanded_backward(dmixed, saved.form)
        size = dkeys.shape[-1] - self.rope_size
        with phase("rope"):
            dq = _side_by_side(dq_plain, rotation.backward(dq_rotated))
            dshared = rotation.backward(dkeys[:, :, None, size:])[:, :, 0]
        with phase("qkv"):
            dlatent, dnorm = self.kv_a_layernorm.backward(dkeys[..., :size], saved.norm)
            djoined = _side_by_side(dlatent, dshared)
            # joined = einsum("btd,jd->btj", x, kv_a_proj) + kv_a_bias
            dx = einsum("btj,jd->btd", djoined, self.kv_a_proj)
            dkv_a_proj = weight_grad(self.kv_a_proj, "btj,btd->jd", djoined, x)
            dkv_a_bias = weight_grad(self.kv_a_bias, "btj->j", djoined)
            # q = query(x)
            dx_part, dquery = self.query.backward(dq, saved.query)
            dx += dx_part
        return dx, LatentAttention(
            query=dquery,
            kv_a_proj=dkv_a_proj,
            kv_a_layernorm=dnorm,
            kv_b_proj=dkv_b_proj,
            o_proj=do_proj,
            kv_a_bias=dkv_a_bias,
            o_bias=do_bias,
            rope_size=self.rope_size,
            form=self.form,
            mixing=self.mixing,
            rope=self.rope,
        )

    def _expanded(
        self, q_plain: Array, q_rotated: Array, keys: Array, mask: Mask
    ) -> tuple[Array, ExpandedSaved]:
        """Compute keys and values of every head, then attend to them."""
        size, nope = keys.shape[-1] - self.rope_size, q_plain.shape[-1]
        latent = keys[..., :size]
        with phase("qkv"):
            kv = einsum("bsc,khc->bskh", latent, self.kv_b_proj)
            shared = np.broadcast_to(keys[:, :, None, size:], (*kv.shape[:3], self.rope_size))
            k, v = _side_by_side(kv[..., :nope], shared), kv[..., nope:]
            q = _side_by_side(q_plain, q_rotated)
        mixed, saved = self.mixing.forward(q[:, :, :, None], k, v, mask)
        return mixed[:, :, :, 0], ExpandedSaved(latent, nope, saved)

    def _expanded_backward(self, dmixed: Array, saved: ExpandedSaved) -> tuple[Array, Array, Array, Any]:
        latent, nope = saved.latent, saved.nope
        with phase("scores"):
            dq, dk, dv = self.mixing.backward(dmixed[:, :, :, None], saved.mix)
        with phase("qkv"):
            dq = dq[:, :, :, 0]
            dkv = _side_by_side(dk[..., :nope], dv)
            # kv = einsum("bsc,khc->bskh", latent, kv_b_proj)
            dlatent = einsum("bskh,khc->bsc", dkv, self.kv_b_proj)
            dkv_b_proj = weight_grad(self.kv_b_proj, "bskh,bsc->khc", dkv, latent)
            dkeys = _side_by_side(dlatent, dk[..., nope:].sum(axis=2))
        return dq[..., :nope], dq[..., nope:], dkeys, dkv_b_proj

    def _absorbed(
        self, q_plain: Array, q_rotated: Array, keys: Array, mask: Mask
    ) -> tuple[Array, AbsorbedSaved]:
        """Attend to the latents directly: all query heads share one key head."""
        size, nope = keys.shape[-1] - self.rope_size, q_plain.shape[-1]
        with phase("qkv"):
            q_latent = einsum("btkh,khc->btkc", q_plain, self.kv_b_proj[:, :nope])
            q = _side_by_side(q_latent, q_rotated)
        # One key head, with all query heads as its group.
        k = keys[:, :, None]
        mixed, saved = self.mixing.forward(q[:, :, None], k, k[..., :size], mask)
        with phase("output"):
            mixed = mixed[:, :, 0]
            v = einsum("btkc,khc->btkh", mixed, self.kv_b_proj[:, nope:])
        return v, AbsorbedSaved(q_plain, mixed, saved)

    def _absorbed_backward(self, dmixed: Array, saved: AbsorbedSaved) -> tuple[Array, Array, Array, Any]:
        q_plain, mixed = saved.q_plain, saved.mixed
        nope, size = q_plain.shape[-1], mixed.shape[-1]
        with phase("output"):
            # v = einsum("btkc,khc->btkh", mixed, kv_b_proj[:, nope:])
            dlatents = einsum("btkh,khc->btkc", dmixed, self.kv_b_proj[:, nope:])
        with phase("scores"):
            dq, dk, dv = self.mixing.backward(dlatents[:, :, None], saved.mix)
        with phase("qkv"):
            dq, dkeys = dq[:, :, 0], dk[:, :, 0]
            dkeys[..., :size] += dv[:, :, 0]
            # q_latent = einsum("btkh,khc->btkc", q_plain, kv_b_proj[:, :nope])
            dq_plain = einsum("btkc,khc->btkh", dq[..., :size], self.kv_b_proj[:, :nope])
            # Both uses of kv_b_proj in one product over twice the positions: its key rows contribute to the
            # first half only, its value rows to the second.
            rows = np.concatenate([_padded(q_plain, 0, dmixed.shape[-1]), _padded(dmixed, nope, 0)], axis=1)
            columns = np.concatenate([dq[..., :size], mixed], axis=1)
            dkv_b_proj = weight_grad(self.kv_b_proj, "btkh,btkc->khc", rows, columns)
        return dq_plain, dq[..., size:], dkeys, dkv_b_proj


def _side_by_side(first: Array, second: Array) -> Array:
    """Concatenate along the last axis, in the memory layout of `first`."""
    size = first.shape[-1]
    joined = np.empty_like(first, shape=(*first.shape[:-1], size + second.shape[-1]))
    joined[..., :size] = first
    joined[..., size:] = second
    return joined


def _padded(x: Array, before: int, after: int) -> Array:
    """Pad x with zeros along the last axis."""
    size = x.shape[-1]
    y = np.zeros_like(x, shape=(*x.shape[:-1], before + size + after))
    y[..., before : before + size] = x
    return y
