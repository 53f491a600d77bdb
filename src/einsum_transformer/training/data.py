"""What a step trains on. A batch is a function of the step's number, so that a resumed run goes on where it
was."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from einsum_transformer.errors import InputError

Array = np.ndarray
Batch = tuple[Array, Array]
"""tokens and targets, both (b, t) ints; targets[b, t] is the token after tokens[b, t], or -100."""


class Batches(Protocol):
    """The batch of every step."""

    def batch(self, step: int) -> list[Batch]:
        """The micro-batches of a step, whose gradients add up."""
        ...

    def description(self) -> dict[str, Any]:
        """What decides the batches, in JSON types: batches that agree in it are the same."""
        ...


@dataclass(frozen=True, slots=True)
class RandomTokens:
    """Uniformly random tokens, each the target of the one before: all there is to learn is the batch itself.

    fixed: the same batch at every step, whose loss a working optimizer brings down.
    """

    vocab_size: int
    batch_size: int
    length: int
    seed: int = 0
    fixed: bool = False
    accumulation: int = 1

    def __post_init__(self) -> None:
        for name in ("batch_size", "length", "accumulation"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: at least 1 is expected")
        if self.seed < 0:
            raise InputError(f"seed is {self.seed}: it must be at least 0")
        if self.batch_size < self.accumulation:
            raise InputError(
                f"accumulation splits a batch of {self.batch_size} into {self.accumulation}: at most its size"
            )

    def batch(self, step: int) -> list[Batch]:
        rng = np.random.default_rng([self.seed, 0 if self.fixed else step])
        tokens = rng.integers(0, self.vocab_size, (self.batch_size, self.length + 1))
        parts = np.array_split(tokens, self.accumulation)
        return [(part[:, :-1], part[:, 1:]) for part in parts]

    def description(self) -> dict[str, Any]:
        return {"kind": "random tokens"} | asdict(self)
