"""einsum(): resolve the operands, run the cached plan, tell the recorder."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import FunctionType
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from einsum_transformer.engine import recorder
from einsum_transformer.engine.equation import Equation, EquationError
from einsum_transformer.engine.lowering import Operand, Plan, lower_pair, lower_single
from einsum_transformer.engine.shapes import ShapeArray

Array = np.ndarray


class Leaf(NDArrayOperatorsMixin, ABC):
    """Whatever stands where a weight array stands: a file's tensor, a quantized tensor, a LoRA pair.

    `einsum` asks the leaf for the contraction and `weight_grad` for the gradient, so components never know of
    leaves. In elementwise arithmetic (`weight + 1`, `x *= weight`) a leaf is the array it stands for.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    trained = True
    """Whether a gradient of it is wanted."""

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __getitem__(self, index: Any) -> Any:
        """A part of the weight, as an array."""
        return self.array()[index]

    @abstractmethod
    def array(self) -> Array:
        """The weight as floating-point numbers, in the shape of this leaf."""

    def rows(self, indices: Array) -> Array:
        """The rows of the first axis at `indices`, as np.take gives them."""
        return np.take(self.array(), indices, axis=0)

    def contract(self, equation: str, operands: tuple[Any, ...], position: int) -> Array:
        """einsum(equation, *operands) where operands[position] is this leaf."""
        return einsum(equation, *operands[:position], self.array(), *operands[position + 1 :])

    def weight_grad(self, equation: str, *operands: Array) -> Any:
        """The gradient that belongs to this leaf."""
        return einsum(equation, *operands, order="C")

    def add_rows(self, indices: Array, dy: Array) -> Any:
        """The gradient of `rows` that belongs to this leaf, or None if it takes none."""
        return add_rows(ShapeArray(self.shape, self.dtype), indices, dy)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        """For NumPy's functions."""
        return np.asarray(self.array(), dtype)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        """For arithmetic by element, where a norm's weight or a bias stands."""
        arrays = [each.array() if isinstance(each, Leaf) else each for each in inputs]
        return getattr(ufunc, method)(*arrays, **options)

    __hash__ = object.__hash__  # type: ignore[assignment]


_plans: dict[tuple[Any, ...], Plan] = {}
_PLANS_KEPT = 4096
_ndarray = np.ndarray


def einsum(equation: str, *operands: Any, order: str = "K") -> Array:
    """The contraction that `equation` spells, as `np.einsum` defines it, run as a BLAS product wherever it is
    one.

    operands: arrays or leaves (see `Leaf`); one letter has one size, and size 1 does not broadcast. Equations
    with three or more operands run pairwise along the path that opt_einsum finds.
    order: "K" lets the engine choose the memory layout of the result; "C" puts operand 1's letters innermost,
    "F" operand 0's.
    Errors: EquationError names the equation, the operand, the letter and both sizes.
    """
    if len(operands) == 2 and order == "K" and recorder.active is None:
        a, b = operands
        if type(a) is _ndarray and type(b) is _ndarray:
            plan = _plans.get((equation, a.shape, b.shape, a.strides, b.strides, a.dtype.num, b.dtype.num))
            if plan is not None:
                return plan.run(a, b)
    return _einsum(equation, operands, order)


def weight_grad(equation: str, *operands_and_weight: Any) -> Any:
    """einsum(equation, *operands) in the memory layout of the last argument, the weight whose gradient it is.

    A leaf answers with what is its own gradient; None, a bias that is not there, has None. An operand that is
    wanted for this gradient alone may be a function that makes it, called if there is a gradient to take.
    """
    *operands, weight = operands_and_weight
    if weight is None or (isinstance(weight, Leaf) and not weight.trained):
        return None
    operands = [operand() if isinstance(operand, FunctionType) else operand for operand in operands]
    if isinstance(weight, Leaf):
        return weight.weight_grad(equation, *operands)
    input_major = isinstance(weight, Array) and weight.ndim > 1 and weight.strides[-1] != weight.itemsize
    return einsum(equation, *operands, order="F" if input_major else "C")


def take_rows(weight: Any, indices: Array) -> Array:
    """Rows of a matrix (v, d) at `indices` (b, t) -> (b, t, d), laid out as a projection's result would be.

    That is with positions innermost in memory, so that every elementwise pass runs over long contiguous
    lines.
    """
    if isinstance(weight, Leaf):
        rows = weight.rows(indices)
    elif isinstance(weight, Array) and weight.strides[0] == weight.itemsize:
        return np.moveaxis(np.take(weight.T, indices, axis=1), 0, -1)
    else:
        rows = np.take(weight, indices, axis=0)
    if not isinstance(rows, Array) or indices.size == 1:
        return rows
    lines = np.ascontiguousarray(rows.reshape(-1, rows.shape[-1]).T)
    return lines.T.reshape(rows.shape)


def add_rows(weight: Any, indices: Array, dy: Array) -> Any:
    """The transpose of `take_rows`, the gradient of a matrix (v, d): row i is the sum of dy (b, t, d) where
    indices == i."""
    if isinstance(weight, Leaf):
        return weight.add_rows(indices, dy)
    total = np.zeros_like(dy, order="C", shape=weight.shape)
    if isinstance(dy, Array):
        np.add.at(total, indices.ravel(), np.ascontiguousarray(dy).reshape(indices.size, -1))
    return total


def lowering(equation: str, *operands: Any) -> str:
    """How `einsum` would run this call: the matrix product it becomes and what it copies."""
    arrays = [
        operand if isinstance(operand, Array) else np.empty(operand.shape, operand.dtype)
        for operand in operands
    ]
    return _plan(equation, Equation.parse(equation), arrays, "K").how


def _einsum(equation: str, operands: tuple[Any, ...], order: str) -> Array:
    for position, operand in enumerate(operands):
        if isinstance(operand, Leaf):
            return operand.contract(equation, operands, position)
    if any(isinstance(operand, ShapeArray) for operand in operands):
        return _dry(equation, operands)
    arrays = [np.asarray(operand) for operand in operands]
    if len(arrays) > 2:
        return _chain(equation, arrays, order)
    return _run(equation, Equation.parse(equation), arrays, order)


def _run(text: str, equation: Equation, arrays: list[Array], order: str) -> Array:
    """One or two operands through their plan, with an event for a recorder that wants it."""
    plan = _plan(text, equation, arrays, order)
    if recorder.active is None or not recorder.active.events_wanted:
        return plan.run(*arrays)
    start = time.perf_counter()
    result = plan.run(*arrays)
    _report(text, equation, arrays, plan.how, time.perf_counter() - start)
    return result


def _plan(text: str, equation: Equation, arrays: Sequence[Array], order: str) -> Plan:
    """The cached plan for these shapes, strides and types, or a new one."""
    if order == "K" and len(arrays) == 2:
        a, b = arrays
        key: tuple[Any, ...] = (text, a.shape, b.shape, a.strides, b.strides, a.dtype.num, b.dtype.num)
    else:
        key = (text, order, *((a.shape, a.strides, a.dtype.num) for a in arrays))
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= _PLANS_KEPT:
            _plans.clear()
        plan = _plans[key] = _lower(equation, arrays, order)
    return plan


def _lower(equation: Equation, arrays: Sequence[Array], order: str) -> Plan:
    if "..." in "".join(equation.inputs):
        return _lower_ellipsis(equation, arrays, order)
    equation.sizes([a.shape for a in arrays])
    dtype = np.result_type(*arrays)
    wide = np.dtype(np.float32) if _is_half(dtype) else dtype
    if any(a.dtype != wide for a in arrays) or wide != dtype:
        converted = [a.astype(wide, copy=False) for a in arrays]
        plan = _lower(equation, converted, order)

        def run(*given: Array) -> Array:
            # astype keeps the layout (order "K"), so the plan made for the converted operands fits every
            # call.
            return plan.run(*(a.astype(wide, copy=False) for a in given)).astype(dtype, copy=False)

        return Plan(run, f"{plan.how} in {wide}")
    layouts = [Operand(term, a.shape, a.strides, a.itemsize) for term, a in zip(equation.inputs, arrays)]
    if len(layouts) == 1:
        return lower_single(equation, layouts[0], dtype)
    return lower_pair(equation, layouts[0], layouts[1], dtype, order)


def _is_half(dtype: np.dtype) -> bool:
    """Types to store and not to compute in: NumPy's float16 and ml_dtypes' floats (a product there is 500x
    slower)."""
    return dtype.itemsize <= 2 and dtype.kind in "fV"


def _lower_ellipsis(equation: Equation, arrays: Sequence[Array], order: str) -> Plan:
    """Spell `...` out; its axes of size 1 broadcast as in NumPy, so they are dropped where another operand is
    larger."""
    spelled = equation.expand_ellipsis([a.shape for a in arrays])
    axes = {letter for term in spelled.inputs for letter in term if ord(letter) > 0x2000}
    full = {
        letter: max(a.shape[term.index(letter)] for term, a in zip(spelled.inputs, arrays) if letter in term)
        for letter in axes
    }
    terms, indices = [], []
    for term, a in zip(spelled.inputs, arrays):
        drop = [letter in axes and n == 1 and full[letter] != 1 for letter, n in zip(term, a.shape)]
        terms.append("".join(letter for letter, gone in zip(term, drop) if not gone))
        indices.append(tuple(0 if gone else slice(None) for gone in drop))
    plan = _lower(Equation(tuple(terms), spelled.output), [a[i] for a, i in zip(arrays, indices)], order)
    return Plan(lambda *given: plan.run(*(a[i] for a, i in zip(given, indices))), plan.how)


def _chain(equation: str, arrays: list[Array], order: str) -> Array:
    """Three or more operands, two at a time."""
    from opt_einsum import contract_path

    parsed = Equation.parse(equation)
    if "..." not in equation:
        parsed.sizes([a.shape for a in arrays])
    parsed = parsed.expand_ellipsis([a.shape for a in arrays])
    path, _ = contract_path(str(parsed), *(a.shape for a in arrays), shapes=True, optimize="auto")
    terms = list(parsed.inputs)
    for step, picked in enumerate(path):
        picked = sorted(picked, reverse=True)
        used_terms, used = [terms.pop(i) for i in picked], [arrays.pop(i) for i in picked]
        last = step == len(path) - 1
        needed = parsed.output if last else "".join(terms) + parsed.output
        output = (
            parsed.output if last else "".join(c for c in dict.fromkeys("".join(used_terms)) if c in needed)
        )
        result = _pairwise(used_terms, used, output, order)
        terms.append(output)
        arrays.append(result)
    return arrays[0]


def _pairwise(terms: list[str], arrays: list[Array], output: str, order: str) -> Array:
    if len(terms) > 2:
        kept = "".join(dict.fromkeys("".join(terms[:2])))
        first = _pairwise(terms[:2], arrays[:2], kept, order)
        return _pairwise([kept, *terms[2:]], [first, *arrays[2:]], output, order)
    equation = Equation(tuple(terms), output)
    return _run(str(equation), equation, arrays, order)


def _dry(text: str, operands: tuple[Any, ...]) -> Any:
    """The shape of the result; the event says what the call would cost."""
    equation = Equation.parse(text)
    shapes = [tuple(np.shape(operand)) for operand in operands]
    spelled = equation.expand_ellipsis(shapes)
    if len(operands) > 2 and "..." in text:
        raise EquationError(f"einsum {text}: a dry run takes one or two operands with '...'")
    sizes = spelled.sizes(shapes)
    if recorder.active is not None and recorder.active.events_wanted:
        _report(text, spelled, operands, _dry_lowering(spelled, operands), 0.0)
    return ShapeArray(spelled.output_shape(sizes), np.result_type(*(operand.dtype for operand in operands)))


def _dry_lowering(equation: Equation, operands: Sequence[Any]) -> str:
    """The plan for operands laid out in C order."""
    layouts = []
    for term, operand in zip(equation.inputs, operands):
        strides, step = [], operand.dtype.itemsize
        for size in reversed(operand.shape):
            strides.append(step)
            step *= size
        layouts.append(Operand(term, operand.shape, tuple(reversed(strides)), operand.dtype.itemsize))
    if len(layouts) == 1:
        return lower_single(equation, layouts[0], operands[0].dtype).how
    return (
        lower_pair(equation, layouts[0], layouts[1], operands[0].dtype).how if len(layouts) == 2 else "path"
    )


def _report(text: str, equation: Equation, operands: Sequence[Any], how: str, seconds: float) -> None:
    spelled = equation.expand_ellipsis([tuple(operand.shape) for operand in operands])
    sizes = {
        letter: n for term, operand in zip(spelled.inputs, operands) for letter, n in zip(term, operand.shape)
    }
    traffic = spelled.elements(sizes) * operands[0].dtype.itemsize
    dtype = str(operands[0].dtype)
    assert recorder.active is not None
    recorder.active.event(text, sizes, dtype, how, seconds, spelled.flops(sizes), traffic)
