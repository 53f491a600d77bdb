"""Data-parallel training: the rows of a batch are divided over workers and their gradients added up.

The driver holds the weights and sends them out at every step; workers hold no more than what never changes,
so any of them can be replaced at any time. With `shard_optimizer` they hold the optimizer's state too, each
shard twice (ZeRO stage 1, Rajbhandari et al., 2020).
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

    address: of a Ray cluster, "auto" or host:port; None starts a local one. threads: BLAS threads of each
    machine, divided over its workers; all its cores by default. timeout: seconds that a worker's answer may
    take. shard_optimizer: divide the optimizer's state over the workers, each part held by two of them.
    """

    workers: int
    address: str | None = None
    threads: int | None = None
    timeout: float = 600.0
    shard_optimizer: bool = False

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise InputError(f"{self.workers} Ray workers: at least 1 is expected")
        if self.shard_optimizer and self.workers < 2:
            raise InputError(
                "a divided optimizer state needs at least 2 Ray workers: each part is held by two"
            )
        if self.threads is not None and self.threads < 1:
            raise InputError(
                f"{self.threads} threads for the Ray workers of a machine: at least 1 is expected"
            )
        if not self.timeout > 0:
            raise InputError(f"a timeout of {self.timeout} s for Ray workers: a number above 0 is expected")

    def compute(self) -> Callable[[Model, TrainingSettings], DataParallel]:
        """The argument `compute` of `Trainer`."""
        kind = Sharded if self.shard_optimizer else DataParallel
        return lambda model, settings: kind(
            model, settings, self.workers, self.address, self.threads, self.timeout
        )


class DataParallel(AbstractContextManager["DataParallel"]):
    """Workers compute; see `RayWorkers`. Close it, or use it in a `with`, to end what it started."""

    def __init__(
        self,
        model: Model,
        settings: TrainingSettings,
        workers: int,
        address: str | None,
        threads: int | None,
        timeout: float,
    ) -> None:
        self.model, self.settings, self.workers = model, settings, workers
        self.weights = trainable(model.decoder)
        places, held = model.weights, frozen(model.decoder)
        self.shapes = Shapes(
            {name: array.shape for name, array in self.weights.items()},
            {name: places[name].stored if name in places else w.shape for name, w in self.weights.items()},
        )
        self.connection = Connection(address, workers, _store_bytes(self.weights, held, workers))
        self.ray = self.connection.ray
        self.trained: Any = None
        """Reference to the weights that the workers have, from a step's gradients to its update."""
        try:
            references = {
                name: self.ray.put(np.asarray(w).reshape(places[name.partition("/")[0]].stored))
                for name, w in held.items()
            }
            plan = Plan(shapes_of(model.decoder), references, settings, blas.current().name)
            self.pool = Pool(self.ray, plan, workers, threads, timeout)
            self._begin()
        except BaseException:
            self.connection.close()
            raise

    def _begin(self) -> None:
        self.local = Local(self.model, self.settings)

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
        """End the workers, and Ray if it was started or connected to here."""
        self.pool.close()
        self.connection.close()

    def __exit__(self, *error: object) -> None:
        self.close()


class Sharded(DataParallel):
    """Workers hold the optimizer's state too: worker i has shard i, and a twin of its neighbour's shard.

    Each step the owners of the shards change them and answer with the new weights; when all have, the twins
    follow. So at any time one of two copies is whole, and a worker that takes a dead one's place gets its
    shards from the neighbours.
    """

    def _begin(self) -> None:
        self.shards = _balanced({name: array.size for name, array in self.weights.items()}, self.workers)
        trained = self._put(self.weights)
        self._give(lambda actor, shard: actor.begin.remote(shard, trained, self.shards[shard]))
        self.pool.recovered = self._recover

    def update(self, gradients: Arrays, lr: float, step: int, scale: float) -> None:
        trained, self.trained = self.trained, None
        parts = [self._put({name: gradients[name] for name in names}) for names in self.shards]
        how, actors = (lr, step, scale), self.pool.actors
        answers = self.pool.ask(lambda i: actors[i].update.remote(i, trained, parts[i], *how))
        self.pool.ask(lambda i: actors[i].follow.remote(self._twin(i), trained, parts[i - 1], *how))
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
        copies = []
        for names in self.shards:
            shard = {moment: self._laid_out(moments[moment], names) for moment in moments}
            copies.append(self.ray.put((-1, shard)))
        self._give(lambda actor, shard: actor.receive.remote(shard, copies[shard]))

    def _twin(self, worker: int) -> int:
        """The shard that a worker holds beside its own, and the worker that owns it."""
        return (worker - 1) % self.workers

    def _laid_out(self, moment: Arrays, names: list[str]) -> Arrays:
        """In the memory layout of the weights, as the update takes them."""
        arrays = {name: np.empty_like(self.weights[name]) for name in names}
        for name, array in arrays.items():
            np.copyto(array, moment[name])
        return self.shapes.sent(arrays)

    def _give(self, submit: Callable[[Any, int], Any]) -> None:
        """submit(actor, shard) for both shards of every worker."""

        def both(worker: int) -> Any:
            # An actor's calls are done in order: the second one's answer is that of both.
            submit(self.pool.actors[worker], self._twin(worker))
            return submit(self.pool.actors[worker], worker)

        self.pool.ask(both)

    def _recover(self, worker: int) -> None:
        """Give a new worker its shards. What a neighbour was asked before is done before it answers this."""
        twin = self._twin(worker)
        for shard, holder in ((worker, (worker + 1) % self.workers), (twin, twin)):
            copy = self.pool.actors[holder].moments.remote(shard)
            try:
                self.pool.get(copy, holder)
            except self.pool.lost:
                raise _lost(worker, holder) from None
            self.pool.get(self.pool.actors[worker].receive.remote(shard, copy), worker)


def _lost(worker: int, neighbour: int) -> InputError:
    return InputError(
        f"workers {worker} and {neighbour} died together, and with them both copies of a part of the "
        "optimizer's state: go on from the last checkpoint"
    )


def _balanced(sizes: dict[str, int], count: int) -> list[list[str]]:
    """Names in `count` groups of about the same size: each, from the largest on, goes where least is."""
    groups: list[list[str]] = [[] for _ in range(count)]
    totals = [0] * count
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        smallest = totals.index(min(totals))
        groups[smallest].append(name)
        totals[smallest] += sizes[name]
    return groups


def _store_bytes(trained: Arrays, held: dict[str, Any], workers: int) -> int:
    """What lies in a machine's object store at most: what is frozen, the weights of two steps, the gradients
    of every worker, and those of all with the new weights where the optimizer's state is divided."""
    once = sum(array.nbytes for array in trained.values())
    return sum(w.dtype.itemsize * math.prod(w.shape) for w in held.values()) + (workers + 4) * once


def check_rows(rows: int, workers: int) -> None:
    """Raise InputError if the rows of a part of a batch are too few for the workers."""
    if rows < workers:
        raise InputError(
            f"{rows} rows cannot be divided over {workers} Ray workers: use a larger batch, fewer "
            "parts of it (accumulation) or fewer workers"
        )


def _shares(parts: list[Batch], workers: int) -> list[list[Part]]:
    """The rows of every part that each worker computes, numbered as they are in the whole batch."""
    shares: list[list[Part]] = [[] for _ in range(workers)]
    for first, tokens, targets in numbered(parts):
        check_rows(len(tokens), workers)
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
