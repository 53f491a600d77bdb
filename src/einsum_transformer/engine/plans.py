"""The cache of plans: one per equation and shapes, strides and types of the operands."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from einsum_transformer.engine import calls
from einsum_transformer.engine.equation import Equation, OperandTypeError
from einsum_transformer.engine.lowering import Operand, Plan, lower_pair, lower_single

Array = np.ndarray

cached: dict[tuple[Any, ...], Plan] = {}
"""Equation, shapes, strides and types -> plan."""
_MAX_CACHED = 4096


def plan_of(text: str, equation: Equation, arrays: Sequence[Array], order: str) -> Plan:
    """Return the cached plan for these shapes, strides and types, or create one."""
    if order == "K" and len(arrays) == 2:
        a, b = arrays
        key: tuple[Any, ...] = (text, a.shape, b.shape, a.strides, b.strides, a.dtype.num, b.dtype.num)
    else:
        key = (text, order, *((a.shape, a.strides, a.dtype.num) for a in arrays))
    plan = cached.get(key)
    if plan is None:
        if len(cached) >= _MAX_CACHED:
            cached.clear()
        plan = cached[key] = _lower(equation, arrays, order)
    return plan


def _lower(equation: Equation, arrays: Sequence[Array], order: str) -> Plan:
    shapes = [a.shape for a in arrays]
    spelled, indices = equation.spell(shapes)
    if indices is not None:
        # Axes of size 1 that broadcast are dropped.
        inner = _lower(spelled, [a[index] for a, index in zip(arrays, indices)], order)
        run = lambda *given: inner.run(*(a[index] for a, index in zip(given, indices)))  # noqa: E731
        return Plan(run, readable(inner.how, spelled, equation), inner.product)
    sizes = spelled.sizes(shapes)
    summed = set(sizes) - set(spelled.output)
    dtype = calls.common_type(equation.shown, [a.dtype for a in arrays])
    layouts = [Operand(term, a.shape, a.strides, a.itemsize) for term, a in zip(spelled.inputs, arrays)]
    if len(arrays) == 1 and not summed:
        return lower_single(spelled, layouts[0], dtype)  # a view, of any type
    wide = computed_in(equation, dtype)
    shape = spelled.output_shape(sizes)
    if any(sizes[letter] == 0 for letter in summed):
        # An empty sum, even if the product of the remaining elements would be 0 x inf.
        return Plan(lambda *given: np.zeros(shape, dtype), "zeros")
    if dtype.kind == "O":
        return Plan(lambda *given: _of_objects(str(equation), given, shape), "objects")
    if any(a.dtype != wide for a in arrays) or wide != dtype:
        return _lower_cast(equation, [a.astype(wide, copy=False) for a in arrays], order, dtype, wide)
    if len(layouts) == 1:
        return lower_single(spelled, layouts[0], dtype)
    plan = lower_pair(spelled, layouts[0], layouts[1], dtype, order)
    return Plan(plan.run, readable(plan.how, spelled, equation), plan.product)


def _lower_cast(
    equation: Equation, converted: Sequence[Array], order: str, dtype: np.dtype, wide: np.dtype
) -> Plan:
    """Compute in `wide`, return the result in `dtype`."""
    plan = _lower(equation, converted, order)

    def run(*given: Array) -> Array:
        # astype preserves the layout (order "K"), so the plan for the converted operands fits every call.
        return plan.run(*(a.astype(wide, copy=False) for a in given)).astype(dtype, copy=False)

    return Plan(run, f"{plan.how} in {wide}", plan.product)


def _of_objects(equation: str, arrays: Sequence[Array], shape: tuple[int, ...]) -> Array:
    """Contract Python objects, which BLAS does not support, in NumPy's einsum loop, starting from 0."""
    out = np.empty(shape, object)
    np.einsum(equation, *arrays, out=out)
    return out


def readable(how: str, spelled: Equation, equation: Equation) -> str:
    """Return a plan's description with `...` in place of the letters that replaced it."""
    letters = set(spelled.letters) - set(equation.letters)
    return re.sub(f"[{''.join(letters)}]+", "...", how) if letters else how


def computed_in(equation: Equation, dtype: np.dtype) -> np.dtype:
    """Return the type to compute in: float32 for float16 and ml_dtypes' floats, which are storage types
    (a product in them is 500 times slower)."""
    custom = dtype.kind == "V" and dtype.num >= 256
    if dtype.kind == "f" and dtype.itemsize <= 2:
        return np.dtype(np.float32)
    if custom and np.can_cast(dtype, np.float32) and not np.can_cast(dtype, np.int8):
        return np.dtype(np.float32)
    if dtype.kind in "biufcO":
        return dtype
    raise OperandTypeError(f"einsum {equation.shown}: values of type {dtype} cannot be multiplied and added")


def dry_lowering(equation: Equation, operands: Sequence[Any]) -> str:
    """Return the description of the plan for operands in C order."""
    layouts = []
    for term, operand in zip(equation.inputs, operands):
        strides, step = [], operand.dtype.itemsize
        for size in reversed(operand.shape):
            strides.append(step)
            step *= size
        layouts.append(Operand(term, operand.shape, tuple(reversed(strides)), operand.dtype.itemsize))
    if len(layouts) == 1:
        return lower_single(equation, layouts[0], operands[0].dtype).description()
    if len(layouts) != 2:
        return "path"
    return lower_pair(equation, layouts[0], layouts[1], operands[0].dtype).description()
