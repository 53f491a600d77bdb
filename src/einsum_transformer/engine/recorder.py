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
    counts_wanted: bool = False
    spans: list[Span] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    values: dict[str, np.ndarray] = field(default_factory=dict)
    counts: dict[tuple[int | None, str], np.ndarray] = field(default_factory=dict)
    """By layer and name."""
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
        path, layer = self._path, self._layer
        if _tally is not None:
            here = _tally.here
            path = (*path, *here.path)
            layer = layer if here.layer is None else here.layer
        self.events.append(Event(equation, sizes, dtype, how, seconds, flops, traffic, path, layer))


active: Recorder | None = None


@contextmanager
def in_place_of_others(recorder: Recorder) -> Iterator[Recorder]:
    """Record with this recorder; the one that is active, if any, pauses meanwhile."""
    global active, _tally
    outer = active, _tally
    active, _tally = recorder, None
    try:
        yield recorder
    finally:
        active, _tally = outer


class _Nothing:
    """The phase of a program nobody watches."""

    __slots__ = ()

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


_NOTHING = _Nothing()


class _Here(threading.local):
    """The phases that each thread is in, below those of the caller."""

    path: tuple[str, ...] = ()
    layer: int | None = None


class _Tally:
    """Phases inside of parallel tasks: their seconds on all threads together, by path and layer."""

    def __init__(self, layer: int | None) -> None:
        self.seconds: defaultdict[tuple[tuple[str, ...], int | None], float] = defaultdict(float)
        self.lock = threading.Lock()
        self.here = _Here()
        self.layer = layer

    def spans(self, path: tuple[str, ...], start: float, wall: float) -> Iterator[Span]:
        """The wall time split over the phases in proportion to their seconds, one after the other, those
        inside of a phase before it."""
        busy = sum(seconds for (inner, _), seconds in self.seconds.items() if len(inner) == 1)
        begins = defaultdict(lambda: start)
        placed = []
        for (inner, layer), seconds in sorted(self.seconds.items(), key=lambda item: len(item[0][0])):
            outer = inner[:-1]
            span = Span((*path, *inner), layer, begins[outer], wall * seconds / busy)
            begins[inner] = min(begins[inner], span.start) if inner in begins else span.start
            begins[outer] += span.seconds
            placed.append(span)
        yield from reversed(placed)


_tally: _Tally | None = None


class _TalliedPhase:
    __slots__ = ("layer", "name", "outer", "outer_layer", "start", "tally")

    def __init__(self, tally: _Tally, name: str, layer: int | None) -> None:
        self.tally, self.name, self.layer = tally, name, layer

    def __enter__(self) -> None:
        here = self.tally.here
        self.outer, self.outer_layer = here.path, here.layer
        here.path = (*self.outer, self.name)
        if self.layer is not None:
            here.layer = self.layer
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        seconds, tally = time.perf_counter() - self.start, self.tally
        here = tally.here
        with tally.lock:
            tally.seconds[here.path, tally.layer if here.layer is None else here.layer] += seconds
        here.path, here.layer = self.outer, self.outer_layer


@contextmanager
def parallel() -> Iterator[None]:
    """Around tasks on several threads: the wall time is split over their phases in proportion to the threads'
    seconds."""
    global _tally
    recorder = active
    if recorder is None:
        yield
        return
    _tally = tally = _Tally(recorder._layer)
    start = time.perf_counter()
    try:
        yield
    finally:
        _tally = None
        recorder.spans.extend(tally.spans(recorder._path, start, time.perf_counter() - start))


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
    return _Phase(active, name, layer) if _tally is None else _TalliedPhase(_tally, name, layer)


def counting() -> bool:
    """Whether some recorder wants counts, so that nothing is counted for nobody."""
    return active is not None and active.counts_wanted


def count(name: str, amounts: np.ndarray) -> None:
    """A recorder that wants counts adds the amounts to those of the same name in the same layer."""
    if active is not None and active.counts_wanted:
        key = active._layer, name
        active.counts[key] = active.counts.get(key, 0) + amounts


def tapping() -> bool:
    """Whether some recorder wants values."""
    return active is not None and active.values_wanted


def tap(name: str, value: np.ndarray) -> np.ndarray:
    """`value` itself; a recorder that wants values keeps a copy under `name`, in a layer `layers.3.name`.

    The names are those of weights and the parts that hold them; without a name it is the layer's own value.
    """
    if active is not None and active.values_wanted:
        place = name if active._layer is None else f"layers.{active._layer}.{name}".rstrip(".")
        active.values[place] = np.array(value)
    return value
