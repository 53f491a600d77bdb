"""qwen3: qwen2 without biases, with an RMSNorm per query and key head."""

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


FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    read_config=_read,
    write_config=lambda config: write_shared(config, "attention_bias") | write_windows(config),
    read_gguf=lambda keys, metadata: gguf.read_shared(keys, metadata, "qwen3", qk_norm="head"),
    write_gguf=gguf.write_shared,
    gguf_names=gguf.NAMES | gguf.QK_NORMS,
)
