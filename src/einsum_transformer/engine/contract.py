"""einsum(): resolve the operands, run the cached plan, tell the recorder."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Unpack

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from einsum_transformer.engine import calls, plans, recorder
from einsum_transformer.engine.equation import Equation, EquationError
from einsum_transformer.engine.shapes import ShapeArray

Array = np.ndarray


class Leaf(NDArrayOperatorsMixin, ABC):
    """Whatever stands where a weight array stands: a file's tensor, a quantized tensor, a LoRA pair.

    `einsum` asks the leaf for the contraction and `weight_grad` for the gradient, so components never know of
    leaves. In elementwise arithmetic (`weight + 1`, `x *= weight`) a leaf is the array it stands for. A new
    kind defines `array`, and overrides what it can do better.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    trained = True
    """Whether a gradient of it is wanted."""

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of what it is made of, also where a part of that is still in its file."""
        return sum(part.nbytes for part in self.parts().values())

    @abstractmethod
    def array(self) -> Array:
        """The weight as floating-point numbers, in the shape of this leaf."""

    def __getitem__(self, index: Any) -> Any:
        """A part of the weight, for an equation or as an array."""
        return _Part(self, index)

    @property
    def whole(self) -> Leaf:
        """The leaf that this one is a part of, or itself."""
        return self

    def rows(self, indices: Array) -> Array:
        """The rows of the first axis at `indices`, as np.take gives them."""
        return np.take(self.array(), indices, axis=0)

    def contract(self, equation: str, operands: tuple[Any, ...], position: int, order: str = "K") -> Array:
        """einsum(equation, *operands) where operands[position] is this leaf; order: see `product`."""
        return product(equation, (*operands[:position], self.array(), *operands[position + 1 :]), order)

    def weight_grad(self, equation: str, *operands: Array) -> Any:
        """The gradient that belongs to this leaf: an array of its shape, or `Gradients` of its parts."""
        return product(equation, operands, "C")

    def add_rows(self, indices: Array, dy: Array) -> Any:
        """The gradient of `rows` that belongs to this leaf, or None if it takes none."""
        return add_rows(ShapeArray(self.shape, self.dtype), indices, dy)

    def parts(self) -> dict[str, Any]:
        """Name -> array or leaf of all that it is made of; nothing for what is not held in memory."""
        return {}

    def with_parts(self, parts: Mapping[str, Any]) -> Leaf:
        """The same kind of leaf, with the same settings, made of other parts."""
        raise NotImplementedError(f"{type(self).__name__} has no parts")

    def trained_parts(self, path: str) -> dict[str, str]:
        """Part -> name of the parameter, for the parts that are trained where this leaf is at `path`."""
        return {}

    def drawn(self, key: tuple[int, ...], first_row: int) -> Leaf:
        """The leaf for one pass over the rows of a batch from first_row on, with the random numbers of
        `key`."""
        return self

    def delta(self) -> Array | None:
        """What an adapter adds to `bare`, None for what has no adapter."""
        return None

    def bare(self) -> Any:
        """The weight without an adapter and without what keeps it from being trained."""
        return self

    def writable(self) -> Any:
        """What stands here in training: itself where only parts are trained, or nothing is; else an array."""
        return np.array(self.array())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        """For NumPy's functions."""
        return np.array(self.array(), dtype=dtype, copy=copy)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        """For arithmetic by element, as of a norm's weight or a bias; nothing is written into a leaf."""
        if any(isinstance(each, Leaf) for each in options.get("out", ())):
            return NotImplemented
        arrays = [each.array() if isinstance(each, Leaf) else each for each in inputs]
        return getattr(ufunc, method)(*arrays, **options)

    __hash__ = object.__hash__  # type: ignore[assignment]


class _Part(Leaf):
    """leaf[index] where an equation uses it; it takes no gradient."""

    trained = False

    def __init__(self, whole: Leaf, index: Any) -> None:
        self._whole, self.index = whole, index
        self.shape, self.dtype = ShapeArray(whole.shape)[index].shape, whole.dtype

    @property
    def whole(self) -> Leaf:
        return self._whole

    def array(self) -> Array:
        return self._whole.array()[self.index]


class Gradients:
    """The gradient of a leaf of which parts are trained: part -> array."""

    __slots__ = ("parts",)

    def __init__(self, **parts: Array) -> None:
        self.parts = parts


# Looked up once: einsum begins with them.
_ndarray, _kept_plans = np.ndarray, plans.kept


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
    if len(operands) == 2 and not keywords and not recorder.active_for_events:
        a, b = operands
        if type(a) is _ndarray and type(b) is _ndarray:
            try:
                plan = _kept_plans.get(
                    (equation, a.shape, b.shape, a.strides, b.strides, a.dtype.num, b.dtype.num)
                )
            except TypeError:  # sublists: `equation` is an operand
                plan = None
            if plan is not None:
                return plan.run(a, b)
    return _with_keywords(equation, operands, keywords) if keywords else _einsum(equation, operands)


def product(equation: str, operands: tuple[Any, ...], order: str = "K") -> Array:
    """einsum(equation, *operands); order: "K" lets the engine choose the memory layout of a matrix product,
    "C" puts operand 1's letters innermost, "F" operand 0's."""
    return einsum(equation, *operands) if order == "K" else _einsum(equation, operands, order)


def is_trained(weight: Any) -> bool:
    """Whether a gradient of a weight is wanted: not of one that is frozen, or None (not there)."""
    return weight is not None and not (isinstance(weight, Leaf) and not weight.trained)


def weight_grad(weight: Any, equation: str, *operands: Any) -> Any:
    """The gradient of a weight, einsum(equation, *operands), in the memory layout of the weight.

    Where `...` broadcasts the weight, its gradient is also the sum over those axes. A leaf answers with what
    is its own gradient. A weight that is not trained (see `is_trained`) has None, and its operands are not
    looked at.
    """
    if not is_trained(weight):
        return None
    with recorder.using(weight, gradient=True):
        if "..." in equation:
            return _broadcast_grad(weight, equation, operands)
        if isinstance(weight, Leaf):
            return weight.weight_grad(equation, *operands)
        input_major = isinstance(weight, Array) and weight.ndim > 1 and weight.strides[-1] != weight.itemsize
        return _einsum(equation, operands, "F" if input_major else "C")


def _broadcast_grad(weight: Any, equation: str, operands: Sequence[Any]) -> Any:
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
    gradient = weight_grad(weight, f"{','.join(inputs)}->{target}", *operands)
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
    return plans.plan_of(equation, Equation.parse(equation), arrays, "K").how


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
    """einsum without np.einsum's keywords; layout: the `order` of `product`."""
    if not isinstance(equation, str):
        equation, operands = calls.from_sublists((equation, *operands))
    for position, operand in enumerate(operands):
        if isinstance(operand, Leaf):
            with recorder.using(operand.whole):
                return operand.contract(equation, operands, position, layout)
    arrays = [operand if isinstance(operand, ShapeArray) else np.asarray(operand) for operand in operands]
    if len(arrays) > 2:
        return _chain(Equation.parse(equation), arrays, layout, path)
    return _run(equation, Equation.parse(equation), arrays, layout)


def _run(text: str, equation: Equation, arrays: list[Any], order: str) -> Any:
    """The operands through their plan, with an event for a recorder that wants it."""
    if any(isinstance(a, ShapeArray) for a in arrays):
        return _dry(text, equation, arrays)
    plan = plans.plan_of(text, equation, arrays, order)
    if not recorder.reads_events():
        return plan.run(*arrays)
    start = time.perf_counter()
    result = plan.run(*arrays)
    _report(text, equation, arrays, result, plan.how, time.perf_counter() - start)
    return result


def _chain(equation: Equation, arrays: list[Any], order: str, path: Sequence[tuple[int, ...]] | None) -> Any:
    """Three or more operands, two at a time, all in their common type."""
    spelled, indices = equation.spell([a.shape for a in arrays])
    dtype = calls.common_type(equation.shown, [a.dtype for a in arrays])
    wide = plans.computed_in(equation, dtype)
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
    return _found_path(str(equation), tuple(a.shape for a in arrays))


@lru_cache(maxsize=1024)
def _found_path(equation: str, shapes: tuple[tuple[int, ...], ...]) -> Any:
    from opt_einsum import contract_path

    return contract_path(equation, *shapes, shapes=True, optimize="auto")[0]


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
    dtype = calls.common_type(equation.shown, [operand.dtype for operand in operands])
    result = ShapeArray(spelled.output_shape(sizes), dtype)
    if recorder.reads_events():
        how = plans.readable(plans.dry_lowering(spelled, operands), spelled, equation)
        recorder.event(text, sizes, operands, result, how, 0.0, spelled.flops(sizes))
    return result


def _report(
    text: str, equation: Equation, operands: Sequence[Any], result: Array, how: str, seconds: float
) -> None:
    spelled, indices = equation.spell([operand.shape for operand in operands])
    if indices is not None:
        operands = [operand[index] for operand, index in zip(operands, indices)]
    sizes = spelled.sizes([operand.shape for operand in operands])
    recorder.event(text, sizes, operands, result, how, seconds, spelled.flops(sizes))
