"""Data-parallel training: workers compute the gradients of a batch's rows, and the driver sums them.

The driver stores the trained weights and sends them to the workers at every step. Workers store constant data
only, so a worker can be replaced at any time. With `shard_optimizer` the workers also store the optimizer's
state, two copies of each shard (ZeRO stage 1, Rajbhandari et al., 2020).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np

from einsum_transformer.arguments import checked
from einsum_transformer.cluster.pool import Connection, Pool
from einsum_transformer.cluster.worker import Moments, Part, Plan, Shapes
from einsum_transformer.engine import blas, phase
from einsum_transformer.engine.parallel import for_each
from einsum_transformer.errors import InputError
from einsum_transformer.models.model import Model
from einsum_transformer.models.parameters import frozen, shapes_of, trainable
from einsum_transformer.training.data import Batch
from einsum_transformer.training.loop import Local, TrainingSettings, numbered

Array = np.ndarray
Arrays = dict[str, Array]


@checked
@dataclass(frozen=True, slots=True)
class RayWorkers:
    """Workers of a Ray cluster that share each batch: `train(..., workers=RayWorkers(4))`.

    address: the address of a Ray cluster, "auto" or host:port; None starts a local one. threads: the number
    of threads on each machine, divided over its workers; all its cores by default. timeout: the time limit
    of a call to a worker, in seconds. shard_optimizer: shard the optimizer's state over the workers, with two
    copies of each shard.
    """

    workers: int
    address: str | None = None
    threads: int | None = None
    timeout: float = 600.0
    shard_optimizer: bool = False

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise InputError(f"`workers` is {self.workers}: expected 1 or more")
        if self.shard_optimizer and self.workers < 2:
            raise InputError(
                "`shard_optimizer` requires at least 2 Ray `workers`, for two copies of each shard"
            )
        if self.threads is not None and self.threads < 1:
            raise InputError(f"`threads` is {self.threads}: expected 1 or more per machine")
        if not self.timeout > 0:
            raise InputError(f"timeout of Ray workers is {self.timeout} s: expected a number above 0")

    def compute(self) -> Callable[[Model, TrainingSettings], DataParallel]:
        """The argument `compute` of `Trainer`."""
        kind = Sharded if self.shard_optimizer else DataParallel
        return lambda model, settings: kind(
            model, settings, self.workers, self.address, self.threads, self.timeout
        )


class DataParallel(AbstractContextManager["DataParallel"]):
    """Computes gradients on Ray workers; see `RayWorkers`. `close`, or a `with` statement, ends them."""

    def __init__(
        self,
        model: Model,
        settings: TrainingSettings,
        workers: int,
        address: str | None,
        threads: int | None,
        timeout: float,
    ) -> None:
        self.model: Model = model
        self.settings: TrainingSettings = settings
        self.workers: int = workers
        self.weights: Arrays = trainable(model.decoder)
        entries, constant = model.weights, frozen(model.decoder)
        self.shapes: Shapes = Shapes(
            {name: array.shape for name, array in self.weights.items()},
            {name: entries[name].stored if name in entries else w.shape for name, w in self.weights.items()},
        )
        self.connection: Connection = Connection(
            address, workers, _store_bytes(self.weights, constant, workers)
        )
        self.ray: Any = self.connection.ray
        self.trained: Any = None
        """Reference to the weights of the current step in the object store, until its update."""
        try:
            references = {
                name: self.ray.put(np.asarray(w).reshape(entries[name.partition("/")[0]].stored))
                for name, w in constant.items()
            }
            plan = Plan(shapes_of(model.decoder), references, settings, blas.settings())
            self.pool: Pool = Pool(self.ray, plan, workers, threads, timeout)
            self._begin()
        except BaseException:
            self.connection.close()
            raise

    def _begin(self) -> None:
        self.local: Local = Local(self.model, self.settings)

    def gradients(self, parts: list[Batch], count: int, step: int) -> tuple[float, Arrays]:
        self.pool.replaced = 0
        shares, key = _shares(parts, self.workers), (self.settings.seed, step)
        with phase("share"):
            self.trained = trained = self._put(self.weights)
        with phase("workers"):
            answers = self.pool.ask(
                lambda i: self.pool.actors[i].gradients.remote(trained, shares[i], count, key)
            )
        with phase("sum"):
            loss = sum(loss for loss, _ in answers)
            return loss, self.shapes.received(_sum([found for _, found in answers]))

    def update(self, gradients: Arrays, lr: float, step: int, scale: float) -> None:
        self.trained = None
        self.local.update(gradients, lr, step, scale)

    def moments(self) -> Moments:
        return self.local.moments()

    def restore(self, moments: Moments) -> None:
        self.local.restore(moments)

    def _put(self, arrays: Arrays) -> Any:
        return self.ray.put(self.shapes.sent(arrays))

    def close(self) -> None:
        """End the workers, and the Ray session if this object started or connected it."""
        self.pool.close()
        self.connection.close()

    def __exit__(self, *error: object) -> None:
        self.close()


class Sharded(DataParallel):
    """Shards the optimizer's state: worker i owns shard i and stores a replica of its neighbour's shard.

    In each step the owners update their shards and return the new weights; after all of them, the replicas
    are updated. So one of the two copies is always complete, and a replacement of a dead worker copies its
    shards from the neighbours.
    """

    def _begin(self) -> None:
        sizes = {name: array.size for name, array in self.weights.items()}
        self.shards: list[list[str]] = _balanced(sizes, self.workers)
        trained = self._put(self.weights)
        self._give(lambda actor, shard: actor.begin.remote(shard, trained, self.shards[shard]))
        self.pool.recovered = self._recover

    def update(self, gradients: Arrays, lr: float, step: int, scale: float) -> None:
        trained = self.trained
        self.trained: Any = None
        parts = [self._put({name: gradients[name] for name in names}) for names in self.shards]
        scalars, actors = (lr, step, scale), self.pool.actors
        answers = self.pool.ask(lambda i: actors[i].update.remote(i, trained, parts[i], *scalars))
        self.pool.ask(lambda i: actors[i].follow.remote(self._replica(i), trained, parts[i - 1], *scalars))
        for worker, (names, weights) in enumerate(zip(self.shards, answers)):
            if names and not weights:
                raise _lost(worker, (worker + 1) % self.workers)
            for name, array in self.shapes.received(weights).items():
                np.copyto(self.weights[name], array)

    def moments(self) -> Moments:
        copies = self.pool.ask(lambda i: self.pool.actors[i].moments.remote(i))
        found: Moments = {moment: {} for moment in self.settings.optimizer.moments}
        for _, moments in copies:
            for moment, arrays in moments.items():
                found[moment] |= self.shapes.received(arrays)
        return {moment: {name: arrays[name] for name in self.weights} for moment, arrays in found.items()}

    def restore(self, moments: Moments) -> None:
        copies: list[Any] = []
        for names in self.shards:
            shard = {moment: self._as_weights(moments[moment], names) for moment in moments}
            copies.append(self.ray.put((-1, shard)))
        self._give(lambda actor, shard: actor.receive.remote(shard, copies[shard]))

    def _replica(self, worker: int) -> int:
        """The index of the shard that a worker replicates, which is also the index of the shard's owner."""
        return (worker - 1) % self.workers

    def _as_weights(self, moment: Arrays, names: list[str]) -> Arrays:
        """Copies of these moments in the memory layout of the weights, which the update requires."""
        arrays = {name: np.empty_like(self.weights[name]) for name in names}
        for name, array in arrays.items():
            np.copyto(array, moment[name])
        return self.shapes.sent(arrays)

    def _give(self, submit: Callable[[Any, int], Any]) -> None:
        """Call submit(actor, shard) for both shards of every worker."""

        def both(worker: int) -> Any:
            # An actor runs its calls in order, so waiting for the second call is enough.
            submit(self.pool.actors[worker], self._replica(worker))
            return submit(self.pool.actors[worker], worker)

        self.pool.ask(both)

    def _recover(self, worker: int) -> None:
        """Copy its shards to a new worker. The neighbours have completed their earlier calls by then."""
        replica = self._replica(worker)
        for shard, holder in ((worker, (worker + 1) % self.workers), (replica, replica)):
            copy = self.pool.actors[holder].moments.remote(shard)
            try:
                self.pool.get(copy, holder)
            except self.pool.lost:
                raise _lost(worker, holder) from None
            self.pool.get(self.pool.actors[worker].receive.remote(shard, copy), worker)


def _lost(worker: int, neighbour: int) -> InputError:
    return InputError(
        f"workers {worker} and {neighbour} died together, which lost both copies of a shard of the "
        "optimizer's state: resume from the last checkpoint"
    )


def _balanced(sizes: dict[str, int], count: int) -> list[list[str]]:
    """Partition names into `count` groups of similar total size: largest first, to the smallest group."""
    groups: list[list[str]] = [[] for _ in range(count)]
    totals = [0] * count
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        smallest = totals.index(min(totals))
        groups[smallest].append(name)
        totals[smallest] += sizes[name]
    return groups


def _store_bytes(trained: Arrays, constant: dict[str, Any], workers: int) -> int:
    """The maximum contents of an object store: the frozen weights, the trained weights of two steps, the
    gradients of every worker, and with a sharded optimizer the summed gradients and the new weights."""
    once = sum(array.nbytes for array in trained.values())
    return sum(w.dtype.itemsize * math.prod(w.shape) for w in constant.values()) + (workers + 4) * once


def check_rows(rows: int, workers: int) -> None:
    """Raise InputError if a micro-batch has fewer rows than there are workers."""
    if rows < workers:
        raise InputError(
            f"{rows} rows cannot be divided over {workers} Ray workers: use a larger batch, fewer gradient "
            "accumulation steps or fewer workers"
        )


def _shares(parts: list[Batch], workers: int) -> list[list[Part]]:
    """The rows of every micro-batch for each worker, with the number of the first row in the whole batch."""
    shares: list[list[Part]] = [[] for _ in range(workers)]
    for first, tokens, targets in numbered(parts):
        check_rows(len(tokens), workers)
        for share, t, y in zip(shares, np.array_split(tokens, workers), np.array_split(targets, workers)):
            share.append((first, t, y))
            first += len(t)
    return shares


def _sum(shares: list[Arrays]) -> Arrays:
    """The sum by name, in the order of the workers, which makes it deterministic."""
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
