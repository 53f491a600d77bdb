"""Intel MKL from the PyPI wheel `mkl`, called through ctypes, which releases the GIL."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from einsum_transformer.engine.libraries import Library

Array = np.ndarray

_ROW_MAJOR, _NO_TRANSPOSE, _TRANSPOSE = 101, 111, 112
_SMALL = 1 << 14
"""Products of fewer multiplications are computed by NumPy: a call through ctypes takes longer."""
_IDLE_MS = 2
"""Milliseconds for which MKL's threads wait for work in a busy loop. The default, 200, takes the cores from
what runs next; 0 makes the products of a decode step, which are 0.1 ms apart, three times slower."""


@cache
def mkl_library() -> Library | None:
    """Return MKL, or None if the wheel is not installed or cannot be loaded (see `mkl_problem`)."""
    symbols, _ = _symbols()
    if symbols is None:
        return None

    def set_threads(count: int) -> None:
        # A thread-local limit (threadpoolctl leaves one behind) would take precedence over the global one.
        symbols.MKL_Set_Num_Threads_Local(0)
        symbols.MKL_Set_Num_Threads(count)

    return Library(
        "mkl",
        installed_version() or "",
        _matmul(symbols),
        set_threads,
        lambda: int(symbols.MKL_Get_Max_Threads()),
    )


def mkl_problem() -> str:
    """Return why MKL is not available; empty if it is."""
    return _symbols()[1]


@cache
def _symbols() -> tuple[Any, str]:
    """Return (the loaded library or None, the reason for None)."""
    files = _files() if installed_version() else []
    found = [Path(str(file.locate())).resolve() for file in files if "mkl_rt" in file.name]
    if not found:
        return None, "the package is not installed; pip install 'einsum-transformer[mkl]'"
    try:
        for name in ("libiomp5.so", "libiomp5.dylib", "libiomp5md.dll"):
            if (path := found[0].parent / name).exists():
                runtime = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
                with suppress(AttributeError):  # an OpenMP runtime without this function
                    runtime.kmp_set_blocktime(_IDLE_MS)
        return ctypes.CDLL(str(found[0]), mode=ctypes.RTLD_GLOBAL), ""
    except OSError as error:
        return None, f"{found[0].name} cannot be loaded: {error}"


def installed_version() -> str | None:
    """Return the version of the wheel, or None, without loading the library or importing importlib.metadata
    (20 ms)."""
    for entry in sys.path:
        for folder in Path(entry or ".").glob("mkl-*.dist-info"):
            return folder.name.removeprefix("mkl-").removesuffix(".dist-info")
    return None


def _files() -> Sequence[Any]:
    import importlib.metadata

    return importlib.metadata.files("mkl") or []


class _Routines:
    """The BLAS routines of one type."""

    def __init__(self, symbols: Any, letter: str, real: Any) -> None:
        pointer, integer = ctypes.c_void_p, ctypes.c_int
        matrix, vector = [pointer, integer], [pointer, integer]
        self.gemm = getattr(symbols, f"cblas_{letter}gemm")
        self.gemm.argtypes = [integer] * 6 + [real, *matrix, *matrix, real, *matrix]
        self.gemv = getattr(symbols, f"cblas_{letter}gemv")
        self.gemv.argtypes = [integer] * 4 + [real, *matrix, *vector, real, *vector]
        # Strides between the matrices of a stack follow each leading dimension, and the size ends the call.
        stack = [*matrix, integer]
        self.gemm_batch = getattr(symbols, f"cblas_{letter}gemm_batch_strided")
        self.gemm_batch.argtypes = [integer] * 6 + [real, *stack, *stack, real, *stack, integer]
        self.gemm.restype = self.gemv.restype = self.gemm_batch.restype = None


def _matmul(symbols: Any) -> Callable[..., Array]:
    routines = {
        np.dtype(kind).str: _Routines(symbols, letter, real)
        for kind, letter, real in ((np.float32, "s", ctypes.c_float), (np.float64, "d", ctypes.c_double))
    }

    def product(a: Array, b: Array, out: Array | None = None) -> Array:
        """a . b by MKL for float matrices and stacks of them, by NumPy for other types and small sizes.

        out: the array for the result, in C order.
        """
        known = routines.get(a.dtype.str)
        if known is None or a.dtype != b.dtype or a.ndim < 2 or b.ndim < 2 or 0 in a.shape or 0 in b.shape:
            return np.matmul(a, b, out=out)
        if a.shape[-2] * a.shape[-1] * b.shape[-1] < _SMALL or a.shape[-1] != b.shape[-2]:
            return np.matmul(a, b, out=out)
        if a.ndim == b.ndim == 2:
            out = np.empty((a.shape[0], b.shape[1]), a.dtype) if out is None else out
            if b.shape[1] == 1:
                _gemv_into(known.gemv, a, b[:, 0], out)
            elif a.shape[0] == 1:
                _gemv_into(known.gemv, b.T, a[0], out)
            else:
                _gemm_into(known.gemm, a, b, out)
            return out
        stack = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        out = np.empty((*stack, a.shape[-2], b.shape[-1]), a.dtype) if out is None else out
        _stack_into(known, _broadcast(a, stack), _broadcast(b, stack), out)
        return out

    return product


def _broadcast(a: Array, stack: tuple[int, ...]) -> Array:
    return a if a.shape[:-2] == stack else np.broadcast_to(a, (*stack, *a.shape[-2:]))


def _gemv_into(gemv: Any, a: Array, x: Array, out: Array) -> None:
    transposed, a, lda = _layout(a)
    rows, columns = a.shape if transposed == _NO_TRANSPOSE else a.shape[::-1]
    item = x.itemsize
    if x.strides[0] <= 0 or x.strides[0] % item:
        x = np.ascontiguousarray(x)
    gemv(
        _ROW_MAJOR, transposed, rows, columns,
        1.0, _address(a), lda, _address(x), x.strides[0] // item, 0.0, _address(out), 1,
    )  # fmt: skip


def _gemm_into(gemm: Any, a: Array, b: Array, out: Array) -> None:
    transposed_a, a, lda = _layout(a)
    transposed_b, b, ldb = _layout(b)
    (m, k), n = a.shape, b.shape[1]
    gemm(
        _ROW_MAJOR, transposed_a, transposed_b, m, n, k,
        1.0, _address(a), lda, _address(b), ldb, 0.0, _address(out), n,
    )  # fmt: skip


def _stack_into(routines: _Routines, a: Array, b: Array, out: Array) -> None:
    """Loop over all stacked axes but the last, whose products are one call if the distance between the
    matrices is a multiple of the size of an element, else one call each."""
    if out.ndim > 3:
        for i in range(len(out)):
            _stack_into(routines, a[i], b[i], out[i])
        return
    transposed_a, first_a, lda = _layout(a[0])
    transposed_b, first_b, ldb = _layout(b[0])
    item = a.itemsize
    steps = a.strides[0], b.strides[0]
    copied = first_a.base is None or first_b.base is None
    # The steps are 32-bit integers.
    bad = any(step < 0 or step % item or step // item >= 1 << 31 for step in steps)
    if copied or bad:
        for i in range(len(out)):
            _gemm_into(routines.gemm, a[i], b[i], out[i])
        return
    count, m, n = out.shape
    routines.gemm_batch(
        _ROW_MAJOR, transposed_a, transposed_b, m, n, a.shape[2],
        1.0, _address(a), lda, steps[0] // item, _address(b), ldb, steps[1] // item,
        0.0, _address(out), n, m * n, count,
    )  # fmt: skip


def _layout(a: Array) -> tuple[int, Array, int]:
    """Return (transposed?, matrix, leading dimension); copy only if neither axis has unit stride."""
    rows, columns = a.shape
    down, across = a.strides
    item = a.itemsize
    if (across == item or columns == 1) and (rows == 1 or (down >= columns * item and down % item == 0)):
        return _NO_TRANSPOSE, a, down // item if rows > 1 else max(columns, 1)
    if (down == item or rows == 1) and (columns == 1 or (across >= rows * item and across % item == 0)):
        return _TRANSPOSE, a, across // item if columns > 1 else max(rows, 1)
    return _NO_TRANSPOSE, np.ascontiguousarray(a), columns


def _address(a: Array) -> int:
    return a.__array_interface__["data"][0]
