"""A worker: the gradients of its rows and, where the optimizer's state is divided, the update of its shards.

Weights come from Ray's object store, mapped read-only and shared by all workers of a machine. They and their
gradients travel in the shape that a checkpoint stores them in: as matrices they are contiguous in the layout
that they have, and what is contiguous is mapped without a copy.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from einsum_transformer.engine import blas
from einsum_transformer.engine.memory import keep_freed
from einsum_transformer.models.parameters import with_arrays
from einsum_transformer.training.loop import TrainingSettings, batch_gradients
from einsum_transformer.training.optimizers import start

Array = np.ndarray
Arrays = Mapping[str, Array]
Moments = dict[str, dict[str, Array]]
Part = tuple[int, Array, Array]
"""The number of its first row in the whole batch, tokens, targets."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What every worker is made of. decoder: one of only shapes (`shapes_of`); frozen: name -> reference to
    the array."""

    decoder: Any
    frozen: dict[str, Any]
    settings: TrainingSettings
    blas: str


@dataclass(frozen=True, slots=True)
class Place:
    """Where a worker runs. node: Ray's id of the machine."""

    pid: int
    host: str
    node: str
    cores: int


@dataclass(frozen=True, slots=True)
class Shapes:
    """Name -> shape of every trained array, in the equations and as a checkpoint stores it."""

    seen: dict[str, tuple[int, ...]]
    stored: dict[str, tuple[int, ...]]

    def sent(self, arrays: Arrays) -> dict[str, Array]:
        """As they travel, views in the same memory."""
        return {name: array.reshape(self.stored[name]) for name, array in arrays.items()}

    def received(self, arrays: Arrays) -> dict[str, Array]:
        """As the equations take them, views in the same memory."""
        return {name: array.reshape(self.seen[name]) for name, array in arrays.items()}


class Worker:
    """One process of a data-parallel training."""

    def __init__(self, plan: Plan, threads: int) -> None:
        import ray  # pyright: ignore[reportMissingImports]

        keep_freed()
        blas.use("mkl" if plan.blas == "mkl" else "numpy")
        blas.set_threads(threads)
        self.plan = plan
        self.frozen = dict(zip(plan.frozen, ray.get(list(plan.frozen.values()))))
        self.shards: dict[int, tuple[int, Moments]] = {}
        """Number of a shard -> (the last step that is in it, the moments of its weights)."""

    def place(self) -> Place:
        """Where this worker runs."""
        import ray  # pyright: ignore[reportMissingImports]

        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        return Place(os.getpid(), os.uname().nodename, ray.get_runtime_context().get_node_id(), cores)

    def set_threads(self, threads: int) -> None:
        blas.set_threads(threads)

    def gradients(
        self, trained: Arrays, parts: list[Part], count: int, key: tuple[int, ...]
    ) -> tuple[float, dict[str, Array]]:
        """The loss of these rows, divided by `count`, and its gradient by every trained array."""
        held = {**self.frozen, **trained}
        decoder = with_arrays(self.plan.decoder, lambda name, shape: held[name].reshape(shape.shape))
        # What overflows is found and told where the sum of all workers is.
        with np.errstate(over="ignore", invalid="ignore"):
            loss, found = batch_gradients(decoder, parts, count, key, self.plan.settings)
        return loss, {name: array.reshape(trained[name].shape) for name, array in found.items()}

    def begin(self, shard: int, trained: Arrays, names: list[str]) -> None:
        """Hold a shard, the moments of these weights, as they are before the first step."""
        weights = {name: trained[name] for name in names}
        self.shards[shard] = -1, start(self.plan.settings.optimizer, weights)

    def receive(self, shard: int, copy: tuple[int, Moments]) -> None:
        """Hold a shard as another worker or a checkpoint has it: (the last step in it, the moments)."""
        step, moments = copy
        self.shards[shard] = (
            step,
            {
                moment: {name: np.array(array) for name, array in arrays.items()}
                for moment, arrays in moments.items()
            },
        )

    def moments(self, shard: int) -> tuple[int, Moments]:
        """The last step that is in a shard, and its moments."""
        return self.shards[shard]

    def update(
        self, shard: int, trained: Arrays, gradients: Arrays, lr: float, step: int, scale: float
    ) -> dict[str, Array]:
        """The new weights of a shard, whose moments change; of a step that is in it already, nothing.

        (A worker that took another's place may have got the shard after the step.)
        """
        last, moments = self.shards[shard]
        if last == step:
            return {}
        weights = {name: np.array(trained[name]) for name in gradients}
        with np.errstate(over="ignore", invalid="ignore"):
            self.plan.settings.optimizer.update(weights, gradients, moments, lr, step, scale)
        self.shards[shard] = step, moments
        return weights

    def follow(self, *update: Any) -> None:
        """`update` of a twin: its moments change as the other copy's did, its new weights are the same."""
        self.update(*update)
