"""Products of matrices of 8-bit integers and of bfloat16 by numkong, which has SIMD instructions for them.

y[n, m] = sum over k of a[n, k] * b[m, k]; int8 x int8 -> int32 is exact, bfloat16 x bfloat16 -> float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np

from einsum_transformer.engine import blas
from einsum_transformer.engine.parallel import for_each
from einsum_transformer.notes import note_once

Array = np.ndarray

LONGEST = 1 << 17
"""Largest k: the sum of more products of 127 and 128 could exceed int32."""
_COARSE = 1 << 26
"""Multiplications of a task that is divided over Python threads; fewer use the threads of numkong, which
start faster but leave the passes over the result to one thread."""
_READ = 1 << 22
"""Elements of a matrix from which its product with a vector is divided over Python threads."""
_PIECE = 1 << 16
"""Elements of a result that are computed and scaled at once, so that they stay in the CPU cache."""


def available() -> bool:
    """Return whether integer products are available; a note says why if they are not."""
    return _library() is not None


@cache
def _library() -> Any:
    """Return numkong, or None."""
    try:
        import numkong
    except ImportError as error:
        return _without(f"numkong cannot be imported: {error}")
    try:
        right = _is_exact(numkong)
    except Exception as error:
        return _without(f"this version of numkong is not supported: {error}")
    return numkong if right else _without("products of numkong are wrong on this machine")


def _without(why: str) -> None:
    note_once(f"{why}; quantized weights are multiplied as floats, which is slower")


def _is_exact(numkong: Any) -> bool:
    """Test products with the largest codes: instructions that saturate give other results."""
    rng = np.random.default_rng(0)
    a = rng.choice(np.array([-128, -127, -1, 0, 1, 127], np.int8), (70, 259))
    a[0], a[1] = 127, -128
    for m in (1, 2, 17):
        b = np.ascontiguousarray(a[:m])
        expected = a.astype(np.int64) @ b.T.astype(np.int64)
        if not np.array_equal(_dots(numkong, b)(a, 2), expected):
            return False
    return True


@cache
def bfloat16_available() -> bool:
    """Return whether products of bfloat16 are available and accurate."""
    if _library() is None:
        return False
    a = np.random.default_rng(0).standard_normal((70, 259)).astype(ml_dtypes.bfloat16)
    expected = a.astype(np.float64) @ a[:3].T.astype(np.float64)
    try:
        return bool(np.abs(bfloat16_dots(a, a[:3], 2) - expected).max() < 1e-4)
    except Exception:
        return False


def bfloat16_dots(a: Array, b: Array, threads: int = 1) -> Array:
    """Return a . b^T, (n, m) of float32; a (n, k), b (m, k): ml_dtypes.bfloat16 with contiguous rows."""
    numkong = _library()
    return np.asarray(numkong.dots_packed(a, numkong.dots_pack(b), threads=threads))


def dots(a: Array, b: Array, threads: int = 1) -> Array:
    """Return the integers a . b^T, (n, m), as int32, or as float64 if m is 1.

    a: int8 (n, k), b: int8 (m, k), with contiguous rows; k is at most `LONGEST`.
    """
    return _dots(_library(), b)(a, threads)


def _dots(numkong: Any, b: Array) -> Callable[[Array, int], Array]:
    """The product with the rows b as a function of (a, threads)."""
    if len(b) == 1:

        def product(a: Array, threads: int) -> Array:
            out = np.empty(len(a))
            numkong.dot(a, b, out=out)  # int32 inside
            return out[:, None]

        return product
    packed = numkong.dots_pack(b)
    return lambda a, threads: np.asarray(numkong.dots_packed(a, packed, threads=threads))


def scaled_dots(
    codes: Array,
    scales: Array,
    zeros: Array | None,
    x: Array,
    x_scales: Array,
    base: int,
    out: Array | None = None,
) -> Array:
    """Return the product of a quantized matrix with quantized rows, y[n, m] = sum_k w[n, k] * v[m, k].

    w = (codes - zeros) * scales; codes: int8 (n, k), scales: (n, 1) or (1, 1), zeros: the same, or None.
    v = sum_i x[i] * base**i * x_scales; x: int8 digits (i, m, k), x_scales: (m,). The sums over k are exact;
    the result has the type of x_scales. out: the array for it.
    """
    n, (count, m, k) = len(codes), x.shape
    if count * m == 1 and n * k < _READ and zeros is None:
        # A decode step has a hundred of these products, of which each call takes a percent. The sums are
        # rounded to the type of the result before they are scaled, as those of several rows are.
        y = np.empty((n, 1), x_scales.dtype) if out is None else out
        _library().dot(codes, x[0], out=y[:, 0])
        y *= x_scales
        y *= scales
        return y
    columns = x.reshape(count * m, k)
    y = np.empty((n, m), x_scales.dtype) if out is None else out
    totals = None if zeros is None else columns.sum(axis=1, dtype=np.float64)
    product = _dots(_library(), columns)

    def run(start: int, stop: int, threads: int = 1) -> None:
        rows = slice(start, stop)
        found = product(codes[rows], threads)
        if zeros is not None and totals is not None:
            found = found - (zeros[rows] if len(zeros) > 1 else zeros) * totals
        if count > 1:
            # Digits, the lowest first, as in Horner's method.
            total = found[:, (count - 1) * m :].astype(np.float64)
            for i in reversed(range(count - 1)):
                total *= base
                total += found[:, i * m : (i + 1) * m]
            found = total
        part = y[rows]
        np.multiply(found, x_scales, out=part, dtype=part.dtype, casting="same_kind")
        part *= scales[rows] if len(scales) > 1 else scales

    if n * k * len(columns) >= (_READ if len(columns) == 1 else _COARSE):
        step = max(1, min(_PIECE // len(columns), -(-n // blas.free_threads())))
        for_each(run, [(start, min(start + step, n)) for start in range(0, n, step)])
    else:
        run(0, n, blas.free_threads())
    return y
