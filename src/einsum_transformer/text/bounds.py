"""The limits of one chat-template rendering: a deadline, and the sizes of the values a template creates.

A trace function ends a rendering that runs too long, which works because jinja2 compiles templates to Python.
It cannot interrupt one long operation of the interpreter (`'a' * 10**9`), so the size of every value is
estimated before a template creates it, and checked afterwards.
"""

import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import chain
from typing import Any

from einsum_transformer.errors import InputError

MAX_BITS = 20_000  # of an integer; Python's int-to-str conversion is limited to about 14,300 bits
MAX_DEPTH = 100  # of nested containers: C code that hashes or compares them recurses without a check
TOTAL = 100  # total size of the values created in one rendering, in units of the largest allowed value
_SIZED = (list, tuple, set, frozenset, dict, type({}.keys()), type({}.values()), type({}.items()))


class OutOfTime(BaseException):
    """Raised by the trace function; not an Exception, so that no handler catches it on the way."""


@dataclass(slots=True)
class Meter:
    """Counts what one rendering has created so far, in characters and list items."""

    largest: int
    end: float = math.inf
    total: float = 0

    def check(self, size: float) -> None:
        # Python drops the trace function if its exception is ignored, for example in a finalizer.
        if time.monotonic() > self.end:
            raise OutOfTime
        if size > self.largest:
            raise InputError(f"chat template: creates a value of more than {self.largest} characters")

    def charge(self, size: float) -> None:
        self.check(size)
        self.total += size
        if self.total > TOTAL * self.largest:
            raise InputError(f"chat template: creates more than {TOTAL * self.largest} characters in total")


METER: ContextVar[Meter] = ContextVar("METER")


@contextmanager
def bounded(seconds: float, largest: int, watched: frozenset[str]) -> Iterator[None]:
    """Bound the time and memory of the calls of this thread inside the `with` block.

    Frames of the files in `watched`, which may contain long loops, are traced at each line, others at their
    call.
    """
    end = time.monotonic() + seconds

    def trace(frame: Any, event: str, argument: Any) -> Any:
        if time.monotonic() > end:
            raise OutOfTime
        return trace if frame.f_code.co_filename in watched else None

    token, previous = METER.set(Meter(largest, end)), sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(previous)
        METER.reset(token)


def weigh(value: Any) -> float:
    """Return the number of characters and items of `value`, counting shared parts each time they occur."""
    size, height = _measure((value,), {})
    if height > MAX_DEPTH:
        raise InputError(f"chat template: creates a value with more than {MAX_DEPTH} levels of nesting")
    METER.get().check(size - 1)
    return size - 1


def _measure(container: Any, seen: dict[int, tuple[float, int, Any]]) -> tuple[float, int]:
    """Return size and height; a shared container, which makes small values huge as text, is looked up."""
    size, height = 1.0, 0
    for item in chain(container, container.values()) if isinstance(container, dict) else container:
        if isinstance(item, str):
            size += len(item) or 1
        elif isinstance(item, _SIZED):
            if id(item) not in seen:
                seen[id(item)] = (*_measure(item, seen), item)
            inner, levels, _ = seen[id(item)]
            size, height = size + inner, max(height, levels + 1)
        else:
            size += _bits_size(item.bit_length()) + 1 if isinstance(item, int) else 1
    return size, height


def keep(value: Any) -> Any:
    """Return `value`, created by a template, after checking its size."""
    weigh(value)
    METER.get().charge(len(value) if isinstance(value, (str, *_SIZED)) else 1)
    return value


def show(value: Any) -> Any:
    """Return `value`, to be written to the output, after checking the length of its text."""
    METER.get().charge(weigh(value))
    return value


def _bits_size(bits: int) -> float:
    return 0 if bits <= MAX_BITS else math.inf


def _power_size(left: Any, right: Any) -> float:
    whole = isinstance(left, int) and isinstance(right, int) and right > 0
    return _bits_size(left.bit_length() * right) if whole else 0


def _product_size(left: Any, right: Any) -> float:
    if isinstance(left, int) and isinstance(right, int):
        return _bits_size(left.bit_length() + right.bit_length())
    sequence, count = (right, left) if isinstance(left, int) else (left, right)
    return weigh(sequence) * max(count, 0) if isinstance(count, int) else 0


def _percent_size(text: Any, values: Any) -> float:
    if not isinstance(text, str):
        return 0
    # Every part of this pattern is optional, so it never backtracks. A width follows "%" or "%(name)".
    widths = [run for pair in re.findall(r"[%)][-#0 +]*(\d*)(?:\.(\d*))?", text) for run in pair if run]
    if "*" in text:
        widths += values if isinstance(values, tuple) else (values,)
    return len(text) + text.count("%") * (_widest(widths) + weigh(values))


def _braces_size(text: str, *args: Any, **kwargs: Any) -> float:
    values = [*args, *kwargs.values()]
    text = text.replace("{{", "").replace("}}", "")
    fields = re.findall(r"\{([^{}]*)", text)
    if any("." in field.partition(":")[0] or "[" in field for field in fields):
        raise InputError("chat template: attributes and indices in format fields are not supported")
    widths: list[Any] = re.findall(r"\d+", " ".join(fields))
    if re.search(r"\{[^{}]*\{", text):
        widths += values
    return len(text) + len(fields) * (_widest(widths) + weigh(values))


def _widest(widths: Sequence[Any]) -> int:
    """Return the largest width among digits of a format string and integer arguments."""
    numbers = [
        each for each in widths if isinstance(each, int) or (isinstance(each, str) and each.isdecimal())
    ]
    return max((abs(int(number)) for number in numbers), default=0)


def _replaced_size(text: Any, old: Any, new: Any, *_: Any, **__: Any) -> int:
    text, old, new = str(text), str(old), str(new)
    return len(text) + text.count(old) * len(new)


def _strip_size(text: str, chars: str | None = None) -> int:
    return 1000 * len(chars or "")  # each character of the text may be compared with each of chars


# Name of an operation -> upper bound of the size of its result; the arguments are those of the operation.
OPERATOR_SIZES: dict[str, Callable[[Any, Any], float]] = {
    "*": _product_size,
    "**": _power_size,
    "%": _percent_size,
    "+": lambda left, right: 0,
}
METHOD_SIZES: dict[str, Callable[..., float]] = {
    "center": lambda text, width=0, *_: width,
    "ljust": lambda text, width=0, *_: width,
    "rjust": lambda text, width=0, *_: width,
    "zfill": lambda text, width=0: width,
    "expandtabs": lambda text, tabsize=8: len(text) + text.count("\t") * tabsize,
    "replace": _replaced_size,
    "join": lambda text, parts=(): len(text) * len(parts) + weigh(parts),
    "translate": lambda text, table=(): len(text) * weigh(table),
    "strip": _strip_size,
    "lstrip": _strip_size,
    "rstrip": _strip_size,
    "format": _braces_size,
    "format_map": lambda text, values=(): _braces_size(text, values),
}
FILTER_SIZES: dict[str, Callable[..., float]] = {
    "batch": lambda value, linecount, fill_with=None: linecount,
    "center": lambda value, width=80: width,
    "format": lambda value, *args, **kwargs: _percent_size(str(value), kwargs or args),
    "indent": lambda s, width=4, *_, **__: (
        len(str(s)) * (1 + (width if isinstance(width, int) else len(width)))
    ),
    "replace": _replaced_size,
    "round": lambda value, precision=0, method="common": abs(precision),
    "trim": _strip_size,
    "slice": lambda value, slices, fill_with=None: slices,
}
