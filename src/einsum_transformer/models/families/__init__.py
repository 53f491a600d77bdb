"""The registry: one line a family."""

from __future__ import annotations

from typing import Any

from einsum_transformer.errors import ConfigError
from einsum_transformer.models.config import nearest
from einsum_transformer.models.families import llama, mistral
from einsum_transformer.models.families.family import Family

FAMILIES: dict[str, Family] = {
    "llama": llama.FAMILY,
    "mistral": mistral.FAMILY,
}


def family_of(model_type: Any, source: str) -> Family:
    """The family that declares `model_type`."""
    if not isinstance(model_type, str):
        raise ConfigError(f"{source}: {model_type!r} is no model type; supported: {', '.join(FAMILIES)}")
    if model_type not in FAMILIES:
        supported = f"supported: {', '.join(FAMILIES)}{nearest(model_type, FAMILIES)}"
        raise ConfigError(f"{source}: model type {model_type!r} is not supported; {supported}")
    return FAMILIES[model_type]
