"""Attention: y = o(softmax(q(x) k(x)^T scale + mask) v(x)), queries and keys rotated by RoPE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np

from einsum_transformer.components import mixing as core
from einsum_transformer.components.context import Context
from einsum_transformer.components.mixing import Mixing
from einsum_transformer.components.qk_norm import QKNorm
from einsum_transformer.engine import einsum, einsums, is_trained, phase, tap, tap_gradient, weight_grad
from einsum_transformer.tree import static

Array = np.ndarray


class Saved(NamedTuple):
    """Activations saved for `Attention.backward`."""

    x: Array
    mixed: Array
    mix: core.Saved
    q_norm: Any
    k_norm: Any


@dataclass(frozen=True, slots=True)
class Attention:
    """Weights in checkpoint layout with split head axes. Gradients are returned as an Attention."""

    q_proj: Annotated[Array, "(k g h) d"]
    k_proj: Annotated[Array, "(k h) d"]
    v_proj: Annotated[Array, "(k h) d"]
    o_proj: Annotated[Array, "d (k g h)"]
    q_bias: Annotated[Array, "(k g h)"] | None = None
    k_bias: Annotated[Array, "(k h)"] | None = None
    v_bias: Annotated[Array, "(k h)"] | None = None
    o_bias: Annotated[Array, "d"] | None = None
    q_norm: QKNorm | None = None
    k_norm: QKNorm | None = None
    sinks: Annotated[Array, "(k g)"] | None = None
    """Attention sinks: for each query head, the score of an extra key whose value is zero."""
    mixing: Mixing = static(default=Mixing())
    rope: int | None = static(default=0)
    """Index of this layer's RoPE in `Decoder.ropes`; None: NoPE (no position encoding)."""

    def forward(self, x: Array, context: Context) -> tuple[Array, Saved]:
        """x: (b, t, d) -> (b, t, d)"""
        saved_q = saved_k = None
        with phase("qkv"):
            q, k, v = einsums(
                x,
                ("btd,kghd->btkgh", self.q_proj),
                ("btd,khd->btkh", self.k_proj),
                ("btd,khd->btkh", self.v_proj),
            )
            if self.q_bias is not None:
                q += self.q_bias
                k += self.k_bias
                v += self.v_bias
            q, k, v = _tapped(q, k, v)
            if self.q_norm is not None and self.k_norm is not None:
                q, saved_q = self.q_norm.forward(q)
                k, saved_k = self.k_norm.forward(k[:, :, :, None])
                q, k = tap("q_norm", q), tap("k_norm", k[:, :, :, 0])
        mixed, saved_mix = attend(q, k, v, context, self.mixing, self.sinks)
        with phase("output"):
            y = einsum("btkgh,dkgh->btd", mixed, self.o_proj)
            if self.o_bias is not None:
                y += self.o_bias
        return y, Saved(x, mixed, saved_mix, saved_q, saved_k)

    def backward(self, dy: Array, saved: Saved, context: Context) -> tuple[Array, Attention]:
        x, mixed = saved.x, saved.mixed
        with phase("output"):
            # y = einsum("btkgh,dkgh->btd", mixed, o_proj) + o_bias
            dmixed = einsum("btd,dkgh->btkgh", dy, self.o_proj)
            do_proj = weight_grad(self.o_proj, "btd,btkgh->dkgh", dy, mixed)
            do_bias = weight_grad(self.o_bias, "btd->d", dy)
        dsinks = None
        if self.sinks is not None and is_trained(self.sinks):
            with phase("scores"):
                dsinks = self.mixing.sinks_backward(dmixed, saved.mix, self.sinks)
        dq, dk, dv = attend_backward(dmixed, saved.mix, context, self.mixing)
        dq_norm = dk_norm = None
        with phase("qkv"):
            if self.q_norm is not None and self.k_norm is not None:
                dq, dq_norm = self.q_norm.backward(dq, saved.q_norm)
                dk, dk_norm = self.k_norm.backward(dk[:, :, :, None], saved.k_norm)
                dk = dk[:, :, :, 0]
            _tap_gradients(dq, dk, dv)
            # q = einsum("btd,kghd->btkgh", x, q_proj) + q_bias, k and v = einsum("btd,khd->btkh", ...) + bias
            dx = einsum("btkgh,kghd->btd", dq, self.q_proj)
            dx += einsum("btkh,khd->btd", dk, self.k_proj)
            dx += einsum("btkh,khd->btd", dv, self.v_proj)
            return dx, Attention(
                q_proj=weight_grad(self.q_proj, "btkgh,btd->kghd", dq, x),
                k_proj=weight_grad(self.k_proj, "btkh,btd->khd", dk, x),
                v_proj=weight_grad(self.v_proj, "btkh,btd->khd", dv, x),
                o_proj=do_proj,
                q_bias=weight_grad(self.q_bias, "btkgh->kgh", dq),
                k_bias=weight_grad(self.k_bias, "btkh->kh", dk),
                v_bias=weight_grad(self.v_bias, "btkh->kh", dv),
                o_bias=do_bias,
                q_norm=dq_norm,
                k_norm=dk_norm,
                sinks=dsinks,
                mixing=self.mixing,
                rope=self.rope,
            )


class FusedSaved(NamedTuple):
    """Activations saved for `FusedAttention.backward`."""

    x: Array
    mixed: Array
    mix: core.Saved
    unclipped: Array | None
    """True where `clip` did not change the value; None without clipping."""


@dataclass(frozen=True, slots=True)
class FusedAttention:
    """Attention with one matrix for q, k and v. Gradients are returned as a FusedAttention.

    Row order of `qkv_proj`: all queries, then all keys, then all values; with `by_head`, the queries, the key
    and the value of one key/value head after the other.
    """

    qkv_proj: Annotated[Array, "j d"]
    o_proj: Annotated[Array, "d (k g h)"]
    qkv_bias: Annotated[Array, "j"] | None = None
    o_bias: Annotated[Array, "d"] | None = None
    by_head: bool = static(default=False)
    clip: float | None = static(default=None)
    """q, k and v are clipped to [-clip, clip]; None: no clipping."""
    mixing: Mixing = static(default=Mixing())
    rope: int | None = static(default=0)

    def forward(self, x: Array, context: Context) -> tuple[Array, FusedSaved]:
        """x: (b, t, d) -> (b, t, d)"""
        unclipped = None
        with phase("qkv"):
            qkv = einsum("btd,jd->btj", x, self.qkv_proj)
            if self.qkv_bias is not None:
                qkv += self.qkv_bias
            if self.clip is not None:
                unclipped = np.abs(qkv) <= self.clip
                np.clip(qkv, -self.clip, self.clip, out=qkv)
            q, k, v = _tapped(*self._views(qkv))
        mixed, saved_mix = attend(q, k, v, context, self.mixing)
        with phase("output"):
            y = einsum("btkgh,dkgh->btd", mixed, self.o_proj)
            if self.o_bias is not None:
                y += self.o_bias
        return y, FusedSaved(x, mixed, saved_mix, unclipped)

    def backward(self, dy: Array, saved: FusedSaved, context: Context) -> tuple[Array, FusedAttention]:
        x, mixed = saved.x, saved.mixed
        with phase("output"):
            # y = einsum("btkgh,dkgh->btd", mixed, o_proj) + o_bias
            dmixed = einsum("btd,dkgh->btkgh", dy, self.o_proj)
            do_proj = weight_grad(self.o_proj, "btd,btkgh->dkgh", dy, mixed)
            do_bias = weight_grad(self.o_bias, "btd->d", dy)
        parts = attend_backward(dmixed, saved.mix, context, self.mixing)
        with phase("qkv"):
            _tap_gradients(*parts)
            dqkv = np.empty_like(dy, shape=(*dy.shape[:2], self.qkv_proj.shape[0]))
            for part, value in zip(self._views(dqkv), parts):
                part[...] = value
            if saved.unclipped is not None:
                # qkv = clip(einsum("btd,jd->btj", x, qkv_proj) + qkv_bias)
                dqkv *= saved.unclipped
            dx = einsum("btj,jd->btd", dqkv, self.qkv_proj)
            return dx, FusedAttention(
                qkv_proj=weight_grad(self.qkv_proj, "btj,btd->jd", dqkv, x),
                o_proj=do_proj,
                qkv_bias=weight_grad(self.qkv_bias, "btj->j", dqkv),
                o_bias=do_bias,
                by_head=self.by_head,
                clip=self.clip,
                mixing=self.mixing,
                rope=self.rope,
            )

    def _views(self, qkv: Array) -> tuple[Array, Array, Array]:
        """Views of qkv (b, t, j): q (b, t, k, g, h), k and v (b, t, k, h)."""
        b, t, joined = qkv.shape
        _, kv_heads, groups, size = self.o_proj.shape
        if self.by_head:
            heads = qkv.reshape(b, t, kv_heads, groups + 2, size)
            return heads[..., :groups, :], heads[..., groups, :], heads[..., groups + 1, :]
        keys = kv_heads * size
        q, k, v = qkv[..., : joined - 2 * keys], qkv[..., joined - 2 * keys : joined - keys], qkv[..., -keys:]
        shape = (b, t, kv_heads, size)
        return q.reshape(b, t, kv_heads, groups, size), k.reshape(shape), v.reshape(shape)


def _tapped(q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    """The projected queries, keys and values, before q_norm, k_norm and RoPE."""
    return tap("q", q, requested=True), tap("k", k, requested=True), tap("v", v, requested=True)


def _tap_gradients(dq: Array, dk: Array, dv: Array) -> None:
    tap_gradient("q", dq)
    tap_gradient("k", dk)
    tap_gradient("v", dv)


def attend(
    q: Array, k: Array, v: Array, context: Context, mixing: Mixing, sinks: Any = None
) -> tuple[Array, core.Saved]:
    """Apply RoPE, append to the KV cache, and return the attention output before `o_proj`."""
    rotation, cache = context.rotation, context.cache
    with phase("rope"):
        if rotation is not None:
            q, k = rotation.forward(q), rotation.forward(k)
            q, k = tap("rot_q", q, requested=True), tap("rot_k", k, requested=True)
    index = context.positions
    if cache is not None:
        with phase("cache"):
            k, v, index = cache.append(k, v)
    elif rotation is not None:
        # q, k and v may be views of one array, which a saved view of v would keep in memory as a whole.
        v = np.copy(v)
    return mixing.forward(q, k, v, context.mask(index, mixing.window), sinks)


def attend_backward(
    dmixed: Array, saved: core.Saved, context: Context, mixing: Mixing
) -> tuple[Array, Array, Array]:
    """The gradients with respect to the projected q, k and v, before RoPE."""
    with phase("scores"):
        dq, dk, dv = mixing.backward(dmixed, saved)
    if context.rotation is not None:
        with phase("rope"):
            tap_gradient("rot_q", dq)
            tap_gradient("rot_k", dk)
            # q, k = rotation(q), rotation(k)
            dq, dk = context.rotation.backward(dq), context.rotation.backward(dk)
    return dq, dk, dv
