"""The decoder: tokens, embedding, blocks of (norm, attention, norm, feed-forward) with residuals, norm,
head."""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from einsum_transformer.components.attention import Attention
from einsum_transformer.components.embedding import Embedding
from einsum_transformer.components.head import Head
from einsum_transformer.components.kv_cache import KVCache, LayerCache
from einsum_transformer.components.rmsnorm import RMSNorm
from einsum_transformer.components.rope import RopeConfig, Rotation, rotation
from einsum_transformer.components.swiglu import SwiGLU
from einsum_transformer.engine import phase, tap
from einsum_transformer.models.config import ModelConfig
from einsum_transformer.numerics.softmax import cross_entropy, cross_entropy_backward
from einsum_transformer.tree import static

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class Block:
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    input_layernorm: RMSNorm
    self_attn: Attention
    post_attention_layernorm: RMSNorm
    mlp: SwiGLU

    def forward(
        self, x: Array, rotation: Rotation, queries: Array, pads: Array | None, cache: LayerCache | None
    ) -> tuple[Array, tuple[Any, ...]]:
        with phase("norm"):
            normed, saved_norm = self.input_layernorm.forward(x)
        with phase("attention"):
            y, saved_attn = self.self_attn.forward(normed, rotation, queries, pads, cache)
        tap("self_attn", y)
        x = np.add(x, y, out=y)
        with phase("norm"):
            normed, saved_post = self.post_attention_layernorm.forward(x)
        with phase("feed-forward"):
            y, saved_mlp = self.mlp.forward(normed)
        tap("mlp", y)
        return np.add(x, y, out=y), (saved_norm, saved_attn, saved_post, saved_mlp)

    def backward(self, dy: Array, saved: tuple[Any, ...], rotation: Rotation) -> tuple[Array, Block]:
        saved_norm, saved_attn, saved_post, saved_mlp = saved
        # y = x + mlp(norm(x)): the residual's gradient goes around the norm, not through it
        with phase("feed-forward"):
            dnormed, dmlp = self.mlp.backward(dy, saved_mlp)
        with phase("norm"):
            dx, dpost = self.post_attention_layernorm.backward(dnormed, saved_post)
        dx += dy
        # x = x + attention(norm(x))
        with phase("attention"):
            dnormed, dattn = self.self_attn.backward(dx, saved_attn, rotation)
        with phase("norm"):
            dinput, dnorm = self.input_layernorm.backward(dnormed, saved_norm)
        dinput += dx
        return dinput, Block(dnorm, dattn, dpost, dmlp)


@dataclass(frozen=True, slots=True)
class Decoder:
    """All weights of a model. A gradient is another Decoder; `lm_head` is None where the embedding serves as
    the head."""

    embed_tokens: Embedding
    layers: tuple[Block, ...]
    norm: RMSNorm
    lm_head: Head | None
    rope: RopeConfig = static(default_factory=RopeConfig)  # noqa: RUF009 (a field specifier)
    head_dim: int = static(default=64)

    def forward(
        self,
        tokens: Array,
        cache: KVCache | None = None,
        positions: str = "all",
        keep: bool = False,
        recompute: bool = False,
    ) -> tuple[Array, Any]:
        """tokens (b, t) -> logits of "all" positions (b, t, v), of the "last" (b, 1, v), or of "none" (b, 0,
        v).

        cache: keys and values of earlier tokens, extended by these. keep: also return what `backward` needs.
        recompute: keep only what enters each block; `backward` runs the block again for the rest.
        """
        start = 0 if cache is None else cache.length
        pads = None if cache is None else cache.pads
        queries = np.arange(start, start + tokens.shape[1])
        places = np.broadcast_to(queries, tokens.shape)
        if pads is not None:
            # Padding is before the text: each row counts its own tokens from 0.
            places = np.maximum(queries - pads[:, None], 0)
        with phase("embedding"):
            x, saved_embedding = self.embed_tokens.forward(tokens)
            tap("embed_tokens", x)
            turn = rotation(self.rope, self.head_dim, places, x.dtype)
        saved_blocks = []
        for i, block in enumerate(self.layers):
            with phase("layer", layer=i):
                y, saved = block.forward(x, turn, queries, pads, None if cache is None else cache.layers[i])
            if keep:
                saved_blocks.append(x if recompute else saved)
            x = y
            del saved, y
        with phase("head"):
            if positions != "all":
                x = x[:, -1:] if positions == "last" else x[:, :0]
            x, saved_norm = self.norm.forward(x)
            logits, saved_head = self.head.forward(x)
            tap("lm_head", logits)
        again = queries if recompute else None
        return logits, (saved_embedding, saved_blocks, saved_norm, saved_head, turn, again) if keep else None

    def loss_and_gradient(
        self, tokens: Array, targets: Array, count: int | None = None, recompute: bool = False
    ) -> tuple[float, Decoder]:
        """The cross-entropy of targets (b, t) after tokens (b, t), divided by `count` (see `cross_entropy`),
        and its gradient by every weight."""
        with phase("forward"):
            logits, saved = self.forward(tokens, keep=True, recompute=recompute)
        with phase("loss"):
            loss, saved_loss = cross_entropy(logits, targets, count)
            dlogits = cross_entropy_backward(saved_loss)
        with phase("backward"):
            return loss, self.backward(dlogits, saved)

    def backward(self, dlogits: Array, saved: Any) -> Decoder:
        """The gradient of a loss by every weight, from its gradient by the logits (b, t, v)."""
        saved_embedding, saved_blocks, saved_norm, saved_head, turn, again = saved
        with phase("head"):
            dx, dhead = self.head.backward(dlogits, saved_head)
            dx, dnorm = self.norm.backward(dx, saved_norm)
        dlayers: list[Block] = []
        for i in reversed(range(len(self.layers))):
            with phase("layer", layer=i):
                # Popped, so that a layer's activations are free as soon as its gradient is there.
                saved_block = saved_blocks.pop()
                if again is not None:
                    with phase("recomputed"):
                        _, saved_block = self.layers[i].forward(saved_block, turn, again, None, None)
                dx, dblock = self.layers[i].backward(dx, saved_block, turn)
            dlayers.append(dblock)
        with phase("embedding"):
            dembed = self.embed_tokens.backward(dx, saved_embedding)
            if self.lm_head is None and dembed.weight is not None:
                # One matrix in two roles: its gradient is the sum of both.
                np.add(dembed.weight, dhead.weight, out=dembed.weight)
        head = None if self.lm_head is None else dhead
        return Decoder(dembed, tuple(reversed(dlayers)), dnorm, head, self.rope, self.head_dim)

    @property
    def head(self) -> Head:
        return Head(self.embed_tokens.weight) if self.lm_head is None else self.lm_head


@dataclass(frozen=True, slots=True)
class Weight:
    """Where a weight stands and what shape it has: `stored` in a checkpoint, `shape` as the equations view
    it."""

    path: str
    letters: str
    stored: tuple[int, ...]
    shape: tuple[int, ...]
    out_axes: int
    """How many axes of `shape` make up the first axis of `stored`, a matrix's outputs."""


def build(config: ModelConfig, leaf: Callable[[Weight], Any]) -> Decoder:
    """A Decoder for `config` whose every weight is leaf(Weight): read, random, or only a shape."""

    def component(kind: Any, path: str, without: str = "", **settings: Any) -> Any:
        weights = {}
        for name, spec in _annotations(kind).items():
            weights[name] = (
                None if re.fullmatch(without, name) else leaf(_weight(f"{path}.{name}", spec, config.sizes))
            )
        return kind(**weights, **settings)

    def norm(path: str) -> RMSNorm:
        return component(RMSNorm, path, eps=config.rms_norm_eps)

    def block(i: int) -> Block:
        path = f"layers.{i}"
        return Block(
            norm(f"{path}.input_layernorm"),
            component(
                Attention,
                f"{path}.self_attn",
                without="" if config.attention_bias else ".*_bias",
                scale=config.head_dim**-0.5,
                window=config.windows[i],
                query_block=config.attention_block,
            ),
            norm(f"{path}.post_attention_layernorm"),
            component(SwiGLU, f"{path}.mlp", without="" if config.mlp_bias else ".*_bias"),
        )

    return Decoder(
        component(Embedding, "embed_tokens"),
        tuple(block(i) for i in range(config.num_hidden_layers)),
        norm("norm"),
        None if config.tie_word_embeddings else component(Head, "lm_head"),
        config.rope,
        config.head_dim,
    )


def weights_of(config: ModelConfig) -> list[Weight]:
    """Every weight of a model of this config, in order."""
    found: list[Weight] = []
    build(config, found.append)
    return found


@cache
def _annotations(kind: type) -> dict[str, str]:
    """Field -> shape in letters, from the component's `Annotated[Array, "..."]` fields."""
    specs = {}
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        for option in (hint, *typing.get_args(hint)):
            if typing.get_origin(option) is typing.Annotated:
                specs[name] = typing.get_args(option)[1]
                break
    return {field.name: specs[field.name] for field in dataclasses.fields(kind) if field.name in specs}


def _weight(path: str, spec: str, sizes: dict[str, int]) -> Weight:
    """`(k g h) d`: stored as [k*g*h, d], viewed as [k, g, h, d]."""
    axes = _axes(spec)
    stored = tuple(math.prod(sizes[letter] for letter in axis) for axis in axes)
    letters = "".join(axes)
    return Weight(path, letters, stored, tuple(sizes[letter] for letter in letters), len(axes[0]))


@cache
def _axes(spec: str) -> tuple[str, ...]:
    """`(k g h) d` -> ("kgh", "d")"""
    return tuple(re.sub(r"[() ]", "", axis) for axis in re.findall(r"\([^)]*\)|\S+", spec))
