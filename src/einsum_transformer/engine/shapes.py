"""ShapeArray: an array with a shape and a type but no data, for dry runs of the same program."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin


class ShapeArray(NDArrayOperatorsMixin):
    """An ndarray without data: NumPy functions return a ShapeArray with the shape and type of their result.

    It wraps a single element broadcast to the shape (strides of zero), so views are free and no memory is
    allocated.
    """

    __slots__ = ("dummy",)

    def __init__(self, shape: tuple[int, ...], dtype: Any = np.float32) -> None:
        self.dummy: np.ndarray = np.broadcast_to(np.zeros((), dtype), shape)

    def _view(self, dummy: np.ndarray) -> ShapeArray:
        """Return a view of this array, which has the same address."""
        view = ShapeArray.__new__(ShapeArray)
        view.dummy = dummy
        return view

    def __reduce__(self) -> Any:
        # Pickling the broadcast dummy would write all its elements.
        return ShapeArray, (self.shape, self.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.dummy.shape

    @property
    def dtype(self) -> np.dtype:
        return self.dummy.dtype

    @property
    def ndim(self) -> int:
        return self.dummy.ndim

    @property
    def size(self) -> int:
        return self.dummy.size

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def T(self) -> ShapeArray:
        return self._view(self.dummy.T)

    def __repr__(self) -> str:
        return f"ShapeArray({self.shape}, {self.dtype})"

    def __len__(self) -> int:
        return len(self.dummy)

    def __bool__(self) -> bool:
        """Return True, so that checks of values pass in a dry run."""
        if self.size != 1:
            raise ValueError(f"the truth value of an array of shape {self.shape} is ambiguous")
        return True

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        # Without this, np.asarray would iterate over all elements, for hours.
        raise TypeError(f"an array of shape {self.shape} in a dry run has no data")

    def __getitem__(self, index: Any) -> ShapeArray:
        part = self.dummy[index]
        # Advanced indexing returns a copy.
        shares = isinstance(part, np.ndarray) and np.may_share_memory(part, self.dummy)
        return self._view(part) if shares else ShapeArray(np.shape(part), self.dtype)

    def __setitem__(self, index: Any, value: Any) -> None:
        np.broadcast_shapes(self.dummy[index].shape, np.shape(value))

    def reshape(self, *shape: Any) -> ShapeArray:
        given = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        known = math.prod(n for n in given if n != -1)
        full = tuple(self.size // known if n == -1 else n for n in given)
        if math.prod(full) != self.size:
            raise ValueError(f"cannot reshape {self.shape} into {full}")
        return self._view(
            np.lib.stride_tricks.as_strided(self.dummy, full, (0,) * len(full), writeable=False)
        )

    def transpose(self, *axes: Any) -> ShapeArray:
        return self._view(self.dummy.transpose(*axes))

    def swapaxes(self, first: int, second: int) -> ShapeArray:
        return self._view(self.dummy.swapaxes(first, second))

    def astype(self, dtype: Any, copy: bool = True) -> ShapeArray:
        return ShapeArray(self.shape, dtype)

    def copy(self) -> ShapeArray:
        return self

    def sum(self, axis: Any = None, keepdims: bool = False) -> ShapeArray:
        return ShapeArray(_reduced(self.shape, axis, keepdims), self.dtype)

    mean = sum
    max = sum
    min = sum

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        if options.get("out"):
            return options["out"][0]
        if method == "reduce":
            shape = _reduced(np.shape(inputs[0]), options.get("axis", 0), options.get("keepdims", False))
            return ShapeArray(shape, inputs[0].dtype)
        if method != "__call__" or ufunc.signature is not None or not all(map(_is_operand, inputs)):
            return NotImplemented
        shape = np.broadcast_shapes(*(np.shape(value) for value in inputs))
        types = [
            value.dtype if isinstance(value, (ShapeArray, np.ndarray, np.generic)) else type(value)
            for value in inputs
        ]
        dtype = ufunc.resolve_dtypes((*types, *[None] * ufunc.nout))[-1]
        return ShapeArray(shape, dtype)

    def __array_function__(self, function: Any, types: Any, arguments: Any, options: Any) -> Any:
        if function not in _FUNCTIONS:
            return NotImplemented
        return _FUNCTIONS[function](*arguments, **options)


def _is_operand(value: Any) -> bool:
    """Return whether a value is an array or a number, not a leaf, which has its own __array_ufunc__."""
    return isinstance(value, (ShapeArray, np.ndarray, np.generic, int, float, complex))


def _reduced(shape: tuple[int, ...], axis: Any, keepdims: bool) -> tuple[int, ...]:
    axes = range(len(shape)) if axis is None else (axis,) if isinstance(axis, int) else axis
    reduced = {np.lib.array_utils.normalize_axis_index(a, len(shape)) for a in axes}
    if keepdims:
        return tuple(1 if i in reduced else n for i, n in enumerate(shape))
    return tuple(n for i, n in enumerate(shape) if i not in reduced)


def _like(a: ShapeArray, dtype: Any = None, order: str = "K", shape: Any = None) -> ShapeArray:
    return ShapeArray(a.shape if shape is None else shape, a.dtype if dtype is None else dtype)


def _concatenate(arrays: Any, axis: int = 0) -> ShapeArray:
    axis = np.lib.array_utils.normalize_axis_index(axis, len(arrays[0].shape))
    others = {(*a.shape[:axis], *a.shape[axis + 1 :]) for a in arrays}
    if len(others) > 1:
        raise ValueError(f"cannot concatenate {[a.shape for a in arrays]} along axis {axis}")
    shape = list(arrays[0].shape)
    shape[axis] = sum(a.shape[axis] for a in arrays)
    return ShapeArray(tuple(shape), arrays[0].dtype)


def _kind(value: Any) -> Any:
    """Return the argument for np.result_type: an array's dtype, or a number itself."""
    return value.dtype if isinstance(value, (ShapeArray, np.ndarray)) else value


def _take(a: ShapeArray, indices: Any, axis: int | None = None) -> ShapeArray:
    axis = 0 if axis is None else axis % a.ndim
    return ShapeArray((*a.shape[:axis], *np.shape(indices), *a.shape[axis + 1 :]), a.dtype)


def _balanced_indices(scores: ShapeArray, kth: int, axis: int = -1) -> np.ndarray:
    """Return the indices of top scores without data, each chosen equally often: a dry run has the cost of a
    run whose router balances the experts."""
    n = scores.shape[-1]
    rows = math.prod(scores.shape[:-1])
    return ((np.arange(rows)[:, None] * (kth + 1) + np.arange(n)) % n).reshape(scores.shape)


_FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    np.empty_like: _like,
    np.zeros_like: _like,
    np.concatenate: _concatenate,
    np.copyto: lambda target, source: target.__setitem__(..., source),
    np.take: _take,
    np.copy: lambda a, order="K": a,
    np.clip: lambda a, low, high, out=None: a,
    np.where: lambda condition, x, y: ShapeArray(
        np.broadcast_shapes(np.shape(condition), np.shape(x), np.shape(y)), np.result_type(_kind(x), _kind(y))
    ),
    np.argpartition: _balanced_indices,
    np.take_along_axis: lambda a, indices, axis: ShapeArray(np.shape(indices), a.dtype),
    np.put_along_axis: lambda a, indices, values, axis: None,
    np.moveaxis: lambda a, source, to: ShapeArray(np.moveaxis(a.dummy, source, to).shape, a.dtype),
    np.shape: lambda a: a.shape,
    np.ndim: lambda a: a.ndim,
    np.broadcast_to: lambda a, shape: ShapeArray(np.broadcast_to(a.dummy, shape).shape, a.dtype),
}
