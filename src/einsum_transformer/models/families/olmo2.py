"""olmo2: norms after attention and feed-forward instead of before, and an RMSNorm over all query heads and
over all key heads."""

from collections.abc import Mapping
from typing import Any

from einsum_transformer.components.rope import RopeConfig
from einsum_transformer.models.config import Keys, ModelConfig
from einsum_transformer.models.families import gguf
from einsum_transformer.models.families.family import Family
from einsum_transformer.models.families.llama import read_shared, write_shared


def read_common(keys: Keys, model_type: str, **settings: Any) -> ModelConfig:
    """Read the keys shared by the generations of OLMo."""
    return read_shared(
        keys,
        model_type,
        {"rms_norm_eps": 1e-5, "pad_token_id": 1, "eos_token_id": 50279},
        block="post_norm",
        qk_norm="whole",
        attention_bias=keys.get("attention_bias", bool, False),
        **settings,
    )


def _read_gguf(keys: Keys, metadata: Mapping[str, Any]) -> ModelConfig:
    """OLMo 2 and 3 are one GGUF architecture; windows distinguish them."""
    windows = gguf.read_windows(keys, 4)
    if not windows:
        return gguf.read_shared(keys, metadata, "olmo2", block="post_norm", qk_norm="whole")
    # RoPE scaling applies only to the full-attention layers.
    theta = keys.get("rope.freq_base", float, 10000.0)
    local = RopeConfig(
        rope_theta=keys.get("rope.freq_base_swa", float, theta),
        original_max_position_embeddings=keys.get("context_length", int),
    )
    settings: dict[str, Any] = {"block": "post_norm", "qk_norm": "whole", "local_rope": local}
    return gguf.read_shared(keys, metadata, "olmo3", **settings, **windows)


FAMILY = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    read_config=lambda keys: read_common(keys, "olmo2"),
    write_config=lambda config: write_shared(config, "attention_bias"),
    read_gguf=_read_gguf,
    write_gguf=gguf.write_shared,
    gguf_names=gguf.NAMES | gguf.POST_NORMS | gguf.QK_NORMS,
)
