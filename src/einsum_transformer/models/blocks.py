"""The blocks of a decoder: where norms and residuals stand around attention and feed-forward.

In every one the residual's gradient goes around the norms, not through them. A residual_multiplier m other
than 1 scales what is added to the residual: x + m y for every x + y below.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from einsum_transformer.components.attention import Attention, FusedAttention
from einsum_transformer.components.gated_mlp import FusedGatedMLP, GatedMLP
from einsum_transformer.components.kv_cache import LayerCache
from einsum_transformer.components.latent_attention import LatentAttention
from einsum_transformer.components.layernorm import LayerNorm
from einsum_transformer.components.mlp import MLP
from einsum_transformer.components.moe import MoE
from einsum_transformer.components.rmsnorm import RMSNorm
from einsum_transformer.components.rope import Rotation
from einsum_transformer.engine import phase, tap
from einsum_transformer.tree import static

Array = np.ndarray
Norm = RMSNorm | LayerNorm
AnyAttention = Attention | FusedAttention | LatentAttention
FeedForward = GatedMLP | FusedGatedMLP | MLP | MoE


@dataclass(frozen=True, slots=True)
class Block:
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    input_layernorm: Norm
    self_attn: AnyAttention
    post_attention_layernorm: Norm
    mlp: FeedForward
    residual_multiplier: float = static(default=1.0)

    def forward(
        self,
        x: Array,
        rotation: Rotation | None,
        queries: Array,
        pads: Array | None,
        cache: LayerCache | None,
    ) -> tuple[Array, tuple[Any, ...]]:
        with phase("norm"):
            normed, saved_norm = self.input_layernorm.forward(x)
            tap("input_layernorm", normed)
        with phase("attention"):
            y, saved_attn = self.self_attn.forward(normed, rotation, queries, pads, cache)
        tap("self_attn", y)
        y = _scaled(y, self.residual_multiplier)
        x = np.add(x, y, out=y)
        with phase("norm"):
            normed, saved_post = self.post_attention_layernorm.forward(x)
            tap("post_attention_layernorm", normed)
        with phase("feed-forward"):
            y, saved_mlp = self.mlp.forward(normed)
        tap("mlp", y)
        y = _scaled(y, self.residual_multiplier)
        return np.add(x, y, out=y), (saved_norm, saved_attn, saved_post, saved_mlp)

    def backward(self, dy: Array, saved: tuple[Any, ...], rotation: Rotation | None) -> tuple[Array, Block]:
        saved_norm, saved_attn, saved_post, saved_mlp = saved
        # y = x + m mlp(norm(x))
        with phase("feed-forward"):
            dnormed, dmlp = self.mlp.backward(_scaled(dy, self.residual_multiplier), saved_mlp)
        with phase("norm"):
            dx, dpost = self.post_attention_layernorm.backward(dnormed, saved_post)
        dx += dy
        # x = x + m attention(norm(x))
        with phase("attention"):
            dattended = _scaled(dx, self.residual_multiplier)
            dnormed, dattn = self.self_attn.backward(dattended, saved_attn, rotation)
        with phase("norm"):
            dinput, dnorm = self.input_layernorm.backward(dnormed, saved_norm)
        dinput += dx
        return dinput, Block(dnorm, dattn, dpost, dmlp, self.residual_multiplier)


@dataclass(frozen=True, slots=True)
class PostNormBlock:
    """x + norm(attention(norm(x))), then x + norm(feed_forward(norm(x))); the norms before may be absent."""

    input_layernorm: Norm | None
    self_attn: AnyAttention
    post_attention_layernorm: Norm
    pre_feedforward_layernorm: Norm | None
    mlp: FeedForward
    post_feedforward_layernorm: Norm
    residual_multiplier: float = static(default=1.0)

    def forward(
        self,
        x: Array,
        rotation: Rotation | None,
        queries: Array,
        pads: Array | None,
        cache: LayerCache | None,
    ) -> tuple[Array, tuple[Any, ...]]:
        with phase("norm"):
            normed, saved_input = _optional("input_layernorm", self.input_layernorm, x)
        with phase("attention"):
            y, saved_attn = self.self_attn.forward(normed, rotation, queries, pads, cache)
        tap("self_attn", y)
        with phase("norm"):
            y, saved_post = self.post_attention_layernorm.forward(y)
            tap("post_attention_layernorm", y)
        y = _scaled(y, self.residual_multiplier)
        x = np.add(x, y, out=y)
        with phase("norm"):
            normed, saved_pre = _optional("pre_feedforward_layernorm", self.pre_feedforward_layernorm, x)
        with phase("feed-forward"):
            y, saved_mlp = self.mlp.forward(normed)
        tap("mlp", y)
        with phase("norm"):
            y, saved_last = self.post_feedforward_layernorm.forward(y)
            tap("post_feedforward_layernorm", y)
        y = _scaled(y, self.residual_multiplier)
        return np.add(x, y, out=y), (saved_input, saved_attn, saved_post, saved_pre, saved_mlp, saved_last)

    def backward(
        self, dy: Array, saved: tuple[Any, ...], rotation: Rotation | None
    ) -> tuple[Array, PostNormBlock]:
        saved_input, saved_attn, saved_post, saved_pre, saved_mlp, saved_last = saved
        # y = x + m norm(mlp(norm(x)))
        with phase("norm"):
            dlast = _scaled(dy, self.residual_multiplier)
            dlast, dpost_feedforward = self.post_feedforward_layernorm.backward(dlast, saved_last)
        with phase("feed-forward"):
            dnormed, dmlp = self.mlp.backward(dlast, saved_mlp)
        with phase("norm"):
            dx, dpre = _optional_backward(self.pre_feedforward_layernorm, dnormed, saved_pre)
        dx += dy
        # x = x + m norm(attention(norm(x)))
        with phase("norm"):
            dattended = _scaled(dx, self.residual_multiplier)
            dattended, dpost_attention = self.post_attention_layernorm.backward(dattended, saved_post)
        with phase("attention"):
            dnormed, dattn = self.self_attn.backward(dattended, saved_attn, rotation)
        with phase("norm"):
            dinput, dnorm = _optional_backward(self.input_layernorm, dnormed, saved_input)
        dinput += dx
        rest = dpost_attention, dpre, dmlp, dpost_feedforward
        return dinput, PostNormBlock(dnorm, dattn, *rest, self.residual_multiplier)


@dataclass(frozen=True, slots=True)
class ParallelBlock:
    """x + attention(norm(x)) + feed_forward(norm(x)), with one norm for both or a second for the latter."""

    input_layernorm: Norm
    self_attn: AnyAttention
    post_attention_layernorm: Norm | None
    mlp: FeedForward
    residual_multiplier: float = static(default=1.0)

    def forward(
        self,
        x: Array,
        rotation: Rotation | None,
        queries: Array,
        pads: Array | None,
        cache: LayerCache | None,
    ) -> tuple[Array, tuple[Any, ...]]:
        saved_post = None
        with phase("norm"):
            normed, saved_norm = self.input_layernorm.forward(x)
            tap("input_layernorm", normed)
        with phase("attention"):
            attended, saved_attn = self.self_attn.forward(normed, rotation, queries, pads, cache)
        tap("self_attn", attended)
        if self.post_attention_layernorm is not None:
            with phase("norm"):
                normed, saved_post = self.post_attention_layernorm.forward(x)
                tap("post_attention_layernorm", normed)
            tap("post_attention_layernorm", normed)
        with phase("feed-forward"):
            y, saved_mlp = self.mlp.forward(normed)
        tap("mlp", y)
        y += attended
        y = _scaled(y, self.residual_multiplier)
        return np.add(x, y, out=y), (saved_norm, saved_attn, saved_post, saved_mlp)

    def backward(
        self, dy: Array, saved: tuple[Any, ...], rotation: Rotation | None
    ) -> tuple[Array, ParallelBlock]:
        saved_norm, saved_attn, saved_post, saved_mlp = saved
        # y = x + m (attention(norm(x)) + mlp(norm(x)))
        dsum = _scaled(dy, self.residual_multiplier)
        with phase("feed-forward"):
            dmlp_input, dmlp = self.mlp.backward(dsum, saved_mlp)
        with phase("attention"):
            dnormed, dattn = self.self_attn.backward(dsum, saved_attn, rotation)
        with phase("norm"):
            if self.post_attention_layernorm is None:
                dnormed += dmlp_input
                dx, dnorm = self.input_layernorm.backward(dnormed, saved_norm)
                dx += dy
                return dx, ParallelBlock(dnorm, dattn, None, dmlp, self.residual_multiplier)
            dx, dnorm = self.input_layernorm.backward(dnormed, saved_norm)
            dthrough, dpost = self.post_attention_layernorm.backward(dmlp_input, saved_post)
        dx += dthrough
        dx += dy
        return dx, ParallelBlock(dnorm, dattn, dpost, dmlp, self.residual_multiplier)


AnyBlock = Block | PostNormBlock | ParallelBlock


def _scaled(y: Array, factor: float) -> Array:
    """factor * y; y itself where the factor is 1."""
    return y if factor == 1 else y * factor


def _optional(name: str, norm: Norm | None, x: Array) -> tuple[Array, Any]:
    if norm is None:
        return x, None
    normed, saved = norm.forward(x)
    return tap(name, normed), saved


def _optional_backward(norm: Norm | None, dy: Array, saved: Any) -> tuple[Array, Any]:
    return (dy, None) if norm is None else norm.backward(dy, saved)
