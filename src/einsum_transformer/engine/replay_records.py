"""The spans and events of a step, repeated with the times of a replay."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence

from einsum_transformer.engine import recorder
from einsum_transformer.engine.recorder import Event, Span, Taped

_DIGITS = re.compile(r"(\d+)")
_At = Callable[[int, float, float], Span | Event]
_DIFFERENT = "the steps record different phases or events"


class Unrepeatable(Exception):
    """A step that cannot be repeated; the message says why."""


class Records:
    """The spans and events of a step, to be repeated with the times of a replay.

    Raises Unrepeatable if they are not the same in both traces, or do not change by the same amount with
    every step.
    """

    def __init__(self, first: Sequence[Taped], second: Sequence[Taped], times: Sequence[float]) -> None:
        """first, second: records of consecutive steps. times: the start of each call of the second one."""
        if len(first) != len(second):
            raise Unrepeatable(_DIFFERENT)
        ends = [
            [bisect_left(times, each.start), bisect_left(times, each.start + each.seconds)] for each in second
        ]
        self.positions: list[int] = sorted({position for pair in ends for position in pair})
        """The calls before which the time is taken."""
        index = {position: i for i, position in enumerate(self.positions)}
        self._records = [
            (_repeated(a.record, b), index[begin], index[end])
            for a, b, (begin, end) in zip(first, second, ends)
        ]

    def send(self, step: int, times: Sequence[float]) -> None:
        """Send the records of the step to the active recorder."""
        recorder.repeat(
            lambda: [at(step, times[begin], times[end] - times[begin]) for at, begin, end in self._records]
        )


def _repeated(before: Span | Event, taped: Taped) -> _At:
    """Return a function of step, start and seconds: the record that many steps after the second trace, of
    calls that run in these seconds."""
    record, start, seconds = taped
    if isinstance(before, Span) and isinstance(record, Span):
        _check(before, record, "path", "layer", "divided")
        path, layer = record.path, record.layer
        if record.divided:
            raise Unrepeatable("a phase runs in parallel tasks")
        return lambda _, start, seconds: Span(path, layer, start, seconds)
    if isinstance(before, Span) or isinstance(record, Span):
        raise Unrepeatable(_DIFFERENT)
    _check(before, record, "equation", "dtype", "path", "layer", "weight", "gradient")
    begin, share = 0.0, 1.0
    if seconds:
        begin, share = (record.start - start) / seconds, record.seconds / seconds
    equation, sizes, dtype, how = record.equation, record.sizes, record.dtype, record.how
    costs = record.flops, record.bytes_read, record.bytes_written
    where = record.path, record.layer, record.weight, record.gradient, record.thread
    if before.sizes == sizes:
        return lambda _, start, seconds: Event(
            equation, sizes, dtype, how, start + begin * seconds, share * seconds, *costs, *where
        )
    if sum(size != sizes[letter] for letter, size in before.sizes.items()) > 1:
        raise Unrepeatable("several sizes of an equation change")  # the product of them is not linear
    sizes_before, how_before = before.sizes, before.how
    costs_before = before.flops, before.bytes_read, before.bytes_written

    def at(step: int, start: float, seconds: float) -> Event:
        now = {letter: _line(step, sizes_before[letter], size) for letter, size in sizes.items()}
        flops, read, written = (_line(step, *pair) for pair in zip(costs_before, costs))
        times_and_costs = start + begin * seconds, share * seconds, flops, read, written
        return Event(equation, now, dtype, _line_of_text(step, how_before, how), *times_and_costs, *where)

    return at


def _line(step: int, before: int, value: int) -> int:
    return value + step * (value - before)


def _line_of_text(step: int, before: str, text: str) -> str:
    """A text in which the numbers change with every step."""
    words, last = _DIGITS.split(text), _DIGITS.split(before)
    if words[::2] != last[::2]:
        return text
    words[1::2] = [str(_line(step, int(a), int(b))) for a, b in zip(last[1::2], words[1::2])]
    return "".join(words)


def _check(a: Span | Event, b: Span | Event, *names: str) -> None:
    if any(getattr(a, name) != getattr(b, name) for name in names):
        raise Unrepeatable(_DIFFERENT)
