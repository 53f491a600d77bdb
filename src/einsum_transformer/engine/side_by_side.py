"""einsums(): several equations of one array; weights that lie side by side in memory are one product."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from einsum_transformer.engine import plans, recorder
from einsum_transformer.engine.contract import Leaf, einsum, report
from einsum_transformer.engine.equation import Equation
from einsum_transformer.engine.shapes import ShapeArray

Array = np.ndarray
Term = tuple[str, Any]
"""(equation, weight)"""


def einsums(x: Array, *terms: Term) -> list[Array]:
    """Return `[einsum(equation, x, weight) for equation, weight in terms]`.

    If the weights lie side by side in memory (see `leaves.resident.allocate` and `Leaf.joined`), their
    products are computed as one, which reads x once and is more efficient with few rows. The results are then
    views of one array, which do not overlap.
    """
    joined = _joined.get(tuple([id(weight) for _, weight in terms]))
    if joined is None:
        joined = _join(terms)
    if joined.matrix is None or not isinstance(x, np.ndarray) or x.dtype != joined.matrix.dtype:
        return [einsum(equation, x, weight) for equation, weight in terms]
    if not (recorder.active_for_events and recorder.reads_events()):
        run = joined.runs.get((x.shape, x.strides))
        return (run or joined.plan(x, terms))(x)
    run = joined.plan(x, terms)
    if isinstance(joined.matrix, Leaf):
        how = joined.matrix.product_with_rows(math.prod(x.shape[:-1]))
        if how is None:
            return [einsum(equation, x, weight) for equation, weight in terms]  # so that each has an event
    else:
        how = joined.how
    start = time.perf_counter()
    with recorder.paused():
        results = run(x)
    seconds = time.perf_counter() - start
    size, first = sum(math.prod(weight.shape) for _, weight in terms), 0
    for (equation, weight), result in zip(terms, results):
        own = math.prod(weight.shape)
        array = _resident(weight)
        if array is None:
            array = ShapeArray.unallocated(weight.shape, weight.stored_type)
        with recorder.using(weight):
            operands, text = [x, array], f"{len(terms)} in one {how}"
            part = first / size, own / size
            report(equation, Equation.parse(equation), operands, result, text, start, seconds, part)
        first += own
    return results


def _resident(weight: Any) -> Array | None:
    """The array of a weight that is one, or of a leaf that only holds one."""
    if isinstance(weight, Leaf):
        return weight.resident()
    return weight if type(weight) is np.ndarray else None


@dataclass(slots=True)
class _Joined:
    """Weights that lie side by side. matrix: all of them, (j, d); None if they are computed one by one."""

    matrix: Array | Leaf | None = None
    runs: dict[tuple[Any, ...], Callable[[Array], list[Array]]] = field(default_factory=dict)
    """Shape and strides of x -> the function that computes all results."""
    how: str = ""
    owners: list[Any] = field(default_factory=list)

    def plan(self, x: Array, terms: tuple[Term, ...]) -> Callable[[Array], list[Array]]:
        assert self.matrix is not None
        parsed = [Equation.parse(equation) for equation, _ in terms]
        for equation, (_, weight) in zip(parsed, terms):
            equation.sizes([x.shape, weight.shape])  # reports a wrong size
        batch = parsed[0].output[: len(x.shape) - 1]
        letter = next(letter for letter in "jabcdefghiklmnopqrstuvwxyz" if letter not in parsed[0].inputs[0])
        contracted = parsed[0].inputs[0][-1]
        text = f"{parsed[0].inputs[0]},{letter}{contracted}->{batch}{letter}"
        matrix, parts, first = self.matrix, [], 0
        if isinstance(matrix, Leaf):
            product = partial(einsum, text)
        else:
            plan = plans.plan_of(text, Equation.parse(text), [x, matrix], "K")
            product, self.how = plan.run, plan.description()
        for _, weight in terms:
            rows = weight.shape[:-1]
            last = first + math.prod(rows)
            parts.append((slice(first, last), (*x.shape[:-1], *rows) if len(rows) > 1 else None))
            first = last

        def run(x: Array) -> list[Array]:
            y = product(x, matrix)
            return [y[..., part] if shape is None else y[..., part].reshape(shape) for part, shape in parts]

        if len(self.runs) >= 256:
            self.runs.clear()
        self.runs[x.shape, x.strides] = run
        return run


_joined: dict[tuple[int, ...], _Joined] = {}
"""The ids of weights -> what is known of them, until one of them is freed."""
_APART = _Joined()


def _join(terms: tuple[Term, ...]) -> _Joined:
    """Return the weights as one matrix if they lie side by side, and store it until one of them is freed."""
    weights = [weight for _, weight in terms]
    arrays = [array for array in map(_resident, weights) if array is not None]
    leaves = [weight for weight in weights if isinstance(weight, Leaf)]
    if len(arrays) < len(weights) and len(leaves) < len(weights):
        return _APART
    key = tuple([id(weight) for weight in weights])
    matrix = None
    if _same_form([equation for equation, _ in terms]):
        matrix = consecutive(arrays) if len(arrays) == len(weights) else leaves[0].joined(leaves[1:])
    found = _Joined(matrix)
    found.owners = [weakref.ref(each, lambda _: _joined.pop(key, None)) for each in weights]
    _joined[key] = found
    return found


def _same_form(equations: list[str]) -> bool:
    """Whether each equation multiplies the last letter of x, and appends the other letters of the weight."""
    first = None
    for text in equations:
        equation = Equation.parse(text)
        if len(equation.inputs) != 2 or "." in text:
            return False
        x, weight = equation.inputs
        first = first or x
        if x != first or weight[-1] != x[-1] or equation.output != x[:-1] + weight[:-1]:
            return False
        if len(set(x)) < len(x) or len(set(weight)) < len(weight):
            return False
    return True


def consecutive(weights: Sequence[Array]) -> Array | None:
    """Return the matrix (j, d) of which the weights (..., d) are consecutive rows, as a view of their memory,
    or None if they are not."""
    memory, first = weights[0].base, weights[0]
    if not isinstance(memory, np.ndarray) or memory.ndim != 1 or not memory.flags.c_contiguous:
        return None
    if memory.itemsize != first.itemsize:
        return None
    rows, address = 0, first.ctypes.data
    steps = None
    for weight in weights:
        matrix = weight.reshape(-1, weight.shape[-1])
        if (
            weight.base is not memory
            or weight.dtype != first.dtype
            or not np.may_share_memory(matrix, weight)
        ):
            return None
        steps = steps or matrix.strides
        if matrix.strides != steps or weight.ctypes.data != address + rows * steps[0]:
            return None
        rows += len(matrix)
    assert steps is not None
    offset = address - memory.ctypes.data
    return np.ndarray((rows, first.shape[-1]), first.dtype, memory, offset, steps)
