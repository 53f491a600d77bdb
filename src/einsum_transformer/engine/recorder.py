"""What a program did: phases with their seconds, one event per einsum, captured values.

Nothing is recorded unless a `Recorder` is active; then `phase()` and `einsum` report to it. One recorder is
active at a time, and the program it watches runs on one thread; what `parallel` puts on others is tallied and
split afterwards.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Event:
    """One einsum: the equation, its letters' sizes, how it was lowered, and what it cost."""

    equation: str
    sizes: dict[str, int]
    dtype: str
    how: str
    seconds: float
    flops: int
    bytes: int
    path: tuple[str, ...]
    """The phases it ran in, from the outermost."""
    layer: int | None


@dataclass(frozen=True, slots=True)
class Span:
    """One phase that ended."""

    path: tuple[str, ...]
    layer: int | None
    start: float
    seconds: float

    @property
    def name(self) -> str:
        return self.path[-1]


@dataclass(slots=True)
class Recorder:
    """Collects spans, and on request events and values, while it is active as a context manager."""

    events_wanted: bool = False
    values_wanted: bool = False
    spans: list[Span] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    values: dict[str, np.ndarray] = field(default_factory=dict)
    _path: tuple[str, ...] = ()
    _layer: int | None = None

    def __enter__(self) -> Recorder:
        global active
        if active is not None:
            raise RuntimeError("a Recorder is active already")
        active = self
        return self

    def __exit__(self, *_: object) -> None:
        global active
        active = None

    def event(
        self,
        equation: str,
        sizes: dict[str, int],
        dtype: str,
        how: str,
        seconds: float,
        flops: int,
        traffic: int,
    ) -> None:
        path = self._path if _tally is None else (*self._path, *_tally.here.path)
        self.events.append(Event(equation, sizes, dtype, how, seconds, flops, traffic, path, self._layer))


active: Recorder | None = None


class _Nothing:
    """The phase of a program nobody watches."""

    __slots__ = ()

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


_NOTHING = _Nothing()


class _Here(threading.local):
    """The phase that each thread is in, for the events it reports."""

    path: tuple[str, ...] = ()


class _Tally:
    """Phases inside of parallel tasks: their seconds on all threads together, by name."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.lock = threading.Lock()
        self.here = _Here()


_tally: _Tally | None = None


class _TalliedPhase:
    __slots__ = ("name", "start", "tally")

    def __init__(self, tally: _Tally, name: str) -> None:
        self.tally, self.name = tally, name

    def __enter__(self) -> None:
        self.tally.here.path = (self.name,)
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.tally.here.path = ()
        with self.tally.lock:
            self.tally.seconds[self.name] += time.perf_counter() - self.start


@contextmanager
def parallel() -> Iterator[None]:
    """Around tasks on several threads: the wall time is split over their phases in proportion to the threads'
    seconds."""
    global _tally
    recorder = active
    if recorder is None:
        yield
        return
    _tally = tally = _Tally()
    start = time.perf_counter()
    try:
        yield
    finally:
        _tally = None
        wall, busy = time.perf_counter() - start, sum(tally.seconds.values())
        for name, seconds in tally.seconds.items():
            share = wall * seconds / busy
            recorder.spans.append(Span((*recorder._path, name), recorder._layer, start, share))
            start += share


class _Phase:
    __slots__ = ("layer", "name", "outer", "outer_layer", "recorder", "start")

    def __init__(self, recorder: Recorder, name: str, layer: int | None) -> None:
        self.recorder, self.name, self.layer = recorder, name, layer

    def __enter__(self) -> None:
        recorder = self.recorder
        self.outer, self.outer_layer = recorder._path, recorder._layer
        recorder._path = (*self.outer, self.name)
        if self.layer is not None:
            recorder._layer = self.layer
        self.start = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end = time.perf_counter()
        recorder = self.recorder
        recorder.spans.append(Span(recorder._path, recorder._layer, self.start, end - self.start))
        recorder._path, recorder._layer = self.outer, self.outer_layer


def phase(name: str, layer: int | None = None) -> Any:
    """A context manager that times a named part of the program; phases nest, `layer` is inherited by inner
    ones."""
    if active is None:
        return _NOTHING
    return _Phase(active, name, layer) if _tally is None else _TalliedPhase(_tally, name)


def tap(name: str, value: np.ndarray) -> np.ndarray:
    """`value` itself; a recorder that wants values keeps a copy under the current phases and `name`."""
    if active is not None and active.values_wanted:
        layer = "" if active._layer is None else f"layers.{active._layer}."
        active.values[layer + ".".join((*active._path, name))] = np.array(value)
    return value
