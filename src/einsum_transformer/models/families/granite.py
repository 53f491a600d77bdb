"""granite: Granite 3: llama with scaling factors for embeddings, scores, residual branches and logits."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from einsum_transformer.errors import ConfigError
from einsum_transformer.models.config import Keys, ModelConfig
from einsum_transformer.models.families import gguf
from einsum_transformer.models.families.family import Family
from einsum_transformer.models.families.llama import read_shared, write_shared


def _read(keys: Keys) -> ModelConfig:
    return read_shared(
        keys,
        "granite",
        {"bos_token_id": 1, "eos_token_id": 2},
        attention_bias=keys.get("attention_bias", bool, False),
        mlp_bias=keys.get("mlp_bias", bool, False),
        embedding_scale=keys.get("embedding_multiplier", float, 1.0),
        attention_scale=keys.get("attention_multiplier", float, 1.0),
        residual_multiplier=keys.get("residual_multiplier", float, 1.0),
        logit_scale=_inverse(keys, "logits_scaling", 1.0),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    return write_shared(config, "attention_bias", "mlp_bias", "residual_multiplier") | {
        "embedding_multiplier": config.embedding_scale,
        "attention_multiplier": config.scale_of(0),
        "logits_scaling": 1 / config.logit_scale,
    }


def _inverse(keys: Keys, name: str, default: Any = ...) -> float:
    """The factor of the logits, from the key that contains their divisor."""
    divisor = keys.get(name, float, default)
    if not 1e-9 <= divisor <= 1e9:
        raise ConfigError(f"{keys.source}: key {name!r} is {divisor}: expected a number from 1e-9 to 1e9")
    return 1 / divisor


def _read_gguf(keys: Keys, metadata: Mapping[str, Any]) -> ModelConfig:
    """As in llama.cpp, a factor of 0 means that it is not set, and a file with rope.scaling.finetuned = false
    does not use RoPE."""
    rope = {} if keys.get("rope.scaling.finetuned", bool, True) else {"rope": None}
    config = gguf.read_shared(
        keys,
        metadata,
        "granite",
        embedding_scale=keys.get("embedding_scale", float, 0.0) or 1.0,
        attention_scale=keys.get("attention.scale", float, 0.0) or None,
        residual_multiplier=keys.get("residual_scale", float, 0.0) or 1.0,
        logit_scale=_inverse(keys, "logit_scale"),
        **rope,
    )
    return replace(config, attention_scale=config.scale_of(0))


def _write_gguf(config: ModelConfig) -> dict[str, Any]:
    factors = {
        "embedding_scale": config.embedding_scale,
        "attention.scale": config.scale_of(0),
        "residual_scale": config.residual_multiplier,
        "logit_scale": 1 / config.logit_scale,
    }
    return gguf.write_shared(config) | factors


FAMILY = Family(
    model_type="granite",
    architecture="GraniteForCausalLM",
    read_config=_read,
    write_config=_write,
    read_gguf=_read_gguf,
    write_gguf=_write_gguf,
    gguf_names=gguf.NAMES,
    gguf_permuted=gguf.PERMUTED,
)
