"""deepseek: DeepSeekMoE 16B: llama with routed and shared experts from the second layer on."""

from typing import Any

from einsum_transformer.errors import ConfigError
from einsum_transformer.models.config import Keys, ModelConfig, MoEConfig
from einsum_transformer.models.families import gguf
from einsum_transformer.models.families.family import Family, check_allowed
from einsum_transformer.models.families.llama import read_shared, write_shared


def read_experts(keys: Keys, **settings: Any) -> MoEConfig:
    """Read the expert keys shared by the DeepSeek models. Shared experts become one of their total size."""
    check_allowed(keys, "scoring_func", str, "softmax")
    size = keys.get("moe_intermediate_size", int, 1407)
    first, step = keys.get("first_k_dense_replace", int, 0), keys.get("moe_layer_freq", int, 1)
    if step < 1:
        raise ConfigError(f"{keys.source}: moe_layer_freq is {step}, expected 1 or more")
    sparse = _sparse(keys.get("num_hidden_layers", int), first, step)
    return MoEConfig(
        keys.get("n_routed_experts", int),
        keys.get("num_experts_per_tok", int),
        size,
        shared_intermediate_size=keys.get("n_shared_experts", int, 0) * size,
        layers=() if all(sparse) else sparse,
        **settings,
    )


def write_experts(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_experts`."""
    moe = config.moe
    assert moe is not None
    layers = moe.layers or (True,) * config.num_hidden_layers
    first = layers.index(True) if True in layers else len(layers)
    steps = (n for n in range(1, len(layers)) if layers == _sparse(len(layers), first, n))
    return {
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_experts_per_tok,
        "moe_intermediate_size": moe.moe_intermediate_size,
        "n_shared_experts": moe.shared_intermediate_size // moe.moe_intermediate_size or None,
        "first_k_dense_replace": first,
        "moe_layer_freq": next(steps, 1),
        "norm_topk_prob": moe.norm_topk_prob,
        "scoring_func": moe.scoring,
    }


def _sparse(layers: int, first: int, step: int) -> tuple[bool, ...]:
    """Which layers have experts."""
    return tuple(i >= first and i % step == 0 for i in range(layers))


def _read(keys: Keys) -> ModelConfig:
    normalize = keys.get("norm_topk_prob", bool, False) and keys.get("num_experts_per_tok", int) > 1
    return read_shared(
        keys,
        "deepseek",
        attention_bias=keys.get("attention_bias", bool, False),
        moe=read_experts(keys, norm_topk_prob=normalize),
    )


def read_gguf_experts(keys: Keys, **settings: Any) -> MoEConfig:
    """Read the experts of the DeepSeek models from GGUF metadata."""
    size, first = keys.get("expert_feed_forward_length", int), keys.get("leading_dense_block_count", int, 0)
    layers = tuple(i >= first for i in range(keys.get("block_count", int)))
    return gguf.read_experts(
        keys,
        size,
        shared_intermediate_size=keys.get("expert_shared_count", int, 0) * size,
        norm_topk_prob=False,
        routed_scaling_factor=keys.get("expert_weights_scale", float, 1.0),
        layers=() if all(layers) else layers,
        **settings,
    )


def write_gguf_experts(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_gguf_experts`."""
    moe = config.moe
    assert moe is not None
    return gguf.write_experts(config) | {
        "leading_dense_block_count": moe.layers.index(True) if True in moe.layers else 0,
        "expert_shared_count": moe.shared_intermediate_size // moe.moe_intermediate_size,
        "expert_weights_scale": moe.routed_scaling_factor,
    }


FAMILY = Family(
    model_type="deepseek",
    architecture="DeepseekForCausalLM",
    read_config=_read,
    write_config=lambda config: write_shared(config, "attention_bias") | write_experts(config),
    read_gguf=lambda keys, metadata: gguf.read_shared(
        keys, metadata, "deepseek", moe=read_gguf_experts(keys)
    ),
    write_gguf=lambda config: gguf.write_shared(config) | write_gguf_experts(config),
    gguf_names=gguf.NAMES | gguf.EXPERTS,
    gguf_permuted=gguf.PERMUTED,
    names={"shared_expert": "shared_experts"},
)
