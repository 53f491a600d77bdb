"""Family: how to read and write a family's configs, and its tensor names. Data only, no arithmetic."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from einsum_transformer.components.rope import ROPE_TYPES, RopeConfig
from einsum_transformer.errors import ConfigError
from einsum_transformer.models.config import (
    FARTHEST,
    FULL,
    LAYER_TYPES,
    SLIDING,
    Keys,
    LayerType,
    ModelConfig,
    shown,
)
from einsum_transformer.notes import note


@dataclass(frozen=True, slots=True)
class Family:
    """One model_type: its architecture in Hugging Face configs, its config keys and its tensor names."""

    model_type: str
    architecture: str
    read_config: Callable[[Keys], ModelConfig]
    """Reads the keys of a config.json of transformers 4 or 5."""
    write_config: Callable[[ModelConfig], dict[str, Any]]
    """Returns the keys of a config.json that transformers reads."""
    read_gguf: Callable[[Keys, Mapping[str, Any]], ModelConfig] | None = None
    """Reads GGUF metadata without the architecture prefix (`block_count`, ...) and the whole metadata."""
    write_gguf: Callable[[ModelConfig], dict[str, Any]] | None = None
    """Returns GGUF metadata without the architecture prefix; None: no GGUF file describes the family."""
    gguf_names: Mapping[str, str] = field(default_factory=dict)
    """Path of a weight within its layer (`self_attn.q_proj`) -> GGUF name (`attn_q`)."""
    gguf_architecture: str = ""
    """The architecture in GGUF files; "": the model_type."""
    gguf_norm_offset: float = 0.0
    """Constant that GGUF files add to the weights of norms."""
    gguf_permuted: frozenset[str] = frozenset()
    """Weights whose rows GGUF stores in the pair order of interleaved RoPE."""
    llama_cpp_windows: bool = True
    """Whether llama.cpp applies the sliding window of a GGUF file."""
    prefix: str = "model."
    """The prefix of the names of all tensors except the head's."""
    other_prefixes: tuple[str, ...] = ()
    """Their prefixes in other files of the same models."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Name of a part here -> in a checkpoint (`o_proj` -> `dense`), "" if it has no name there."""
    leaf_names: Mapping[str, str] = field(default_factory=lambda: {"sinks": "sinks"})
    """Name of a weight here -> in a checkpoint, for weights that are not a module's `.weight` or `.bias`."""
    module_names: Mapping[str, str] = field(default_factory=dict)
    """Name of a part in a checkpoint -> its module in transformers 5, where they differ."""
    stacked_experts: bool = False
    """Whether transformers 5 stores the experts of a layer as two stacked parameters."""
    transposed: frozenset[str] = frozenset()
    """Parts whose matrices a checkpoint stores as [in, out]."""
    ignored_tensors: str = r".*\.rotary_emb\.inv_freq"
    """Pattern of checkpoint tensors that are not weights (buffers that old versions saved)."""

    def checkpoint_name(self, path: str) -> str:
        """`layers.0.self_attn.q_proj` -> `model.layers.0.self_attn.q_proj.weight`; `..._bias` ->
        `..._proj.bias`; `leaf_names` takes precedence."""
        *parts, last = path.split(".")
        kind = "weight"
        if last in self.leaf_names:
            kind = self.leaf_names[last]
        elif last in ("weight", "bias"):
            kind = last
        elif last.endswith("_bias"):
            parts, kind = [*parts, f"{last.removesuffix('_bias')}_proj"], "bias"
        else:
            parts = [*parts, last]
        name = ".".join(filter(None, [*(self.names.get(part, part) for part in parts), kind]))
        return name if parts[0] == "lm_head" else f"{self.prefix}{name}"

    def module_name(self, path: str) -> str:
        """The name in transformers 5 of the module whose weight is at `path`."""
        parts = self.checkpoint_name(path).removesuffix(".weight").split(".")
        return ".".join(self.module_names.get(part, part) for part in parts)

    def is_transposed(self, path: str) -> bool:
        """Whether a checkpoint stores this matrix as [in, out]."""
        return path.rpartition(".")[2] in self.transposed

    @property
    def prefixes(self) -> tuple[str, ...]:
        """All prefixes of names in files of these models, the usual one first. A base model (AutoModel) is
        saved without the first part of the prefix."""
        whole = (self.prefix, *self.other_prefixes)
        return tuple(dict.fromkeys((*whole, *(prefix.partition(".")[2] for prefix in whole))))

    def found_in(self, tensors: Iterable[str]) -> Family:
        """This family with the prefix of a checkpoint's tensors."""
        names = set(tensors)
        for prefix in self.prefixes:
            family = replace(self, prefix=prefix)
            if family.checkpoint_name("embed_tokens.weight") in names:
                return family
        return self

    def gguf_name(self, path: str) -> str:
        """`layers.0.self_attn.q_proj` -> `blk.0.attn_q.weight`."""
        layer = re.fullmatch(r"layers\.(\d+)\.(.*)", path)
        local = layer[2] if layer else path
        kind = "weight"
        if local.endswith("_bias"):
            local, kind = f"{local.removesuffix('_bias')}_proj", "bias"
        if local.endswith(".bias"):
            local, kind = local.removesuffix(".bias"), "bias"
        name = self.gguf_names[local.removesuffix(".weight")]
        return f"blk.{layer[1]}.{name}.{kind}" if layer else f"{name}.{kind}"


def unwritten_field(family: Family, config: ModelConfig) -> str:
    """The first field that the family's config.json cannot represent, or ""."""
    written = family.read_config(Keys(family.write_config(config), "config.json"))
    excluded = {"defaulted", "ignored", "training", "attention_block"}
    names = [each.name for each in fields(ModelConfig) if each.name not in excluded]
    return next((name for name in names if getattr(written, name) != getattr(config, name)), "")


def read_rope(
    keys: Keys,
    max_positions: int,
    default_theta: float = 10000.0,
    default_partial: float = 1.0,
    aliases: Mapping[str, str] | None = None,
) -> RopeConfig:
    """Read a RopeConfig from `rope_parameters` (transformers 5), or from `rope_theta` and `rope_scaling` with
    `type` or `rope_type` (transformers 4). aliases: other names of rope types."""
    theta = keys.get("rope_theta", float, default_theta)
    partial = keys.get("partial_rotary_factor", float, default_partial)
    both = [keys.get(name, dict, None) for name in ("rope_parameters", "rope_scaling")]
    raw = both[0] or both[1] or {}
    inner = Keys(raw, f"{keys.source}: rope_parameters" if both[0] else f"{keys.source}: rope_scaling")
    if layered := [name for name, value in raw.items() if isinstance(value, dict)]:
        raise ConfigError(
            f"{inner.source}: key {layered[0]!r}: RoPE per layer type is not supported for this model"
        )
    trained = keys.get("original_max_position_embeddings", int, None)
    rope = read_rope_type(inner, max_positions, theta, partial, trained, aliases or {})
    prefix = inner.source.rpartition(": ")[2]
    keys.unused += [f"{prefix}.{name}" for name in inner.left_over()]
    return rope


_ROPE_KEYS: dict[str, dict[str, tuple[type, Any]]] = {
    "llama3": {"low_freq_factor": (float, ...), "high_freq_factor": (float, ...)},
    "longrope": {"short_factor": (list, ...), "long_factor": (list, ...), "attention_factor": (float, None)},
    "yarn": {
        "beta_fast": (float, 32.0),
        "beta_slow": (float, 1.0),
        "truncate": (bool, True),
        **dict.fromkeys(("attention_factor", "mscale", "mscale_all_dim"), (float, None)),
    },
}
"""The keys of a rope_type besides factor: key -> type and default (`...`: required)."""


def read_rope_type(
    inner: Keys,
    max_positions: int,
    theta: float,
    partial: float = 1.0,
    stated: int | None = None,
    aliases: Mapping[str, str] | None = None,
) -> RopeConfig:
    """Read a RopeConfig from its JSON object; the arguments are the values of absent keys."""
    kinds = [inner.get(name, str, None) for name in ("rope_type", "type")]
    if kinds[0] and kinds[1] and kinds[0] != kinds[1]:
        raise ConfigError(f"{inner.source}: rope_type {kinds[0]!r} contradicts type {kinds[1]!r}")
    kind = kinds[0] or kinds[1] or "default"
    kind = (aliases or {}).get(kind, kind)
    if kind not in ROPE_TYPES:
        raise ConfigError(
            f"{inner.source}: rope_type {shown(kind)} is not supported; supported: {', '.join(ROPE_TYPES)}"
        )
    own = inner.get("original_max_position_embeddings", int, None)
    trained: int = stated or own or max_positions
    settings: dict[str, Any] = {
        "rope_theta": inner.get("rope_theta", float, theta),
        "partial_rotary_factor": inner.get("partial_rotary_factor", float, partial),
        "rope_type": kind,
        # dynamic extends the context from max_position_embeddings on, regardless of other keys.
        "original_max_position_embeddings": max_positions if kind == "dynamic" else trained,
    }
    if kind != "default":
        default = max_positions / max(trained, 1) if kind in ("yarn", "longrope") else ...
        settings["factor"] = inner.get("factor", float, default)
    for name, (of, default) in _ROPE_KEYS.get(kind, {}).items():
        settings[name] = _numbers(inner, name) if of is list else inner.get(name, of, default)
    try:
        return RopeConfig(**settings)
    except ConfigError as error:
        raise ConfigError(f"{inner.source}: {error}") from None


def read_layered_ropes(
    keys: Keys, positions: int, theta: float, local_theta: float
) -> tuple[RopeConfig, RopeConfig]:
    """The RoPE of full-attention and of sliding-window layers: `rope_parameters` per layer type (transformers
    5), or `rope_scaling` for the former only (transformers 4). theta, local_theta: the default bases."""
    both = keys.get("rope_parameters", dict, None) or {}
    scaling = keys.get("rope_scaling", dict, None)
    found = []
    for kind, base in ((FULL, theta), (SLIDING, local_theta)):
        raw = both.get(kind) or {}
        if not isinstance(raw, dict):
            raise ConfigError(f"{keys.source}: rope_parameters.{kind} must be an object")
        raw = raw | scaling if scaling is not None and kind == FULL else raw
        inner = Keys(raw, f"{keys.source}: rope_parameters.{kind}")
        found.append(read_rope_type(inner, positions, base))
        keys.unused += [f"rope_parameters.{kind}.{name}" for name in inner.left_over()]
    keys.unused += [f"rope_parameters.{name}" for name in both if name not in (FULL, SLIDING)]
    return found[0], found[1]


def write_layered_ropes(config: ModelConfig) -> dict[str, Any]:
    """The `rope_parameters` per layer type that `read_layered_ropes` reads."""
    assert config.rope is not None
    return {
        kind: {"rope_type": "default", "rope_theta": rope.rope_theta} | (write_rope_type(rope) or {})
        for kind, rope in ((FULL, config.rope), (SLIDING, config.local_rope or config.rope))
    }


def _numbers(keys: Keys, name: str) -> tuple[float, ...]:
    values = keys.get(name, list)
    if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        raise ConfigError(f"{keys.source}: key {name!r} must contain only numbers")
    return tuple(float(value) if abs(value) < FARTHEST else math.inf for value in values)


def write_rope(rope: RopeConfig | None) -> dict[str, Any]:
    """The keys `rope_theta` and `rope_scaling`, which every version of transformers reads."""
    if rope is None:
        return {}
    written: dict[str, Any] = {"rope_theta": rope.rope_theta}
    if rope.partial_rotary_factor != 1:
        written["partial_rotary_factor"] = rope.partial_rotary_factor
    scaling = write_rope_type(rope)
    return written | {"rope_scaling": scaling} if scaling else written


def write_rope_type(rope: RopeConfig) -> dict[str, Any] | None:
    """The value of `rope_scaling`; None for default RoPE."""
    if rope.frequency_factors is not None:
        raise ConfigError(
            "this GGUF's rope_freqs match no known rope_type, so a config.json cannot represent them"
        )
    if rope.rope_type == "default":
        return None
    scaling: dict[str, Any] = {"rope_type": rope.rope_type, "factor": rope.factor}
    if rope.rope_type in _ROPE_KEYS:
        scaling["original_max_position_embeddings"] = rope.original_max_position_embeddings
    for name, (of, _) in _ROPE_KEYS.get(rope.rope_type, {}).items():
        if (value := getattr(rope, name)) is not None:
            scaling[name] = list(value) if of is list else value
    return scaling


def read_layer_types(keys: Keys, default: Callable[[int], list[LayerType]]) -> tuple[LayerType, ...]:
    """`layer_types`, or `default(number of layers)` if it is absent. Errors: ConfigError unless every layer
    has a supported type."""
    layers = keys.get("num_hidden_layers", int)
    found = keys.get("layer_types", list, None)
    if found is None:
        return tuple(default(layers))
    if wrong := [kind for kind in found if kind not in LAYER_TYPES]:
        raise ConfigError(
            f"layer_types has {shown(wrong[0])}, which is not supported; supported: {', '.join(LAYER_TYPES)}"
        )
    if len(found) != layers:
        raise ConfigError(
            f"config keys disagree: layer_types has {len(found)} entries, but num_hidden_layers is {layers}"
        )
    return tuple(found)


def check_allowed(keys: Keys, name: str, kind: type | tuple[type, ...], *allowed: Any) -> None:
    """Raise ConfigError unless a key is absent, null, or one of the allowed values."""
    value = keys.get(name, kind, None)
    if value is not None and value not in allowed:
        raise ConfigError(f"{keys.source}: {name} = {shown(value)} is not supported for this model")


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """The ids of eos_token_id, which may be one id or a list."""
    if value is None:
        return ()
    ids = tuple(value) if isinstance(value, list) else (value,)
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise ConfigError(f"config key 'eos_token_id' is {value!r}: expected a token id or a list of them")
    return ids


def without_impossible_ids(config: ModelConfig, source: str) -> ModelConfig:
    """The config without token ids that are outside its vocabulary; a note names them."""

    def exists(token: int | None) -> bool:
        return token is None or -1 <= token < config.vocab_size

    found: dict[str, Any] = {}
    wrong: list[str] = []
    for name in ("bos_token_id", "pad_token_id"):
        if not exists(token := getattr(config, name)):
            found[name] = None
            wrong.append(f"{name} {token}")
    if not all(map(exists, config.eos_token_id)):
        found["eos_token_id"] = tuple(filter(exists, config.eos_token_id))
        wrong += [f"eos_token_id {token}" for token in config.eos_token_id if not exists(token)]
    if found:
        note(f"{source}: outside the vocabulary of {config.vocab_size} and not used: {', '.join(wrong[:8])}")
    return replace(config, **found)
