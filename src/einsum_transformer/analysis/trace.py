"""The trace of a run: a JSON file of its phases and einsum calls for Perfetto and Chrome's trace viewer."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from einsum_transformer.engine import Recorder, blas
from einsum_transformer.engine.recorder import Event, Span
from einsum_transformer.errors import InputError
from einsum_transformer.formats.files import atomic_file
from einsum_transformer.loading.libraries import processor
from einsum_transformer.notes import note

LIMIT = 200_000
"""Maximum number of recorded events; the file is then about 60 MB."""
_FIRST = 4
"""Number of steps at the start of a run that are recorded as long as there is space."""
_EINSUM, _INNER, _OUTER = "einsum", "inner phase", "outer phase"
"""Kinds of records. An outer phase is not part of another phase, such as prefill, decode and forward; the
counters of a step are counted as outer phases."""
_KINDS = (_EINSUM, _INNER, _OUTER)
_STEP_ENDS = {("prefill", "head"), ("decode",), ("head",)}
"""Phases that end a step: a pass of the prefill, a decode step with its draft, a pass of a validation."""
_STEP_BEGINS = ("batch",)
"""The first phase of a training step."""
_BETWEEN = {("setup",), ("prefill",), ("sampling",), ("text",)}
"""Outer phases that are between the steps of a generation, or end after their last step."""


@dataclass(frozen=True, slots=True)
class _Value:
    """A counter at a time."""

    name: str
    """With its unit as the last word."""
    start: float
    value: int


Record = Span | Event | _Value


class _Sample:
    """Records of one kind: those of the first steps and of every `stride`-th step."""

    def __init__(self) -> None:
        self.stride = 1
        self.seen = 0
        """Number of events of this kind in the run."""
        self.count = 0
        self.by_step: dict[int, list[Record]] = {}

    def includes(self, step: int) -> bool:
        return step < _FIRST or step % self.stride == 0

    def add(self, step: int, record: Record) -> None:
        self.by_step.setdefault(step, []).append(record)
        self.count += 1

    def thin(self) -> int:
        """Double the stride; returns the number of records that were removed."""
        self.stride *= 2
        before = self.count
        for step in [step for step in self.by_step if not self.includes(step)]:
            self.count -= len(self.by_step.pop(step))
        return before - self.count


class Trace:
    """Records the phases and einsum calls of a run, and writes them in the Trace Event Format.

    A step is a pass of the prefill, a decode step, a training step, or a pass of a validation. In a run with
    more than `limit` events only every k-th step is recorded in full; k doubles whenever the limit is
    reached, which also removes earlier steps. Einsum calls are removed first, then inner phases. The file and
    a note report how many events it contains.

    counters: returns values to plot, by name and unit ("KV cache bytes"); it is called once per step.
    """

    def __init__(self, counters: Callable[[], Mapping[str, int]] | None = None, limit: int = LIMIT) -> None:
        self.limit: int = limit
        self.start: float = 0.0
        self._counters = counters
        self._samples = {kind: _Sample() for kind in _KINDS}
        self._steps = 0
        """Number of completed steps."""
        self._in_step = False
        """Whether a step has begun that has not ended."""
        self._main_thread = 0

    def record(self, recorder: Recorder) -> Recorder:
        """Add readers to a recorder that is about to be entered by this thread; times are relative to now."""
        self.start, self._main_thread = time.perf_counter(), threading.get_ident()
        return recorder.on_span(self._span).on_event(self._event)

    @property
    def steps(self) -> int:
        """The number of steps so far."""
        return self._steps + self._in_step

    def _span(self, span: Span) -> None:
        if span.path == _STEP_BEGINS and self._in_step:
            self._end_step()
        self._in_step = self._in_step or span.path not in _BETWEEN
        self._add(_OUTER if len(span.path) == 1 else _INNER, span)
        if span.path in _STEP_ENDS:
            self._end_step()

    def _event(self, event: Event) -> None:
        self._add(_EINSUM, event)

    def _end_step(self) -> None:
        now = time.perf_counter()
        resident = rss_bytes()
        values = {} if resident is None else {"resident memory bytes": resident}
        for name, value in (values | dict(self._counters() if self._counters else {})).items():
            self._add(_OUTER, _Value(name, now, value))
        self._steps += 1
        self._in_step = False

    def _add(self, kind: str, record: Record) -> None:
        sample = self._samples[kind]
        sample.seen += not isinstance(record, _Value)
        if sample.includes(self._steps) and self._has_space(kind) and sample.includes(self._steps):
            sample.add(self._steps, record)

    def _has_space(self, kind: str) -> bool:
        """Return whether a record can be added, after removing others if necessary. An eighth of the limit is
        reserved for outer phases."""
        limit = self.limit if kind == _OUTER else self.limit - self.limit // 8
        while sum(sample.count for sample in self._samples.values()) >= limit:
            if not self._thin():
                return False
        return True

    def _thin(self) -> bool:
        """Remove records of the first kind that makes up more than a quarter of the limit, else outer phases;
        returns whether there were any to remove."""
        for kind, sample in self._samples.items():
            if sample.count > self.limit // 4 or kind == _OUTER:
                while sample.stride <= self._steps:
                    if sample.thin():
                        return True
        return False

    def write(self, path: str | Path, model: str) -> None:
        """Write the file, atomically; model: its source. Raises InputError if it cannot be written."""
        path = Path(path)
        if self._in_step:
            self._end_step()
        about = self._about(model)
        try:
            with atomic_file(path) as file:
                head = json.dumps({"displayTimeUnit": "ms", "otherData": about}, allow_nan=False)
                file.write(f'{head[:-1]}, "traceEvents": ['.encode())
                for i, event in enumerate(self._trace_events(model)):
                    text = json.dumps(event, allow_nan=False, separators=(",", ":"))
                    file.write(f"{',' if i else ''}\n{text}".encode())
                file.write(b"\n]}\n")
        except OSError as error:
            raise InputError(f"`trace` {path}: cannot be written: {error.strerror}") from None
        if any(about["left_out"].values()):
            einsums, inner = about["steps_with_einsum_calls"], about["steps_with_inner_phases"]
            note(
                f"{path}: at most {self.limit:,} events are recorded: the trace contains the einsum calls of "
                f"{einsums:,} and the inner phases of {inner:,} of {self.steps:,} steps"
            )

    def _about(self, model: str) -> dict[str, Any]:
        samples, names = self._samples, ("einsum_calls", "inner_phases", "outer_phases")
        written = {kind: self._written(kind) for kind in _KINDS}
        return {
            "model": model,
            "blas": blas.description(),
            "threads": blas.get_threads(),
            "processor": processor(),
            "steps": self.steps,
            "steps_with_einsum_calls": len(samples[_EINSUM].by_step),
            "steps_with_inner_phases": len(samples[_INNER].by_step),
            "recorded": dict(zip(names, written.values())),
            "left_out": {name: samples[kind].seen - written[kind] for name, kind in zip(names, _KINDS)},
        }

    def _written(self, kind: str) -> int:
        records = (record for step in self._samples[kind].by_step.values() for record in step)
        return sum(not isinstance(record, _Value) for record in records)

    def _trace_events(self, model: str) -> Iterator[dict[str, Any]]:
        """Yield the names of the threads, then all records by their start, outer ones first."""
        records: list[Record] = [
            record for kind in _KINDS for step in self._samples[kind].by_step.values() for record in step
        ]
        threads = {self._main_thread: 0}
        for record in records:
            if isinstance(record, Event):
                threads.setdefault(record.thread, len(threads))
        names = ["main thread", *(f"worker thread {i}" for i in range(1, len(threads)))]
        divided = len(names)
        if any(isinstance(record, Span) and record.divided for record in records):
            names.append("phases of parallel tasks: shares of the wall time")
        process = {"ph": "M", "pid": os.getpid(), "tid": 0}
        yield process | {"name": "process_name", "args": {"name": f"einsum_transformer {model}"}}
        for i, name in enumerate(names):
            yield process | {"name": "thread_name", "tid": i, "args": {"name": name}}
            yield process | {"name": "thread_sort_index", "tid": i, "args": {"sort_index": i}}
        records.sort(key=_order)
        for record in records:
            if isinstance(record, Span):
                yield self._interval(record, divided if record.divided else 0) | _of_phase(record)
            elif isinstance(record, Event):
                yield self._interval(record, threads[record.thread]) | _of_einsum(record)
            else:
                at = {"ts": self._nanoseconds(record.start) / 1000, "pid": os.getpid(), "tid": 0}
                name, _, unit = record.name.rpartition(" ")
                yield {"ph": "C", "name": name, **at, "args": {unit: record.value}}

    def _nanoseconds(self, now: float) -> int:
        return round((now - self.start) * 1e9)

    def _interval(self, record: Span | Event, thread: int) -> dict[str, Any]:
        # Both ends are rounded, so that what is inside of an interval remains inside.
        begin = self._nanoseconds(record.start)
        end = self._nanoseconds(record.start + record.seconds)
        times = {"ts": begin / 1000, "dur": (end - begin) / 1000}
        return {"ph": "X", **times, "pid": os.getpid(), "tid": thread}


def _order(record: Record) -> tuple[float, int]:
    """Return the sort key: by start; of two with one start, the outer one first."""
    return record.start, 0 if isinstance(record, _Value) else len(record.path) + isinstance(record, Event)


def _of_phase(span: Span) -> dict[str, Any]:
    args: dict[str, Any] = {"phase": "/".join(span.path)}
    if span.layer is not None:
        args["layer"] = span.layer
    if span.divided:
        args["divided"] = (
            "the wall time of parallel tasks, divided by the seconds of each phase on all threads"
        )
    return {"name": span.name, "cat": "phase", "args": args}


def _of_einsum(event: Event) -> dict[str, Any]:
    args: dict[str, Any] = {
        "equation": event.equation,
        "sizes": event.sizes,
        "dtype": event.dtype,
        "layer": event.layer,
        "phase": "/".join(event.path),
        "weight": event.weight,
        "flops": event.flops,
        "bytes_read": event.bytes_read,
        "bytes_written": event.bytes_written,
        "gflops": round(event.flops / event.seconds / 1e9, 4) if event.seconds > 0 else None,
        "gbps": round(event.bytes / event.seconds / 1e9, 4) if event.seconds > 0 else None,
        "lowering": event.how,
    }
    if event.gradient:
        args["gradient"] = True
    args = {name: value for name, value in args.items() if value is not None}
    return {"name": event.equation, "cat": "einsum", "args": args}


def rss_bytes() -> int | None:
    """Return the resident memory of this process, or None if the system does not report it."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError, AttributeError):
        return None
