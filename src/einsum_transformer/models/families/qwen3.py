"""qwen3: qwen2 without biases, with an RMSNorm of every query and key head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from einsum_transformer.models.config import Keys, ModelConfig
from einsum_transformer.models.families import gguf
from einsum_transformer.models.families.family import Family
from einsum_transformer.models.families.llama import read_shared, write_shared
from einsum_transformer.models.families.qwen2 import read_windows, write_windows


def _read(keys: Keys) -> ModelConfig:
    return read_shared(
        keys,
        "qwen3",
        {"head_dim": 128},
        qk_norm="head",
        attention_bias=keys.get("attention_bias", bool, False),
        **read_windows(keys),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    return write_shared(config) | write_windows(config) | {"attention_bias": config.attention_bias}


def _read_gguf(keys: Keys, metadata: Mapping[str, Any]) -> ModelConfig:
    return gguf.read_shared(keys, metadata, "qwen3", qk_norm="head")


FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    read_config=_read,
    write_config=_write,
    read_gguf=_read_gguf,
    gguf_names=gguf.NAMES | gguf.QK_NORMS,
)
