"""qwen2_moe: qwen2 with a mixture of experts and a gated shared expert."""

from collections.abc import Mapping
from typing import Any

from einsum_transformer.errors import ConfigError
from einsum_transformer.models.config import FULL, SLIDING, Keys, ModelConfig, MoEConfig
from einsum_transformer.models.families import gguf
from einsum_transformer.models.families.family import Family, read_layer_types
from einsum_transformer.models.families.llama import read_shared, write_shared


def read_experts(keys: Keys, experts: int, chosen: int, size: int, **shared: Any) -> MoEConfig:
    """Read the expert keys shared by the Qwen models, with these defaults."""
    step = keys.get("decoder_sparse_step", int, 1)
    if step < 1:
        raise ConfigError(f"{keys.source}: decoder_sparse_step is {step}, expected 1 or more")
    dense = keys.get("mlp_only_layers", list, [])
    layers = range(keys.get("num_hidden_layers", int))
    sparse = tuple(i not in dense and (i + 1) % step == 0 for i in layers)
    return MoEConfig(
        keys.get("num_experts", int, experts),
        keys.get("num_experts_per_tok", int, chosen),
        keys.get("moe_intermediate_size", int, size),
        norm_topk_prob=keys.get("norm_topk_prob", bool, False),
        layers=() if all(sparse) else sparse,
        **shared,
    )


def write_experts(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_experts`."""
    moe = config.moe
    assert moe is not None
    return {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_experts_per_tok,
        "moe_intermediate_size": moe.moe_intermediate_size,
        "norm_topk_prob": moe.norm_topk_prob,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, sparse in enumerate(moe.layers) if not sparse],
    }


def _read(keys: Keys) -> ModelConfig:
    shared = keys.get("shared_expert_intermediate_size", int, 5632)
    window, last = keys.get("sliding_window", int, 4096), keys.get("max_window_layers", int, 28)
    used = keys.get("use_sliding_window", bool, False)
    kinds = read_layer_types(
        keys, lambda n: [SLIDING if used and i % 2 == 0 and i < last else FULL for i in range(n)]
    )
    windowed = used and SLIDING in kinds
    return read_shared(
        keys,
        "qwen2_moe",
        {"max_position_embeddings": 32768},
        qkv_bias=keys.get("qkv_bias", bool, True),
        moe=read_experts(keys, 60, 4, 1408, shared_intermediate_size=shared, shared_gate=True),
        sliding_window=window if windowed else None,
        layer_types=kinds if windowed else (),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    assert config.moe is not None
    return (
        write_shared(config, "qkv_bias", "sliding_window")
        | write_experts(config)
        | {
            "shared_expert_intermediate_size": config.moe.shared_intermediate_size,
            "use_sliding_window": config.sliding_window is not None,
            "layer_types": [FULL if window is None else SLIDING for window in config.windows],
        }
    )


def _read_gguf(keys: Keys, metadata: Mapping[str, Any]) -> ModelConfig:
    moe = gguf.read_experts(
        keys,
        keys.get("expert_feed_forward_length", int),
        shared_intermediate_size=keys.get("expert_shared_feed_forward_length", int),
        shared_gate=True,
        norm_topk_prob=False,
    )
    return gguf.read_shared(keys, metadata, "qwen2_moe", qkv_bias=True, moe=moe)


def _write_gguf(config: ModelConfig) -> dict[str, Any]:
    assert config.moe is not None
    shared = {"expert_shared_feed_forward_length": config.moe.shared_intermediate_size}
    return gguf.write_shared(config) | gguf.write_experts(config) | shared


FAMILY = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    read_config=_read,
    write_config=_write,
    read_gguf=_read_gguf,
    write_gguf=_write_gguf,
    stacked_experts=True,
    gguf_names=gguf.NAMES | gguf.EXPERTS,
    gguf_architecture="qwen2moe",
)
