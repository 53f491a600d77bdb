"""Learning rate schedules: constant, linear or cosine, after a linear warm-up."""

from __future__ import annotations

import math
from dataclasses import dataclass

from einsum_transformer.arguments import checked
from einsum_transformer.errors import InputError

SHAPES = ("constant", "linear", "cosine")


@checked
@dataclass(frozen=True, slots=True)
class Schedule:
    """The learning rate as a function of the step, 0 to steps - 1.

    shape: "constant", "linear" or "cosine". Warm-up: lr (step + 1) / warmup_steps while step < warmup_steps.
    Then, with p rising from 0 to 1 over the remaining steps: constant lr; linear lr + (final_lr - lr) p;
    cosine final_lr + (lr - final_lr) (1 + cos(pi p)) / 2.
    """

    lr: float
    steps: int
    shape: str = "constant"
    warmup_steps: int = 0
    final_lr: float = 0.0

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise InputError(f"`schedule` is {self.shape!r}: expected {' or '.join(SHAPES)}")
        for name in ("lr", "final_lr"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"`{name}` is {value}: expected a number, 0 or more")
        if self.steps < 1 or not 0 <= self.warmup_steps <= self.steps:
            raise InputError(
                f"`warmup_steps` is {self.warmup_steps}: expected at most the number of steps, {self.steps}"
            )

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        p = min(1.0, (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps))
        if self.shape == "linear":
            return self.lr + (self.final_lr - self.lr) * p
        if self.shape == "cosine":
            return self.final_lr + (self.lr - self.final_lr) * (1 + math.cos(math.pi * p)) / 2
        return self.lr
