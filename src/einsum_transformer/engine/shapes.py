"""ShapeArray: an array with a shape and a type but no data, for dry runs of the same program."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin


class Observer:
    """A context manager that observes the arrays of dry runs: their memory, and elementwise operations.

    An array's memory is counted until its last view is deleted, as in a real run. on_pass: called with the
    name of a NumPy function, the elements that it reads or writes (the larger number), and the type of its
    result, for each elementwise operation, reduction and copy; not for einsums. Only one observer can be
    active, and dry runs must be on one thread.
    """

    def __init__(self, on_pass: Callable[[str, int, np.dtype], object] | None = None) -> None:
        self.on_pass = on_pass
        self.live: int = 0
        """Bytes of the arrays that exist now."""
        self._peak = 0

    def __enter__(self) -> Observer:
        global _observer
        if _observer is not None:
            raise RuntimeError("another Observer of dry runs is active")
        _observer = self
        return self

    def __exit__(self, *_: object) -> None:
        global _observer
        _observer = None

    def peak(self) -> int:
        """Return the largest `live` since the last call."""
        found, self._peak = self._peak, self.live
        return found

    def allocated(self, owner: np.ndarray, nbytes: int) -> None:
        """Count an array until `owner`, which its views refer to, is deleted."""
        self.live += nbytes
        self._peak = max(self._peak, self.live)
        weakref.finalize(owner, self._freed, nbytes)

    def _freed(self, nbytes: int) -> None:
        self.live -= nbytes


_observer: Observer | None = None


def _count(name: str, elements: int, dtype: np.dtype) -> None:
    """Report an operation on elements to the observer."""
    if _observer is not None and _observer.on_pass is not None:
        _observer.on_pass(name, elements, dtype)


class ShapeArray(NDArrayOperatorsMixin):
    """An ndarray without data: NumPy functions return a ShapeArray with the shape and type of their result.

    It wraps a single element broadcast to the shape (strides of zero), so views are free and no memory is
    allocated.
    """

    __slots__ = ("dummy",)

    def __init__(self, shape: tuple[int, ...], dtype: Any = np.float32) -> None:
        owner = np.zeros((), dtype)
        self.dummy: np.ndarray = np.broadcast_to(owner, shape)
        if _observer is not None:
            _observer.allocated(owner, self.nbytes)

    @classmethod
    def unallocated(cls, shape: tuple[int, ...], dtype: Any = np.float32) -> ShapeArray:
        """Return an array that a real run never has as a whole, so that no `Observer` counts its memory."""
        found = cls.__new__(cls)
        found.dummy = np.broadcast_to(np.zeros((), dtype), shape)
        return found

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

    def __float__(self) -> float:
        """Return 0, so that the value of a loss can be taken in a dry run."""
        return 0.0 * bool(self)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        # Without this, np.asarray would iterate over all elements, for hours.
        raise TypeError(f"an array of shape {self.shape} in a dry run has no data")

    def __getitem__(self, index: Any) -> ShapeArray:
        part = self.dummy[index]
        if isinstance(part, np.ndarray) and np.may_share_memory(part, self.dummy):
            return self._view(part)
        # Advanced indexing returns a copy.
        _count("copy", part.size, self.dtype)
        return ShapeArray(np.shape(part), self.dtype)

    def __setitem__(self, index: Any, value: Any) -> None:
        target = self.dummy[index]
        np.broadcast_shapes(target.shape, np.shape(value))
        _count("copy", target.size, self.dtype)

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
        _count("copy", self.size, np.dtype(dtype))
        return ShapeArray(self.shape, dtype)

    def copy(self) -> ShapeArray:
        return _copy(self)

    def sum(self, axis: Any = None, keepdims: bool = False) -> ShapeArray:
        _count("add.reduce", self.size, self.dtype)
        return ShapeArray(_reduced(self.shape, axis, keepdims), self.dtype)

    mean = sum
    max = sum
    min = sum

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        name = ufunc.__name__ if method == "__call__" else f"{ufunc.__name__}.{method}"
        if options.get("out"):
            out = options["out"][0]
            if _observer is not None:
                sizes = (int(np.prod(np.shape(value))) for value in (out, *inputs))
                _count(name, max(sizes), out.dtype)
            return out
        if method == "reduce":
            _count(name, inputs[0].size, inputs[0].dtype)
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
        _count(name, math.prod(shape), dtype)
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
    _count("copy", math.prod(shape), arrays[0].dtype)
    return ShapeArray(tuple(shape), arrays[0].dtype)


def _copy(a: ShapeArray, order: str = "K") -> ShapeArray:
    _count("copy", a.size, a.dtype)
    return ShapeArray(a.shape, a.dtype)


def _where(condition: Any, x: Any, y: Any) -> ShapeArray:
    shape = np.broadcast_shapes(np.shape(condition), np.shape(x), np.shape(y))
    _count("where", math.prod(shape), np.result_type(_kind(x), _kind(y)))
    return ShapeArray(shape, np.result_type(_kind(x), _kind(y)))


def _clip(a: ShapeArray, low: Any, high: Any, out: Any = None) -> ShapeArray:
    _count("clip", a.size, a.dtype)
    return a if out is None else out


def _kind(value: Any) -> Any:
    """Return the argument for np.result_type: an array's dtype, or a number itself."""
    return value.dtype if isinstance(value, (ShapeArray, np.ndarray)) else value


def _take(a: ShapeArray, indices: Any, axis: int | None = None) -> ShapeArray:
    axis = 0 if axis is None else axis % a.ndim
    _count("copy", a.size // a.shape[axis] * np.size(indices), a.dtype)
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
    np.sum: lambda a, axis=None, dtype=None, keepdims=False, where=True: a.sum(axis, keepdims),
    np.copy: _copy,
    np.clip: _clip,
    np.where: _where,
    np.argpartition: _balanced_indices,
    np.take_along_axis: lambda a, indices, axis: ShapeArray(np.shape(indices), a.dtype),
    np.put_along_axis: lambda a, indices, values, axis: None,
    np.moveaxis: lambda a, source, to: a._view(np.moveaxis(a.dummy, source, to)),
    np.shape: lambda a: a.shape,
    np.ndim: lambda a: a.ndim,
    np.broadcast_to: lambda a, shape: a._view(np.broadcast_to(a.dummy, shape)),
}
