"""Decoder blocks, which differ in the placement of norms and residuals around attention and feed-forward.

In all of them the gradient of the residual connection bypasses the norms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from einsum_transformer.components.attention import Attention, FusedAttention
from einsum_transformer.components.context import Context
from einsum_transformer.components.gated_mlp import FusedGatedMLP, GatedMLP
from einsum_transformer.components.latent_attention import LatentAttention
from einsum_transformer.components.layernorm import LayerNorm
from einsum_transformer.components.mlp import MLP
from einsum_transformer.components.moe import MoE
from einsum_transformer.components.rmsnorm import RMSNorm
from einsum_transformer.engine import phase, tap, tap_gradient
from einsum_transformer.tree import static

Array = np.ndarray
Norm = RMSNorm | LayerNorm
AnyAttention = Attention | FusedAttention | LatentAttention
FeedForward = GatedMLP | FusedGatedMLP | MLP | MoE


class Saved(NamedTuple):
    """Activations saved for the backward pass of a block, by part; None for parts that it does not have."""

    input_layernorm: Any
    self_attn: Any
    post_attention_layernorm: Any
    mlp: Any
    pre_feedforward_layernorm: Any = None
    post_feedforward_layernorm: Any = None


@dataclass(frozen=True, slots=True)
class Block:
    """x + m attention(norm(x)), then x + m feed_forward(norm(x)), with the residual multiplier m."""

    input_layernorm: Norm
    self_attn: AnyAttention
    post_attention_layernorm: Norm
    mlp: FeedForward
    residual_multiplier: float = static(default=1.0)

    def forward(self, x: Array, context: Context) -> tuple[Array, Saved]:
        x = tap("resid_pre", x, requested=True)
        normed, saved_norm = _norm("input_layernorm", self.input_layernorm, x)
        y, saved_attn = _attention(self.self_attn, normed, context)
        x = np.add(x, _times(self.residual_multiplier, y, "attn_out"), out=y)
        x = tap("resid_mid", x, requested=True)
        normed, saved_post = _norm("post_attention_layernorm", self.post_attention_layernorm, x)
        y, saved_mlp = _feed_forward(self.mlp, normed)
        y = np.add(x, _times(self.residual_multiplier, y, "mlp_out"), out=y)
        return y, Saved(saved_norm, saved_attn, saved_post, saved_mlp)

    def backward(self, dy: Array, saved: Saved, context: Context) -> tuple[Array, Block]:
        # y = x + m mlp(norm(x))
        dmlp_out = _scaled(dy, self.residual_multiplier, "mlp_out")
        dnormed, dmlp = _feed_forward_backward(self.mlp, dmlp_out, saved.mlp)
        dx, dpost = _norm_backward(
            "post_attention_layernorm", self.post_attention_layernorm, dnormed, saved.post_attention_layernorm
        )
        dx += dy
        tap_gradient("resid_mid", dx)
        # x = x + m attention(norm(x))
        dattn_out = _scaled(dx, self.residual_multiplier, "attn_out")
        dnormed, dattn = _attention_backward(self.self_attn, dattn_out, saved.self_attn, context)
        dinput, dnorm = _norm_backward(
            "input_layernorm", self.input_layernorm, dnormed, saved.input_layernorm
        )
        dinput += dx
        tap_gradient("resid_pre", dinput)
        return dinput, Block(
            input_layernorm=dnorm,
            self_attn=dattn,
            post_attention_layernorm=dpost,
            mlp=dmlp,
            residual_multiplier=self.residual_multiplier,
        )


@dataclass(frozen=True, slots=True)
class PostNormBlock:
    """x + m norm(attention(norm(x))), then x + m norm(feed_forward(norm(x))); inner norms are optional."""

    input_layernorm: Norm | None
    self_attn: AnyAttention
    post_attention_layernorm: Norm
    pre_feedforward_layernorm: Norm | None
    mlp: FeedForward
    post_feedforward_layernorm: Norm
    residual_multiplier: float = static(default=1.0)

    def forward(self, x: Array, context: Context) -> tuple[Array, Saved]:
        x = tap("resid_pre", x, requested=True)
        normed, saved_input = _norm("input_layernorm", self.input_layernorm, x)
        y, saved_attn = _attention(self.self_attn, normed, context)
        y, saved_post = _norm("post_attention_layernorm", self.post_attention_layernorm, y)
        x = np.add(x, _times(self.residual_multiplier, y, "attn_out"), out=y)
        x = tap("resid_mid", x, requested=True)
        normed, saved_pre = _norm("pre_feedforward_layernorm", self.pre_feedforward_layernorm, x)
        y, saved_mlp = _feed_forward(self.mlp, normed)
        y, saved_last = _norm("post_feedforward_layernorm", self.post_feedforward_layernorm, y)
        y = np.add(x, _times(self.residual_multiplier, y, "mlp_out"), out=y)
        return y, Saved(saved_input, saved_attn, saved_post, saved_mlp, saved_pre, saved_last)

    def backward(self, dy: Array, saved: Saved, context: Context) -> tuple[Array, PostNormBlock]:
        # y = x + m norm(mlp(norm(x)))
        dnormed = _scaled(dy, self.residual_multiplier, "mlp_out")
        dmlp_out, dpost_feedforward = _norm_backward(
            "post_feedforward_layernorm",
            self.post_feedforward_layernorm,
            dnormed,
            saved.post_feedforward_layernorm,
        )
        dnormed, dmlp = _feed_forward_backward(self.mlp, dmlp_out, saved.mlp)
        dx, dpre = _norm_backward(
            "pre_feedforward_layernorm",
            self.pre_feedforward_layernorm,
            dnormed,
            saved.pre_feedforward_layernorm,
        )
        dx += dy
        tap_gradient("resid_mid", dx)
        # x = x + m norm(attention(norm(x)))
        dnormed = _scaled(dx, self.residual_multiplier, "attn_out")
        dattended, dpost_attention = _norm_backward(
            "post_attention_layernorm", self.post_attention_layernorm, dnormed, saved.post_attention_layernorm
        )
        dnormed, dattn = _attention_backward(self.self_attn, dattended, saved.self_attn, context)
        dinput, dnorm = _norm_backward(
            "input_layernorm", self.input_layernorm, dnormed, saved.input_layernorm
        )
        dinput += dx
        tap_gradient("resid_pre", dinput)
        return dinput, PostNormBlock(
            input_layernorm=dnorm,
            self_attn=dattn,
            post_attention_layernorm=dpost_attention,
            pre_feedforward_layernorm=dpre,
            mlp=dmlp,
            post_feedforward_layernorm=dpost_feedforward,
            residual_multiplier=self.residual_multiplier,
        )


@dataclass(frozen=True, slots=True)
class ParallelBlock:
    """x + m (attention(norm(x)) + feed_forward(norm(x))), with one shared norm or one norm for each."""

    input_layernorm: Norm
    self_attn: AnyAttention
    post_attention_layernorm: Norm | None
    mlp: FeedForward
    residual_multiplier: float = static(default=1.0)

    def forward(self, x: Array, context: Context) -> tuple[Array, Saved]:
        x = tap("resid_pre", x, requested=True)
        normed, saved_norm = _norm("input_layernorm", self.input_layernorm, x)
        attended, saved_attn = _attention(self.self_attn, normed, context)
        saved_post = None
        if self.post_attention_layernorm is not None:
            normed, saved_post = _norm("post_attention_layernorm", self.post_attention_layernorm, x)
        y, saved_mlp = _feed_forward(self.mlp, normed)
        multiplier = self.residual_multiplier
        y = _times(multiplier, y, "mlp_out")
        y += _times(multiplier, attended, "attn_out")
        y = np.add(x, y, out=y)
        return y, Saved(saved_norm, saved_attn, saved_post, saved_mlp)

    def backward(self, dy: Array, saved: Saved, context: Context) -> tuple[Array, ParallelBlock]:
        # y = x + m (attention(norm(x)) + mlp(norm(x)))
        dmlp_out = _scaled(dy, self.residual_multiplier, "mlp_out")
        dattn_out = _scaled(dy, self.residual_multiplier, "attn_out")
        dmlp_input, dmlp = _feed_forward_backward(self.mlp, dmlp_out, saved.mlp)
        dnormed, dattn = _attention_backward(self.self_attn, dattn_out, saved.self_attn, context)
        dpost = None
        if self.post_attention_layernorm is None:
            dnormed += dmlp_input
        dx, dnorm = _norm_backward("input_layernorm", self.input_layernorm, dnormed, saved.input_layernorm)
        if self.post_attention_layernorm is not None:
            dx_part, dpost = _norm_backward(
                "post_attention_layernorm",
                self.post_attention_layernorm,
                dmlp_input,
                saved.post_attention_layernorm,
            )
            dx += dx_part
        dx += dy
        tap_gradient("resid_pre", dx)
        return dx, ParallelBlock(
            input_layernorm=dnorm,
            self_attn=dattn,
            post_attention_layernorm=dpost,
            mlp=dmlp,
            residual_multiplier=self.residual_multiplier,
        )


AnyBlock = Block | PostNormBlock | ParallelBlock


def _norm(name: str, norm: Norm | None, x: Array) -> tuple[Array, Any]:
    """norm(x), or x if there is no norm."""
    if norm is None:
        return x, None
    with phase("norm"):
        y, saved = norm.forward(x)
        return tap(name, y), saved


def _norm_backward(name: str, norm: Norm | None, dy: Array, saved: Any) -> tuple[Array, Any]:
    if norm is None:
        return dy, None
    with phase("norm"):
        tap_gradient(name, dy)
        return norm.backward(dy, saved)


def _attention(attention: AnyAttention, x: Array, context: Context) -> tuple[Array, Any]:
    with phase("attention", scope="self_attn"):
        y, saved = attention.forward(x, context)
        return tap("", y), saved


def _attention_backward(attention: Any, dy: Array, saved: Any, context: Context) -> tuple[Array, Any]:
    with phase("attention", scope="self_attn"):
        tap_gradient("", dy)
        return attention.backward(dy, saved, context)


def _feed_forward(mlp: FeedForward, x: Array) -> tuple[Array, Any]:
    with phase("feed-forward", scope="mlp"):
        y, saved = mlp.forward(x)
        return tap("", y), saved


def _feed_forward_backward(mlp: Any, dy: Array, saved: Any) -> tuple[Array, Any]:
    with phase("feed-forward", scope="mlp"):
        tap_gradient("", dy)
        return mlp.backward(dy, saved)


def _times(multiplier: float, y: Array, name: str) -> Array:
    """multiplier * y, in place: what is added to the residual stream, the value `name`."""
    if multiplier != 1:
        y *= y.dtype.type(multiplier)
    return tap(name, y, requested=True)


def _scaled(dy: Array, multiplier: float, name: str) -> Array:
    """The gradient before the multiplication; dy is that of the value `name`."""
    tap_gradient(name, dy)
    return dy if multiplier == 1 else dy * dy.dtype.type(multiplier)
