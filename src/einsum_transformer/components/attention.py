"""Attention: y = o(softmax(q(x) k(x)^T scale + mask) v(x)), queries and keys turned by RoPE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np

from einsum_transformer.components.kv_cache import LayerCache
from einsum_transformer.components.mixing import Mask, Mixing
from einsum_transformer.components.qk_norm import QKNorm
from einsum_transformer.components.rope import Rotation
from einsum_transformer.engine import einsum, phase, tap, weight_grad
from einsum_transformer.tree import static

Array = np.ndarray
Saved = tuple[Array, Array, Any, Any]


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
    q_norm: QKNorm | None = None
    k_norm: QKNorm | None = None
    mixing: Mixing = static(default=Mixing())
    rope: int | None = static(default=0)
    """Which of the decoder's rotations turns this layer's queries and keys; None: positions are not told."""

    def forward(
        self,
        x: Array,
        rotation: Rotation | None,
        queries: Array,
        pads: Array | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[Array, Saved]:
        """x: (b, t, d); queries: (t,) the positions of x in the sequence, padding included; pads: (b,) or
        None."""
        saved_norms = None
        with phase("qkv"):
            q = einsum("btd,kghd->btkgh", x, self.q_proj)
            k = einsum("btd,khd->btkh", x, self.k_proj)
            v = einsum("btd,khd->btkh", x, self.v_proj)
            if self.q_bias is not None:
                q += self.q_bias
                k += self.k_bias
                v += self.v_bias
            if self.q_norm is not None and self.k_norm is not None:
                q, saved_q = self.q_norm.forward(q)
                k, saved_k = self.k_norm.forward(k[:, :, :, None])
                k, saved_norms = k[:, :, :, 0], (saved_q, saved_k)
                tap("self_attn.q_norm", q)
                tap("self_attn.k_norm", k)
        mixed, saved_mix = attend(q, k, v, rotation, queries, pads, cache, self.mixing)
        with phase("output"):
            y = einsum("btkgh,dkgh->btd", mixed, self.o_proj)
            if self.o_bias is not None:
                y += self.o_bias
        return y, (x, mixed, saved_norms, saved_mix)

    def backward(self, dy: Array, saved: Saved, rotation: Rotation | None) -> tuple[Array, Attention]:
        x, mixed, saved_norms, saved_mix = saved
        with phase("output"):
            # y = einsum("btkgh,dkgh->btd", mixed, o_proj) + o_bias
            dmixed = einsum("btd,dkgh->btkgh", dy, self.o_proj)
            do_proj = weight_grad("btd,btkgh->dkgh", dy, mixed, self.o_proj)
            do_bias = weight_grad("btd->d", dy, self.o_bias)
        dq, dk, dv = attend_backward(dmixed, saved_mix, rotation, self.mixing)
        dq_norm = dk_norm = None
        with phase("qkv"):
            if self.q_norm is not None and self.k_norm is not None:
                dq, dq_norm = self.q_norm.backward(dq, saved_norms[0])
                dk, dk_norm = self.k_norm.backward(dk[:, :, :, None], saved_norms[1])
                dk = dk[:, :, :, 0]
            # q = einsum("btd,kghd->btkgh", x, q_proj) + q_bias, k and v = einsum("btd,khd->btkh", ...) + bias
            dx = einsum("btkgh,kghd->btd", dq, self.q_proj)
            dx += einsum("btkh,khd->btd", dk, self.k_proj)
            dx += einsum("btkh,khd->btd", dv, self.v_proj)
            return dx, Attention(
                weight_grad("btkgh,btd->kghd", dq, x, self.q_proj),
                weight_grad("btkh,btd->khd", dk, x, self.k_proj),
                weight_grad("btkh,btd->khd", dv, x, self.v_proj),
                do_proj,
                weight_grad("btkgh->kgh", dq, self.q_bias),
                weight_grad("btkh->kh", dk, self.k_bias),
                weight_grad("btkh->kh", dv, self.v_bias),
                do_bias,
                dq_norm,
                dk_norm,
                self.mixing,
                self.rope,
            )


@dataclass(frozen=True, slots=True)
class FusedAttention:
    """The same with one matrix for q, k and v. A gradient is another FusedAttention.

    Its rows are those of all queries, then all keys, then all values; or, `by_head`, for each key/value head
    its queries, its key and its value.
    """

    qkv_proj: Annotated[Array, "j d"]
    o_proj: Annotated[Array, "d (k g h)"]
    qkv_bias: Annotated[Array, "j"] | None = None
    o_bias: Annotated[Array, "d"] | None = None
    by_head: bool = static(default=False)
    clip: float | None = static(default=None)
    """Limits q, k and v to [-clip, clip]."""
    mixing: Mixing = static(default=Mixing())
    rope: int | None = static(default=0)

    def forward(
        self,
        x: Array,
        rotation: Rotation | None,
        queries: Array,
        pads: Array | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[Array, Saved]:
        """As in Attention."""
        inside = None
        with phase("qkv"):
            qkv = einsum("btd,jd->btj", x, self.qkv_proj)
            if self.qkv_bias is not None:
                qkv += self.qkv_bias
            if self.clip is not None:
                inside = np.abs(qkv) <= self.clip
                np.clip(qkv, -self.clip, self.clip, out=qkv)
            q, k, v = self._views(qkv)
        mixed, saved_mix = attend(q, k, v, rotation, queries, pads, cache, self.mixing)
        with phase("output"):
            y = einsum("btkgh,dkgh->btd", mixed, self.o_proj)
            if self.o_bias is not None:
                y += self.o_bias
        return y, (x, mixed, inside, saved_mix)

    def backward(self, dy: Array, saved: Saved, rotation: Rotation | None) -> tuple[Array, FusedAttention]:
        x, mixed, inside, saved_mix = saved
        with phase("output"):
            # y = einsum("btkgh,dkgh->btd", mixed, o_proj) + o_bias
            dmixed = einsum("btd,dkgh->btkgh", dy, self.o_proj)
            do_proj = weight_grad("btd,btkgh->dkgh", dy, mixed, self.o_proj)
            do_bias = weight_grad("btd->d", dy, self.o_bias)
        parts = attend_backward(dmixed, saved_mix, rotation, self.mixing)
        with phase("qkv"):
            dqkv = np.empty_like(dy, shape=(*dy.shape[:2], self.qkv_proj.shape[0]))
            for part, value in zip(self._views(dqkv), parts):
                part[...] = value
            if inside is not None:
                # qkv = clip(einsum("btd,jd->btj", x, qkv_proj) + qkv_bias)
                dqkv *= inside
            dx = einsum("btj,jd->btd", dqkv, self.qkv_proj)
            return dx, FusedAttention(
                weight_grad("btj,btd->jd", dqkv, x, self.qkv_proj),
                do_proj,
                weight_grad("btj->j", dqkv, self.qkv_bias),
                do_bias,
                self.by_head,
                self.clip,
                self.mixing,
                self.rope,
            )

    def _views(self, qkv: Array) -> tuple[Array, Array, Array]:
        """q (b, t, k, g, h), k and v (b, t, k, h) in the memory of qkv (b, t, j)."""
        b, t, joined = qkv.shape
        _, kv_heads, groups, size = self.o_proj.shape
        if self.by_head:
            heads = qkv.reshape(b, t, kv_heads, groups + 2, size)
            return heads[..., :groups, :], heads[..., groups, :], heads[..., groups + 1, :]
        keys = kv_heads * size
        q, k, v = qkv[..., : joined - 2 * keys], qkv[..., joined - 2 * keys : joined - keys], qkv[..., -keys:]
        shape = (b, t, kv_heads, size)
        return q.reshape(b, t, kv_heads, groups, size), k.reshape(shape), v.reshape(shape)


def attend(
    q: Array,
    k: Array,
    v: Array,
    rotation: Rotation | None,
    queries: Array,
    pads: Array | None,
    cache: LayerCache | None,
    mixing: Mixing,
) -> tuple[Array, Any]:
    """What projected queries, keys and values become: turned, joined to the cache, mixed."""
    with phase("rope"):
        if rotation is not None:
            q, k = rotation.forward(q), rotation.forward(k)
    index = queries
    if cache is not None:
        with phase("cache"):
            k, v, index = cache.append(k, v)
    return mixing.forward(q, k, v, Mask(queries, index, mixing.window, pads))


def attend_backward(
    dmixed: Array, saved: Any, rotation: Rotation | None, mixing: Mixing
) -> tuple[Array, Array, Array]:
    """The gradients by q, k and v as they were projected."""
    with phase("scores"):
        dq, dk, dv = mixing.backward(dmixed, saved)
    if rotation is not None:
        with phase("rope"):
            # q, k = rotation(q), rotation(k)
            dq, dk = rotation.backward(dq), rotation.backward(dk)
    return dq, dk, dv
