"""mistral: Mistral 7B, Nemo and all others with model_type "mistral": llama with a sliding window and no
biases."""

from __future__ import annotations

from typing import Any

from einsum_transformer.models.config import Keys, ModelConfig
from einsum_transformer.models.families import gguf
from einsum_transformer.models.families.family import Family
from einsum_transformer.models.families.llama import read_shared, write_shared


def _read(keys: Keys) -> ModelConfig:
    # transformers' default window is 4096 where the key is absent; null says none.
    absent = "sliding_window" not in keys.raw
    return read_shared(
        keys, "mistral", sliding_window=keys.get("sliding_window", int, 4096 if absent else None)
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    return write_shared(config) | {"sliding_window": config.sliding_window}


FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    read_config=_read,
    write_config=_write,
    gguf_names=gguf.NAMES,
    gguf_permuted=gguf.PERMUTED,
)
