"""gemma2: gemma with norms before and after attention and feed-forward, soft-capped scores and logits, and a
sliding window in every other layer."""

from collections.abc import Callable, Mapping
from typing import Any

from einsum_transformer.models.config import FULL, SLIDING, Keys, LayerType, ModelConfig
from einsum_transformer.models.families import gguf
from einsum_transformer.models.families.family import Family, read_layer_types
from einsum_transformer.models.families.gemma import DEFAULTS, TANH, read_common, read_gguf_common
from einsum_transformer.models.families.llama import write_shared

_DEFAULTS = DEFAULTS | {"hidden_activation": TANH, "num_key_value_heads": 4}


def _read(keys: Keys) -> ModelConfig:
    return read_common(
        keys,
        "gemma2",
        _DEFAULTS,
        act="hidden_activation",
        block="sandwich_norm",
        attn_logit_softcapping=keys.nullable("attn_logit_softcapping", float, 50.0),
        final_logit_softcapping=keys.nullable("final_logit_softcapping", float, 30.0),
        attention_scale=read_scale(keys),
        **read_windows(keys, lambda layers: [FULL if i % 2 else SLIDING for i in range(layers)]),
    )


def read_scale(keys: Keys) -> float:
    """query_pre_attn_scalar^-0.5"""
    scalar = keys.get("query_pre_attn_scalar", float, 256.0)
    return max(scalar, 1e-9) ** -0.5


def read_windows(keys: Keys, default: Callable[[int], list[LayerType]]) -> dict[str, Any]:
    """sliding_window and layer_types."""
    kinds = read_layer_types(keys, default)
    window = keys.nullable("sliding_window", int, 4096)
    if window is None and keys.raw.get("layer_types") is None:
        return {}
    return {"sliding_window": window, "layer_types": kinds} if SLIDING in kinds else {}


def write_common(config: ModelConfig) -> dict[str, Any]:
    """The keys shared by gemma2 and gemma3."""
    scalar = round((config.attention_scale or config.head_dim**-0.5) ** -2, 6)
    fields = ("attention_bias", "attn_logit_softcapping", "final_logit_softcapping")
    return write_shared(config, *fields, act="hidden_activation") | {
        "query_pre_attn_scalar": int(scalar) if scalar.is_integer() else scalar,
        "sliding_window": config.sliding_window or 4096,
        "layer_types": [FULL if window is None else SLIDING for window in config.windows],
    }


def _read_gguf(keys: Keys, metadata: Mapping[str, Any]) -> ModelConfig:
    keys.raw = {"attention.sliding_window": 4096, **keys.raw}
    return read_gguf_common(
        keys,
        metadata,
        "gemma2",
        block="sandwich_norm",
        attn_logit_softcapping=keys.get("attn_logit_softcapping", float, 50.0),
        final_logit_softcapping=keys.get("final_logit_softcapping", float, 30.0),
        attention_scale=gguf_scale(keys, 46),
        **gguf.read_windows(keys, 2),
    )


def write_gguf_common(config: ModelConfig, pattern: int) -> dict[str, Any]:
    """The GGUF metadata shared by gemma2 and gemma3, without the attention scale (see `gguf_scale`).
    pattern: the layers with full attention, of which llama.cpp assumes every n-th."""
    caps = ("attn_logit_softcapping", "final_logit_softcapping")
    written = {name: getattr(config, name) for name in caps if getattr(config, name) is not None}
    return gguf.write_shared(config) | written | gguf.write_window(config, pattern)


def gguf_scale(keys: Keys, largest: int) -> float:
    """The attention scale. GGUF does not store query_pre_attn_scalar: it is the head size, or hidden_size /
    heads in the largest model of each generation, which llama.cpp identifies by its number of layers."""
    size = keys.get("embedding_length", int) // max(keys.get("attention.head_count", int), 1)
    if keys.get("block_count", int) != largest:
        size = keys.get("attention.key_length", int, size)
    return max(size, 1) ** -0.5


FAMILY = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    read_config=_read,
    write_config=write_common,
    read_gguf=_read_gguf,
    write_gguf=lambda config: write_gguf_common(config, 2),
    gguf_names=gguf.NAMES | gguf.POST_NORMS,
    gguf_norm_offset=1.0,
)
