"""mixtral: mistral with a mixture of experts, whose weights are normalized."""

from typing import Any

from einsum_transformer.models.config import Keys, ModelConfig, MoEConfig
from einsum_transformer.models.families import gguf
from einsum_transformer.models.families.family import Family
from einsum_transformer.models.families.llama import read_shared, write_shared

_DEFAULTS = {
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-5,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _read(keys: Keys) -> ModelConfig:
    experts = MoEConfig(
        keys.get("num_local_experts", int, 8),
        keys.get("num_experts_per_tok", int, 2),
        keys.get("intermediate_size", int),
    )
    window = keys.get("sliding_window", int, None)
    return read_shared(keys, "mixtral", _DEFAULTS, moe=experts, sliding_window=window)


def _write(config: ModelConfig) -> dict[str, Any]:
    assert config.moe is not None
    return write_shared(config, "sliding_window") | {
        "num_local_experts": config.moe.num_experts,
        "num_experts_per_tok": config.moe.num_experts_per_tok,
    }


def _write_gguf(config: ModelConfig) -> dict[str, Any]:
    return gguf.write_shared(config) | gguf.write_window(config) | gguf.write_experts(config)


FAMILY = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    read_config=_read,
    write_config=_write,
    stacked_experts=True,
    write_gguf=_write_gguf,
    gguf_names=gguf.NAMES | gguf.EXPERTS,
    gguf_architecture="llama",
    llama_cpp_windows=False,
    gguf_permuted=gguf.PERMUTED,
    names={"mlp": "block_sparse_moe", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
    module_names={"block_sparse_moe": "mlp"},
)
