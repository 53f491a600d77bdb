"""What a running program tells its readers: phases with their seconds, einsum events, values by name.

Nothing is recorded unless a `Recorder` is active. It is active in the context (see `contextvars`) that
entered it, which is one thread's, and in the tasks that `parallel.for_each` runs for that thread. A recorder
that is entered inside another one takes its place until it is left.
"""

from __future__ import annotations

import fnmatch
import threading
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from einsum_transformer.engine.shapes import ShapeArray

Array = np.ndarray
Path = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Event:
    """One einsum: the equation, its letters' sizes, how it was lowered, and what it cost."""

    equation: str
    sizes: dict[str, int]
    dtype: str
    """Of the result."""
    how: str
    seconds: float
    flops: int
    bytes_read: int
    """Every operand once, in its own type."""
    bytes_written: int
    path: Path
    """The phases it ran in, from the outermost."""
    layer: int | None
    weight: str | None
    """The path of the weight that is an operand, or whose gradient this is; None if there is none."""
    gradient: bool
    """Whether the result is a part of the gradient of `weight`."""

    @property
    def bytes(self) -> int:
        return self.bytes_read + self.bytes_written


@dataclass(frozen=True, slots=True)
class Span:
    """One phase that ended."""

    path: Path
    layer: int | None
    start: float
    seconds: float

    @property
    def name(self) -> str:
        return self.path[-1]


class _Readers:
    """Callbacks and the patterns of the names that each of them reads."""

    def __init__(self) -> None:
        self._added: list[tuple[Sequence[str], Callable[..., Any]]] = []
        self._found: dict[tuple[str | Path, str], tuple[Callable[..., Any], ...]] = {}

    def __bool__(self) -> bool:
        return bool(self._added)

    def add(self, patterns: Sequence[str], reader: Callable[..., Any]) -> None:
        self._added.append((patterns, reader))
        self._found.clear()

    def of(self, name: str | Path, ending: str = "") -> tuple[Callable[..., Any], ...]:
        """The callbacks that read this name, by a pattern of this ending; the name of a path is
        "outer/inner"."""
        found = self._found.get((name, ending))
        if found is None:
            text = name if isinstance(name, str) else "/".join(name)
            found = self._found[name, ending] = tuple(
                reader
                for patterns, reader in self._added
                if any(each.endswith(ending) and fnmatch.fnmatchcase(text, each) for each in patterns)
            )
        return found


class Recorder:
    """Calls its readers while it is active as a context manager.

    spans, events: keep all of them in the lists of that name. values: patterns of the names of values to keep
    a copy of in the dictionary of that name; a later value of a name replaces an earlier one.

    Any number of readers can be added. A pattern is a shell's: `*` stands for any characters, dots included.
    Readers of one recorder run one at a time, and what they compute is not recorded.
    """

    def __init__(self, spans: bool = True, events: bool = False, values: str | Sequence[str] = ()) -> None:
        self.spans: list[Span] = []
        self.events: list[Event] = []
        self.values: dict[str, Array] = {}
        self._span_readers, self._event_readers, self._value_readers = _Readers(), _Readers(), _Readers()
        self._lock = threading.RLock()
        self._outer: _Frame | None = None
        self._entered = False
        self._keeps_spans = spans
        self._weights: dict[int, _Weights] = {}
        if events:
            self.on_event(self.events.append)
        if values:
            self.on_value(self._keep, *([values] if isinstance(values, str) else values))

    def on_span(self, reader: Callable[[Span], object], *phases: str) -> Recorder:
        """reader(span) when a phase ends, of all phases or of those whose path ("forward/layer/attention")
        matches."""
        self._span_readers.add(phases or ("*",), reader)
        return self

    def on_event(self, reader: Callable[[Event], object], *phases: str) -> Recorder:
        """reader(event) after every einsum, of all phases or of those whose path matches; added before the
        recorder is entered."""
        if self._entered:
            raise RuntimeError("a reader of events is added before the Recorder is entered")
        self._event_readers.add(phases or ("*",), reader)
        return self

    def on_value(self, reader: Callable[[str, Array], Array | None], *names: str) -> Recorder:
        """reader(name, value) for every value whose name matches, such as "layers.3.self_attn". It is added
        before the recorder is entered.

        The array belongs to the program, which may overwrite it afterwards: copy what is to be kept. What the
        reader returns, if not None, takes the value's place from there on; it must have the same shape.
        Backward passes do not know of it.
        """
        if self._entered:
            raise RuntimeError("a reader of values is added before the Recorder is entered")
        self._value_readers.add(names or ("*",), reader)
        return self

    def __enter__(self) -> Recorder:
        if self._entered:
            raise RuntimeError("this Recorder is active already: a run of its own needs one of its own")
        global active, active_for_events
        with _lock:
            active += 1
            active_for_events += bool(self._event_readers)
        self._entered, self._outer = True, _frame.get()
        _frame.set(_Frame(self))
        return self

    def __exit__(self, *_: object) -> None:
        global active, active_for_events
        with _lock:
            active -= 1
            active_for_events -= bool(self._event_readers)
        self._entered = False
        if (frame := _frame.get()) is not None and frame.recorder is self:
            _frame.set(self._outer)
        self._outer = None
        self._weights.clear()

    def _keep(self, name: str, value: Array) -> None:
        self.values[name] = np.array(value)

    def _span(self, span: Span) -> None:
        if self._keeps_spans:
            self.spans.append(span)
        if self._span_readers and (readers := self._span_readers.of(span.path)):
            self._tell(readers, span)

    def _tell(self, readers: tuple[Callable[..., Any], ...], told: Event | Span) -> None:
        """Call readers one after the other, with recording paused in this context."""
        frame = _frame.get()
        _frame.set(None)
        try:
            with self._lock:
                for reader in readers:
                    reader(told)
        finally:
            _frame.set(frame)

    def _replaced(self, name: str, value: Array, ending: str = "") -> Array:
        """The value, or what a reader returned in its place."""
        readers = self._value_readers.of(name, ending)
        if not readers:
            return value
        frame = _frame.get()
        _frame.set(None)
        try:
            with self._lock:
                for reader in readers:
                    instead = reader(name, value)
                    if instead is not None and instead is not value:
                        value = _like(name, value, instead)
        finally:
            _frame.set(frame)
        return value


def _like(name: str, value: Array, instead: Array) -> Array:
    """A copy of `instead` in the type and memory layout of `value`: the program may write into it."""
    if np.shape(instead) != np.shape(value):
        raise ValueError(f"{name} has shape {np.shape(value)}, what a reader returned {np.shape(instead)}")
    copy = np.empty_like(value)
    if isinstance(copy, ShapeArray):
        return copy
    np.copyto(copy, instead, casting="same_kind")
    return copy


class _Weights:
    """Which weight an array is, by its address in memory, so that views are found too."""

    def __init__(self, owner: object, named: Iterable[tuple[str, Any]]) -> None:
        # Both are held so that no other object can be given their ids.
        self.owner, self._leaves = owner, list(named)
        self._by_id = {id(weight): name for name, weight in self._leaves}
        ranges: dict[int, tuple[int, str]] = {}
        for name, weight in self._leaves:
            if isinstance(weight, (Array, ShapeArray)):
                low, high = _bounds(weight)
                ranges.setdefault(low, (high, name))
        self._ranges = ranges
        self._starts = sorted(ranges)

    def name(self, weight: Any) -> str | None:
        """The path of a weight, of a view of one, or None."""
        if (found := self._by_id.get(id(weight))) is not None:
            return found
        if not isinstance(weight, (Array, ShapeArray)):
            return None
        address = _address(weight)
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
    """Where in the program a context stands, for the recorder that is active in it. Never changed (but not
    frozen: one is made for every phase, and a frozen one takes three times as long)."""

    recorder: Recorder
    path: Path = ()
    layer: int | None = None
    scope: str = ""
    """What the names of values begin with here."""
    tally: _Tally | None = None
    weights: _Weights | None = None
    weight: str | None = None
    """The path of the leaf whose product or gradient is computed here."""
    gradient: bool = False


_frame: ContextVar[_Frame | None] = ContextVar("einsum_transformer_recorder", default=None)
"""Where the program stands for a recorder, None where nobody records."""
active = 0
"""How many recorders are active in all threads: a program that nobody watches asks for nothing else."""
active_for_events = 0
"""How many of them have readers of events."""
_lock = threading.Lock()


class _Nothing:
    """The phase of a program nobody watches."""

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
        if outer.recorder._value_readers:  # nobody else needs the names of values
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
        # A generator may be closed in another context, or after the recording: then nothing is left here.
        if frame is None or frame.path is not inner.path:
            return
        _frame.set(outer)
        if outer.tally is not None:
            outer.tally.add(inner.path, inner.layer, seconds)
        else:
            recorder._span(Span(inner.path, inner.layer, self.start, seconds))


def phase(name: str, layer: int | None = None, scope: str | None = None) -> Any:
    """A context manager that times a named part of the program; phases nest.

    layer: number of the layer, inherited by inner phases. scope: what the names of values inside begin with,
    after the scope around; that of a layer is "layers.<number>".
    """
    if not active:
        return _NOTHING
    frame = _frame.get()
    if frame is None or not frame.recorder._entered:
        return _NOTHING
    return _Phase(frame, name, layer, scope)


def tap(name: str, value: Array, asked: bool = False) -> Array:
    """What is used from here on: `value`, or what a reader returns in its place.

    name: relative to the scope of the phases around, "" for the scope itself. Names are those of weights and
    the modules that hold them. asked: only for readers that `asked_for` it.
    """
    if not active:
        return value
    frame = _frame.get()
    if frame is None or not frame.recorder._value_readers:
        return value
    return frame.recorder._replaced(_named(frame, name), value, name if asked else "")


def tap_at(path: str, value: Array) -> Array:
    """`tap` with the whole name."""
    frame = _frame.get()
    return value if frame is None else frame.recorder._replaced(path, value)


def asked_for(name: str) -> bool:
    """Whether a reader asks for a value by a pattern that ends in its name: for values that take work or
    memory to make, and which "*" alone does not ask for."""
    if not active:
        return False
    frame = _frame.get()
    if frame is None or not frame.recorder._value_readers:
        return False
    return bool(frame.recorder._value_readers.of(_named(frame, name), name))


def _named(frame: _Frame, name: str) -> str:
    return f"{frame.scope}.{name}" if frame.scope and name else frame.scope or name


def reads_values() -> bool:
    """Whether some reader wants values."""
    frame = _frame.get()
    return frame is not None and bool(frame.recorder._value_readers)


def reads_events() -> bool:
    """Whether some reader wants events."""
    frame = _frame.get()
    return frame is not None and bool(frame.recorder._event_readers)


def know_weights(owner: object, named: Callable[[], Iterable[tuple[str, Any]]]) -> None:
    """Until the phase around ends, events name the weights of `owner`; named: (path, array or leaf) of each.

    It is called only where events are read, and once for an owner.
    """
    frame = _frame.get()
    if frame is None or not frame.recorder._event_readers:
        return
    kept = frame.recorder._weights
    known = kept.get(id(owner))
    if known is None or known.owner is not owner:
        if len(kept) >= 16:
            kept.clear()
        known = kept[id(owner)] = _Weights(owner, named())
    _frame.set(replace(frame, weights=known))


@contextmanager
def _using(frame: _Frame, name: str, gradient: bool) -> Iterator[None]:
    _frame.set(replace(frame, weight=name, gradient=gradient))
    try:
        yield
    finally:
        _frame.set(frame)


def using(weight: Any, gradient: bool = False) -> Any:
    """A context manager around the products of a weight (an array, a leaf or a part of one), or around those
    of its gradient: events inside name it."""
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
    seconds: float,
    flops: int,
) -> None:
    """Tell readers of one einsum; operands and result: arrays, of whichever only shape and type are read."""
    frame = _frame.get()
    assert frame is not None
    readers = frame.recorder._event_readers.of(frame.path)
    if not readers:
        return
    weight, gradient = frame.weight, frame.gradient
    if frame.weights is not None:
        for operand in operands:
            if (name := frame.weights.name(operand)) is not None:
                weight, gradient = name, False
                break
    read = sum(operand.size * operand.dtype.itemsize for operand in operands)
    written = result.size * result.dtype.itemsize
    dtype, where = str(result.dtype), (frame.path, frame.layer)
    frame.recorder._tell(
        readers, Event(equation, sizes, dtype, how, seconds, flops, read, written, *where, weight, gradient)
    )


class _Tally:
    """Phases inside of parallel tasks: their seconds on all threads together, by path and layer."""

    def __init__(self, outer: _Frame) -> None:
        self.outer = outer
        self._seconds: defaultdict[tuple[Path, int | None], float] = defaultdict(float)
        self._lock = threading.Lock()

    def add(self, path: Path, layer: int | None, seconds: float) -> None:
        with self._lock:
            self._seconds[path[len(self.outer.path) :], layer] += seconds

    def spans(self, start: float, wall: float) -> Iterator[Span]:
        """The wall time split over the phases in proportion to their seconds, one after the other, those
        inside of a phase before it."""
        busy = sum(seconds for (inner, _), seconds in self._seconds.items() if len(inner) == 1)
        begins = defaultdict(lambda: start)
        placed = []
        for (inner, layer), seconds in sorted(self._seconds.items(), key=lambda item: len(item[0][0])):
            outer = inner[:-1]
            span = Span((*self.outer.path, *inner), layer, begins[outer], wall * seconds / busy)
            begins[inner] = min(begins[inner], span.start) if inner in begins else span.start
            begins[outer] += span.seconds
            placed.append(span)
        yield from reversed(placed)


@contextmanager
def parallel() -> Iterator[None]:
    """Around tasks on several threads: the wall time is split over their phases in proportion to the threads'
    seconds."""
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
