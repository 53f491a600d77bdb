"""A pool of Ray actors that are called together; an actor that dies is replaced and called again."""

from __future__ import annotations

import os
import re
import socket
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from einsum_transformer.cluster.worker import Place, Plan, Worker
from einsum_transformer.errors import InputError

_ADDRESS = re.compile(r"auto|[\w.-]+:\d+|\[[0-9a-fA-F:]+\]:\d+")
# Ray reads these at import; a variable that is already set is not changed.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Under `uv run`, Ray would upload the working directory with all checkpoints, and every worker would
    # create a virtual environment before it starts.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}
_STORE_BYTES = 1 << 27
"""Headroom of a local object store beyond its computed contents."""


def import_ray(local: bool) -> Any:
    """Import the package ray; raises InputError with the install command if it is missing.

    local: make Ray listen on the loopback interface only, if this is its first import.
    """
    # With 0, Ray uses the loopback interface only, which is its default on systems other than Linux.
    loopback = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"} if local else {}
    for name, value in (_ENVIRONMENT | loopback).items():
        os.environ.setdefault(name, value)
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(
            'training on several workers requires Ray: pip install "einsum-transformer[ray]"'
        ) from None
    return ray


class Connection:
    """A Ray session: the current session of this process, the cluster at `address`, or a new local one.

    `close` ends the session unless it existed before.
    """

    def __init__(self, address: str | None, workers: int, store_bytes: int) -> None:
        self.ray: Any = import_ray(local=address is None)
        if address is not None and not _ADDRESS.fullmatch(address):
            raise InputError(f"Ray address is {address!r}: expected auto or host:port")
        self.ours: bool = not self.ray.is_initialized()
        explicit = None if address == "auto" else address
        if not self.ours:
            used = self.ray.get_runtime_context().gcs_address
            if explicit not in (None, used):
                raise InputError(
                    f"Ray address {address!r}: this process is connected to {used}; call ray.shutdown() first"
                )
            return
        if explicit is not None:
            _check_reachable(explicit)
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if address is None:
            quiet |= {
                "num_cpus": workers,
                "include_dashboard": False,
                "object_store_memory": store_bytes + _STORE_BYTES,
            }
        try:
            self.ray.init(address or "local", **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            first = str(error).strip().split("\n")[0]
            failed = "Ray does not start" if address is None else f"Ray address {address!r}: no connection"
            raise InputError(f"{failed}: {first}") from None

    def close(self) -> None:
        if self.ours and self.ray.is_initialized():
            self.ray.shutdown()


def _check_reachable(address: str) -> None:
    """Check that the address accepts connections; Ray itself retries for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"Ray address {address!r}: no connection: {error}; check that the head node is running"
        ) from None


class Pool:
    """`count` workers with the same plan; the workers of a machine divide its threads.

    threads: the number of threads on each machine, all its cores by default. timeout: the time limit of a
    call, in seconds.
    """

    def __init__(self, ray: Any, plan: Plan, count: int, threads: int | None, timeout: float) -> None:
        self.ray: Any = ray
        self.plan: Any = ray.put(plan)
        self.timeout: float = timeout
        self.recovered: Callable[[int], None] = lambda worker: None
        """Called with the index of a worker that was replaced, before any other call to the new actor."""
        errors = ray.exceptions
        self.lost: tuple[Any, ...] = (
            errors.RayActorError,
            errors.ActorUnschedulableError,
            errors.NodeDiedError,
            errors.ObjectLostError,
            errors.OutOfMemoryError,
            errors.WorkerCrashedError,
        )
        self.replaced: int = 0
        """The number of workers replaced in the current step."""
        self.places: list[Place] = []
        first = max(1, (threads or 1) // count)
        self.actors: list[Any] = [self._actor(first, cpus=1) for _ in range(count)]
        try:
            self._wait_for_start(threads)
        except BaseException:
            self.close()
            raise

    def _wait_for_start(self, threads: int | None) -> None:
        """Wait until all workers have started, and divide the threads of each machine."""
        calls = [actor.place.remote() for actor in self.actors]
        ready, _ = self.ray.wait(calls, num_returns=len(calls), timeout=self.timeout)
        if len(ready) < len(calls):
            raise InputError(
                f"{len(ready)} of {len(calls)} Ray workers started within {self.timeout:g} s: each requires "
                "a free CPU of the cluster, and this package on its machine"
            )
        try:
            places = self.ray.get(calls)
        except self.ray.exceptions.RayError as error:
            raise InputError(f"a Ray worker did not start: {str(error).strip().splitlines()[-1]}") from None
        # Neighbours run on different machines if possible, because they store copies of each other's moments.
        seen: Counter[str] = Counter()
        ranks = []
        for place in places:
            ranks.append((seen[place.node], place.node))
            seen[place.node] += 1
        order = sorted(range(len(places)), key=ranks.__getitem__)
        self.actors, self.places = [self.actors[i] for i in order], [places[i] for i in order]
        self.threads: list[int] = [
            max(1, (threads or place.cores) // seen[place.node]) for place in self.places
        ]
        self.ray.get([actor.set_threads.remote(n) for actor, n in zip(self.actors, self.threads)])

    def _actor(self, threads: int, cpus: int) -> Any:
        # Threads are set by the worker: environment variables of an actor delay its start by two seconds.
        kind = self.ray.remote(Worker).options(num_cpus=cpus, scheduling_strategy="SPREAD")
        return kind.remote(self.plan, threads)

    def ask(self, submit: Callable[[int], Any]) -> list[Any]:
        """Return the results of all workers; `submit(index)` starts the call of a worker. If a worker dies,
        its call is repeated on its replacement."""
        answers: list[Any] = [None] * len(self.actors)
        pending = {submit(i): i for i in range(len(self.actors))}
        deadline = time.monotonic() + self.timeout
        while pending:
            ready, _ = self.ray.wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                self._time_out(min(pending.values()))
            worker = pending.pop(ready[0])
            try:
                answers[worker] = self.get(ready[0], worker)
            except self.lost as error:
                self._replace(worker, error)
                pending[submit(worker)] = worker
                deadline = time.monotonic() + self.timeout
        return answers

    def get(self, reference: Any, worker: int) -> Any:
        """Return the result of a call to one worker; an exception in the worker is raised as it is."""
        try:
            return self.ray.get(reference, timeout=self.timeout)
        except self.ray.exceptions.GetTimeoutError:
            self._time_out(worker)
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause from error

    def _time_out(self, worker: int) -> None:
        place = self.places[worker]
        self._kill(worker)
        raise InputError(
            f"worker {worker} (process {place.pid} on {place.host}) did not respond in {self.timeout:g} s "
            "and was ended: check its machine, or set a longer timeout if a step takes that long"
        )

    def _replace(self, worker: int, error: Exception) -> None:
        """Start a new actor for a dead worker; it requests no CPU, as Ray still counts the old one."""
        while True:
            self.replaced += 1
            # All workers may die with their machine, and one or two replacements may die as well.
            if self.replaced > len(self.actors) + 2:
                reason = str(error).strip().splitlines()[0]
                raise InputError(
                    f"worker {worker} died after {self.replaced - 1} replacements in one step: {reason}"
                )
            self._kill(worker)
            self.actors[worker] = self._actor(self.threads[worker], cpus=0)
            try:
                self.places[worker] = self.get(self.actors[worker].place.remote(), worker)
                self.recovered(worker)
                return
            except self.lost as again:
                error = again

    def _kill(self, worker: int) -> None:
        self.ray.kill(self.actors[worker])

    def close(self) -> None:
        for worker in range(len(self.actors)):
            self._kill(worker)
