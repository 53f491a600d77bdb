"""Ray worker: computes the gradients of its rows and, with a sharded optimizer, updates its shards.

Weights are mapped read-only from Ray's object store, which the workers of a machine share. Weights and
gradients are sent in their checkpoint shapes, because these are contiguous in memory, and the object store
maps contiguous arrays without a copy.
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
"""(index of the first row in the whole batch, tokens, targets)."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The configuration of every worker. decoder: a decoder with shapes in place of arrays (`shapes_of`);
    frozen: name -> reference to the array in the object store."""

    decoder: Any
    frozen: dict[str, Any]
    settings: TrainingSettings
    blas: tuple[str, dict[str, str]]


@dataclass(frozen=True, slots=True)
class Place:
    """The process and machine of a worker. node: Ray's id of the machine."""

    pid: int
    host: str
    node: str
    cores: int


@dataclass(frozen=True, slots=True)
class Shapes:
    """Name -> shape of every trained array, as einsum equations use it (`seen`) and in a checkpoint."""

    seen: dict[str, tuple[int, ...]]
    stored: dict[str, tuple[int, ...]]

    def sent(self, arrays: Arrays) -> dict[str, Array]:
        """Views of the arrays in their checkpoint shapes, to be sent."""
        return {name: array.reshape(self.stored[name]) for name, array in arrays.items()}

    def received(self, arrays: Arrays) -> dict[str, Array]:
        """Views of received arrays in the shapes of the einsum equations."""
        return {name: array.reshape(self.seen[name]) for name, array in arrays.items()}


class Worker:
    """A process of data-parallel training."""

    def __init__(self, plan: Plan, threads: int) -> None:
        import ray  # pyright: ignore[reportMissingImports]

        keep_freed()
        blas.use(*plan.blas)
        blas.set_threads(threads)
        self.plan = plan
        self.frozen: dict[str, Any] = dict(zip(plan.frozen, ray.get(list(plan.frozen.values()))))
        self.shards: dict[int, tuple[int, Moments]] = {}
        """Index of a shard -> (the last step applied to it, the moments of its weights)."""

    def place(self) -> Place:
        """Return the process and machine of this worker."""
        import ray  # pyright: ignore[reportMissingImports]

        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        return Place(os.getpid(), os.uname().nodename, ray.get_runtime_context().get_node_id(), cores)

    def set_threads(self, threads: int) -> None:
        blas.set_threads(threads)

    def gradients(
        self, trained: Arrays, parts: list[Part], count: int, key: tuple[int, ...]
    ) -> tuple[float, dict[str, Array]]:
        """Return the loss of these rows, summed and divided by `count`, and its gradients by array name."""
        arrays = {**self.frozen, **trained}
        decoder = with_arrays(self.plan.decoder, lambda name, shape: arrays[name].reshape(shape.shape))
        # The trainer reports values that are not finite in the sum over all workers.
        with np.errstate(over="ignore", invalid="ignore"):
            loss, found = batch_gradients(decoder, parts, count, key, self.plan.settings)
        return loss, {name: array.reshape(trained[name].shape) for name, array in found.items()}

    def begin(self, shard: int, trained: Arrays, names: list[str]) -> None:
        """Store a shard: the initial moments of these weights."""
        weights = {name: trained[name] for name in names}
        self.shards[shard] = -1, start(self.plan.settings.optimizer, weights)

    def receive(self, shard: int, copy: tuple[int, Moments]) -> None:
        """Store a copy of a shard from another worker or a checkpoint: (last step applied, moments)."""
        step, moments = copy
        self.shards[shard] = (
            step,
            {
                moment: {name: np.array(array) for name, array in arrays.items()}
                for moment, arrays in moments.items()
            },
        )

    def moments(self, shard: int) -> tuple[int, Moments]:
        """Return the last step applied to a shard, and its moments."""
        return self.shards[shard]

    def update(
        self, shard: int, trained: Arrays, gradients: Arrays, lr: float, step: int, scale: float
    ) -> dict[str, Array]:
        """Update the moments of a shard and return its new weights, or nothing if the step is already applied
        (by the worker from which a replacement copied the shard)."""
        last, moments = self.shards[shard]
        if last == step:
            return {}
        weights = {name: np.array(trained[name]) for name in gradients}
        with np.errstate(over="ignore", invalid="ignore"):
            self.plan.settings.optimizer.update(weights, gradients, moments, lr, step, scale)
        self.shards[shard] = step, moments
        return weights

    def follow(self, *update: Any) -> None:
        """Update a replica of a shard as `update` does; the owner returns the new weights."""
        self.update(*update)
