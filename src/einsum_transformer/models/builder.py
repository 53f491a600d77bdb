"""build(): the decoder of a config, with arrays, leaves or only shapes as weights."""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

from einsum_transformer.components.attention import Attention, FusedAttention
from einsum_transformer.components.embedding import Embedding
from einsum_transformer.components.gated_mlp import FusedGatedMLP, GatedMLP
from einsum_transformer.components.head import Head
from einsum_transformer.components.latent_attention import DirectQuery, LatentAttention, LatentQuery
from einsum_transformer.components.layernorm import LayerNorm
from einsum_transformer.components.mixing import Mixing
from einsum_transformer.components.mlp import MLP
from einsum_transformer.components.moe import MoE, Routing
from einsum_transformer.components.qk_norm import HeadNorm, WholeNorm
from einsum_transformer.components.rmsnorm import RMSNorm
from einsum_transformer.errors import ConfigError
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
from einsum_transformer.models.decoder import Decoder
from einsum_transformer.numerics.activations import ACTIVATIONS, Activation

C = TypeVar("C")
"""A component."""
_QKV_BIASES = frozenset({"q_bias", "k_bias", "v_bias"})
_ATTENTION_BIASES = _QKV_BIASES | {"o_bias", "qkv_bias", "q_a_bias", "kv_a_bias"}
_MLP_BIASES = frozenset({"gate_bias", "up_bias", "down_bias"})


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """The path of a weight in the decoder and its shape: `stored` in a checkpoint, `shape` in equations."""

    path: str
    letters: str
    stored: tuple[int, ...]
    shape: tuple[int, ...]
    out_axes: int
    """Number of axes of `shape` that form the first axis of `stored`, the outputs of a matrix."""

    @property
    def component(self) -> str:
        """Path of the component that the weight belongs to."""
        return self.path.rpartition(".")[0]


def build(config: ModelConfig, leaf: Callable[[WeightSpec], Any]) -> Decoder:
    """Return a Decoder for `config` whose weights are leaf(WeightSpec): loaded, random, or only shapes."""
    return _Builder(config, leaf).decoder()


def weights_of(config: ModelConfig) -> list[WeightSpec]:
    """The specs of all weights of a model of this config, in order."""
    found: list[WeightSpec] = []
    build(config, found.append)
    return found


@dataclass(frozen=True, slots=True)
class _Builder:
    """Builds the components that a config selects."""

    config: ModelConfig
    leaf: Callable[[WeightSpec], Any]

    def decoder(self) -> Decoder:
        config = self.config
        learned = config.learned_positions
        # In the order of the fields, which is also the order of `weights_of`.
        return Decoder(
            embed_tokens=self.component(Embedding, "embed_tokens", scale=config.embedding_scale),
            layers=tuple(self.block(i) for i in range(config.num_hidden_layers)),
            norm=self.norm("norm"),
            lm_head=None if config.tie_word_embeddings else self.head(),
            embed_positions=self.component(Embedding, "embed_positions", letters={"weight": "t d"})
            if learned
            else None,
            ropes=config.ropes,
            head_dim=config.head_dim,
            logit_scale=config.logit_scale,
            logit_cap=config.final_logit_softcapping,
        )

    def head(self) -> Head:
        config = self.config
        without = () if config.lm_head_bias else ("bias",)
        scale, cap = config.logit_scale, config.final_logit_softcapping
        return self.component(Head, "lm_head", without, scale=scale, cap=cap)

    def block(self, i: int) -> AnyBlock:
        kind, multiplier = self.config.block, self.config.residual_multiplier

        def norm(name: str) -> Norm:
            return self.norm(f"layers.{i}.{name}")

        if kind == "pre_norm":
            return Block(
                input_layernorm=norm("input_layernorm"),
                self_attn=self.attention(i),
                post_attention_layernorm=norm("post_attention_layernorm"),
                mlp=self.feed_forward(i),
                residual_multiplier=multiplier,
            )
        if kind in ("parallel", "parallel_two_norms"):
            return ParallelBlock(
                input_layernorm=norm("input_layernorm"),
                self_attn=self.attention(i),
                post_attention_layernorm=None if kind == "parallel" else norm("post_attention_layernorm"),
                mlp=self.feed_forward(i),
                residual_multiplier=multiplier,
            )
        if kind in ("sandwich_norm", "post_norm"):
            before = kind == "sandwich_norm"
            return PostNormBlock(
                input_layernorm=norm("input_layernorm") if before else None,
                self_attn=self.attention(i),
                post_attention_layernorm=norm("post_attention_layernorm"),
                pre_feedforward_layernorm=norm("pre_feedforward_layernorm") if before else None,
                mlp=self.feed_forward(i),
                post_feedforward_layernorm=norm("post_feedforward_layernorm"),
                residual_multiplier=multiplier,
            )
        raise _unknown("block", kind)

    def attention(self, i: int) -> AnyAttention:
        config, path = self.config, f"layers.{i}.self_attn"
        settings: dict[str, Any] = {"mixing": self.mixing(i), "rope": config.rope_of(i)}
        if config.latent is not None:
            return self.latent_attention(path, config.latent, settings)
        if config.fused_qkv is not None:
            heads = config.num_attention_heads + 2 * config.num_key_value_heads
            return self.component(
                FusedAttention,
                path,
                without=() if config.attention_bias else _ATTENTION_BIASES,
                sizes={"j": heads * config.head_dim},
                by_head=config.fused_qkv == "head",
                clip=config.clip_qkv,
                **settings,
            )
        without = _ATTENTION_BIASES - _QKV_BIASES if config.qkv_bias else _ATTENTION_BIASES
        if config.qk_norm is not None:
            settings |= {name: self.qk_norm(f"{path}.{name}") for name in ("q_norm", "k_norm")}
        absent = (*(() if config.attention_bias else without), *(() if config.sinks else ("sinks",)))
        return self.component(Attention, path, absent, **settings)

    def latent_attention(self, path: str, latent: LatentConfig, settings: dict[str, Any]) -> LatentAttention:
        size = latent.qk_nope_head_dim + latent.qk_rope_head_dim
        without = () if self.config.attention_bias else _ATTENTION_BIASES
        if latent.q_lora_rank is None:
            query: Any = self.component(DirectQuery, f"{path}.query", sizes={"h": size})
        else:
            rank = {"c": latent.q_lora_rank}
            norm = self.latent_norm(f"{path}.query.q_a_layernorm", rank, latent)
            sizes = rank | {"h": size}
            query = self.component(LatentQuery, f"{path}.query", without, sizes, q_a_layernorm=norm)
        rank = {"c": latent.kv_lora_rank, "j": latent.kv_lora_rank + latent.qk_rope_head_dim}
        return self.component(
            LatentAttention,
            path,
            without,
            rank | {"h": latent.qk_nope_head_dim + latent.v_head_dim},
            query=query,
            kv_a_layernorm=self.latent_norm(f"{path}.kv_a_layernorm", rank, latent),
            o_proj=self.weight(f"{path}.o_proj", "d (k h)", {"h": latent.v_head_dim}),
            rope_size=latent.qk_rope_head_dim,
            form=latent.form,
            **settings,
        )

    def latent_norm(self, path: str, sizes: dict[str, int], latent: LatentConfig) -> RMSNorm:
        return self.component(RMSNorm, path, sizes=sizes, letters={"weight": "c"}, eps=latent.norm_eps)

    def mixing(self, i: int) -> Mixing:
        config = self.config
        return Mixing(
            scale=config.scale_of(i),
            window=config.windows[i],
            softcap=config.attn_logit_softcapping,
            alibi_bias_max=config.alibi_bias_max,
            query_block=config.attention_block,
        )

    def qk_norm(self, path: str) -> HeadNorm | WholeNorm:
        config = self.config
        if config.qk_norm == "head":
            return self.component(HeadNorm, path, eps=config.norm_eps, offset=config.norm_offset)
        if config.qk_norm == "whole":
            groups = {"g": 1} if path.endswith("k_norm") else {}
            return self.component(WholeNorm, path, sizes=groups, eps=config.norm_eps)
        raise _unknown("qk_norm", config.qk_norm)

    def feed_forward(self, i: int) -> FeedForward:
        config, path = self.config, f"layers.{i}.mlp"
        activation = ACTIVATIONS[config.hidden_act]
        if config.moe is not None and config.has_experts(i):
            return self.experts(path, config.moe, activation)
        if config.mlp == "fused":
            joined = {"j": 2 * config.intermediate_size}
            return self.component(FusedGatedMLP, path, sizes=joined, activation=activation)
        without = () if config.mlp_bias else _MLP_BIASES
        if config.mlp == "gated":
            return self.component(GatedMLP, path, without, activation=activation)
        if config.mlp == "plain":
            return self.component(MLP, path, without, activation=activation)
        raise _unknown("mlp", config.mlp)

    def experts(self, path: str, moe: MoEConfig, activation: Activation) -> MoE:
        kind = MLP if self.config.mlp == "plain" else GatedMLP

        def expert(name: str, size: int) -> GatedMLP | MLP:
            return self.component(kind, f"{path}.{name}", _MLP_BIASES, {"f": size}, activation=activation)

        shared, gate = moe.shared_intermediate_size, None
        experts = tuple(expert(f"experts.{e}", moe.moe_intermediate_size) for e in range(moe.num_experts))
        shared_expert = expert("shared_expert", shared) if shared else None
        if moe.shared_gate:
            gate = self.weight(f"{path}.shared_expert_gate", "e d", {"e": 1})
        return self.component(
            MoE,
            path,
            sizes={"e": moe.num_experts},
            experts=experts,
            shared_expert=shared_expert,
            shared_expert_gate=gate,
            routing=Routing(
                top_k=moe.num_experts_per_tok,
                scoring=moe.scoring,
                normalize=moe.norm_topk_prob,
                scaling=moe.routed_scaling_factor,
                groups=moe.n_group,
                top_groups=moe.topk_group,
            ),
        )

    def norm(self, path: str) -> Norm:
        config = self.config
        if config.norm == "layer":
            without = () if config.norm_bias else ("bias",)
            return self.component(LayerNorm, path, without, eps=config.norm_eps)
        if config.norm == "rms":
            return self.component(RMSNorm, path, eps=config.norm_eps, offset=config.norm_offset)
        raise _unknown("norm", config.norm)

    def component(
        self,
        kind: type[C],
        path: str,
        without: Collection[str] = (),
        sizes: dict[str, int] | None = None,
        letters: dict[str, str] | None = None,
        **settings: Any,
    ) -> C:
        """A component with its weights; those in `without` are None. sizes, letters: override the sizes of
        the config and the axis letters of the class."""
        weights = {
            name: None
            if name in without
            else self.weight(f"{path}.{name}", (letters or {}).get(name, spec), sizes)
            for name, spec in _annotations(kind).items()
            if name not in settings
        }
        return kind(**weights, **settings)

    def weight(self, path: str, spec: str, sizes: dict[str, int] | None = None) -> Any:
        return self.leaf(_weight(path, spec, self.config.sizes | (sizes or {})))


def _unknown(field: str, value: Any) -> ConfigError:
    return ConfigError(f"{field} {value!r}: the builder has no component for it")


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


def _weight(path: str, spec: str, sizes: dict[str, int]) -> WeightSpec:
    """`(k g h) d`: stored as [k*g*h, d], viewed as [k, g, h, d]."""
    axes = _axes(spec)
    stored = tuple(math.prod(sizes[letter] for letter in axis) for axis in axes)
    letters = "".join(axes)
    return WeightSpec(path, letters, stored, tuple(sizes[letter] for letter in letters), len(axes[0]))


@cache
def _axes(spec: str) -> tuple[str, ...]:
    """`(k g h) d` -> ("kgh", "d")"""
    return tuple(re.sub(r"[() ]", "", axis) for axis in re.findall(r"\([^)]*\)|\S+", spec))
