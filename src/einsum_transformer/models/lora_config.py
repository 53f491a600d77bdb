"""What an adapter is: LoRA's settings under PEFT's names."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from einsum_transformer.errors import InputError

ALL_LINEAR = "all-linear"
"""Every matrix of the blocks; not the embedding and not the output head (as in PEFT)."""


@dataclass(frozen=True, slots=True)
class LoRAConfig:
    """Which matrices get an adapter, of what rank, scaled how.

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
            except (re.error, RecursionError, OverflowError) as error:
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
