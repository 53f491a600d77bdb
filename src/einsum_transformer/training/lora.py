"""LoRA on a model: which weights get an adapter, and what that costs."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from einsum_transformer.engine import Leaf
from einsum_transformer.errors import InputError
from einsum_transformer.leaves.frozen import Frozen
from einsum_transformer.leaves.lora import Dropout, LoRA
from einsum_transformer.models.decoder import weights_of
from einsum_transformer.models.model import Model
from einsum_transformer.tree import map_named, named_leaves

Array = np.ndarray

ALL_LINEAR = "all-linear"
"""Every matrix of the blocks; not the embedding and not the output head (as in PEFT)."""


@dataclass(frozen=True, slots=True)
class LoRAConfig:
    """What an adapter is, with PEFT's names.

    scaling = lora_alpha / r, with use_rslora lora_alpha / sqrt(r). target_modules: the last parts of weights'
    names ("q_proj"), or one regular expression for whole module names, or "all-linear". rank_pattern and
    alpha_pattern: regular expressions for the ends of module names -> the rank or alpha of those.
    """

    r: int = 8
    lora_alpha: float = 16.0
    target_modules: str | tuple[str, ...] = ("q_proj", "v_proj")
    lora_dropout: float = 0.0
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for rank in (self.r, *self.rank_pattern.values()):
            if type(rank) is not int or not 1 <= rank <= 1 << 16:
                raise InputError(f"LoRA rank r is {rank!r}: a whole number from 1 on is expected")
        for alpha in (self.lora_alpha, *self.alpha_pattern.values()):
            if not (math.isfinite(alpha) and alpha > 0):
                raise InputError(f"lora_alpha is {alpha!r}: a number above 0 is expected")
        patterns = [self.target_modules] if isinstance(self.target_modules, str) else []
        for pattern in (*patterns, *self.rank_pattern, *self.alpha_pattern):
            try:
                re.compile(pattern)
            except re.error as error:
                raise InputError(f"LoRA: {pattern!r} is no regular expression: {error}") from None
        if not 0 <= self.lora_dropout < 1:
            raise InputError(f"lora_dropout is {self.lora_dropout}: at least 0 and less than 1 is expected")

    def rank_and_scaling(self, module: str) -> tuple[int, float]:
        """The rank and scaling of the adapter of a module."""
        rank = _by_pattern(self.rank_pattern, module, self.r)
        alpha = _by_pattern(self.alpha_pattern, module, self.lora_alpha)
        return rank, alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, module: str) -> bool:
        """Whether a matrix of this module's name gets an adapter."""
        wanted = self.target_modules
        if wanted == ALL_LINEAR:
            return not re.search(r"(^|\.)(embed_tokens|lm_head)$", module)
        if isinstance(wanted, str):
            return re.fullmatch(wanted, module) is not None
        return any(module == name or module.endswith(f".{name}") for name in wanted)


def _by_pattern(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    for key, value in pattern.items():
        if re.fullmatch(rf"(.*\.)?({key})", module):
            return value
    return default


def with_lora(model: Model, config: LoRAConfig, seed: int = 0) -> Model:
    """The model with an adapter on each target and every other weight frozen.

    A has PEFT's start, uniform in +-1 / sqrt(inputs), each tensor from a stream of its own; B is zero, so
    that the model's output is the base's bit for bit. All adapters share one `Dropout`.
    """
    weights = {weight.path: weight for weight in weights_of(model.config)}
    dropout = Dropout(config.lora_dropout)
    found: list[str] = []

    def leaf(path: str, weight: Any) -> Any:
        if isinstance(weight, (Frozen, LoRA)):
            raise InputError(f"{model.source}: the model has an adapter already; merge it first")
        place, module = weights[path], module_of(model, path)
        if len(place.stored) < 2 or not config.targets(module):
            return Frozen(weight)
        found.append(module)
        rank, scaling = config.rank_and_scaling(module)
        if rank > min(place.stored):
            raise InputError(f"LoRA rank {rank} is larger than {module}, a matrix of {list(place.stored)}")
        outputs, inputs = place.shape[: place.out_axes], place.shape[place.out_axes :]
        rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
        bound = 1 / math.sqrt(place.stored[1])
        a = rng.uniform(-bound, bound, (rank, *inputs)).astype(weight.dtype)
        b = np.zeros((*outputs, rank), weight.dtype)
        return LoRA(path, weight, a, b, scaling, len(outputs), dropout)

    decoder = map_named(leaf, model.decoder)
    if not found:
        modules = sorted(
            {module_of(model, path).split(".")[-1] for path, w in weights.items() if len(w.stored) > 1}
        )
        wanted = config.target_modules
        names = wanted if isinstance(wanted, str) else ", ".join(wanted)
        raise InputError(
            f"LoRA target_modules {names!r} name no matrix of this model; it has {', '.join(modules)}"
        )
    return replace(model, decoder=decoder)


def module_of(model: Model, path: str) -> str:
    """The module of the weight at `path`, by its name in a checkpoint: "model.layers.0.self_attn.q_proj"."""
    return model.family.checkpoint_name(path).removesuffix(".weight")


def trainable(decoder: Any) -> dict[str, Array]:
    """Name -> array of everything in a decoder that is trained: its arrays, and its adapters' matrices."""
    found: dict[str, Array] = {}
    for path, leaf in named_leaves(decoder):
        if isinstance(leaf, LoRA):
            found |= {f"{path}.lora_A": leaf.a, f"{path}.lora_B": leaf.b}
        elif not isinstance(leaf, Leaf):
            found[path] = leaf
    return found


def gradients_by_name(gradient: Any) -> dict[str, Array]:
    """The gradient of a decoder by the names of `trainable`."""
    found: dict[str, Array] = {}
    for path, leaf in named_leaves(gradient):
        if isinstance(leaf, dict):
            found |= {f"{path}.{part}": array for part, array in leaf.items()}
        else:
            found[path] = leaf
    return found
