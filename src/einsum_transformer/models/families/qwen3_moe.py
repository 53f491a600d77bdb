"""qwen3_moe: qwen3 with a mixture of experts, without a shared expert."""

from collections.abc import Mapping
from typing import Any

from einsum_transformer.models.config import Keys, ModelConfig
from einsum_transformer.models.families import gguf
from einsum_transformer.models.families.family import Family
from einsum_transformer.models.families.llama import read_shared, write_shared
from einsum_transformer.models.families.qwen2_moe import read_experts, write_experts


def _read(keys: Keys) -> ModelConfig:
    window = keys.get("sliding_window", int, 4096)
    keys = keys.renamed({"num_local_experts": "num_experts"})
    return read_shared(
        keys,
        "qwen3_moe",
        {"num_key_value_heads": 4, "max_position_embeddings": 32768},
        qk_norm="head",
        attention_bias=keys.get("attention_bias", bool, False),
        moe=read_experts(keys, 128, 8, 768),
        # Unlike in qwen3, the window applies to every layer.
        sliding_window=window if keys.get("use_sliding_window", bool, False) else None,
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    window = {"use_sliding_window": config.sliding_window is not None}
    return write_shared(config, "attention_bias", "sliding_window") | write_experts(config) | window


def _read_gguf(keys: Keys, metadata: Mapping[str, Any]) -> ModelConfig:
    moe = gguf.read_experts(keys, keys.get("expert_feed_forward_length", int), norm_topk_prob=True)
    return gguf.read_shared(keys, metadata, "qwen3_moe", qk_norm="head", moe=moe)


FAMILY = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    read_config=_read,
    write_config=_write,
    read_gguf=_read_gguf,
    write_gguf=lambda config: gguf.write_shared(config) | gguf.write_experts(config),
    stacked_experts=True,
    gguf_names=gguf.NAMES | gguf.EXPERTS | gguf.QK_NORMS,
    gguf_architecture="qwen3moe",
)
