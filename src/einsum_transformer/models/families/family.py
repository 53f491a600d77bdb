"""What a family declares: how to read its configs and what its tensors are called. Data and small maps, no
maths."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from einsum_transformer.components.rope import RopeConfig
from einsum_transformer.errors import ConfigError
from einsum_transformer.models.config import Keys, ModelConfig


@dataclass(frozen=True, slots=True)
class Family:
    """One model_type: its architecture in Hugging Face configs, its key map both ways, its tensor names."""

    model_type: str
    architecture: str
    read_config: Callable[[Keys], ModelConfig]
    """From the keys of a config.json (v4 or v5 spelling)."""
    write_config: Callable[[ModelConfig], dict[str, Any]]
    """To the keys of a config.json that transformers reads."""
    read_gguf: Callable[[Keys, Mapping[str, Any]], ModelConfig] | None = None
    """From GGUF metadata without the architecture prefix (`block_count`, ...) and the whole metadata."""
    gguf_names: Mapping[str, str] = field(default_factory=dict)
    """Path of a weight inside its place (`self_attn.q_proj`) -> GGUF name (`attn_q`)."""
    gguf_permuted: frozenset[str] = frozenset()
    """Weights whose rows GGUF stores in the pair order of interleaved RoPE."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Path pattern -> checkpoint name where the rule of `checkpoint_name` does not hold."""
    ignored_tensors: str = r".*\.rotary_emb\.inv_freq"
    """Pattern of checkpoint tensors that hold no weight (buffers that old versions saved)."""

    def checkpoint_name(self, path: str) -> str:
        """`layers.0.self_attn.q_proj` -> `model.layers.0.self_attn.q_proj.weight`; `..._bias` ->
        `..._proj.bias`."""
        for pattern, name in self.renamed.items():
            if re.fullmatch(pattern, path):
                return re.sub(pattern, name, path)
        if path.endswith("_bias"):
            path = f"{path.removesuffix('_bias')}_proj.bias"
        elif not path.endswith(".weight"):
            path = f"{path}.weight"
        return path if path.startswith("lm_head.") else f"model.{path}"

    def gguf_name(self, path: str) -> str:
        """`layers.0.self_attn.q_proj` -> `blk.0.attn_q.weight`."""
        layer = re.fullmatch(r"layers\.(\d+)\.(.*)", path)
        place = layer[2] if layer else path
        kind = "weight"
        if place.endswith("_bias"):
            place, kind = f"{place.removesuffix('_bias')}_proj", "bias"
        name = self.gguf_names[place.removesuffix(".weight")]
        return f"blk.{layer[1]}.{name}.{kind}" if layer else f"{name}.{kind}"


def unsaid(family: Family, config: ModelConfig) -> str:
    """The first field that the family's config.json cannot say, or ""."""
    said = family.read_config(Keys(family.write_config(config), "config.json"))
    aside = {"defaulted", "ignored", "attention_block"}
    names = [each.name for each in fields(ModelConfig) if each.name not in aside]
    return next((name for name in names if getattr(said, name) != getattr(config, name)), "")


def read_rope(keys: Keys, max_positions: int, default_theta: float = 10000.0) -> RopeConfig:
    """RopeConfig from `rope_parameters` (v5) or `rope_theta` + `rope_scaling` with `type` or `rope_type`
    (v4)."""
    theta = keys.get("rope_theta", float, default_theta)
    partial = keys.get("partial_rotary_factor", float, 1.0)
    both = [keys.get(name, dict, None) for name in ("rope_parameters", "rope_scaling")]
    raw = both[0] or both[1] or {}
    inner = Keys(raw, f"{keys.source}: rope_parameters" if both[0] else f"{keys.source}: rope_scaling")
    kinds = [inner.get(name, str, None) for name in ("rope_type", "type")]
    if kinds[0] and kinds[1] and kinds[0] != kinds[1]:
        raise ConfigError(f"{inner.source}: rope_type {kinds[0]!r} contradicts type {kinds[1]!r}")
    if layered := [name for name, value in raw.items() if isinstance(value, dict)]:
        raise ConfigError(
            f"{inner.source}: key {layered[0]!r}: RoPE by layer type is not supported for this model"
        )
    kind = kinds[0] or kinds[1] or "default"
    trained = keys.get("original_max_position_embeddings", int, None)
    trained = trained or inner.get("original_max_position_embeddings", int, None) or max_positions
    settings: dict[str, Any] = {
        "rope_theta": inner.get("rope_theta", float, theta),
        "partial_rotary_factor": inner.get("partial_rotary_factor", float, partial),
        "rope_type": kind,
        # dynamic stretches what lies beyond max_position_embeddings, whatever else is said.
        "original_max_position_embeddings": max_positions if kind == "dynamic" else trained,
    }
    if kind != "default":
        fallback = max_positions / trained if kind == "yarn" and trained > 0 else ...
        settings["factor"] = inner.get("factor", float, fallback)
    if kind == "llama3":
        settings["low_freq_factor"] = inner.get("low_freq_factor", float)
        settings["high_freq_factor"] = inner.get("high_freq_factor", float)
    if kind == "yarn":
        for name, default in (("beta_fast", 32.0), ("beta_slow", 1.0)):
            settings[name] = inner.get(name, float, default)
        settings["truncate"] = inner.get("truncate", bool, True)
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            settings[name] = inner.get(name, float, None)
    place = inner.source.rpartition(": ")[2]
    keys.unused += [f"{place}.{name}" for name in inner.left_over()]
    try:
        return RopeConfig(**settings)
    except ConfigError as error:
        raise ConfigError(f"{inner.source}: {error}") from None


def write_rope(rope: RopeConfig) -> dict[str, Any]:
    """The keys `rope_theta` and `rope_scaling`, which every version of transformers reads."""
    if rope.frequency_factors is not None:
        raise ConfigError(
            "this GGUF's rope_freqs follow no known rope_type, so a config.json cannot say them"
        )
    written: dict[str, Any] = {"rope_theta": rope.rope_theta}
    if rope.partial_rotary_factor != 1:
        written["partial_rotary_factor"] = rope.partial_rotary_factor
    if rope.rope_type == "default":
        return written
    scaling: dict[str, Any] = {"rope_type": rope.rope_type, "factor": rope.factor}
    if rope.rope_type in ("llama3", "yarn"):
        scaling["original_max_position_embeddings"] = rope.original_max_position_embeddings
    if rope.rope_type == "llama3":
        scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.rope_type == "yarn":
        scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            if (value := getattr(rope, name)) is not None:
                scaling[name] = value
    return written | {"rope_scaling": scaling}


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """eos_token_id may be one id or a list of them."""
    if value is None:
        return ()
    ids = tuple(value) if isinstance(value, list) else (value,)
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise ConfigError(f"config key 'eos_token_id' is {value!r}: expected a token id or a list of them")
    return ids
