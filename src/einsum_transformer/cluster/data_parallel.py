"""Data-parallel training: the rows of a batch are divided over workers and their gradients added up.

The driver holds the weights and sends them out at every step; workers hold no more than what never changes, so
any of them can be replaced at any time. With `shard_optimizer` they hold the optimizer's state too, each shard
twice (ZeRO stage 1, Rajbhandari et al., 2020).
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy as np

from einsum_transformer.cluster.pool import Connection, Pool
from einsum_transformer.cluster.worker import Moments, Part, Plan, emptied, frozen_weights
from einsum_transformer.engine import blas, phase
from einsum_transformer.engine.parallel import for_each
from einsum_transformer.errors import InputError
from einsum_transformer.models.adapters import trainable
from einsum_transformer.models.model import Model
from einsum_transformer.training.data import Batch
from einsum_transformer.training.loop import Settings, numbered
from einsum_transformer.training.optimizers import start

Array = np.ndarray
Arrays = dict[str, Array]


def data_parallel(
    workers: int,
    address: str | None = None,
    threads: int | None = None,
    timeout: float = 600.0,
    shard_optimizer: bool = False,
) -> Callable[[Model, Settings], DataParallel]:
    """What makes a `DataParallel` of a model and settings: `Trainer(..., compute=data_parallel(4))`.

    address: of a Ray cluster, "auto" or host:port; None starts a local one. threads: of each machine, divided
    over its workers; all its cores by default. timeout: seconds that a worker's answer may take.
    shard_optimizer: divide the optimizer's state over the workers, each part held by two of them.
    """
    if workers < 1:
        raise InputError(f"{workers} Ray workers: at least 1 is expected")
    if shard_optimizer and workers < 2:
        raise InputError("a divided optimizer state needs at least 2 Ray workers: each part is held by two")
    if threads is not None and threads < 1:
        raise InputError(f"{threads} threads for the Ray workers of a machine: at least 1 is expected")
    if not timeout > 0:
        raise InputError(f"a timeout of {timeout} s for Ray workers: a number above 0 is expected")
    return lambda model, settings: DataParallel(
        model, settings, workers, address, threads, timeout, shard_optimizer
    )


class DataParallel:
    """Workers compute; see `data_parallel`. Close it, or use it in a `with`, to end what it started."""

    def __init__(
        self,
        model: Model,
        settings: Settings,
        workers: int,
        address: str | None,
        threads: int | None,
        timeout: float,
        shard_optimizer: bool,
    ) -> None:
        self.settings, self.workers = settings, workers
        self.weights = trainable(model.decoder)
        places = model.weights
        self.stored = {
            name: places[name].stored if name in places else array.shape
            for name, array in self.weights.items()
        }
        frozen = frozen_weights(model.decoder)
        trained_bytes = sum(array.nbytes for array in self.weights.values())
        frozen_bytes = sum(w.dtype.itemsize * int(np.prod(w.shape)) for w in frozen.values())
        # Two steps' weights, and the gradients of each worker and of all.
        store_bytes = frozen_bytes + (workers + 4) * trained_bytes
        self.connection = Connection(address, workers, store_bytes)
        self.ray = self.connection.ray
        try:
            references = {
                path: self.ray.put(np.asarray(w).reshape(places[path].stored)) for path, w in frozen.items()
            }
            plan = Plan(emptied(model.decoder), references, settings, blas.current().name)
            self.pool = Pool(self.ray, plan, workers, threads, timeout)
            self.state = start(settings.optimizer, self.weights)
        except BaseException:
            self.connection.close()
            raise

    def gradients(self, parts: list[Batch], count: int, step: int) -> tuple[float, Arrays]:
        self.pool.replaced = 0
        shares = _shares(parts, self.workers)
        with phase("share"):
            trained = self.ray.put(self._stored(self.weights))
        with phase("workers"):
            answers = self.pool.ask(
                lambda i: self.pool.actors[i].gradients.remote(
                    trained, shares[i], count, (self.settings.seed, step)
                )
            )
        with phase("sum"):
            return sum(loss for loss, _ in answers), self._shaped(_sum([found for _, found in answers]))

    def update(self, gradients: Arrays, lr: float, step: int, scale: float) -> None:
        self.settings.optimizer.update(self.weights, gradients, self.state, lr, step, scale)

    def moments(self) -> Moments:
        return self.state

    def restore(self, moments: Moments) -> None:
        for moment, arrays in moments.items():
            for name, array in arrays.items():
                np.copyto(self.state[moment][name], array)

    def close(self) -> None:
        """End the workers, and Ray if it was started or connected to here."""
        self.pool.close()
        self.connection.close()

    def __enter__(self) -> DataParallel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _stored(self, arrays: Arrays) -> Arrays:
        """In the shapes that a checkpoint has, views in the same memory."""
        return {name: array.reshape(self.stored[name]) for name, array in arrays.items()}

    def _shaped(self, arrays: Arrays) -> Arrays:
        """In the shapes that the equations have."""
        return {name: array.reshape(self.weights[name].shape) for name, array in arrays.items()}


def _shares(parts: list[Batch], workers: int) -> list[list[Part]]:
    """The rows of every part that each worker computes, numbered as they are in the whole batch."""
    shares: list[list[Part]] = [[] for _ in range(workers)]
    for first, tokens, targets in numbered(parts):
        if len(tokens) < workers:
            raise InputError(
                f"{len(tokens)} rows cannot be divided over {workers} Ray workers: use a larger batch, fewer "
                "parts of it (accumulation) or fewer workers"
            )
        for share, t, y in zip(shares, np.array_split(tokens, workers), np.array_split(targets, workers)):
            share.append((first, t, y))
            first += len(t)
    return shares


def _sum(shares: list[Arrays]) -> Arrays:
    """The sum by name, in the order of the workers whoever was first."""
    first, *others = shares
    if not others:
        return first
    total = {name: np.empty_like(array) for name, array in first.items()}

    def add(name: str) -> None:
        np.add(first[name], others[0][name], out=total[name])
        for other in others[1:]:
            total[name] += other[name]

    for_each(add, [(name,) for name in total], coarse=sum(array.size for array in total.values()) > 1 << 20)
    return total
