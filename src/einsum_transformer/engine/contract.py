# pyright: reportUnnecessaryIsInstance=false
"""einsum(): resolve the operands, run the cached plan, notify the recorder."""

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
from einsum_transformer.engine.lowering import FEW_ROWS
from einsum_transformer.engine.replay import Traced, not_repeatable
from einsum_transformer.engine.shapes import ShapeArray

Array = np.ndarray


class Leaf(NDArrayOperatorsMixin, ABC):
    """A replacement for a weight array: a tensor in a file, a quantized tensor, a weight with LoRA.

    `einsum` calls the leaf for the contraction and `weight_grad` for the gradient, so components are
    independent of leaves. In elementwise arithmetic (`weight + 1`, `x *= weight`) a leaf acts as its array.
    A subclass defines `array`, and overrides other methods to be more efficient.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    trained = True
    """Whether its gradient is computed."""
    encoding: str = ""
    """The type in the file, of a weight that stays in the encoding of its file."""
    repeatable: bool = False
    """Whether its products use the same arrays at every step, so that a replay can repeat them."""

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its parts, including parts that are still in their file."""
        return sum(part.nbytes for part in self.parts().values())

    @abstractmethod
    def array(self) -> Array:
        """Return the weight as a floating-point array of the shape of this leaf."""

    def resident(self) -> Array | None:
        """Return the array in memory if a product with this leaf is the product with it, else None."""
        return None

    def product_with_rows(self, count: int) -> str | None:
        """Describe the product with `count` rows of x if it is one call, else return None."""
        return None

    @property
    def stored_type(self) -> np.dtype:
        """The type of the stored elements or codes."""
        return self.dtype

    def joined(self, others: Sequence[Leaf]) -> Leaf | None:
        """Return a leaf (j, d) of which this one and the others, (..., d), are consecutive rows, or None: it
        computes their products at once."""
        return None

    def __getitem__(self, index: Any) -> Any:
        """Return a part of the weight, for use in an equation or as an array."""
        return _Part(self, index)

    @property
    def whole(self) -> Leaf:
        """The leaf that this one is a part of, or itself."""
        return self

    def rows(self, indices: Array) -> Array:
        """Return the rows of the first axis at `indices`, as np.take does."""
        return np.take(self.array(), indices, axis=0)

    def contract(self, equation: str, operands: tuple[Any, ...], position: int, order: str = "K") -> Array:
        """Return `einsum(equation, *operands)` with this leaf at `position`; order: see `product`."""
        return product(equation, (*operands[:position], self.array(), *operands[position + 1 :]), order)

    def weight_grad(self, equation: str, *operands: Array) -> Any:
        """Return the gradient of this leaf: an array of its shape, or `Gradients` of its parts."""
        return product(equation, operands, "C")

    def add_rows(self, indices: Array, dy: Array) -> Any:
        """Return the gradient of this leaf for the use of `rows`, or None if `rows` does not train it."""
        return add_rows(ShapeArray(self.shape, self.dtype), indices, dy)

    def parts(self) -> dict[str, Any]:
        """Return name -> array or leaf of the parts; empty for a leaf that is not in memory."""
        return {}

    def with_parts(self, parts: Mapping[str, Any]) -> Leaf:
        """Return a leaf of the same kind and settings with other parts."""
        raise NotImplementedError(f"{type(self).__name__} has no parts")

    def packed(self) -> tuple[dict[str, Array], list[int]] | None:
        """Return the parts of a quantized matrix as they are saved, and [rows, columns, bits, group]; None
        for a leaf that is saved as its array."""
        return None

    @property
    def product_type(self) -> str:
        """The type of its products: the type of the activations after they are rounded."""
        return str(self.dtype)

    def bits_per_element(self) -> int | None:
        """Return the bits of a code of a quantized weight, None for other leaves."""
        return None

    def trained_parts(self, path: str) -> dict[str, str]:
        """Return part -> parameter name of the trained parts of this leaf at `path`."""
        return {}

    def with_dropout(self, key: tuple[int, ...], first_row: int) -> Leaf:
        """Return the leaf for one pass over the rows of a batch from first_row on, with random numbers
        (dropout) determined by `key`."""
        return self

    def delta(self) -> Array | None:
        """Return the array that an adapter adds to `base_weight`, or None for a leaf without an adapter."""
        return None

    def base_weight(self) -> Any:
        """Return the weight without its adapter and without the wrapper that freezes it."""
        return self

    def writable(self) -> Any:
        """Return the weight to train: itself if only parts or nothing of it is trained, else an array."""
        return np.array(self.array())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        """Convert to an array for NumPy's functions."""
        return np.array(self.array(), dtype=dtype, copy=copy)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        """Elementwise arithmetic, e.g. with a norm's weight or a bias; a leaf is never written to."""
        if any(isinstance(each, Leaf) for each in options.get("out", ())):
            return NotImplemented
        arrays = [each.array() if isinstance(each, Leaf) else each for each in inputs]
        if not all(each.repeatable for each in inputs if isinstance(each, Leaf)):
            not_repeatable((*arrays, *options.get("out", ())))
        return getattr(ufunc, method)(*arrays, **options)

    __hash__ = object.__hash__  # type: ignore[assignment]


class _Part(Leaf):
    """leaf[index] as an operand of an equation; it is not trained."""

    trained = False

    def __init__(self, whole: Leaf, index: Any) -> None:
        self._whole, self.index = whole, index
        self.shape, self.dtype = ShapeArray(whole.shape)[index].shape, whole.dtype
        self.repeatable = whole.repeatable

    @property
    def whole(self) -> Leaf:
        return self._whole

    def array(self) -> Array:
        return self._whole.array()[self.index]


class Gradients:
    """The gradient of a leaf whose parts are trained: part -> array."""

    __slots__ = ("parts",)

    def __init__(self, **parts: Array) -> None:
        self.parts: dict[str, Array] = parts


# Globals of the fast path of einsum, to save attribute lookups.
_ndarray, _cached_plans = np.ndarray, plans.cached


def einsum(equation: Any, *operands: Any, **keywords: Unpack[calls.Keywords]) -> Array:
    """Evaluate the contraction `equation` with the semantics of `np.einsum`, as BLAS products if possible.

    operands: arrays, numbers, lists or leaves (see `Leaf`). A letter has the same size in all operands, and
    size 1 does not broadcast; axes of `...` do. Three or more operands are contracted pairwise along a path
    found by opt_einsum. Sublists, einsum(a, [0, 1], b, [1, 2]), can replace the equation.
    order, out, dtype, casting, optimize: as in np.einsum; with the default order "K" the engine chooses the
    memory layout of the result.
    The section "Where einsum and np.einsum differ" of docs/concepts/notation.md lists them.
    Raises EquationError, which names the equation, the operand, the letter and both sizes.
    """
    if len(operands) == 2 and not keywords and not recorder.active_for_events:
        a, b = operands
        if type(a) is _ndarray and type(b) is _ndarray:
            try:
                plan = _cached_plans.get(
                    (equation, a.shape, b.shape, a.strides, b.strides, a.dtype.num, b.dtype.num)
                )
            except TypeError:  # sublists: `equation` is an operand
                plan = None
            if plan is not None:
                return plan.run(a, b)
    return _with_keywords(equation, operands, keywords) if keywords else _einsum(equation, operands)


def product(equation: str, operands: tuple[Any, ...], order: str = "K") -> Array:
    """Return `einsum(equation, *operands)`; order: "K" lets the engine choose the memory layout of a matrix
    product, "C" puts operand 1's letters innermost, "F" operand 0's."""
    return einsum(equation, *operands) if order == "K" else _einsum(equation, operands, order)


def is_trained(weight: Any) -> bool:
    """Return whether a weight has a gradient: False for a frozen leaf and for None (absent)."""
    return weight is not None and not (isinstance(weight, Leaf) and not weight.trained)


def weight_grad(weight: Any, equation: str, *operands: Any) -> Any:
    """Return the gradient of a weight, `einsum(equation, *operands)`, in the memory layout of the weight.

    Where `...` broadcasts the weight, its gradient is also summed over those axes. A leaf returns the
    gradient of its own kind. For a weight that is not trained (see `is_trained`) the result is None and the
    operands are not used.
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
    """weight_grad of an equation with `...`, rewritten with letters to sum over axes the weight lacks."""
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


def take_rows(weight: Array | Leaf, indices: Array) -> Array:
    """Return the rows of a matrix (v, d) at `indices` (b, t) -> (b, t, d), in a projection's memory layout.

    Unless they are few, positions are innermost in memory, so that elementwise operations run over long
    contiguous lines.
    """
    few = indices.size <= FEW_ROWS
    if isinstance(weight, Leaf):
        rows = weight.rows(indices)
    elif isinstance(weight, Array) and weight.strides[0] == weight.itemsize:
        if few:
            return np.ascontiguousarray(weight[indices])  # np.take would copy the whole matrix
        return np.moveaxis(np.take(weight.T, indices, axis=1), 0, -1)
    else:
        rows = np.take(weight, indices, axis=0)
    if few or not isinstance(rows, Array):
        return rows
    transposed = np.ascontiguousarray(rows.reshape(-1, rows.shape[-1]).T)
    return transposed.T.reshape(rows.shape)


def add_rows(weight: Any, indices: Array, dy: Array, into: Any = None) -> Any:
    """Return the gradient of a matrix (v, d), the transpose of `take_rows`: row i is the sum of dy (b, t, d)
    where indices == i.

    into: the gradient of another use of the matrix, to which this one is added; it is returned.
    """
    if isinstance(weight, Leaf):
        found = weight.add_rows(indices, dy)
        if found is None or into is None:
            return found
        return np.add(into, found, out=into)
    total = np.zeros_like(dy, order="C", shape=weight.shape) if into is None else into
    if isinstance(dy, Array):
        np.add.at(total, indices.ravel(), np.ascontiguousarray(dy).reshape(indices.size, -1))
    return total


def lowering(equation: str, *operands: Any) -> str:
    """Describe how `einsum` runs this call: its matrix product and the operands it copies."""
    if len(operands) > 2:
        raise EquationError(f"einsum {equation}: three or more operands run as several products, not one")
    arrays: list[Any] = [
        operand if isinstance(operand, Array) else np.empty(operand.shape, operand.dtype)
        for operand in operands
    ]
    return plans.plan_of(equation, Equation.parse(equation), arrays, "K").description()


def _with_keywords(equation: Any, operands: tuple[Any, ...], keywords: calls.Keywords) -> Any:
    """einsum with np.einsum's keywords; only the order affects the plan."""
    order, out, dtype, casting, path = calls.checked(keywords)
    if not isinstance(equation, str):
        equation, operands = calls.from_sublists((equation, *operands))
    if path is not None:
        calls.check_path(path, len(operands))
    if out is not None or dtype is not None or casting in ("no", "equiv"):
        if any(isinstance(operand, Leaf) for operand in operands):
            raise EquationError(f"einsum {equation}: out=, dtype= and casting= are not supported with a leaf")
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
            if not operand.repeatable:
                not_repeatable(operands)
            with recorder.using(operand.whole):
                return operand.contract(equation, operands, position, layout)
    arrays = [
        operand if isinstance(operand, ShapeArray | Traced) else np.asarray(operand) for operand in operands
    ]
    if len(arrays) > 2:
        return _chain(Equation.parse(equation), arrays, layout, path)
    return _run(equation, Equation.parse(equation), arrays, layout)


def _run(text: str, equation: Equation, arrays: list[Any], order: str) -> Any:
    """Run the operands through their plan; report an event if a recorder reads events."""
    if any(isinstance(a, ShapeArray) for a in arrays):
        return _dry(text, equation, arrays)
    plan = plans.plan_of(text, equation, arrays, order)
    if not recorder.reads_events():
        return plan.run(*arrays)
    start = time.perf_counter()
    result = plan.run(*arrays)
    report(text, equation, arrays, result, plan.description(), start, time.perf_counter() - start)
    return result


def _chain(equation: Equation, arrays: list[Any], order: str, path: Sequence[tuple[int, ...]] | None) -> Any:
    """Contract three or more operands pairwise in their common type."""
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
    from opt_einsum import contract_path  # pyright: ignore[reportMissingTypeStubs]

    return contract_path(equation, *shapes, shapes=True, optimize="auto")[0]


def _pairwise(terms: list[str], arrays: list[Any], output: str, order: str) -> Any:
    if len(terms) > 2:
        needed = "".join(terms[2:]) + output
        term = "".join(c for c in dict.fromkeys("".join(terms[:2])) if c in needed)
        first = _pairwise(terms[:2], arrays[:2], term, order)
        return _pairwise([term, *terms[2:]], [first, *arrays[2:]], output, order)
    equation = Equation(tuple(terms), output)
    return _run(str(equation), equation, arrays, order)


def _dry(text: str, equation: Equation, operands: Sequence[Any]) -> Any:
    """Dry run: return the shape of the result and report the cost of the call as an event."""
    spelled, indices = equation.spell([operand.shape for operand in operands])
    if indices is not None:
        operands = [operand[index] for operand, index in zip(operands, indices)]
    sizes = spelled.sizes([operand.shape for operand in operands])
    dtype = calls.common_type(equation.shown, [operand.dtype for operand in operands])
    result = ShapeArray(spelled.output_shape(sizes), dtype)
    if recorder.reads_events():
        how = plans.readable(plans.dry_lowering(spelled, operands), spelled, equation)
        recorder.event(text, sizes, operands, result, how, time.perf_counter(), 0.0, spelled.flops(sizes))
    return result


def report(
    text: str,
    equation: Equation,
    operands: Sequence[Any],
    result: Array,
    how: str,
    start: float,
    seconds: float,
    part: tuple[float, float] = (0.0, 1.0),
) -> None:
    """Report a call of einsum to the readers of events; start: of time.perf_counter; part: as in
    `recorder.event`."""
    # Without `...`, `spell` would only check the sizes, as `sizes` does below.
    spelled, indices = equation, None
    if "..." in "".join(equation.inputs) + equation.output:
        spelled, indices = equation.spell([operand.shape for operand in operands])
    if indices is not None:
        operands = [operand[index] for operand, index in zip(operands, indices)]
    sizes = spelled.sizes([operand.shape for operand in operands])
    recorder.event(text, sizes, operands, result, how, start, seconds, spelled.flops(sizes), part)
