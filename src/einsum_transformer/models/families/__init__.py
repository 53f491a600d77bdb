"""The registry of model families, one line per family."""

from collections.abc import Callable, Mapping
from typing import Any

from einsum_transformer.arguments import nearest
from einsum_transformer.errors import ConfigError
from einsum_transformer.models.config import Keys, ModelConfig, shown
from einsum_transformer.models.families import (
    deepseek,
    deepseek_v2,
    gemma,
    gemma2,
    gemma3,
    gpt2,
    gpt_neox,
    granite,
    llama,
    mistral,
    mixtral,
    mpt,
    olmo2,
    olmo3,
    phi,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    smollm3,
)
from einsum_transformer.models.families.family import Family

FAMILIES: dict[str, Family] = {
    "llama": llama.FAMILY,
    "mistral": mistral.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen3": qwen3.FAMILY,
    "gemma": gemma.FAMILY,
    "gemma2": gemma2.FAMILY,
    "gemma3_text": gemma3.FAMILY,
    "gemma3": gemma3.MULTIMODAL,
    "phi": phi.FAMILY,
    "phi3": phi3.FAMILY,
    "gpt2": gpt2.FAMILY,
    "gpt_neox": gpt_neox.FAMILY,
    "mpt": mpt.FAMILY,
    "olmo2": olmo2.FAMILY,
    "olmo3": olmo3.FAMILY,
    "smollm3": smollm3.FAMILY,
    "granite": granite.FAMILY,
    "mixtral": mixtral.FAMILY,
    "qwen2_moe": qwen2_moe.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
    "deepseek": deepseek.FAMILY,
    "deepseek_v2": deepseek_v2.FAMILY,
}


_GGUF = {
    family.gguf_architecture or family.model_type: family.read_gguf
    for family in FAMILIES.values()
    if family.read_gguf is not None
}


def gguf_reader(architecture: Any, source: str) -> Callable[[Keys, Mapping[str, Any]], ModelConfig]:
    """The function that reads the metadata of GGUF files of this architecture."""
    if not isinstance(architecture, str) or architecture not in _GGUF:
        near = nearest(architecture, _GGUF) if isinstance(architecture, str) else ""
        supported = f"supported: {', '.join(_GGUF)}{near}"
        raise ConfigError(f"{source}: GGUF architecture {shown(architecture)} is not supported; {supported}")
    return _GGUF[architecture]


def family_of(model_type: Any, source: str) -> Family:
    """The family that declares `model_type`."""
    if not isinstance(model_type, str):
        raise ConfigError(f"{source}: {model_type!r} is not a model type; supported: {', '.join(FAMILIES)}")
    if model_type not in FAMILIES:
        supported = f"supported: {', '.join(FAMILIES)}{nearest(model_type, FAMILIES)}"
        raise ConfigError(f"{source}: model type {model_type!r} is not supported; {supported}")
    return FAMILIES[model_type]
