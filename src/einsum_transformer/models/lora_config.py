"""The settings of LoRA adapters, named as in PEFT."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import re2  # pyright: ignore[reportMissingTypeStubs]

from einsum_transformer.arguments import checked
from einsum_transformer.errors import InputError

ALL_LINEAR = "all-linear"
"""Every matrix of the blocks; not the embedding and not the output head (as in PEFT)."""
_MOST_PATTERNS = 4096
_PATTERN_BYTES = 1 << 20
"""Memory limit of one compiled regular expression."""


@checked
@dataclass(frozen=True, slots=True)
class LoRAConfig:
    """The target matrices, ranks and scaling of LoRA adapters.

    scaling = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora. lora_dropout: dropout probability of
    the adapters' inputs in training. target_modules: suffixes of module
    names ("q_proj"), or one regular expression for whole module names, or "all-linear". rank_pattern and
    alpha_pattern: regular expressions for suffixes of module names -> rank or alpha; the first match applies.
    target_parameters: suffixes of parameter names, for parameters that are not modules: stacked experts
    ("experts.gate_up_proj") or any matrix ("gate.weight"). Regular expressions use RE2 syntax, without
    lookaround and backreferences.
    """

    r: int = 8
    lora_alpha: float = 16.0
    target_modules: str | Sequence[str] = ("q_proj", "v_proj")
    lora_dropout: float = 0.0
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict[str, int])
    alpha_pattern: Mapping[str, float] = field(default_factory=dict[str, float])
    target_parameters: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for rank in (self.r, *self.rank_pattern.values()):
            if type(rank) is not int or not 1 <= rank <= 1 << 16:
                raise InputError(f"LoRA rank r is {rank!r}: expected an integer from 1 to {1 << 16}")
        for alpha in (self.lora_alpha, *self.alpha_pattern.values()):
            if not math.isfinite(alpha):
                raise InputError(f"lora_alpha is {alpha!r}: expected a finite number")
        for patterns in (self.rank_pattern, self.alpha_pattern):
            if len(patterns) > _MOST_PATTERNS:
                raise InputError(
                    f"LoRA: {len(patterns):,} patterns, at most {_MOST_PATTERNS:,} are supported"
                )
            for pattern in patterns:
                _compiled(_end_of_name(pattern))
        if not 0 <= self.lora_dropout < 1:
            raise InputError(f"lora_dropout is {self.lora_dropout}: expected at least 0 and less than 1")

    @staticmethod
    def parse_targets(text: str) -> str | tuple[str, ...]:
        """The `target_modules` of a text: names with commas between them, "all-linear", or a regular
        expression."""
        names = tuple(part.strip() for part in text.split(","))
        if not all(names):
            raise InputError(f"LoRA targets are {text!r}: expected names with commas between them")
        plain = all(name.replace("_", "").replace(".", "").isalnum() for name in names)
        return names if plain and text != ALL_LINEAR else text

    def for_training(self) -> LoRAConfig:
        """Return these settings if they are valid for a new adapter, else raise InputError: a loaded adapter
        may have any scaling, as in PEFT and in mlx-lm, but with a scaling of 0 nothing would be learned."""
        for alpha in (self.lora_alpha, *self.alpha_pattern.values()):
            if alpha <= 0:
                raise InputError(f"lora_alpha is {alpha!r}: expected a number above 0")
        return self

    def rank_and_alpha(self, *names: str) -> tuple[int, float]:
        """The rank and alpha of the adapter on the matrix with these names."""
        rank = _by_pattern(self.rank_pattern, names, self.r)
        return rank, _by_pattern(self.alpha_pattern, names, self.lora_alpha)

    def rank_and_scaling(self, *names: str) -> tuple[int, float]:
        """The rank and scaling of the adapter on the matrix with these names."""
        rank, alpha = self.rank_and_alpha(*names)
        return rank, self.scaling(rank, alpha)

    def scaling(self, rank: int, alpha: float) -> float:
        """alpha / rank, or alpha / sqrt(rank) with use_rslora."""
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def targets_parameter(self, name: str) -> bool:
        """Whether a parameter of this name is one of `target_parameters`."""
        return any(name == target or name.endswith(f".{target}") for target in self.target_parameters)

    def targets(self, module: str, linear: bool = True) -> bool:
        """Whether the matrix of this module gets an adapter; linear: it is neither embedding nor head."""
        modules = self.target_modules
        if modules == ALL_LINEAR:
            return linear
        if isinstance(modules, str):
            return _compiled(modules).fullmatch(module) is not None
        return any(module == name or module.endswith(f".{name}") for name in modules)


def _by_pattern(pattern: Mapping[str, Any], names: tuple[str, ...], default: Any) -> Any:
    for key, value in pattern.items():
        if any(_compiled(_end_of_name(key)).fullmatch(name) for name in names):
            return value
    return default


def _end_of_name(pattern: str) -> str:
    return rf"(?:.*\.)?(?:{pattern})"


@lru_cache(maxsize=2 * _MOST_PATTERNS)
def _compiled(pattern: str) -> Any:
    """A regular expression that is matched in linear time, because it may come from an untrusted file."""
    engine: Any = re2  # a module without types
    options = engine.Options()
    options.max_mem, options.log_errors = _PATTERN_BYTES, False
    try:
        return engine.compile(pattern, options)
    except (engine.error, UnicodeEncodeError) as error:
        reason = error.args[0] if isinstance(error, engine.error) else error
        reason = reason.decode(errors="replace") if isinstance(reason, bytes) else reason
        raise InputError(f"LoRA: {pattern!r} is not a valid RE2 regular expression: {reason}") from None
