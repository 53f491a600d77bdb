"""Multi-head latent attention (DeepSeek-V2, 2024): keys and values of all heads come from one small latent.

    c, r   = split(kv_a(x)),  c = norm(c)            what the cache holds: c, and r turned by RoPE
    k_n, v = split(kv_b(c)) for every head;  k = (k_n, r),  q = (q_n, q_r) with q_r turned by RoPE
    y      = o(softmax(q k^T scale + mask) v)

Two ways to the same numbers. *Expanded*: make k and v of every position, then attend. *Absorbed*: as
q_n . kv_b(c) = (q_n kv_b) . c, let queries look at the latents themselves: attention with one key head of
size c + r whose values are the latents, and kv_b applied to what was mixed. Expanding costs as much as there
are positions in the cache, absorbing as much as there are queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np

from einsum_transformer.components.kv_cache import LayerCache
from einsum_transformer.components.mixing import Mask, Mixing
from einsum_transformer.components.rmsnorm import RMSNorm
from einsum_transformer.components.rope import Rotation
from einsum_transformer.engine import einsum, phase, tap, weight_grad
from einsum_transformer.tree import static

Array = np.ndarray
Form = Literal["auto", "expanded", "absorbed"]


@dataclass(frozen=True, slots=True)
class LatentQuery:
    """q = q_b(norm(q_a(x))): queries by way of a latent of their own. A gradient is another LatentQuery."""

    q_a_proj: Annotated[Array, "c d"]
    q_a_layernorm: RMSNorm
    q_b_proj: Annotated[Array, "(k h) c"]
    q_a_bias: Annotated[Array, "c"] | None = None

    def forward(self, x: Array) -> tuple[Array, Any]:
        latent = einsum("btd,cd->btc", x, self.q_a_proj)
        if self.q_a_bias is not None:
            latent += self.q_a_bias
        normed, saved_norm = self.q_a_layernorm.forward(latent)
        tap("self_attn.query.q_a_layernorm", normed)
        return einsum("btc,khc->btkh", normed, self.q_b_proj), (x, normed, saved_norm)

    def backward(self, dq: Array, saved: Any) -> tuple[Array, LatentQuery]:
        x, normed, saved_norm = saved
        # q = einsum("btc,khc->btkh", normed, q_b_proj)
        dnormed = einsum("btkh,khc->btc", dq, self.q_b_proj)
        dq_b_proj = weight_grad("btkh,btc->khc", dq, normed, self.q_b_proj)
        dlatent, dnorm = self.q_a_layernorm.backward(dnormed, saved_norm)
        # latent = einsum("btd,cd->btc", x, q_a_proj) + q_a_bias
        dx = einsum("btc,cd->btd", dlatent, self.q_a_proj)
        dq_a_proj = weight_grad("btc,btd->cd", dlatent, x, self.q_a_proj)
        return dx, LatentQuery(dq_a_proj, dnorm, dq_b_proj, weight_grad("btc->c", dlatent, self.q_a_bias))


@dataclass(frozen=True, slots=True)
class DirectQuery:
    """q = q_proj(x). A gradient is another DirectQuery."""

    q_proj: Annotated[Array, "(k h) d"]

    def forward(self, x: Array) -> tuple[Array, Any]:
        return einsum("btd,khd->btkh", x, self.q_proj), x

    def backward(self, dq: Array, saved: Any) -> tuple[Array, DirectQuery]:
        # q = einsum("btd,khd->btkh", x, q_proj)
        dx = einsum("btkh,khd->btd", dq, self.q_proj)
        return dx, DirectQuery(weight_grad("btkh,btd->khd", dq, saved, self.q_proj))


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Weights in checkpoint layout, heads viewed apart. A gradient is another LatentAttention."""

    query: LatentQuery | DirectQuery
    kv_a_proj: Annotated[Array, "j d"]
    kv_a_layernorm: RMSNorm
    kv_b_proj: Annotated[Array, "(k h) c"]
    o_proj: Annotated[Array, "d (k h)"]
    kv_a_bias: Annotated[Array, "j"] | None = None
    o_bias: Annotated[Array, "d"] | None = None
    rope_size: int = static(default=64)
    """Dimensions of each query, and of the one key they share, that RoPE turns."""
    form: Form = static(default="auto")
    """"expanded", "absorbed", or "auto": absorbed where the cache holds more positions than x has."""
    mixing: Mixing = static(default=Mixing())
    rope: int | None = static(default=0)

    def forward(
        self,
        x: Array,
        rotation: Rotation | None,
        queries: Array,
        pads: Array | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[Array, Any]:
        """As in Attention."""
        assert rotation is not None
        with phase("qkv"):
            q, saved_q = self.query.forward(x)
            joined = einsum("btd,jd->btj", x, self.kv_a_proj)
            if self.kv_a_bias is not None:
                joined += self.kv_a_bias
            size = joined.shape[-1] - self.rope_size
            latent, saved_norm = self.kv_a_layernorm.forward(joined[..., :size])
            tap("self_attn.kv_a_layernorm", latent)
        with phase("rope"):
            nope = q.shape[-1] - self.rope_size
            q_plain, q_turned = q[..., :nope], rotation.forward(q[..., nope:])
            keys = _side_by_side(latent, rotation.forward(joined[..., None, size:])[:, :, 0])
        index = queries
        if cache is not None:
            with phase("cache"):
                held, _, index = cache.append(keys[:, :, None], keys[:, :, None, :0])
                keys = held[:, :, 0]
        mask = Mask(queries, index, self.mixing.window, pads)
        absorbed = self.form == "absorbed" or (self.form == "auto" and keys.shape[1] > x.shape[1])
        attend = self._absorbed if absorbed else self._expanded
        mixed, saved_mix = attend(q_plain, q_turned, keys, mask)
        with phase("output"):
            y = einsum("btkh,dkh->btd", mixed, self.o_proj)
            if self.o_bias is not None:
                y += self.o_bias
        return y, (x, saved_q, saved_norm, mixed, absorbed, saved_mix)

    def backward(self, dy: Array, saved: Any, rotation: Rotation | None) -> tuple[Array, LatentAttention]:
        x, saved_q, saved_norm, mixed, absorbed, saved_mix = saved
        assert rotation is not None
        with phase("output"):
            # y = einsum("btkh,dkh->btd", mixed, o_proj) + o_bias
            dmixed = einsum("btd,dkh->btkh", dy, self.o_proj)
            do_proj = weight_grad("btd,btkh->dkh", dy, mixed, self.o_proj)
            do_bias = weight_grad("btd->d", dy, self.o_bias)
        back = self._absorbed_backward if absorbed else self._expanded_backward
        dq_plain, dq_turned, dkeys, dkv_b_proj = back(dmixed, saved_mix)
        size = dkeys.shape[-1] - self.rope_size
        with phase("rope"):
            dq = _side_by_side(dq_plain, rotation.backward(dq_turned))
            dshared = rotation.backward(dkeys[:, :, None, size:])[:, :, 0]
        with phase("qkv"):
            dlatent, dnorm = self.kv_a_layernorm.backward(dkeys[..., :size], saved_norm)
            djoined = _side_by_side(dlatent, dshared)
            # joined = einsum("btd,jd->btj", x, kv_a_proj) + kv_a_bias
            dx = einsum("btj,jd->btd", djoined, self.kv_a_proj)
            dkv_a_proj = weight_grad("btj,btd->jd", djoined, x, self.kv_a_proj)
            dkv_a_bias = weight_grad("btj->j", djoined, self.kv_a_bias)
            through, dquery = self.query.backward(dq, saved_q)
            dx += through
        weights = (dquery, dkv_a_proj, dnorm, dkv_b_proj, do_proj, dkv_a_bias, do_bias)
        return dx, LatentAttention(*weights, self.rope_size, self.form, self.mixing, self.rope)

    def _expanded(self, q_plain: Array, q_turned: Array, keys: Array, mask: Mask) -> tuple[Array, Any]:
        """Keys and values of every head, then attention over them."""
        size, nope = keys.shape[-1] - self.rope_size, q_plain.shape[-1]
        latent = keys[..., :size]
        with phase("qkv"):
            kv = einsum("bsc,khc->bskh", latent, self.kv_b_proj)
            shared = np.broadcast_to(keys[:, :, None, size:], (*kv.shape[:3], self.rope_size))
            k, v = _side_by_side(kv[..., :nope], shared), kv[..., nope:]
            q = _side_by_side(q_plain, q_turned)
        mixed, saved = self.mixing.forward(q[:, :, :, None], k, v, mask)
        return mixed[:, :, :, 0], (latent, nope, saved)

    def _expanded_backward(self, dmixed: Array, saved: Any) -> tuple[Array, Array, Array, Any]:
        latent, nope, saved_mix = saved
        with phase("scores"):
            dq, dk, dv = self.mixing.backward(dmixed[:, :, :, None], saved_mix)
        with phase("qkv"):
            dq = dq[:, :, :, 0]
            dkv = _side_by_side(dk[..., :nope], dv)
            # kv = einsum("bsc,khc->bskh", latent, kv_b_proj)
            dlatent = einsum("bskh,khc->bsc", dkv, self.kv_b_proj)
            dkv_b_proj = weight_grad("bskh,bsc->khc", dkv, latent, self.kv_b_proj)
            dkeys = _side_by_side(dlatent, dk[..., nope:].sum(axis=2))
        return dq[..., :nope], dq[..., nope:], dkeys, dkv_b_proj

    def _absorbed(self, q_plain: Array, q_turned: Array, keys: Array, mask: Mask) -> tuple[Array, Any]:
        """Queries that look at the latents, all heads at one key."""
        size, nope = keys.shape[-1] - self.rope_size, q_plain.shape[-1]
        with phase("qkv"):
            q_latent = einsum("btkh,khc->btkc", q_plain, self.kv_b_proj[:, :nope])
            q = _side_by_side(q_latent, q_turned)
        # One key head, and the heads of the model as its group.
        k = keys[:, :, None]
        mixed, saved = self.mixing.forward(q[:, :, None], k, k[..., :size], mask)
        with phase("output"):
            mixed = mixed[:, :, 0]
            v = einsum("btkc,khc->btkh", mixed, self.kv_b_proj[:, nope:])
        return v, (q_plain, mixed, saved)

    def _absorbed_backward(self, dmixed: Array, saved: Any) -> tuple[Array, Array, Array, Any]:
        q_plain, mixed, saved_mix = saved
        nope, size = q_plain.shape[-1], mixed.shape[-1]
        with phase("output"):
            # v = einsum("btkc,khc->btkh", mixed, kv_b_proj[:, nope:])
            dlatents = einsum("btkh,khc->btkc", dmixed, self.kv_b_proj[:, nope:])
        with phase("scores"):
            dq, dk, dv = self.mixing.backward(dlatents[:, :, None], saved_mix)
        with phase("qkv"):
            dq, dkeys = dq[:, :, 0], dk[:, :, 0]
            dkeys[..., :size] += dv[:, :, 0]
            # q_latent = einsum("btkh,khc->btkc", q_plain, kv_b_proj[:, :nope])
            dq_plain = einsum("btkc,khc->btkh", dq[..., :size], self.kv_b_proj[:, :nope])
            # Both uses of kv_b_proj in one product over twice the positions: its rows for keys take part in
            # the first half alone, those for values in the second.
            rows = np.concatenate([_padded(q_plain, 0, dmixed.shape[-1]), _padded(dmixed, nope, 0)], axis=1)
            columns = np.concatenate([dq[..., :size], mixed], axis=1)
            dkv_b_proj = weight_grad("btkh,btkc->khc", rows, columns, self.kv_b_proj)
        return dq_plain, dq[..., size:], dkeys, dkv_b_proj


def _side_by_side(first: Array, second: Array) -> Array:
    """Both along the last axis, laid out like the first."""
    size = first.shape[-1]
    joined = np.empty_like(first, shape=(*first.shape[:-1], size + second.shape[-1]))
    joined[..., :size] = first
    joined[..., size:] = second
    return joined


def _padded(x: Array, before: int, after: int) -> Array:
    """x with zeroes around it along the last axis."""
    size = x.shape[-1]
    y = np.zeros_like(x, shape=(*x.shape[:-1], before + size + after))
    y[..., before : before + size] = x
    return y
