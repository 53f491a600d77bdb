"""Repeat the NumPy calls of a step for the next steps, without running the program that makes them.

A decode step runs the same Python code for every token, and its NumPy calls differ only in where the KV
cache is written and how much of it is read. `Steps` runs two steps with arrays that record their calls
(`Trace`). If both made the same calls, a `Replay` repeats them for the next steps, with fixed memory for the
results. The place of an array (offset, shape and strides) may change by the same amounts with every step;
everything else must be equal. The next step is computed in both ways, and a replay is used only if its result
is the same.

A step that cannot be repeated runs as a program, with the same results, and `Steps.reason` says why: a value
decides what is computed (mixture of experts), or an array is computed outside of the recorded calls.

The rule for code that is replayed: a number that depends on the position is an argument of the step (like the
tables of RoPE) or an array; a Python number is a constant of the replay.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from einsum_transformer.engine import blas, recorder
from einsum_transformer.engine.recorder import Taped
from einsum_transformer.engine.replay_records import Records, Unrepeatable

Array = np.ndarray
Function = Callable[..., Any]

WARM_UP = 16
"""Steps that run as a program before the first trace: two traces take as long as 30 to 40 replays save."""
LEAST = 64
"""Steps with regular places that must be left for a trace."""
_TRIES = 3
"""Traces of irregular steps before all further steps run as a program."""
_tracing = threading.RLock()
"""Held while the products of other libraries than NumPy are replaced by ones that record."""
_LINE = 64  # bytes of a cache line, to which memory is aligned
_KNOWN = {
    *("T", "base", "dtype", "flags", "itemsize", "nbytes", "ndim", "shape", "size", "strides", "trace"),
    *("copy", "max", "mean", "min", "prod", "reshape", "sum", "swapaxes", "transpose", "view"),
    *(name for name in dir(np.ndarray) if name.startswith("_")),
}
"""The attributes of an array that do not depend on its values, and the methods that are recorded."""
_VALUES = np.ndarray, np.generic, int, float, complex
_ARITHMETIC = {np.add, np.subtract, np.multiply, np.divide}


def _untraced_attribute(name: str) -> property:
    return property(lambda self: self._untraced(getattr(self.view(Array), name)))


class Traced(np.ndarray):
    """An array whose NumPy calls are recorded, and those of the arrays that are computed from it.

    Calls that are not recorded are detected: their results are in memory that the trace does not know, and a
    step that reads such memory is not repeated.
    """

    trace: Trace | None = None
    # All other attributes read values, or are methods that are not recorded.
    vars().update({name: _untraced_attribute(name) for name in dir(np.ndarray) if name not in _KNOWN})

    def __array_finalize__(self, source: Any) -> None:
        if isinstance(source, Traced):
            self.trace = source.trace

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **keywords: Any) -> Any:
        if not all(isinstance(each, _VALUES) for each in inputs):
            return NotImplemented  # a leaf converts itself to an array
        outs = keywords.pop("out", ())
        function = ufunc if method == "__call__" else getattr(ufunc, method)
        return _trace_of((*inputs, *outs)).call(function, inputs, outs, keywords)

    def __array_function__(self, function: Any, types: Any, arguments: Any, keywords: Any) -> Any:
        if function is np.copyto:
            target, source = arguments
            _trace_of(arguments).call(_copy, (source,), (target,), keywords)
            return None
        if not keywords and function in (np.einsum, np.where):
            return _trace_of(arguments).call(_where if function is np.where else function, arguments, (), {})
        result = super().__array_function__(function, types, arguments, keywords)
        return result if isinstance(result, Array) else self._untraced(result)

    def __getitem__(self, index: Any) -> Any:
        part = super().__getitem__(index)
        return part if isinstance(part, Traced) and _owner(part) is _owner(self) else self._untraced(part)

    def reshape(self, *shape: Any, **options: Any) -> Any:
        view = super().reshape(*shape, **options)
        if _owner(view) is not _owner(self):
            # A copy with the elements in C order.
            _trace_of([self]).call(_copy, (self,), (view.reshape(self.shape),), {})
        return view

    def copy(self, order: Any = "C") -> Any:
        copied = super().copy(order)
        _trace_of([self]).call(_copy, (self,), (copied,), {})
        return copied

    def __setitem__(self, index: Any, value: Any) -> None:
        target = self[index]
        if isinstance(target, Traced) and _owner(target) is _owner(self):
            np.copyto(target, value)
        else:
            super().__setitem__(index, value)

    def __float__(self) -> float:
        return self._untraced(float(self.view(Array)))

    def __int__(self) -> int:
        return self._untraced(int(self.view(Array)))

    def __bool__(self) -> bool:
        return self._untraced(bool(self.view(Array)))

    def __index__(self) -> int:
        return self._untraced(self.view(Array).__index__())

    def _untraced(self, found: Any) -> Any:
        """What Python code reads of the values, on which the calls that follow may depend."""
        if self.trace is not None:
            self.trace.fail("values decide what is computed")
        return found


def condition(test: Callable[[Array], bool], a: Any) -> bool:
    """Return test(a), where code depends on values; a replay with another result runs as a program."""
    if isinstance(a, Traced) and a.trace is not None:
        return a.trace.condition(test, a)
    return test(a)


def recorded(function: Function, *arguments: Any) -> Any:
    """Return function(*arguments) and record it as one call: it takes arrays and constants, returns a new
    array, and writes the same result to an argument `out` if it is given."""
    if any(isinstance(each, Traced) for each in arguments):
        return _trace_of(arguments).call(function, arguments, (), {})
    return function(*arguments)


def not_repeatable(operands: Sequence[Any]) -> None:
    """Do not repeat the step of these operands: a weight has other arrays at every step."""
    for each in operands:
        if isinstance(each, Traced) and each.trace is not None:
            each.trace.fail("a weight is not in memory")


class _Call(NamedTuple):
    """A call of a NumPy function. arguments: arrays and constants; outs: the arrays that it writes."""

    function: Function
    arguments: tuple[Any, ...]
    outs: tuple[Array, ...]
    keywords: dict[str, Any]


class Trace:
    """The NumPy calls of one step with the arrays `inputs`."""

    def __init__(self, inputs: Sequence[Array]) -> None:
        self.inputs: list[Array] = [np.array(a) for a in inputs]
        self.calls: list[_Call] = []
        self.times: list[float] = []
        """time.perf_counter() at the start of each call."""
        self.records: list[Taped] = []
        """The spans and events of the active recorder."""
        self.result: Array | None = None
        self.reason: str = ""
        """Why the step cannot be repeated; empty if nothing is known against it."""
        self._thread = threading.get_ident()

    def run(self, function: Function) -> Array:
        """Return function(*inputs) and record its calls."""
        products = list(blas.PRODUCTS.values())
        with _tracing:
            libraries = [each.matmul for each in products]
            for each in products:
                if not isinstance(each.matmul, np.ufunc):
                    each.matmul = partial(_recorded, each.matmul)
            try:
                with recorder.taped() as self.records:
                    self.result = _plain(function(*map(self._traced, self.inputs)))
            finally:
                for each, library in zip(products, libraries):
                    each.matmul = library
        return np.array(self.result)

    def call(self, function: Function, arguments: Sequence[Any], outs: Sequence[Any], keywords: Any) -> Any:
        """Call the function, record the call and return its result, which is traced.

        outs: the arrays to write to, if they are given.
        """
        arguments, outs = tuple(map(_plain, arguments)), tuple(map(_plain, outs))
        given = {"out": outs if isinstance(function, np.ufunc) else outs[0]} if outs else {}
        start = time.perf_counter()
        result = function(*arguments, **keywords, **given)
        if self._thread != threading.get_ident():
            self.fail("several threads call NumPy")
        if not isinstance(result, Array):
            self.fail("a call does not return one array")
            return result
        if any(isinstance(value, Array) for value in keywords.values()):
            self.fail("a keyword of a call is an array")
        self._add(start, _Call(function, arguments, (result,), dict(keywords)))
        return self._traced(result)

    def condition(self, test: Callable[[Array], bool], a: Array) -> bool:
        """Return test(a) and record that a replay must have the same result."""
        a, start = _plain(a), time.perf_counter()
        expected = test(a)
        self._add(start, _Call(_Expected(test, expected), (a,), (), {}))
        return expected

    def fail(self, reason: str) -> None:
        """Record why the step cannot be repeated."""
        self.reason = self.reason or reason

    def _add(self, start: float, call: _Call) -> None:
        self.calls.append(call)
        self.times.append(start)

    def _traced(self, a: Array) -> Traced:
        traced = a.view(Traced)
        traced.trace = self
        return traced


class _Differs(Exception):
    """A condition does not have the result of the trace."""


@dataclass(frozen=True, slots=True)
class _Expected:
    test: Callable[[Array], bool]
    result: bool

    def __call__(self, a: Array) -> None:
        if self.test(a) is not self.result:
            raise _Differs


class _Memory:
    """Memory of arrays: an input, a constant (a weight, the KV cache), or a result, of the replay's own."""

    def __init__(self, owner: Array, is_result: bool, first: int, growth: int) -> None:
        self.owner, self.is_result, self.growth = owner, is_result, growth
        """growth: bytes by which a result grows with every step."""
        self.first = self.last = first
        """The first and the last call that uses it."""


class _Place:
    """An array of a call: its offset in a memory, its shape and strides, and their change with every step."""

    __slots__ = (
        "array",
        "change",
        "memory",
        "moves",
        "offset",
        "shape",
        "shape_change",
        "strides",
        "strides_change",
    )

    def __init__(self, memory: _Memory, a: Array, b: Array, offset_a: int, offset_b: int) -> None:
        """a, b: the array in the first and in the second trace."""
        self.memory, self.array, self.offset = memory, b, offset_b
        self.shape, self.strides = b.shape, b.strides
        self.change: int = offset_b - offset_a
        self.shape_change: tuple[int, ...] = ()
        self.strides_change: tuple[int, ...] = ()
        if a.shape != b.shape or a.strides != b.strides:
            if any(n <= 1 and n != m for n, m in zip(a.shape, b.shape)):
                raise Unrepeatable("an axis grows from one element")  # whose stride has no meaning
            self.shape_change = tuple([n - m for m, n in zip(a.shape, b.shape)])
            self.strides_change = tuple([n - m for m, n in zip(a.strides, b.strides)])
        self.moves = bool(self.change or self.shape_change)

    def at(self, step: int) -> Array:
        """The array, `step` steps after the second trace.

        Raises TypeError or ValueError outside of its memory.
        """
        shape, strides = self.shape, self.strides
        if self.shape_change:
            shape = tuple([n + step * change for n, change in zip(shape, self.shape_change)])
            strides = tuple([n + step * change for n, change in zip(strides, self.strides_change)])
        offset = self.offset + step * self.change
        return np.ndarray(shape, self.array.dtype, self.memory.owner, offset, strides)

    def fits(self, step: int) -> bool:
        """Whether the array is inside its memory, `step` steps after the second trace."""
        try:
            self.at(step)
        except (TypeError, ValueError):
            return False
        return True

    def is_single(self, axis: int) -> bool:
        """Whether this axis, counted from the last one, has size 1 at every step."""
        return self.shape[-axis] == 1 and not (self.shape_change and self.shape_change[-axis])

    def drop(self, axes: Sequence[int]) -> None:
        """Drop axes of size 1, counted from the last one."""
        kept = [i for i in range(len(self.shape)) if len(self.shape) - i not in axes]
        self.shape = tuple([self.shape[i] for i in kept])
        self.strides = tuple([self.strides[i] for i in kept])
        if self.shape_change:
            self.shape_change = tuple([self.shape_change[i] for i in kept])
            self.strides_change = tuple([self.strides_change[i] for i in kept])

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for arrays that are the same at every step."""
        where = id(self.memory.owner), self.array.dtype.num, self.offset, self.change
        return *where, self.shape, self.strides, self.shape_change, self.strides_change


class Replay:
    """The calls of two consecutive steps, repeatable for the `limit` steps after the second one.

    Raises Unrepeatable if the steps differ by more than regular changes of place.
    """

    def __init__(self, first: Trace, second: Trace, limit: int) -> None:
        if reason := first.reason or second.reason:
            raise Unrepeatable(reason)
        if len(first.calls) != len(second.calls):
            raise Unrepeatable("the steps make different calls")
        self._inputs, self._records = second.inputs, Records(first.records, second.records, second.times)
        # No array of the traces is freed before all are compared, so an id means one array.
        self._located: dict[int, tuple[Array, int]] = {}
        self._memories: dict[tuple[int, int], _Memory] = {
            (id(a), id(b)): _Memory(_in_memory_order(b), False, 0, 0)
            for a, b in zip(first.inputs, second.inputs)
        }
        calls = [self._compared(i, *pair) for i, pair in enumerate(zip(first.calls, second.calls))]
        result = self._place(len(calls), first.result, second.result, False)
        if result.moves:
            raise Unrepeatable("the result has another shape at every step")
        moving = [each for _, given in calls for each in given if isinstance(each, _Place) and each.moves]
        in_constants = [each for each in moving if not each.memory.is_result]
        self.limit: int = bisect_left(
            range(1, limit + 1), True, key=lambda step: not all(each.fits(step) for each in in_constants)
        )
        _allocate([memory for memory in self._memories.values() if memory.is_result], self.limit)
        self._result = result.at(0)
        del self._memories, self._located
        self._calls: list[tuple[Function, tuple[Any, ...]]] = []
        self._moving: list[_Place] = []
        self._with_moving: list[tuple[int, Function, list[Any], list[tuple[int, int]]]] = []
        """Calls with arrays that move: (index, function, arguments, [(argument, index in _moving)])."""
        self._arrange(calls)
        bounds = [0, *self._records.positions, len(calls)]
        self._ranges = list(pairwise(bounds))
        """The calls between two times that are taken, with those before the first and after the last."""
        self._times: list[float] = []

    def run(self, step: int, inputs: Sequence[Array]) -> Array | None:
        """Return the result of the step with this number after the second trace, or None if a condition has
        another result."""
        for own, given in zip(self._inputs, inputs):
            np.copyto(own, given)
        calls, moved = self._calls, [place.at(step) for place in self._moving]
        for i, function, arguments, moving in self._with_moving:
            for argument, n in moving:
                arguments[argument] = moved[n]
            calls[i] = function, tuple(arguments)
        self._times = times = []
        now = time.perf_counter
        try:
            with np.errstate(over="ignore"):
                for begin, end in self._ranges:
                    for function, arguments in calls[begin:end]:
                        function(*arguments)
                    times.append(now())
        except _Differs:
            return None
        return np.array(self._result)

    def send_records(self, step: int) -> None:
        """Send the spans and events of the last run to the active recorder, if there is one."""
        if self._records.positions:
            self._records.send(step, self._times)

    def _compared(self, i: int, first: _Call, second: _Call) -> tuple[Function, list[Any]]:
        """Return the function of call i and its arguments, results included."""
        same = first.function == second.function and first.keywords == second.keywords
        if not same or len(first.arguments) != len(second.arguments):
            raise Unrepeatable("the steps make different calls")
        arguments = [self._argument(i, a, b) for a, b in zip(first.arguments, second.arguments)]
        outs = [self._place(i, a, b, True) for a, b in zip(first.outs, second.outs)]
        function, keywords = second.function, second.keywords
        # np.maximum and np.minimum do not accept the result as a third argument.
        binary = function in (np.maximum, np.minimum)
        if keywords or binary or not isinstance(function, np.ufunc | _Expected):
            function = _with_out(function, keywords)
        return function, [*arguments, *outs]

    def _argument(self, i: int, a: Any, b: Any) -> Any:
        if isinstance(a, Array) and isinstance(b, Array):
            return self._place(i, a, b, False)
        if type(a) is not type(b) or a != b:
            raise Unrepeatable(f"a number changes from {a} to {b}")
        return b

    def _place(self, i: int, a: Any, b: Any, written: bool) -> _Place:
        """The place of an array of call i that is `a` in the first trace and `b` in the second."""
        if a.dtype != b.dtype or a.ndim != b.ndim:
            raise Unrepeatable("an array changes its type or its number of axes")
        (owner_a, offset_a), (owner_b, offset_b) = self._locate(a), self._locate(b)
        memory = self._memories.get((id(owner_a), id(owner_b)))
        if memory is None:
            if owner_a is not owner_b and not written:
                raise Unrepeatable(f"an array {b.shape} is computed outside of the recorded calls")
            growth = owner_b.nbytes - owner_a.nbytes
            memory = _Memory(_in_memory_order(owner_b), owner_a is not owner_b, i, growth)
            self._memories[id(owner_a), id(owner_b)] = memory
        memory.last = i
        return _Place(memory, a, b, offset_a, offset_b)

    def _locate(self, a: Array) -> tuple[Array, int]:
        """The array that owns the memory of an array, and the offset of the array in it."""
        found = self._located.get(id(a))
        if found is None:
            owner = _owner(a)
            found = self._located[id(a)] = owner, 0 if a is owner else _address(a) - _address(owner)
        return found

    def _arrange(self, calls: list[tuple[Function, list[Any]]]) -> None:
        """Store the calls, with the arrays in place of their places."""
        index: dict[tuple[Any, ...], int] = {}
        for i, (function, given) in enumerate(calls):
            if isinstance(function, np.ufunc) and function.signature is None:
                _simplify(function, given)
            moving: list[tuple[int, int]] = []
            for n, each in enumerate(given):
                if isinstance(each, _Place) and each.moves:
                    if each.key not in index:
                        index[each.key] = len(self._moving)
                        self._moving.append(each)
                    moving.append((n, index[each.key]))
            arguments = [each.at(0) if isinstance(each, _Place) else each for each in given]
            if moving:
                self._with_moving.append((i, function, arguments, moving))
            self._calls.append((function, tuple(arguments)))


class Steps:
    """The consecutive steps of one program, e.g. the decode steps with one KV cache."""

    def __init__(self) -> None:
        self.repeated: int = 0
        """Number of repeated steps."""
        self._depends_on: tuple[Any, Any] = None, None
        self._restart()

    def run(
        self,
        function: Callable[..., Array],
        inputs: Sequence[Array],
        number: int,
        left: int,
        owner: Any,
        memory: int,
        advance: Callable[[], None],
    ) -> Array:
        """Return function(*inputs), by a replay if possible.

        number: number of this step. left: number of steps, with this one, whose arrays have regular places.
        owner: the object whose weights the function uses. memory: changes if other arrays that it uses are
        allocated again. advance: does what the function does besides NumPy calls.
        """
        products = [each.matmul for each in blas.PRODUCTS.values()]
        forms = [(a.shape, a.strides, a.dtype) for a in inputs]
        context = memory, products, forms, recorder.destination()
        if self._depends_on[0] is not owner or self._depends_on[1] != context:
            self._depends_on = owner, context
            self._restart()
        if self._replay is not None:
            step = number - self._first
            if 1 <= step <= self._replay.limit:
                return self._repeated(self._replay, step, function, inputs, advance)
            self._replay = None
        self._seen = self._seen + 1 if number == self._last + 1 else 0
        self._last = number
        if self.reason or self._seen < WARM_UP or (left < LEAST and self._trace is None):
            return function(*inputs)
        return self._traced(function, inputs, number, left)

    def _restart(self) -> None:
        self.reason: str = ""
        """Why the steps run as a program; empty if they are repeated, or will be."""
        self._seen, self._last = 0, -2
        """The number of consecutive steps that ran as a program, and the last of them."""
        self._trace: tuple[int, int, Trace] | None = None
        """The number and the steps left of the last step, if it was traced, and its trace."""
        self._replay: Replay | None = None
        self._first = 0
        """The number of the replay's second trace."""
        self._checked, self._failures = False, 0

    def _repeated(
        self,
        replay: Replay,
        step: int,
        function: Function,
        inputs: Sequence[Array],
        advance: Callable[[], None],
    ) -> Array:
        blas.follow_load(False)
        result = replay.run(step, inputs)
        if result is not None and self._checked:
            replay.send_records(step)
            advance()
            self.repeated += 1
            return result
        expected = function(*inputs)
        if result is not None:
            self._checked = np.array_equal(result, expected, equal_nan=True)
            if not self._checked:
                self.reason, self._replay = "a replay has another result", None
        return expected

    def _traced(self, function: Function, inputs: Sequence[Array], number: int, left: int) -> Array:
        before, trace = self._trace, Trace(inputs)
        result = trace.run(function)
        self._trace = number, left, trace
        if before is None or before[:2] != (number - 1, left + 1):
            return result
        try:
            self._replay, self._first, self._checked = Replay(before[2], trace, left - 1), number, False
            self._trace, self._failures = None, 0
        except Unrepeatable as error:
            # The next steps may be regular: an axis had one element, a constant was replaced by a larger one.
            self._failures += 1
            if self._failures == _TRIES:
                self.reason, self._trace = str(error), None
        return result


def _simplify(function: np.ufunc, arguments: list[Any]) -> None:
    """Make a call of an elementwise function cheaper: drop axes of size 1, and convert numbers to arrays of
    the type of the result, in which they are computed."""
    *inputs, result = [each for each in arguments if isinstance(each, _Place)]
    if single := [axis for axis in range(1, len(result.shape) + 1) if result.is_single(axis)]:
        for each in (*inputs, result):
            each.drop(single)
    for each in inputs:
        leading = len(each.shape)
        while leading and each.is_single(leading):
            leading -= 1
        each.drop(range(leading + 1, len(each.shape) + 1))  # it is broadcast without its first axes too
    dtype = result.array.dtype
    if function in _ARITHMETIC and dtype.kind == "f" and all(each.array.dtype == dtype for each in inputs):
        arguments[:] = [np.asarray(a, dtype) if isinstance(a, (int, float)) else a for a in arguments]


def _allocate(results: Sequence[_Memory], limit: int) -> None:
    """Allocate the memory of the results; later results reuse that of earlier ones."""
    free: list[Array] = []
    used: list[tuple[int, Array]] = []
    for memory in sorted(results, key=lambda memory: memory.first):
        free += [buffer for last, buffer in used if last < memory.first]
        used = [(last, buffer) for last, buffer in used if last >= memory.first]
        size = memory.owner.nbytes + max(0, memory.growth) * limit
        fitting = [i for i, buffer in enumerate(free) if size <= buffer.nbytes <= 2 * size]
        memory.owner = free.pop(fitting[-1]) if fitting else _aligned(size)
        used.append((memory.last, memory.owner))


def _aligned(size: int) -> Array:
    memory = np.empty(size + _LINE, np.uint8)
    begin = -_address(memory) % _LINE
    return memory[begin : begin + size]


def _trace_of(arguments: Sequence[Any]) -> Trace:
    return next(each.trace for each in arguments if isinstance(each, Traced) and each.trace is not None)


def _recorded(matmul: Function, a: Any, b: Any) -> Any:
    """A product of a library that is not a NumPy function."""
    return recorded(matmul, a, b)


def _plain(a: Any) -> Any:
    if not isinstance(a, Traced):
        return a
    base = a.base
    if type(base) is Array and base.shape == a.shape and base.strides == a.strides:
        return base  # all of it, so that most arrays of a trace are the same objects
    return a.view(Array)


def _copy(source: Any, out: Array, **keywords: Any) -> Array:
    np.copyto(out, source, **keywords)
    return out


def _where(test: Array, a: Any, b: Any, out: Array | None = None) -> Array:
    if out is None:
        return np.where(test, a, b)
    np.copyto(out, b)
    np.copyto(out, a, where=test)
    return out


def _with_out(function: Function, keywords: dict[str, Any]) -> Function:
    """The function with its keywords, and the result array as the last argument."""
    return lambda *arguments: function(*arguments[:-1], out=arguments[-1], **keywords)


def _owner(a: Array) -> Array:
    """The array that owns the memory of a view."""
    while isinstance(a.base, Array):
        a = a.base
    return a


def _in_memory_order(owner: Array) -> Array:
    """A view with the axes in the order of the memory, as np.ndarray needs it."""
    return owner.transpose(sorted(range(owner.ndim), key=lambda axis: -owner.strides[axis]))


def _address(a: Array) -> int:
    return a.__array_interface__["data"][0]
