"""gemma3_text, and the text part of gemma3: gemma2 without soft caps, with an RMSNorm per query and key head,
five sliding-window layers for each full-attention layer, and a separate RoPE for each of the two."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from einsum_transformer.components.rope import RopeConfig
from einsum_transformer.errors import ConfigError
from einsum_transformer.models.config import FULL, SLIDING, Keys, ModelConfig
from einsum_transformer.models.families import gguf
from einsum_transformer.models.families.family import Family, read_layered_ropes, write_layered_ropes
from einsum_transformer.models.families.gemma import DEFAULTS, TANH, read_common, read_gguf_common
from einsum_transformer.models.families.gemma2 import (
    gguf_scale,
    read_scale,
    read_windows,
    write_common,
    write_gguf_common,
)

_DEFAULTS = DEFAULTS | {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_activation": TANH,
    "max_position_embeddings": 131072,
}
"""Defaults of keys; the text_config of a multimodal config omits keys with these values."""


def _read(keys: Keys) -> ModelConfig:
    pattern = keys.get("sliding_window_pattern", int, 6)
    if pattern < 1:
        raise ConfigError(f"{keys.source}: sliding_window_pattern is {pattern}, expected 1 or more")
    if keys.get("num_hidden_layers", int, None) is None:
        keys.raw = {**keys.raw, "num_hidden_layers": _DEFAULTS["num_hidden_layers"]}
    theta, local_theta = keys.get("rope_theta", float, 1e6), keys.get("rope_local_base_freq", float, 1e4)
    positions = keys.get("max_position_embeddings", int, 131072)
    rope, local = read_layered_ropes(keys, positions, theta, local_theta)
    return read_common(
        keys,
        "gemma3_text",
        _DEFAULTS,
        act="hidden_activation",
        block="sandwich_norm",
        qk_norm="head",
        final_logit_softcapping=keys.get("final_logit_softcapping", float, None),
        attention_scale=read_scale(keys),
        rope=rope,
        local_rope=local,
        **read_windows(keys, lambda layers: [SLIDING if (i + 1) % pattern else FULL for i in range(layers)]),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    ropes = write_layered_ropes(config)
    return write_common(config) | {
        "rope_local_base_freq": ropes[SLIDING]["rope_theta"],
        "rope_parameters": ropes,
    }


def _read_nested(keys: Keys) -> ModelConfig:
    """The text part of a multimodal config."""
    text = Keys(keys.get("text_config", dict), f"{keys.source}: text_config")
    for name in ("eos_token_id", "bos_token_id", "pad_token_id", "tie_word_embeddings"):
        if name in keys.raw and name not in text.raw:
            text.raw = {**text.raw, name: keys.raw[name]}
        keys.seen.add(name)
    text.seen.add("model_type")
    config = _read(text)
    keys.defaulted += [f"text_config.{name}" for name in text.defaulted]
    keys.unused += [f"text_config.{name}" for name in text.left_over()]
    return config


def _read_gguf(keys: Keys, metadata: Mapping[str, Any]) -> ModelConfig:
    context = keys.get("context_length", int)
    size = keys.get("embedding_length", int) // max(keys.get("attention.head_count", int), 1)
    head_dim = keys.get("attention.key_length", int, size)
    gguf.check_rotated(keys, head_dim)
    rope = gguf.read_rope(keys, head_dim, context)
    windows = gguf.read_windows(keys, 6)
    attention = keys.get("rope.scaling.attn_factor", float, 1.0)
    local = RopeConfig(
        rope_theta=keys.get("rope.freq_base_swa", float, 1e4),
        original_max_position_embeddings=context,
        attention_factor=None if attention == 1 else attention,
    )
    return read_gguf_common(
        keys,
        metadata,
        "gemma3_text",
        block="sandwich_norm",
        qk_norm="head",
        final_logit_softcapping=keys.get("final_logit_softcapping", float, 0.0) or None,
        attention_scale=gguf_scale(keys, 62),
        rope=replace(rope, rope_theta=keys.get("rope.freq_base", float, 1e6)),
        local_rope=local if windows else None,
        **windows,
    )


def _write_gguf(config: ModelConfig) -> dict[str, Any]:
    local = {} if config.local_rope is None else {"rope.freq_base_swa": config.local_rope.rope_theta}
    return write_gguf_common(config, 6) | local


FAMILY = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    read_config=_read,
    write_config=_write,
    read_gguf=_read_gguf,
    write_gguf=_write_gguf,
    gguf_names=gguf.NAMES | gguf.POST_NORMS | gguf.QK_NORMS,
    gguf_architecture="gemma3",
    gguf_norm_offset=1.0,
    other_prefixes=("language_model.model.", "model.language_model."),
    ignored_tensors=r"(model\.)?(vision_tower|multi_modal_projector)\..*|.*\.rotary_emb\.inv_freq",
)
MULTIMODAL = Family(
    model_type="gemma3",
    architecture="Gemma3ForCausalLM",
    read_config=_read_nested,
    write_config=_write,
)
