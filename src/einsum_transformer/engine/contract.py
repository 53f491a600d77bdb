"""einsum(): resolve the operands, run the cached plan, tell the recorder."""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import FunctionType
from typing import Any, Unpack

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from einsum_transformer.engine import calls, recorder
from einsum_transformer.engine.equation import Equation, EquationError, OperandTypeError
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


def einsum(equation: Any, *operands: Any, **keywords: Unpack[calls.Keywords]) -> Array:
    """The contraction that `equation` spells, as `np.einsum` defines it, run as a BLAS product wherever it is
    one.

    operands: arrays, numbers, lists or leaves (see `Leaf`). One letter has one size, and size 1 does not
    broadcast; axes of `...` do. Equations with three or more operands run pairwise along the path that
    opt_einsum finds. Sublists, einsum(a, [0, 1], b, [1, 2]), stand for an equation.
    order, out, dtype, casting, optimize: as in np.einsum; with the default order "K" the engine chooses the
    memory layout of the result.
    What differs from np.einsum stands in docs/notation.md, section "Where einsum and np.einsum differ".
    Errors: EquationError names the equation, the operand, the letter and both sizes.
    """
    if len(operands) == 2 and not keywords and recorder.active is None:
        a, b = operands
        if type(a) is _ndarray and type(b) is _ndarray:
            try:
                plan = _plans.get(
                    (equation, a.shape, b.shape, a.strides, b.strides, a.dtype.num, b.dtype.num)
                )
            except TypeError:  # sublists: `equation` is an operand
                plan = None
            if plan is not None:
                return plan.run(a, b)
    return _with_keywords(equation, operands, keywords) if keywords else _einsum(equation, operands)


def weight_grad(equation: str, *operands_and_weight: Any) -> Any:
    """einsum(equation, *operands) in the memory layout of the last argument, the weight whose gradient it is.

    Where `...` broadcasts the weight, its gradient is also the sum over those axes. A leaf answers with what
    is its own gradient; None, a bias that is not there, has None. An operand that is wanted for this gradient
    alone may be a function that makes it, called if there is a gradient to take.
    """
    *operands, weight = operands_and_weight
    if weight is None or (isinstance(weight, Leaf) and not weight.trained):
        return None
    operands = [operand() if isinstance(operand, FunctionType) else operand for operand in operands]
    if "..." in equation:
        return _broadcast_grad(equation, operands, weight)
    if isinstance(weight, Leaf):
        return weight.weight_grad(equation, *operands)
    input_major = isinstance(weight, Array) and weight.ndim > 1 and weight.strides[-1] != weight.itemsize
    return _einsum(equation, tuple(operands), "F" if input_major else "C")


def _broadcast_grad(equation: str, operands: Sequence[Any], weight: Any) -> Any:
    """weight_grad of an equation with `...`, spelled in letters so that axes the weight lacks are summed."""
    parsed = Equation.parse(equation)
    operands = [operand if isinstance(operand, ShapeArray) else np.asarray(operand) for operand in operands]
    terms = Equation((*parsed.inputs, parsed.output), "...", equation)
    spelled, indices = terms.spell([*(operand.shape for operand in operands), tuple(weight.shape)])
    *inputs, target = spelled.inputs
    if lost := set(target) - set("".join(inputs)):
        axes = [n for letter, n in zip(target, weight.shape) if letter in lost]
        raise EquationError(
            f"einsum {equation}: the weight of shape {weight.shape} has axes {axes} that no operand has"
        )
    if indices is not None:
        operands = [operand[index] for operand, index in zip(operands, indices)]
        if isinstance(weight, Leaf) and 0 in indices[-1]:
            raise EquationError(f"einsum {equation}: '...' broadcasts a weight that is not an array")
    gradient = weight_grad(f"{','.join(inputs)}->{target}", *operands, weight)
    return gradient if isinstance(weight, Leaf) else gradient.reshape(weight.shape)


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
    if len(operands) > 2:
        raise EquationError(f"einsum {equation}: three or more operands have a path, not one lowering")
    arrays = [
        operand if isinstance(operand, Array) else np.empty(operand.shape, operand.dtype)
        for operand in operands
    ]
    return _plan(equation, Equation.parse(equation), arrays, "K").how


def _with_keywords(equation: Any, operands: tuple[Any, ...], keywords: calls.Keywords) -> Any:
    """einsum with np.einsum's keywords; none of them takes part in a plan but the order."""
    order, out, dtype, casting, path = calls.checked(keywords)
    if not isinstance(equation, str):
        equation, operands = calls.from_sublists((equation, *operands))
    if path is not None:
        calls.check_path(path, len(operands))
    if out is not None or dtype is not None or casting in ("no", "equiv"):
        if any(isinstance(operand, Leaf) for operand in operands):
            raise EquationError(f"einsum {equation}: out=, dtype= and casting= do not go with a leaf")
        operands = tuple(calls.cast(operands, out, dtype, casting))
    layout = "K"
    if order in ("C", "F") and len(operands) == 2:
        parsed = Equation.parse(equation)
        innermost = parsed.output[-1:] if order == "C" else parsed.output[:1]
        layout = "C" if innermost in parsed.inputs[-1] else "F"
    result = calls.in_order(_einsum(equation, operands, layout, path), order, operands)
    return result if out is None else calls.write(out, result, casting)


def _einsum(
    equation: Any,
    operands: tuple[Any, ...],
    layout: str = "K",
    path: Sequence[tuple[int, ...]] | None = None,
) -> Any:
    """einsum; layout: "K" lets the engine choose, "C" puts operand 1's letters innermost in memory, "F"
    operand 0's, where it is a matrix product. Leaves take no notice of it."""
    if not isinstance(equation, str):
        equation, operands = calls.from_sublists((equation, *operands))
    for position, operand in enumerate(operands):
        if isinstance(operand, Leaf):
            return operand.contract(equation, operands, position)
    arrays = [operand if isinstance(operand, ShapeArray) else np.asarray(operand) for operand in operands]
    if len(arrays) > 2:
        return _chain(Equation.parse(equation), arrays, layout, path)
    return _run(equation, Equation.parse(equation), arrays, layout)


def _run(text: str, equation: Equation, arrays: list[Any], order: str) -> Any:
    """The operands through their plan, with an event for a recorder that wants it."""
    if any(isinstance(a, ShapeArray) for a in arrays):
        return _dry(text, equation, arrays)
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
    shapes = [a.shape for a in arrays]
    spelled, indices = equation.spell(shapes)
    if indices is not None:
        # Its axes of size 1 broadcast: they are dropped where another operand has more.
        inner = _lower(spelled, [a[index] for a, index in zip(arrays, indices)], order)
        run = lambda *given: inner.run(*(a[index] for a, index in zip(given, indices)))  # noqa: E731
        return Plan(run, _readable(inner.how, spelled, equation))
    sizes = spelled.sizes(shapes)
    summed = set(sizes) - set(spelled.output)
    dtype = calls.common_type(equation.shown, [a.dtype for a in arrays])
    layouts = [Operand(term, a.shape, a.strides, a.itemsize) for term, a in zip(spelled.inputs, arrays)]
    if len(arrays) == 1 and not summed:
        return lower_single(spelled, layouts[0], dtype)  # a view, of any type
    wide = _computed_in(equation, dtype)
    shape = spelled.output_shape(sizes)
    if any(sizes[letter] == 0 for letter in summed):
        # A sum of nothing, even where the product of what is left would be 0 x inf.
        return Plan(lambda *given: np.zeros(shape, dtype), "zeros")
    if dtype.kind == "O":
        return Plan(lambda *given: _of_objects(str(equation), given, shape), "objects")
    if any(a.dtype != wide for a in arrays) or wide != dtype:
        return _lower_cast(equation, [a.astype(wide, copy=False) for a in arrays], order, dtype, wide)
    if len(layouts) == 1:
        return lower_single(spelled, layouts[0], dtype)
    plan = lower_pair(spelled, layouts[0], layouts[1], dtype, order)
    return Plan(plan.run, _readable(plan.how, spelled, equation))


def _lower_cast(
    equation: Equation, converted: Sequence[Array], order: str, dtype: np.dtype, wide: np.dtype
) -> Plan:
    """Compute in `wide`, answer in `dtype`."""
    plan = _lower(equation, converted, order)

    def run(*given: Array) -> Array:
        # astype keeps the layout (order "K"), so the plan made for the converted operands fits every call.
        return plan.run(*(a.astype(wide, copy=False) for a in given)).astype(dtype, copy=False)

    return Plan(run, f"{plan.how} in {wide}")


def _of_objects(equation: str, arrays: Sequence[Array], shape: tuple[int, ...]) -> Array:
    """Python objects have no BLAS: NumPy's own loop adds and multiplies them in its order, beginning at 0."""
    out = np.empty(shape, object)
    np.einsum(equation, *arrays, out=out)
    return out


def _readable(how: str, spelled: Equation, equation: Equation) -> str:
    """A plan's line with `...` again for the letters that stand for it."""
    letters = set(spelled.letters) - set(equation.letters)
    return re.sub(f"[{''.join(letters)}]+", "...", how) if letters else how


def _computed_in(equation: Equation, dtype: np.dtype) -> np.dtype:
    """The type to compute in: float32 for float16 and ml_dtypes' floats, which are types to store (a product
    in them is 500 times slower)."""
    custom = dtype.kind == "V" and dtype.num >= 256
    if dtype.kind == "f" and dtype.itemsize <= 2:
        return np.dtype(np.float32)
    if custom and np.can_cast(dtype, np.float32) and not np.can_cast(dtype, np.int8):
        return np.dtype(np.float32)
    if dtype.kind in "biufcO":
        return dtype
    raise OperandTypeError(f"einsum {equation.shown}: numbers of type {dtype} cannot be multiplied and added")


def _chain(equation: Equation, arrays: list[Any], order: str, path: Sequence[tuple[int, ...]] | None) -> Any:
    """Three or more operands, two at a time, all in their common type."""
    spelled, indices = equation.spell([a.shape for a in arrays])
    dtype = calls.common_type(equation.shown, [a.dtype for a in arrays])
    wide = _computed_in(equation, dtype)
    if dtype.kind == "O":
        return _run(equation.shown, equation, arrays, order)
    if indices is not None:
        arrays = [a[index] for a, index in zip(arrays, indices)]
    sizes = spelled.sizes([a.shape for a in arrays])
    if any(sizes[letter] == 0 and letter not in spelled.output for letter in sizes):
        return _run(str(spelled), spelled, arrays, order)
    arrays = [a.astype(wide, copy=False) for a in arrays]
    terms = list(spelled.inputs)
    for picked in path or _best_path(spelled, arrays):
        picked = sorted(picked, reverse=True)
        used_terms, used = [terms.pop(i) for i in picked], [arrays.pop(i) for i in picked]
        needed = "".join(terms) + spelled.output
        output = "".join(c for c in dict.fromkeys("".join(used_terms)) if c in needed)
        output = output if terms else spelled.output
        terms.append(output)
        arrays.append(_pairwise(used_terms, used, output, order))
    return arrays[0].astype(dtype, copy=False)


def _best_path(equation: Equation, arrays: Sequence[Any]) -> Any:
    from opt_einsum import contract_path

    return contract_path(str(equation), *(a.shape for a in arrays), shapes=True, optimize="auto")[0]


def _pairwise(terms: list[str], arrays: list[Any], output: str, order: str) -> Any:
    if len(terms) > 2:
        needed = "".join(terms[2:]) + output
        kept = "".join(c for c in dict.fromkeys("".join(terms[:2])) if c in needed)
        first = _pairwise(terms[:2], arrays[:2], kept, order)
        return _pairwise([kept, *terms[2:]], [first, *arrays[2:]], output, order)
    equation = Equation(tuple(terms), output)
    return _run(str(equation), equation, arrays, order)


def _dry(text: str, equation: Equation, operands: Sequence[Any]) -> Any:
    """The shape of the result; the event says what the call would cost."""
    spelled, indices = equation.spell([operand.shape for operand in operands])
    if indices is not None:
        operands = [operand[index] for operand, index in zip(operands, indices)]
    sizes = spelled.sizes([operand.shape for operand in operands])
    if recorder.active is not None and recorder.active.events_wanted:
        _report(text, spelled, operands, _readable(_dry_lowering(spelled, operands), spelled, equation), 0.0)
    dtype = calls.common_type(equation.shown, [operand.dtype for operand in operands])
    return ShapeArray(spelled.output_shape(sizes), dtype)


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
    spelled, indices = equation.spell([operand.shape for operand in operands])
    if indices is not None:
        operands = [operand[index] for operand, index in zip(operands, indices)]
    sizes = spelled.sizes([operand.shape for operand in operands])
    traffic = spelled.elements(sizes) * operands[0].dtype.itemsize
    dtype = str(operands[0].dtype)
    assert recorder.active is not None
    recorder.active.event(text, sizes, dtype, how, seconds, spelled.flops(sizes), traffic)
