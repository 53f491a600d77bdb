"""The decoder: tokens, embedding, blocks of attention and feed-forward, norm, head."""

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

from einsum_transformer.components.attention import Attention, FusedAttention
from einsum_transformer.components.embedding import Embedding
from einsum_transformer.components.gated_mlp import FusedGatedMLP, GatedMLP
from einsum_transformer.components.head import Head
from einsum_transformer.components.kv_cache import KVCache
from einsum_transformer.components.latent_attention import DirectQuery, LatentAttention, LatentQuery
from einsum_transformer.components.layernorm import LayerNorm
from einsum_transformer.components.mixing import Mixing
from einsum_transformer.components.mlp import MLP
from einsum_transformer.components.moe import MoE, Routing
from einsum_transformer.components.qk_norm import HeadNorm, WholeNorm
from einsum_transformer.components.rmsnorm import RMSNorm
from einsum_transformer.components.rope import RopeConfig, rotation
from einsum_transformer.engine import phase, tap
from einsum_transformer.errors import InputError
from einsum_transformer.models.blocks import (
    AnyAttention,
    AnyBlock,
    Block,
    FeedForward,
    Norm,
    ParallelBlock,
    PostNormBlock,
)
from einsum_transformer.models.config import LatentConfig, ModelConfig, MoEConfig
from einsum_transformer.numerics.activations import ACTIVATIONS, Activation
from einsum_transformer.numerics.softmax import cross_entropy, cross_entropy_backward
from einsum_transformer.tree import static

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class Decoder:
    """All weights of a model. A gradient is another Decoder; `lm_head` is None where the embedding serves as
    the head."""

    embed_tokens: Embedding
    layers: tuple[AnyBlock, ...]
    norm: Norm
    lm_head: Head | None
    embed_positions: Embedding | None = None
    """A learned row for each position, added to the tokens' rows."""
    ropes: tuple[RopeConfig, ...] = static(default=())
    """The rotations that the layers choose from."""
    head_dim: int = static(default=64)
    logit_cap: float | None = static(default=None)
    logit_scale: float = static(default=1.0)

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
        if cache is not None:
            cache.remember(tokens)
        pads = None if cache is None else cache.pads
        queries = np.arange(start, start + tokens.shape[1])
        places = np.broadcast_to(queries, tokens.shape)
        if pads is not None:
            # Padding is before the text: each row counts its own tokens from 0.
            places = np.maximum(queries - pads[:, None], 0)
        with phase("embedding"):
            x, saved_embedding = self.embed_tokens.forward(tokens)
            tap("embed_tokens", x)
            if self.embed_positions is not None:
                self._check_places(places)
                x = x + tap("embed_positions", self.embed_positions.forward(places)[0])
            ahead = 0 if cache is None else cache.horizon - (0 if pads is None else pads)
            turns = [rotation(rope, self.head_dim, places, x.dtype, ahead) for rope in self.ropes]
        saved_blocks = []
        for i, block in enumerate(self.layers):
            rope = block.self_attn.rope
            turn = None if rope is None else turns[rope]
            with phase("layer", layer=i):
                y, saved = block.forward(x, turn, queries, pads, None if cache is None else cache.layers[i])
                tap("", y)
            if keep:
                saved_blocks.append(x if recompute else saved)
            x = y
            del saved, y
        with phase("head"):
            if positions != "all":
                x = x[:, -1:] if positions == "last" else x[:, :0]
            x, saved_norm = self.norm.forward(x)
            tap("norm", x)
            logits, saved_head = self.head.forward(x, keep)
            tap("logits", logits)
        if not keep:
            return logits, None
        again = queries if recompute else None
        return logits, (saved_embedding, places, saved_blocks, saved_norm, saved_head, turns, again)

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
        saved_embedding, places, saved_blocks, saved_norm, saved_head, turns, again = saved
        with phase("head"):
            dx, dhead = self.head.backward(dlogits, saved_head)
            dx, dnorm = self.norm.backward(dx, saved_norm)
        dlayers: list[AnyBlock] = []
        for i in reversed(range(len(self.layers))):
            rope = self.layers[i].self_attn.rope
            turn = None if rope is None else turns[rope]
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
            dpositions = None if self.embed_positions is None else self.embed_positions.backward(dx, places)
            if self.lm_head is None and dembed.weight is not None:
                # One matrix in two roles: its gradient is the sum of both.
                np.add(dembed.weight, dhead.weight, out=dembed.weight)
        head = None if self.lm_head is None else dhead
        settings = self.ropes, self.head_dim, self.logit_cap, self.logit_scale
        return Decoder(dembed, tuple(reversed(dlayers)), dnorm, head, dpositions, *settings)

    @property
    def head(self) -> Head:
        """The output head; where the embedding serves as one, a Head on the same matrix."""
        if self.lm_head is not None:
            return self.lm_head
        return Head(self.embed_tokens.weight, cap=self.logit_cap, scale=self.logit_scale)

    def _check_places(self, places: Array) -> None:
        assert self.embed_positions is not None
        known, last = self.embed_positions.weight.shape[0], int(places.max())
        if last >= known:
            raise InputError(
                f"{last + 1} tokens are more than the {known} positions that this model has learned"
            )


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
    return _Builder(config, leaf).decoder()


@dataclass(frozen=True, slots=True)
class _Builder:
    """Chooses the components that a config asks for."""

    config: ModelConfig
    leaf: Callable[[Weight], Any]

    def decoder(self) -> Decoder:
        config = self.config
        learned = config.learned_positions
        unbiased = "" if config.lm_head_bias else "bias"
        head = {"cap": config.final_logit_softcapping, "scale": config.logit_scale}
        return Decoder(
            self.component(Embedding, "embed_tokens", scale=config.embedding_scale),
            tuple(self.block(i) for i in range(config.num_hidden_layers)),
            self.norm("norm"),
            None if config.tie_word_embeddings else self.component(Head, "lm_head", unbiased, **head),
            self.component(Embedding, "embed_positions", letters={"weight": "t d"}) if learned else None,
            config.ropes,
            config.head_dim,
            config.final_logit_softcapping,
            config.logit_scale,
        )

    def block(self, i: int) -> AnyBlock:
        kind, path = self.config.block, f"layers.{i}"
        multiplier = self.config.residual_multiplier
        if kind == "pre_norm":
            return Block(
                self.norm(f"{path}.input_layernorm"),
                self.attention(i),
                self.norm(f"{path}.post_attention_layernorm"),
                self.feed_forward(i),
                multiplier,
            )
        if kind in ("parallel", "parallel_two_norms"):
            return ParallelBlock(
                self.norm(f"{path}.input_layernorm"),
                self.attention(i),
                None if kind == "parallel" else self.norm(f"{path}.post_attention_layernorm"),
                self.feed_forward(i),
                multiplier,
            )
        before = kind == "sandwich_norm"
        return PostNormBlock(
            self.norm(f"{path}.input_layernorm") if before else None,
            self.attention(i),
            self.norm(f"{path}.post_attention_layernorm"),
            self.norm(f"{path}.pre_feedforward_layernorm") if before else None,
            self.feed_forward(i),
            self.norm(f"{path}.post_feedforward_layernorm"),
            multiplier,
        )

    def attention(self, i: int) -> AnyAttention:
        config, path = self.config, f"layers.{i}.self_attn"
        settings: dict[str, Any] = {"mixing": self.mixing(i), "rope": config.rope_of(i)}
        if config.latent is not None:
            return self.latent_attention(path, config.latent, settings)
        if config.fused_qkv is not None:
            joined = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
            unbiased = "" if config.attention_bias else ".*_bias"
            settings |= {"by_head": config.fused_qkv == "head", "clip": config.clip_qkv}
            return self.component(FusedAttention, path, unbiased, {"j": joined}, **settings)
        unbiased = "" if config.attention_bias else "o_bias" if config.qkv_bias else ".*_bias"
        norms = (
            {name: self.qk_norm(f"{path}.{name}") for name in ("q_norm", "k_norm")} if config.qk_norm else {}
        )
        return self.component(Attention, path, unbiased, **norms, **settings)

    def latent_attention(self, path: str, latent: LatentConfig, settings: dict[str, Any]) -> LatentAttention:
        size = latent.qk_nope_head_dim + latent.qk_rope_head_dim
        unbiased = "" if self.config.attention_bias else ".*_bias"
        if latent.q_lora_rank is None:
            query: Any = self.component(DirectQuery, f"{path}.query", sizes={"h": size})
        else:
            rank = {"c": latent.q_lora_rank}
            norm = self.latent_norm(f"{path}.query.q_a_layernorm", rank, latent.norm_eps)
            sizes = rank | {"h": size}
            query = self.component(LatentQuery, f"{path}.query", unbiased, sizes, q_a_layernorm=norm)
        rank = {"c": latent.kv_lora_rank, "j": latent.kv_lora_rank + latent.qk_rope_head_dim}
        return self.component(
            LatentAttention,
            path,
            unbiased,
            rank | {"h": latent.qk_nope_head_dim + latent.v_head_dim},
            query=query,
            kv_a_layernorm=self.latent_norm(f"{path}.kv_a_layernorm", rank, latent.norm_eps),
            o_proj=self.weight(f"{path}.o_proj", "d (k h)", {"h": latent.v_head_dim}),
            rope_size=latent.qk_rope_head_dim,
            form=latent.form,
            **settings,
        )

    def latent_norm(self, path: str, sizes: dict[str, int], eps: float) -> RMSNorm:
        return self.component(RMSNorm, path, sizes=sizes, letters={"weight": "c"}, eps=eps)

    def mixing(self, i: int) -> Mixing:
        config = self.config
        return Mixing(
            config.scale_of(i),
            config.windows[i],
            config.attn_logit_softcapping,
            config.alibi_bias_max,
            config.attention_block,
        )

    def qk_norm(self, path: str) -> HeadNorm | WholeNorm:
        config = self.config
        if config.qk_norm == "head":
            return self.component(HeadNorm, path, eps=config.norm_eps, offset=config.norm_offset)
        groups = {"g": 1} if path.endswith("k_norm") else {}
        return self.component(WholeNorm, path, sizes=groups, eps=config.norm_eps)

    def feed_forward(self, i: int) -> FeedForward:
        config, path = self.config, f"layers.{i}.mlp"
        unbiased = "" if config.mlp_bias else ".*_bias"
        activation = ACTIVATIONS[config.hidden_act]
        if config.moe is not None and config.has_experts(i):
            return self.experts(path, config.moe, activation)
        if config.mlp == "fused":
            joined = {"j": 2 * config.intermediate_size}
            return self.component(FusedGatedMLP, path, sizes=joined, activation=activation)
        kind = GatedMLP if config.mlp == "gated" else MLP
        return self.component(kind, path, unbiased, activation=activation)

    def experts(self, path: str, moe: MoEConfig, activation: Activation) -> MoE:
        kind = MLP if self.config.mlp == "plain" else GatedMLP

        def expert(name: str, size: int) -> GatedMLP | MLP:
            return self.component(kind, f"{path}.{name}", ".*_bias", {"f": size}, activation=activation)

        shared = moe.shared_intermediate_size
        return self.component(
            MoE,
            path,
            sizes={"e": moe.num_experts},
            experts=tuple(expert(f"experts.{e}", moe.moe_intermediate_size) for e in range(moe.num_experts)),
            shared_expert=expert("shared_expert", shared) if shared else None,
            shared_expert_gate=self.weight(f"{path}.shared_expert_gate", "e d", {"e": 1})
            if moe.shared_gate
            else None,
            routing=Routing(
                moe.num_experts_per_tok,
                moe.scoring,
                moe.norm_topk_prob,
                moe.routed_scaling_factor,
                moe.n_group,
                moe.topk_group,
            ),
        )

    def norm(self, path: str) -> Norm:
        config = self.config
        if config.norm == "layer":
            return self.component(LayerNorm, path, "" if config.norm_bias else "bias", eps=config.norm_eps)
        return self.component(RMSNorm, path, eps=config.norm_eps, offset=config.norm_offset)

    def component(
        self,
        kind: Any,
        path: str,
        without: str = "",
        sizes: dict[str, int] | None = None,
        letters: dict[str, str] | None = None,
        **settings: Any,
    ) -> Any:
        """A component with its weights, None for those that `without` matches. sizes, letters: where its
        weights have other ones than the config's and the class's."""
        weights = {
            name: None
            if re.fullmatch(without, name)
            else self.weight(f"{path}.{name}", (letters or {}).get(name, spec), sizes)
            for name, spec in _annotations(kind).items()
            if name not in settings
        }
        return kind(**weights, **settings)

    def weight(self, path: str, spec: str, sizes: dict[str, int] | None = None) -> Any:
        return self.leaf(_weight(path, spec, self.config.sizes | (sizes or {})))


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
