"""ModelConfig: all settings of a model's shapes and arithmetic, named as in Hugging Face configs."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from einsum_transformer.arguments import checked_config
from einsum_transformer.choices import check_choices
from einsum_transformer.components.latent_attention import Form
from einsum_transformer.components.moe import Scoring
from einsum_transformer.components.rope import RopeConfig
from einsum_transformer.errors import ConfigError
from einsum_transformer.numerics.activations import HiddenAct

LayerType = Literal["full_attention", "sliding_attention"]
FULL, SLIDING = LAYER_TYPES = get_args(LayerType)
BlockKind = Literal["pre_norm", "sandwich_norm", "post_norm", "parallel", "parallel_two_norms"]
"""Norms before attention and feed-forward; before and after; after; attention and feed-forward in parallel,
with one norm before both, or one before each."""
NormKind = Literal["rms", "layer"]
MLPKind = Literal["gated", "fused", "plain"]
"""Gated, such as SwiGLU; gated with one matrix for gate and up; two matrices with an activation between."""
QKVOrder = Literal["role", "head"]
"""Row order of a fused matrix: all queries, then all keys, then all values; or head by head."""
QKNormKind = Literal["head", "whole"]
MOST_LAYERS = 1 << 12
FARTHEST = 1 << 62
_MOST = {"num_hidden_layers": MOST_LAYERS, "num_attention_heads": 1 << 16, "num_key_value_heads": 1 << 16}
_LARGEST = 1 << 24
"""No size of a real model comes near this; a larger one is a mistake or an attack."""


@dataclass(frozen=True, slots=True)
class MoEConfig:
    """A mixture of experts in place of the feed-forward."""

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_intermediate_size: int = 0
    """Hidden size of the shared expert, which processes every token; 0: no shared expert."""
    shared_gate: bool = False
    """Whether the shared expert's output is multiplied by a gate."""
    scoring: Scoring = "softmax"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    n_group: int = 1
    topk_group: int = 1
    layers: tuple[bool, ...] = ()
    """Which layers have experts; () for all."""

    def __post_init__(self) -> None:
        check_choices(self)
        for name, most in (
            ("num_experts", 1 << 16),
            ("moe_intermediate_size", _LARGEST),
            ("n_group", 1 << 16),
        ):
            _check_count(name, getattr(self, name), most)
        _check_count("num_experts_per_tok", self.num_experts_per_tok, self.num_experts)
        _check_count("topk_group", self.topk_group, self.n_group)
        if self.num_experts % self.n_group:
            raise ConfigError(
                f"config keys disagree: num_experts {self.num_experts} is not a multiple of n_group "
                f"{self.n_group}"
            )
        if self.num_experts_per_tok > self.num_experts // self.n_group * self.topk_group:
            raise ConfigError(
                f"config keys disagree: num_experts_per_tok is {self.num_experts_per_tok}, but "
                f"{self.topk_group} groups of {self.num_experts // self.n_group} experts have fewer"
            )
        if not 0 <= self.shared_intermediate_size <= _LARGEST:
            raise ConfigError(
                f"the shared expert's size is {self.shared_intermediate_size}: expected 0 to {_LARGEST}"
            )
        if not 0 < self.routed_scaling_factor <= 1e6:
            raise ConfigError(
                f"routed_scaling_factor is {self.routed_scaling_factor}: expected a positive number up to 1e6"
            )


@dataclass(frozen=True, slots=True)
class LatentConfig:
    """Sizes of multi-head latent attention."""

    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    """None: queries are projected directly, without a latent."""
    norm_eps: float = 1e-6
    """Epsilon of the norms of the latents: 1e-6 in DeepSeek-V2, independent of its rms_norm_eps."""
    form: Form = "auto"
    """The equations that run: "expanded", "absorbed", or "auto"."""

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            _check_count(name, getattr(self, name), _LARGEST)
        if self.q_lora_rank is not None:
            _check_count("q_lora_rank", self.q_lora_rank, _LARGEST)
        _check_range("norm_eps", self.norm_eps, 1)


@checked_config
@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The settings of a decoder. Windows and lengths are in tokens."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    block: BlockKind = "pre_norm"
    """Placement of norms and residual connections."""
    norm: NormKind = "rms"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    """1 for norms that multiply by 1 + weight (Gemma)."""
    norm_bias: bool = True
    """Whether LayerNorms have biases."""
    mlp: MLPKind = "gated"
    moe: MoEConfig | None = None
    hidden_act: HiddenAct = "silu"
    latent: LatentConfig | None = None
    """Sizes of latent attention; head_dim is then the number of dimensions per head that RoPE rotates."""
    fused_qkv: QKVOrder | None = None
    """Row order of one fused matrix for q, k and v; None: separate matrices."""
    qk_norm: QKNormKind | None = None
    """RMSNorm of queries and keys: per "head", or over the "whole" vector; None: no norm."""
    attention_scale: float | None = None
    """Factor of the attention scores; None: 1 / sqrt(head_dim)."""
    scale_by_layer: bool = False
    """Whether the scores of layer i are also divided by i + 1."""
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    clip_qkv: float | None = None
    sinks: bool = False
    """Whether each query head has a learned attention sink; not with fused or latent attention."""
    rope: RopeConfig | None = field(default_factory=RopeConfig)
    local_rope: RopeConfig | None = None
    """RoPE of the sliding-window layers; None: the same as `rope`."""
    rope_layers: tuple[bool, ...] = ()
    """Whether each layer uses RoPE (True) or NoPE (False); (): all layers use RoPE."""
    learned_positions: bool = False
    alibi_bias_max: float | None = None
    sliding_window: int | None = None
    layer_types: tuple[LayerType, ...] = ()
    """The attention type of each layer; (): `sliding_window` applies to all layers."""
    attention_bias: bool = False
    """Biases of q, k, v and o."""
    qkv_bias: bool = False
    """Biases of q, k and v only."""
    mlp_bias: bool = False
    lm_head_bias: bool = False
    embedding_scale: float = 1.0
    residual_multiplier: float = 1.0
    """Factor of the outputs of attention and feed-forward before they are added to x."""
    logit_scale: float = 1.0
    """Factor of the logits, applied before the soft cap."""
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    attention_block: int = 128
    """Queries per tile of the attention; changes speed and memory, not results."""
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    defaulted: tuple[str, ...] = field(default=(), compare=False)
    """Keys that are missing in the source."""
    ignored: tuple[str, ...] = field(default=(), compare=False)
    """Keys of the source that have no effect."""
    training: tuple[tuple[str, Any], ...] = field(default=(), compare=False)
    """Keys of the source that affect only training, such as dropout, with their values; not applied."""

    def __post_init__(self) -> None:
        check_choices(self)
        for name in _SIZES:
            _check_count(name, getattr(self, name), _MOST.get(name, _LARGEST))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"config keys disagree: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.sliding_window is not None:
            _check_count("sliding_window", self.sliding_window, 1 << 31)
        self._check_layers()
        if self.latent is not None and self.num_key_value_heads != self.num_attention_heads:
            raise ConfigError(
                f"config keys disagree: num_key_value_heads is {self.num_key_value_heads}, but latent "
                f"attention needs num_attention_heads {self.num_attention_heads}"
            )
        self._check_attention()
        for name, most in (("norm_eps", 1), ("initializer_range", 100)):
            _check_range(name, getattr(self, name), most)
        for name in _FACTORS:
            value = getattr(self, name)
            if value is not None and not 1e-9 <= value <= 1e9:
                raise ConfigError(f"config key {name!r} is {value}: expected a number from 1e-9 to 1e9")
        for rope in self.ropes:
            rotated = int(self.head_dim * rope.partial_rotary_factor)
            if rotated < 2 or rotated % 2:
                raise ConfigError(
                    f"head_dim {self.head_dim}: RoPE rotates {rotated} dimensions: not an even number >= 2"
                )
            factors = (len(rope.short_factor), len(rope.long_factor))
            if rope.rope_type == "longrope" and factors != (rotated // 2,) * 2:
                raise ConfigError(
                    f"rope short_factor and long_factor have {factors[0]} and {factors[1]} entries, but RoPE "
                    f"rotates {rotated // 2} pairs"
                )

    def _check_attention(self) -> None:
        kind = "latent" if self.latent is not None else "fused" if self.fused_qkv is not None else "split"
        only = {
            "sinks": ("split", self.sinks),
            "qkv_bias": ("split", self.qkv_bias),
            "qk_norm": ("split", self.qk_norm is not None),
            "clip_qkv": ("fused", self.clip_qkv is not None),
        }
        for name, (needed, is_set) in only.items():
            if is_set and kind != needed:
                raise ConfigError(
                    f"config keys disagree: {name} needs {needed} matrices of q, k and v, but they are {kind}"
                )

    def _check_layers(self) -> None:
        lists = {"layer_types": self.layer_types, "rope_layers": self.rope_layers}
        lists["layers with experts"] = () if self.moe is None else self.moe.layers
        for name, found in lists.items():
            if found and len(found) != self.num_hidden_layers:
                raise ConfigError(
                    f"config keys disagree: {name} has {len(found)} entries, but num_hidden_layers is "
                    f"{self.num_hidden_layers}"
                )
        if SLIDING in self.layer_types and self.sliding_window is None:
            raise ConfigError(
                "config keys disagree: layer_types contains sliding_attention, but sliding_window is null"
            )

    def truncated(self, layers: int) -> ModelConfig:
        """The config truncated to its first `layers` layers."""
        return replace(
            self,
            num_hidden_layers=layers,
            layer_types=self.layer_types[:layers],
            rope_layers=self.rope_layers[:layers],
            moe=self.moe and replace(self.moe, layers=self.moe.layers[:layers]),
        )

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each axis letter (docs/concepts/notation.md) that occurs in the shapes of weights."""
        return {
            "v": self.vocab_size,
            "d": self.hidden_size,
            "f": self.intermediate_size,
            "k": self.num_key_value_heads,
            "g": self.num_attention_heads // self.num_key_value_heads,
            "h": self.head_dim,
            "t": self.max_position_embeddings,
        }

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The sliding window of each layer; None for full attention."""
        kinds = self.layer_types or (SLIDING,) * self.num_hidden_layers
        return tuple(self.sliding_window if kind == SLIDING else None for kind in kinds)

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """The RoPE settings that `rope_of` indexes."""
        return tuple(rope for rope in (self.rope, self.local_rope) if rope is not None)

    def has_experts(self, layer: int) -> bool:
        """Whether a layer's feed-forward is a mixture of experts."""
        return self.moe is not None and (not self.moe.layers or self.moe.layers[layer])

    def rope_of(self, layer: int) -> int | None:
        """Index in `ropes` of a layer's RoPE; None for NoPE (no position encoding)."""
        if self.rope is None or (self.rope_layers and not self.rope_layers[layer]):
            return None
        return 1 if self.local_rope is not None and self.windows[layer] is not None else 0

    def scale_of(self, layer: int) -> float:
        """The factor of a layer's attention scores."""
        scale = self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale
        return scale / (layer + 1) if self.scale_by_layer else scale


def _check_count(name: str, value: Any, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ConfigError(f"config key {name!r} is {shown(value)}: expected an integer from 1 to {most}")


def _check_range(name: str, value: float, most: float) -> None:
    if not 0 <= value <= most:
        raise ConfigError(f"config key {name!r} is {value}: expected a number from 0 to {most}")


_FACTORS = (
    *("attention_scale", "attn_logit_softcapping", "final_logit_softcapping", "clip_qkv", "alibi_bias_max"),
    *("embedding_scale", "residual_multiplier", "logit_scale"),
)
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "attention_block",
)


def shown(value: Any) -> str:
    """The repr of a value for a message, truncated to 60 characters."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        text = "an integer of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."


class Keys:
    """Typed reads from a JSON object, which record the keys that were read, missing and left over."""

    def __init__(self, raw: Mapping[str, Any], source: str) -> None:
        self.raw: Mapping[str, Any] = raw
        self.source: str = source
        self.seen: set[str] = set()
        self.defaulted: list[str] = []
        self.unused: list[str] = []
        """Unread keys of nested objects, such as `rope_scaling.x`."""
        self._file_names: Mapping[str, str] = {}
        """Requested name -> name in the file, which messages and lists use."""

    def get(self, name: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
        """The value of `name`, or `default` if it is absent or null; without a default, ConfigError."""
        name = self._file_names.get(name, name)
        self.seen.add(name)
        value = self.raw.get(name)
        if value is None:
            if default is ...:
                raise ConfigError(f"{self.source}: key {name!r} is missing")
            self.defaulted.append(name)
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        as_float = float in kinds and isinstance(value, int)
        if not (isinstance(value, kinds) or as_float) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join(each.__name__ for each in kinds)
            raise ConfigError(f"{self.source}: key {name!r} is {shown(value)}, expected {names}")
        if isinstance(value, (int, float)) and not -FARTHEST < value < FARTHEST:
            raise ConfigError(f"{self.source}: key {name!r} is {shown(value)}: the number is out of range")
        return float(value) if as_float else value

    def nullable(self, name: str, kind: type | tuple[type, ...], default: Any) -> Any:
        """The value of a key for which null has a meaning: None for null, `default` if it is absent."""
        return self.get(name, kind, default if name not in self.raw else None)

    def renamed(self, names: Mapping[str, str]) -> Keys:
        """The same keys under other names (file name -> new name); reads are recorded in both objects."""
        keys = copy(self)
        keys._file_names = {new: old for old, new in names.items() if old in self.raw}
        return keys

    def left_over(self) -> tuple[str, ...]:
        return (*sorted(set(self.raw) - self.seen), *self.unused)
