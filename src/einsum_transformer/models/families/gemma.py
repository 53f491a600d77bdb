"""gemma: norms that multiply by 1 + weight, tied embeddings (scaled by sqrt(hidden_size)), GeGLU."""

import math
from collections.abc import Mapping
from typing import Any

from einsum_transformer.models.config import Keys, ModelConfig
from einsum_transformer.models.families import gguf
from einsum_transformer.models.families.family import Family, check_allowed
from einsum_transformer.models.families.llama import read_shared, write_shared

DEFAULTS: dict[str, Any] = {
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
TANH = "gelu_pytorch_tanh"


def read_common(keys: Keys, model_type: str, defaults: dict[str, Any], **settings: Any) -> ModelConfig:
    """Read the keys shared by the generations of Gemma."""
    check_allowed(keys, "use_bidirectional_attention", bool, False)
    hidden = keys.get("hidden_size", int, defaults.get("hidden_size", ...))
    return read_shared(
        keys,
        model_type,
        defaults,
        norm_offset=1.0,
        # Rounded to the computation dtype, as all values are.
        embedding_scale=math.sqrt(max(hidden, 1)),
        attention_bias=keys.get("attention_bias", bool, False),
        **settings,
    )


def _read(keys: Keys) -> ModelConfig:
    # In early files "gelu" means its tanh approximation; the later key hidden_activation takes precedence.
    act = keys.get("hidden_activation", str, None) or keys.get("hidden_act", str, TANH)
    return read_common(keys, "gemma", DEFAULTS, hidden_act=TANH if act == "gelu" else act)


def _write(config: ModelConfig) -> dict[str, Any]:
    return write_shared(config, "attention_bias") | {"hidden_activation": config.hidden_act}


def read_gguf_common(
    keys: Keys, metadata: Mapping[str, Any], model_type: str, **settings: Any
) -> ModelConfig:
    """Read the GGUF metadata shared by the generations of Gemma."""
    scale = math.sqrt(max(keys.get("embedding_length", int), 1))
    fixed = {"norm_offset": 1.0, "embedding_scale": scale, "hidden_act": TANH}
    return gguf.read_shared(keys, metadata, model_type, **fixed | settings)


FAMILY = Family(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    read_config=_read,
    write_config=_write,
    read_gguf=lambda keys, metadata: read_gguf_common(keys, metadata, "gemma"),
    write_gguf=gguf.write_shared,
    gguf_names=gguf.NAMES,
    gguf_norm_offset=1.0,
)
