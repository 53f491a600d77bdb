"""A pool of Ray actors that are asked together; one that dies is replaced and asked again."""

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
# Ray reads these when it is imported; who sets one of them is obeyed.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # A driver under `uv run` would have its folder packed, with all checkpoints in it, and every worker make
    # a virtual environment there before it starts.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}
_STORE_BYTES = 1 << 27
"""Of a local object store, beyond what is known to lie in it."""


def import_ray(local: bool) -> Any:
    """The package ray, or one line that says how to install it.

    local: a Ray that listens on the loopback interface alone, if this is its first import.
    """
    # Off is where Ray stays on the loopback interface, which it does on other systems than Linux by default.
    loopback = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"} if local else {}
    for name, value in (_ENVIRONMENT | loopback).items():
        os.environ.setdefault(name, value)
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(
            'training on several workers needs Ray: pip install "einsum-transformer[ray]"'
        ) from None
    return ray


class Connection:
    """A Ray that is in use already, one that is connected to at `address`, or a local one for this process
    alone; `close` ends what was begun here."""

    def __init__(self, address: str | None, workers: int, store_bytes: int) -> None:
        self.ray = import_ray(local=address is None)
        if address is not None and not _ADDRESS.fullmatch(address):
            raise InputError(f"Ray address {address!r}: auto or host:port is expected")
        self.ours = not self.ray.is_initialized()
        elsewhere = None if address == "auto" else address
        if not self.ours:
            used = self.ray.get_runtime_context().gcs_address
            if elsewhere not in (None, used):
                raise InputError(
                    f"Ray address {address!r}: this process is connected to {used}; shut that down"
                )
            return
        if elsewhere is not None:
            _knock(elsewhere)
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
            what = "Ray does not start" if address is None else f"Ray address {address!r}: no connection"
            raise InputError(f"{what}: {first}") from None

    def close(self) -> None:
        if self.ours and self.ray.is_initialized():
            self.ray.shutdown()


def _knock(address: str) -> None:
    """See that somebody listens there; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"Ray address {address!r}: no connection: {error}; is the head node up?") from None


class Pool:
    """`count` workers made of one plan, each with its share of its machine's threads.

    threads: of a machine, all its cores by default. timeout: seconds that an answer may take.
    """

    def __init__(self, ray: Any, plan: Plan, count: int, threads: int | None, timeout: float) -> None:
        self.ray, self.plan, self.timeout = ray, ray.put(plan), timeout
        self.recovered: Callable[[int], None] = lambda worker: None
        """Called with the number of a worker that took a dead one's place, before it is asked anything."""
        errors = ray.exceptions
        self.lost = (
            errors.RayActorError,
            errors.ActorUnschedulableError,
            errors.NodeDiedError,
            errors.ObjectLostError,
            errors.OutOfMemoryError,
            errors.WorkerCrashedError,
        )
        self.replaced = 0
        """How many workers were replaced in this step."""
        self.places: list[Place] = []
        first = max(1, (threads or 1) // count)
        self.actors = [self._actor(first, cpus=1) for _ in range(count)]
        try:
            self._settle(threads)
        except BaseException:
            self.close()
            raise

    def _settle(self, threads: int | None) -> None:
        """See that all have started, and divide each machine's threads."""
        asked = [actor.place.remote() for actor in self.actors]
        ready, _ = self.ray.wait(asked, num_returns=len(asked), timeout=self.timeout)
        if len(ready) < len(asked):
            raise InputError(
                f"{len(ready)} of {len(asked)} Ray workers started within {self.timeout:g} s: "
                "has the cluster as many free CPUs, and this package on every machine?"
            )
        try:
            places = self.ray.get(asked)
        except self.ray.exceptions.RayError as error:
            raise InputError(f"a Ray worker did not start: {str(error).strip().splitlines()[-1]}") from None
        # Neighbours on different machines where that can be: they hold copies of each other's moments.
        seen: Counter[str] = Counter()
        ranks = []
        for place in places:
            ranks.append((seen[place.node], place.node))
            seen[place.node] += 1
        order = sorted(range(len(places)), key=ranks.__getitem__)
        self.actors, self.places = [self.actors[i] for i in order], [places[i] for i in order]
        self.threads = [max(1, (threads or place.cores) // seen[place.node]) for place in self.places]
        self.ray.get([actor.set_threads.remote(n) for actor, n in zip(self.actors, self.threads)])

    def _actor(self, threads: int, cpus: int) -> Any:
        # A worker sets its threads itself: a process with an environment of its own starts two seconds later.
        kind = self.ray.remote(Worker).options(num_cpus=cpus, scheduling_strategy="SPREAD")
        return kind.remote(self.plan, threads)

    def ask(self, submit: Callable[[int], Any]) -> list[Any]:
        """The answer of every worker to submit(its number), a call of its actor; asked again of the one that
        takes a dead one's place."""
        answers: list[Any] = [None] * len(self.actors)
        asked = {submit(i): i for i in range(len(self.actors))}
        deadline = time.monotonic() + self.timeout
        while asked:
            ready, _ = self.ray.wait(list(asked), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                self._hung(min(asked.values()))
            worker = asked.pop(ready[0])
            try:
                answers[worker] = self.get(ready[0], worker)
            except self.lost as error:
                self._replace(worker, error)
                asked[submit(worker)] = worker
                deadline = time.monotonic() + self.timeout
        return answers

    def get(self, reference: Any, worker: int) -> Any:
        """The answer of one worker; a mistake in its work is raised here as what it was."""
        try:
            return self.ray.get(reference, timeout=self.timeout)
        except self.ray.exceptions.GetTimeoutError:
            self._hung(worker)
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause from error

    def _hung(self, worker: int) -> None:
        place = self.places[worker]
        self._kill(worker)
        raise InputError(
            f"worker {worker} (process {place.pid} on {place.host}) gave no answer in {self.timeout:g} s and "
            "was ended: look at that machine, or set a longer timeout if a step takes that long"
        )

    def _replace(self, worker: int, error: Exception) -> None:
        """A new actor in the place of a dead one; it takes the CPU that Ray counted for the other."""
        while True:
            self.replaced += 1
            # A machine may take all of them along, and one or two may be unlucky again.
            if self.replaced > len(self.actors) + 2:
                reason = str(error).strip().splitlines()[0]
                raise InputError(
                    f"worker {worker} died, after {self.replaced - 1} others in one step: {reason}"
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
