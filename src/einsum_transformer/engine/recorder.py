# pyright: reportPrivateUsage=false
"""Record a running program: phases with their seconds, einsum events, values by name.

Nothing is recorded unless a `Recorder` is active. It is active in the context (see `contextvars`) that
entered it, which belongs to one thread, and in the tasks that `parallel.for_each` runs for that thread. A
recorder that is entered inside another one replaces it until it is exited.
"""

from __future__ import annotations

import fnmatch
import threading
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from einsum_transformer.arguments import checked
from einsum_transformer.engine.shapes import ShapeArray

Array = np.ndarray
Path = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Event:
    """One einsum call: the equation, the sizes of its letters, its lowering and its cost."""

    equation: str
    sizes: dict[str, int]
    dtype: str
    """The type of the result."""
    how: str
    start: float
    """time.perf_counter() at the start of the call."""
    seconds: float
    flops: int
    bytes_read: int
    """The size of all operands, each in its own type."""
    bytes_written: int
    path: Path
    """The enclosing phases, outermost first."""
    layer: int | None
    weight: str | None
    """The path of the weight that is an operand, or whose gradient is computed; None without a weight."""
    gradient: bool
    """Whether the result is part of the gradient of `weight`."""
    thread: int
    """threading.get_ident() of the calling thread."""

    @property
    def bytes(self) -> int:
        return self.bytes_read + self.bytes_written


@dataclass(frozen=True, slots=True)
class Span:
    """One completed phase."""

    path: Path
    layer: int | None
    start: float
    seconds: float
    busy: float | None = None
    """If the phase ran in parallel tasks: its seconds, summed over the threads. Start and seconds are then
    its share of the wall time of the tasks, and not the time when it ran."""

    @property
    def name(self) -> str:
        return self.path[-1]

    @property
    def divided(self) -> bool:
        """Whether the phase ran in parallel tasks."""
        return self.busy is not None


class Taped(NamedTuple):
    """A record, and the start and the seconds of the calls that were timed for it: for the equations of one
    joined product, the whole product."""

    record: Span | Event
    start: float
    seconds: float


class _Readers:
    """Callbacks, each with the patterns of the names that it reads."""

    def __init__(self) -> None:
        self._added: list[tuple[Sequence[str], Callable[..., Any]]] = []
        self._found: dict[tuple[str | Path, str], tuple[Callable[..., Any], ...]] = {}

    def __bool__(self) -> bool:
        return bool(self._added)

    def add(self, patterns: Sequence[str], reader: Callable[..., Any]) -> None:
        self._added.append((patterns, reader))
        self._found.clear()

    def of(self, name: str | Path, ending: str = "") -> tuple[Callable[..., Any], ...]:
        """Return the callbacks with a pattern that has this ending and matches the name; the name of a path
        is "outer/inner"."""
        found = self._found.get((name, ending))
        if found is None:
            text = name if isinstance(name, str) else "/".join(name)
            found = self._found[name, ending] = tuple(
                reader
                for patterns, reader in self._added
                if any(each.endswith(ending) and fnmatch.fnmatchcase(text, each) for each in patterns)
            )
        return found


@checked
class Recorder:
    """A context manager that calls its readers (callbacks) while it is active.

    spans, events: collect all of them in the attributes of the same names. values: patterns of the names of
    values to copy into the dictionary `values`; a later value replaces an earlier one of the same name.

    Any number of readers can be added. Patterns are shell patterns: `*` matches any characters, including
    dots. Readers of one recorder run one at a time, and their own computations are not recorded.
    """

    def __init__(self, spans: bool = True, events: bool = False, values: str | Sequence[str] = ()) -> None:
        self.spans: list[Span] = []
        self.events: list[Event] = []
        self.values: dict[str, Array] = {}
        self._span_readers, self._event_readers, self._value_readers = _Readers(), _Readers(), _Readers()
        self._gradient_readers = _Readers()
        self._array_readers = _Readers()
        self._lock = threading.RLock()
        self._outer: _Frame | None = None
        self._entered = False
        self._stores_spans = spans
        self._weights: dict[int, _Weights] = {}
        self._tape: list[Taped] | None = None
        self._pending: list[Callable[[], Iterable[Span | Event]]] = []
        """Return the records of repeated steps, which are stored and read when the enclosing phase ends, so
        that this takes none of its time."""
        if events:
            self.on_event(self.events.append)
        if values:
            self.on_value(self._store, *([values] if isinstance(values, str) else values))

    def on_span(self, reader: Callable[[Span], object], *phases: str) -> Recorder:
        """Call reader(span) when a phase ends, for all phases or those whose path
        ("forward/layer/attention") matches."""
        self._span_readers.add(phases or ("*",), reader)
        return self

    def on_event(self, reader: Callable[[Event], object], *phases: str) -> Recorder:
        """Call reader(event) after every einsum, in all phases or those whose path matches. Readers must be
        added before the recorder is entered."""
        if self._entered:
            raise RuntimeError("readers of events must be added before the Recorder is entered")
        self._event_readers.add(phases or ("*",), reader)
        return self

    def on_arrays(self, reader: Callable[[Event, Sequence[Any], Any], object], *phases: str) -> Recorder:
        """Call reader(event, operands, result) after every einsum, in all phases or those whose path matches.
        Readers must be added before the recorder is entered.

        The arrays are those of the program, which may overwrite them later: copy what is stored. Operands
        that are not in memory as arrays have only a shape. Decode steps run as a program while arrays are
        read, and not as a replay.
        """
        if self._entered:
            raise RuntimeError("readers of arrays must be added before the Recorder is entered")
        self._array_readers.add(phases or ("*",), reader)
        return self

    def on_value(self, reader: Callable[[str, Array], Array | None], *names: str) -> Recorder:
        """Call reader(name, value) for every value whose name matches, such as "layers.3.self_attn". Readers
        must be added before the recorder is entered.

        The program may overwrite the array later: copy it to store it. An array that the reader returns
        replaces the value in the rest of the forward pass; it must have the same shape. Backward passes
        ignore the replacement.
        """
        if self._entered:
            raise RuntimeError("readers of values must be added before the Recorder is entered")
        self._value_readers.add(names or ("*",), reader)
        return self

    def on_gradient(self, reader: Callable[[str, Array], object], *names: str) -> Recorder:
        """Call reader(name, gradient) in backward passes, with the gradient of every value whose name
        matches. The program may overwrite the array later: copy it to store it."""
        self._gradient_readers.add(names or ("*",), reader)
        return self

    def __enter__(self) -> Recorder:
        if self._entered:
            raise RuntimeError("this Recorder is already active: use another Recorder for another run")
        global active, active_for_events
        with _lock:
            active += 1
            active_for_events += self._reads_events
        self._entered, self._outer = True, _frame.get()
        _frame.set(_Frame(self))
        return self

    def __exit__(self, *_: object) -> None:
        global active, active_for_events
        with _lock:
            active -= 1
            active_for_events -= self._reads_events
        self._repeat()
        self._entered = False
        if (frame := _frame.get()) is not None and frame.recorder is self:
            _frame.set(self._outer)
        self._outer = None
        self._weights.clear()

    @property
    def _reads_events(self) -> bool:
        return bool(self._event_readers) or bool(self._array_readers)

    def _store(self, name: str, value: Array) -> None:
        self.values[name] = np.array(value)

    def _span(self, span: Span) -> None:
        self._repeat()
        if self._tape is not None:
            self._tape.append(Taped(span, span.start, span.seconds))
        if self._stores_spans:
            self.spans.append(span)
        if self._span_readers and (readers := self._span_readers.of(span.path)):
            self._notify(readers, span)

    def _repeat(self) -> None:
        """Store the pending spans and call the readers, as during the run of a program."""
        if not self._pending:
            return
        frame = _frame.get()
        _frame.set(None)
        try:
            with self._lock:
                pending, self._pending = self._pending, []
                for record in chain.from_iterable(records() for records in pending):
                    if isinstance(record, Event):
                        readers = self._event_readers
                    else:
                        readers = self._span_readers
                        if self._stores_spans:
                            self.spans.append(record)
                    if readers:
                        for reader in readers.of(record.path):
                            reader(record)
        finally:
            _frame.set(frame)

    def _notify(self, readers: tuple[Callable[..., Any], ...], *arguments: Any) -> None:
        """Call the readers one after the other, with recording paused in this context."""
        frame = _frame.get()
        _frame.set(None)
        try:
            with self._lock:
                for reader in readers:
                    reader(*arguments)
        finally:
            _frame.set(frame)

    def _replaced(self, name: str, value: Array, ending: str = "") -> Array:
        """Return the value, or the replacement that a reader returned."""
        readers = self._value_readers.of(name, ending)
        if not readers:
            return value
        frame = _frame.get()
        _frame.set(None)
        try:
            with self._lock:
                for reader in readers:
                    replacement = reader(name, value)
                    if replacement is None or replacement is value:
                        continue
                    value = _like(name, value, replacement)
        finally:
            _frame.set(frame)
        return value


def _like(name: str, value: Array, replacement: Array) -> Array:
    """Copy `replacement` to the type and memory layout of `value`: the program may write to it. If they are
    equal, return `value`, so that the rest of the pass has the same bits as without a reader."""
    if (shape := np.shape(replacement)) != np.shape(value):
        raise ValueError(f"{name} has shape {np.shape(value)}, but a reader returned shape {shape}")
    copy = np.empty_like(value)
    if isinstance(copy, ShapeArray):
        return copy
    if np.array_equal(value, replacement, equal_nan=True):
        return value
    np.copyto(copy, replacement, casting="same_kind")
    return copy


class _Weights:
    """Finds the name of a weight by its address in memory, also from a view of the weight."""

    def __init__(self, owner: object, named: Iterable[tuple[str, Any]]) -> None:
        # References to both, so that their ids are not reused.
        self.owner, self._leaves = owner, list(named)
        self._by_id = {id(weight): name for name, weight in self._leaves}
        ranges: dict[int, tuple[int, str]] = {}
        for name, weight in self._leaves:
            if isinstance(weight, (Array, ShapeArray)):
                low, high = _bounds(weight)  # pyright: ignore[reportUnknownArgumentType]
                ranges.setdefault(low, (high, name))
        self._ranges = ranges
        self._starts = sorted(ranges)

    def name(self, weight: Any) -> str | None:
        """Return the path of a weight or of the weight that this is a view of, else None."""
        if (found := self._by_id.get(id(weight))) is not None:
            return found
        if not isinstance(weight, (Array, ShapeArray)):
            return None
        address = _address(weight)  # pyright: ignore[reportUnknownArgumentType]
        before = bisect_right(self._starts, address) - 1
        if before < 0:
            return None
        end, name = self._ranges[self._starts[before]]
        return name if address < end else None


def _address(a: Array | ShapeArray) -> int:
    return (a.dummy if isinstance(a, ShapeArray) else a).__array_interface__["data"][0]


def _bounds(a: Array | ShapeArray) -> tuple[int, int]:
    return np.lib.array_utils.byte_bounds(a.dummy if isinstance(a, ShapeArray) else a)


@dataclass(slots=True)
class _Frame:
    """The current position of a context in the program, for its active recorder. Immutable (but not frozen:
    one is created for every phase, and creating a frozen one takes three times as long)."""

    recorder: Recorder
    path: Path = ()
    layer: int | None = None
    scope: str = ""
    """The prefix of the names of values here."""
    tally: _Tally | None = None
    weights: _Weights | None = None
    weight: str | None = None
    """The path of the leaf whose product or gradient is computed here."""
    gradient: bool = False


_frame: ContextVar[_Frame | None] = ContextVar("einsum_transformer_recorder", default=None)
"""The position in the program for the active recorder, None without one."""
active: int = 0
"""The number of active recorders in all threads; at 0, `phase` and `tap` return at once."""
active_for_events: int = 0
"""The number of active recorders with readers of events."""
_lock = threading.Lock()


class _Nothing:
    """A phase that is not recorded."""

    __slots__ = ()

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


_NOTHING = _Nothing()


class _Phase:
    __slots__ = ("inner", "outer", "start")

    def __init__(self, outer: _Frame, name: str, layer: int | None, scope: str | None) -> None:
        inside = outer.scope
        if outer.recorder._value_readers:  # only they need the names of values
            if layer is not None:
                scope = f"layers.{layer}"
            if scope is not None:
                inside = f"{inside}.{scope}" if inside else scope
        own = outer.layer if layer is None else layer
        self.outer = outer
        self.inner = _Frame(
            outer.recorder,
            (*outer.path, name),
            own,
            inside,
            outer.tally,
            outer.weights,
            outer.weight,
            outer.gradient,
        )

    def __enter__(self) -> None:
        _frame.set(self.inner)
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        seconds = time.perf_counter() - self.start
        outer, inner, recorder = self.outer, self.inner, self.inner.recorder
        frame = _frame.get()
        # A generator may be closed in another context, or after the recording: nothing to restore then.
        if frame is None or frame.path is not inner.path:
            return
        _frame.set(outer)
        if outer.tally is not None:
            outer.tally.add(inner.path, inner.layer, seconds)
        else:
            recorder._span(Span(inner.path, inner.layer, self.start, seconds))


def phase(name: str, layer: int | None = None, scope: str | None = None) -> Any:
    """Return a context manager that times a named part of the program; phases can be nested.

    layer: number of the layer, inherited by inner phases. scope: prefix of the names of values inside, added
    to the enclosing scope; the scope of a layer is "layers.<number>".
    """
    if not active:
        return _NOTHING
    frame = _frame.get()
    if frame is None or not frame.recorder._entered:
        return _NOTHING
    return _Phase(frame, name, layer, scope)


@contextmanager
def _in_scope(frame: _Frame, scope: str) -> Generator[None]:
    _frame.set(replace(frame, scope=_named(frame, scope)))
    try:
        yield
    finally:
        _frame.set(frame)


def scoped(scope: str) -> Any:
    """Return a context manager that adds a scope to the names of values, as a phase does, without a phase."""
    frame = _frame.get() if active else None
    return _NOTHING if frame is None else _in_scope(frame, scope)


def tap(name: str, value: Array, requested: bool = False) -> Array:
    """Return the value to use from here on: `value`, or a reader's replacement.

    name: relative to the scope of the enclosing phases, "" for the scope itself. Names follow the names of
    weights and their modules. requested: only call the readers that request the value (see the function
    `requested`).
    """
    if not active:
        return value
    frame = _frame.get()
    if frame is None or not frame.recorder._value_readers:
        return value
    return frame.recorder._replaced(_named(frame, name), value, name if requested else "")


def tap_gradient(name: str, gradient: Array) -> None:
    """Pass the gradient of a value to its readers; name: as for `tap`."""
    if not active:
        return
    frame = _frame.get()
    if frame is None or not frame.recorder._gradient_readers:
        return
    if readers := frame.recorder._gradient_readers.of(full := _named(frame, name)):
        frame.recorder._notify(readers, full, gradient)


def gradient_requested(name: str) -> bool:
    """`requested` for readers of gradients."""
    frame = _frame.get()
    if frame is None or not frame.recorder._gradient_readers:
        return False
    return bool(frame.recorder._gradient_readers.of(_named(frame, name), name))


def position() -> tuple[Path, int | None]:
    """Return the enclosing phases and the layer, as in an `Event`; ((), None) without an active recorder."""
    frame = _frame.get()
    return ((), None) if frame is None else (frame.path, frame.layer)


def destination() -> tuple[Recorder, Path] | None:
    """Return the active recorder and the enclosing phases, None without an active recorder."""
    frame = _frame.get()
    return None if frame is None else (frame.recorder, frame.path)


@contextmanager
def paused() -> Generator[None]:
    """Context manager whose calls are not recorded."""
    frame = _frame.get()
    _frame.set(None)
    try:
        yield
    finally:
        _frame.set(frame)


@contextmanager
def taped() -> Generator[list[Taped]]:
    """Context manager that also collects the records of the active recorder in a list."""
    records: list[Taped] = []
    frame = _frame.get()
    if frame is None:
        yield records
        return
    frame.recorder._tape = records
    try:
        yield records
    finally:
        frame.recorder._tape = None


def repeat(records: Callable[[], Iterable[Span | Event]]) -> None:
    """Send the records of a step to the active recorder; it calls the function when this phase ends."""
    frame = _frame.get()
    assert frame is not None
    frame.recorder._pending.append(records)
    if not frame.path:
        frame.recorder._repeat()


def tap_at(path: str, value: Array) -> Array:
    """`tap` with the full name."""
    frame = _frame.get()
    return value if frame is None else frame.recorder._replaced(path, value)


def requested(name: str) -> bool:
    """Return whether a reader has a pattern that ends in this name: for values that are costly to compute or
    store, which the pattern `*` alone does not request."""
    if not active:
        return False
    frame = _frame.get()
    if frame is None or not frame.recorder._value_readers:
        return False
    return bool(frame.recorder._value_readers.of(_named(frame, name), name))


def _named(frame: _Frame, name: str) -> str:
    return f"{frame.scope}.{name}" if frame.scope and name else frame.scope or name


def reads_values() -> bool:
    """Return whether the active recorder has readers of values."""
    frame = _frame.get()
    return frame is not None and bool(frame.recorder._value_readers)


def reads_events() -> bool:
    """Return whether the active recorder has readers of events or of their arrays."""
    frame = _frame.get()
    return frame is not None and frame.recorder._reads_events


def reads_arrays() -> bool:
    """Return whether the active recorder has readers of the arrays of events."""
    frame = _frame.get()
    return frame is not None and bool(frame.recorder._array_readers)


def name_weights(owner: object, named: Callable[[], Iterable[tuple[str, Any]]]) -> None:
    """Let events name the weights of `owner` until the enclosing phase ends.

    named: returns (path, array or leaf) of each weight; called once per owner, and only if events are read.
    """
    frame = _frame.get()
    if frame is None or not frame.recorder._reads_events:
        return
    cached = frame.recorder._weights
    weights = cached.get(id(owner))
    if weights is None or weights.owner is not owner:
        if len(cached) >= 16:
            cached.clear()
        weights = cached[id(owner)] = _Weights(owner, named())
    _frame.set(replace(frame, weights=weights))


@contextmanager
def _using(frame: _Frame, name: str, gradient: bool) -> Generator[None]:
    _frame.set(replace(frame, weight=name, gradient=gradient))
    try:
        yield
    finally:
        _frame.set(frame)


def using(weight: Any, gradient: bool = False) -> Any:
    """Return a context manager for the products of a weight (an array, a leaf or a part of one) or of its
    gradient: events inside name the weight."""
    frame = _frame.get()
    if frame is None or frame.weights is None or (name := frame.weights.name(weight)) is None:
        return _NOTHING
    return _using(frame, name, gradient)


def event(
    equation: str,
    sizes: dict[str, int],
    operands: Sequence[Any],
    result: Any,
    how: str,
    start: float,
    seconds: float,
    flops: int,
    part: tuple[float, float] = (0.0, 1.0),
) -> None:
    """Report one einsum call to the readers of events and of arrays; the elements of the arrays are not read
    here.

    part: where in these seconds the call begins, and its share of them, if several calls were timed at once.
    """
    frame = _frame.get()
    assert frame is not None
    readers = frame.recorder._event_readers.of(frame.path)
    array_readers = frame.recorder._array_readers.of(frame.path)
    if not readers and not array_readers:
        return
    weight, gradient = frame.weight, frame.gradient
    if frame.weights is not None:
        for operand in operands:
            if (name := frame.weights.name(operand)) is not None:
                weight, gradient = name, False
                break
    read = sum(operand.size * operand.dtype.itemsize for operand in operands)
    written = result.size * result.dtype.itemsize
    time_and_cost = start + part[0] * seconds, part[1] * seconds, flops, read, written
    where = frame.path, frame.layer, weight, gradient, threading.get_ident()
    found = Event(equation, sizes, _dtype_name(result.dtype), how, *time_and_cost, *where)
    frame.recorder._repeat()
    if frame.recorder._tape is not None:
        frame.recorder._tape.append(Taped(found, start, seconds))
    frame.recorder._notify(readers, found)
    if array_readers:
        frame.recorder._notify(array_readers, found, operands, result)


_dtype_name = lru_cache(str)  # str() of a dtype takes 5 us


class _Tally:
    """The seconds of phases inside parallel tasks, summed over all threads, per path and layer."""

    def __init__(self, outer: _Frame) -> None:
        self.outer = outer
        self._seconds: defaultdict[tuple[Path, int | None], float] = defaultdict(float)
        self._lock = threading.Lock()

    def add(self, path: Path, layer: int | None, seconds: float) -> None:
        with self._lock:
            self._seconds[path[len(self.outer.path) :], layer] += seconds

    def spans(self, start: float, wall: float) -> Iterator[Span]:
        """Split the wall time over the phases in proportion to their seconds: consecutive spans inside of the
        span of their outer phase, inner phases before outer ones."""
        busy = sum(seconds for (inner, _), seconds in self._seconds.items() if len(inner) == 1)
        top: tuple[Path, int | None] = ((), None)
        begins: dict[tuple[Path, int | None], float] = {top: start}
        outers: dict[Path, tuple[Path, int | None]] = {(): top}
        placed: list[Span] = []
        for key, seconds in sorted(self._seconds.items(), key=lambda item: len(item[0][0])):
            inner, layer = key
            # The outer phase has the same layer, unless this phase sets it.
            outer = (inner[:-1], layer)
            outer = outer if outer in begins else outers.get(inner[:-1], top)
            span = Span((*self.outer.path, *inner), layer, begins[outer], wall * seconds / busy, seconds)
            begins[outer] += span.seconds
            begins[key] = span.start
            outers.setdefault(inner, key)
            placed.append(span)
        yield from reversed(placed)


@contextmanager
def parallel() -> Generator[None]:
    """Context manager for tasks on several threads: the wall time is split over their phases in proportion to
    the seconds summed over the threads."""
    frame = _frame.get()
    if frame is None:
        yield
        return
    tally = _Tally(frame)
    _frame.set(replace(frame, tally=tally))
    start = time.perf_counter()
    try:
        yield
    finally:
        wall = time.perf_counter() - start
        _frame.set(frame)
        for span in tally.spans(start, wall):
            frame.recorder._span(span)
