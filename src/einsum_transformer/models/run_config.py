"""JSON configs of this package: model and run settings in one flat file; `"// note"` keys are comments."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from einsum_transformer.arguments import checked, nearest
from einsum_transformer.errors import ConfigError, InputError
from einsum_transformer.models.config import FARTHEST, Keys, ModelConfig, MoEConfig, shown
from einsum_transformer.models.families import family_of
from einsum_transformer.models.lora_config import LoRAConfig
from einsum_transformer.models.unsupported import check_layers, other_json


@checked
@dataclass(frozen=True, slots=True)
class RunConfig:
    """All keys of a config file, with their defaults. Lengths are in tokens; docs/reference/configs.md
    explains each key."""

    arch: str
    d_model: int = 512
    n_layers: int = 8
    n_heads: int = 8
    n_kv_heads: int | None = None
    head_dim: int | None = None
    d_ff: int = 2048
    vocab_size: int = 4096
    max_seq_len: int = 2048
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    attention_bias: bool = False
    sliding_window: int | None = None
    rope_base: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    use_gqa: bool = True
    use_mqa: bool = False
    use_moe: bool = False
    num_experts: int | None = None
    top_k: int | None = None
    moe_d_ff: int | None = None
    shared_d_ff: int | None = None
    arch_keys: dict[str, Any] | None = None
    """Keys of the architecture's config.json for which this class has no field."""
    batch_size: int = 1
    seq_len: int = 128
    block_size: int = 128
    weight_dtype: str = "float32"
    strict_load: bool = True
    quantization: str | None = None
    hf_repo_id: str | None = None
    weight_file: str | None = None
    max_new_tokens: int = 32
    temperature: float = 0.0
    top_k_sample: int = 0
    use_lora: bool = False
    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    lora_merge_after_training: bool = False
    speculative: bool = False
    draft_layers: int | None = None
    prefill_only: bool = False
    learning_rate: float = 1e-3
    source: str = "config"

    def __post_init__(self) -> None:
        family_of(self.arch, self.source)
        if self.weight_dtype not in ("float32", "float64", "bfloat16", "float16"):
            raise ConfigError(
                f"{self.source}: weight_dtype {self.weight_dtype!r}: expected float32, float64, bfloat16 or "
                "float16"
            )
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and not 1 <= value <= 1 << 24:
                raise ConfigError(f"{self.source}: {name} is {value}, expected 1 or more")
        for name in ("temperature", "learning_rate", "top_k_sample"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{self.source}: {name} is {getattr(self, name)}, expected 0 or more")
        if self.use_mqa and self.n_kv_heads not in (None, 1):
            raise ConfigError(
                f"{self.source}: use_mqa means one key/value head, but n_kv_heads is {self.n_kv_heads}"
            )
        if not self.strict_load:
            raise ConfigError(
                f"{self.source}: strict_load cannot be false: a missing tensor is always an error"
            )

    @property
    def lora(self) -> LoRAConfig | None:
        """The LoRA settings of a training run; None without use_lora."""
        if not self.use_lora:
            return None
        return LoRAConfig(self.lora_rank, self.lora_alpha, self.lora_target_modules).for_training()

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads: 1 with use_mqa, n_kv_heads with use_gqa, else n_heads."""
        if self.use_mqa:
            return 1
        return self.n_kv_heads if self.use_gqa and self.n_kv_heads is not None else self.n_heads

    def model_config(self) -> ModelConfig:
        """The ModelConfig that the family reads from these keys under Hugging Face's names, with the switches
        of variants applied."""
        family = family_of(self.arch, self.source)
        keys = Keys(
            {
                "vocab_size": self.vocab_size,
                "hidden_size": self.d_model,
                "intermediate_size": self.d_ff,
                "num_hidden_layers": self.n_layers,
                "num_attention_heads": self.n_heads,
                "num_key_value_heads": self.kv_heads,
                "head_dim": self.head_dim or self.d_model // self.n_heads,
                "max_position_embeddings": self.max_seq_len,
                "rms_norm_eps": self.norm_eps,
                "layer_norm_eps": self.norm_eps,
                "rope_theta": self.rope_base,
                "rope_scaling": self.rope_scaling,
                "tie_word_embeddings": self.tie_embeddings,
                "attention_bias": self.attention_bias or None,
                "sliding_window": self.sliding_window,
                # For families whose window may apply to some layers only: it applies to every layer.
                "use_sliding_window": self.sliding_window is not None,
                "max_window_layers": 0,
                "num_local_experts": self.num_experts,
                "num_experts": self.num_experts,
                "n_routed_experts": self.num_experts,
                "num_experts_per_tok": self.top_k,
                "moe_intermediate_size": self.moe_d_ff,
                "shared_expert_intermediate_size": self.shared_d_ff,
            }
            | (self.arch_keys or {}),
            self.source,
        )
        check_layers(keys.raw, self.source)
        try:
            config = family.read_config(keys)
            config = replace(
                config,
                attention_block=self.block_size,
                num_key_value_heads=config.num_key_value_heads if self.arch_keys else self.kv_heads,
                moe=self._experts(config),
            )
        except ConfigError as error:
            named = str(error).startswith(self.source)
            raise error if named else ConfigError(f"{self.source}: {error}") from None
        if inner := [name for name in keys.unused if name.startswith("rope_scaling.")]:
            raise ConfigError(f"{self.source}: unknown key {inner[0]!r}")
        for name in ("attention_bias", "sliding_window", *(self.arch_keys or {})):
            if name in keys.left_over() and (value := keys.raw[name]) is not None:
                raise ConfigError(f"{self.source}: arch {self.arch!r} does not support {name} = {value}")
        return config

    def _experts(self, config: ModelConfig) -> MoEConfig | None:
        """The architecture's experts, or with use_moe those that replace its feed-forward."""
        if config.moe is not None:
            return config.moe
        stated = [name for name in _EXPERTS if getattr(self, name) is not None]
        if not self.use_moe:
            if stated:
                raise ConfigError(f"arch {self.arch!r} has no {stated[0]}; set use_moe to add experts")
            return None
        shared = self.shared_d_ff or 0
        size = self.moe_d_ff or self.d_ff
        return MoEConfig(self.num_experts or 8, self.top_k or 2, size, shared_intermediate_size=shared)


_EXPERTS = ("num_experts", "top_k", "moe_d_ff", "shared_d_ff")
_COUNTS = (
    *_EXPERTS,
    *("d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff", "vocab_size", "max_seq_len"),
    *("batch_size", "seq_len", "block_size", "max_new_tokens", "lora_rank", "draft_layers"),
)


def parse_run_config(raw: Mapping[str, Any], source: str) -> RunConfig:
    """Read a RunConfig from a JSON object. Errors: ConfigError for unknown keys and values of a wrong type;
    `//` keys are comments."""
    if "arch" not in raw and (found := other_json(raw)):
        raise ConfigError(f"{source}: {found}")
    fields = {field.name: field for field in dataclasses.fields(RunConfig) if field.name != "source"}
    values: dict[str, Any] = {}
    for key, value in raw.items():
        if key.startswith("//"):
            continue
        if key not in fields:
            raise ConfigError(f"{source}: unknown key {key!r}{nearest(key, fields)}")
        values[key] = _checked(key, value, str(fields[key].type), source)
    if "arch" not in values:
        raise ConfigError(f"{source}: key 'arch' is missing")
    return RunConfig(**values, source=source)


def override(config: RunConfig, assignments: list[str]) -> RunConfig:
    """Apply `key=value` pairs of the command line; a value that is not valid JSON is a string."""
    values: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise InputError(f"--set {assignment!r}: expected key=value")
        try:
            values[key] = json.loads(text)
        except ValueError:
            values[key] = text
    return with_keys(config, values)


def with_keys(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """Return the config with these values of its keys, checked like those of a file."""
    raw: dict[str, Any] = dataclasses.asdict(config)
    raw["lora_target_modules"], source = list(config.lora_target_modules), raw.pop("source")
    return parse_run_config(raw | dict(values), source)


def _checked(
    key: str, value: dict[str, Any] | list[Any] | str | float | None, declared: str, source: str
) -> Any:
    """Return `value` if it has the declared type of the field, else raise ConfigError."""
    optional = declared.endswith("| None")
    kind = declared.removesuffix(" | None")
    if value is None and optional:
        return None
    if isinstance(value, (int, float)) and not -FARTHEST < value < FARTHEST:
        raise ConfigError(f"{source}: key {key!r} is {shown(value)}: the number is out of range")
    if kind == "float" and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if kind.startswith("tuple") and isinstance(value, list) and all(isinstance(each, str) for each in value):
        return tuple(value)
    kinds: dict[str, type[Any]] = {"int": int, "bool": bool, "str": str, "dict[str, Any]": dict}
    if kind in kinds and isinstance(value, kinds[kind]) and (kind == "bool" or not isinstance(value, bool)):
        return value
    names = {"tuple[str, ...]": "a list of names", "dict[str, Any]": "an object"}
    names |= {"str": "a string", "int": "an integer"}
    expected = names.get(kind, kind) + (" or null" if optional else "")
    raise ConfigError(f"{source}: key {key!r} is {shown(value)}, expected {expected}")
