"""The calls of MKL's routines, without MKL: NumPy computes the routines from their arguments."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from einsum_transformer.engine import mkl

Array = np.ndarray
ROW_MAJOR, PLAIN, TRANSPOSED = 101, 111, 112


def view(address: int, dtype: Any, rows: int, columns: int, leading: int) -> Array:
    """The matrix at an address, with rows `leading` elements apart."""
    item = np.dtype(dtype).itemsize
    size = ((rows - 1) * leading + columns) * item
    memory = (ctypes.c_char * size).from_address(address)
    return np.ndarray((rows, columns), dtype, memory, 0, (leading * item, item))


class Routines:
    """The routines that are called, and how often."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        for letter, dtype in (("s", np.float32), ("d", np.float64)):
            for name, routine in (
                ("gemm", self.gemm),
                ("gemv", self.gemv),
                ("gemm_batch_strided", self.batch),
            ):
                setattr(self, f"cblas_{letter}{name}", self.routine(name, dtype, routine))

    def routine(self, name: str, dtype: Any, compute: Callable[..., None]) -> Callable[..., None]:
        def call(*given: Any) -> None:
            assert len(given) == len(call.argtypes)  # type: ignore[attr-defined]
            assert all(isinstance(each, int | float) for each in given)
            self.calls.append(name)
            compute(dtype, *given)

        return call

    @staticmethod
    def operand(dtype: Any, transposed: int, address: int, rows: int, columns: int, leading: int) -> Array:
        if transposed == TRANSPOSED:
            return view(address, dtype, columns, rows, leading).T
        assert transposed == PLAIN
        return view(address, dtype, rows, columns, leading)

    def gemm(self, dtype: Any, order: int, ta: int, tb: int, m: int, n: int, k: int, *rest: Any) -> None:
        alpha, a, lda, b, ldb, beta, c, ldc = rest
        assert (order, alpha, beta) == (ROW_MAJOR, 1.0, 0.0)
        left = self.operand(dtype, ta, a, m, k, lda)
        view(c, dtype, m, n, ldc)[...] = left @ self.operand(dtype, tb, b, k, n, ldb)

    def gemv(self, dtype: Any, order: int, ta: int, m: int, n: int, alpha: float, *rest: Any) -> None:
        a, lda, x, step, beta, y, step_y = rest
        assert (order, alpha, beta, step_y) == (ROW_MAJOR, 1.0, 0.0, 1)
        matrix = view(a, dtype, m, n, lda)
        matrix = matrix.T if ta == TRANSPOSED else matrix
        vector = view(x, dtype, matrix.shape[1], 1, step)
        view(y, dtype, len(matrix), 1, 1)[...] = matrix @ vector

    def batch(self, dtype: Any, order: int, ta: int, tb: int, m: int, n: int, k: int, *rest: Any) -> None:
        alpha, a, lda, step_a, b, ldb, step_b, beta, c, ldc, step_c, count = rest
        item = np.dtype(dtype).itemsize
        for i in range(count):
            at = a + i * step_a * item, b + i * step_b * item, c + i * step_c * item
            self.gemm(dtype, order, ta, tb, m, n, k, alpha, at[0], lda, at[1], ldb, beta, at[2], ldc)


@pytest.fixture
def routines(monkeypatch: pytest.MonkeyPatch) -> Routines:
    monkeypatch.setattr(mkl, "_SMALL", 0)
    return Routines()


def layouts(a: Array) -> list[Array]:
    """The same matrices in other memory layouts, also some that no routine can read in place."""
    wide = np.zeros((*a.shape[:-1], 2 * a.shape[-1] + 1), a.dtype)
    wide[..., : a.shape[-1]] = a
    every_other = np.zeros((*a.shape[:-1], 2 * a.shape[-1]), a.dtype)
    every_other[..., ::2] = a
    transposed = np.ascontiguousarray(a.swapaxes(-1, -2)).swapaxes(-1, -2)
    backward = a[..., ::-1].copy()[..., ::-1]
    innermost = np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 0, -1)), -1, 0)
    return [a, wide[..., : a.shape[-1]], every_other[..., ::2], transposed, backward, innermost]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("sizes", [(6, 5, 4), (6, 5, 1), (1, 5, 4), (1, 5, 1), (6, 1, 4), (1, 1, 1)])
@pytest.mark.parametrize("stack", [(), (3,), (2, 3)])
def test_every_layout(routines: Routines, dtype: Any, sizes: tuple[int, int, int], stack: Any) -> None:
    product = mkl._matmul(routines)
    rng = np.random.default_rng(0)
    m, k, n = sizes
    left = rng.integers(-9, 9, (*stack, m, k)).astype(dtype)
    right = rng.integers(-9, 9, (*stack, k, n)).astype(dtype)
    for a in layouts(left):
        for b in layouts(right):
            got = product(a, b)
            assert got.dtype == dtype
            np.testing.assert_array_equal(got, left @ right)
    assert routines.calls


def test_one_call_for_a_vector_a_matrix_and_a_stack(routines: Routines) -> None:
    product = mkl._matmul(routines)
    a, b = np.ones((2, 3, 8, 5), np.float32), np.ones((2, 1, 5, 4), np.float32)
    for left, right, expected in (
        (a[0, 0], b[0, 0], ["gemm"]),
        (a[0, 0], b[0, 0, :, :1], ["gemv"]),
        (a[0, 0, :1], b[0, 0], ["gemv"]),
        (a[0], b[0], ["gemm_batch_strided"]),
        (a, b, ["gemm_batch_strided"] * 2),
    ):
        routines.calls.clear()
        np.testing.assert_array_equal(product(left, right), left @ right)
        assert routines.calls == expected


def test_other_types_and_small_products_use_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mkl, "_SMALL", 100)
    routines = Routines()
    product = mkl._matmul(routines)
    small = np.ones((4, 4), np.float32)
    whole, mixed = np.ones((8, 8), np.int64), np.ones((8, 8), np.float32)
    for a, b in ((small, small), (whole, whole), (mixed, mixed.astype(np.float64)), (mixed[:0], mixed)):
        np.testing.assert_array_equal(product(a, b), a @ b)
    assert not routines.calls
    with pytest.raises(ValueError, match="matmul"):
        product(mixed, np.ones((9, 8), np.float32))
