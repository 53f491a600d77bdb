"""Integer products equal NumPy's int64, with the largest codes too; scales, zero points and digits."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from einsum_transformer.engine import integers
from einsum_transformer.numerics.uniform import DIGIT_BASE, digits, rounded

Array = np.ndarray


def codes(rng: np.random.Generator, rows: int, width: int) -> Array:
    return rng.integers(-128, 128, (rows, width)).astype(np.int8)


@pytest.mark.parametrize("width", [1, 3, 31, 64, 65, 259, 1537])
@pytest.mark.parametrize("count", [1, 2, 8, 17])
def test_products_are_exact(count: int, width: int) -> None:
    rng = np.random.default_rng(width)
    a, b = codes(rng, 70, width + 5)[:, 2 : 2 + width], codes(rng, count, width)
    found = integers.dots(a, b, threads=2)
    np.testing.assert_array_equal(found, a.astype(np.int64) @ b.T.astype(np.int64))


@pytest.mark.parametrize("count", [1, 2])
def test_the_longest_sum_fits(count: int) -> None:
    a = np.full((2, integers.LONGEST), -128, np.int8)
    b = np.full((count, integers.LONGEST), -127, np.int8)
    assert (integers.dots(a, b) == 128 * 127 * integers.LONGEST).all()


@pytest.mark.parametrize("rows_of_scales", [1, 300])
@pytest.mark.parametrize("with_zeros", [False, True])
@pytest.mark.parametrize("bits", [4, 8, 16, 32])
@pytest.mark.parametrize("count", [1, 5, 200])
def test_scaled_products(
    count: int, bits: int, with_zeros: bool, rows_of_scales: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal to the product of the rounded values, divided over threads and not."""
    rng = np.random.default_rng(count)
    weight, scales = codes(rng, 300, 96), rng.random((rows_of_scales, 1), np.float32)
    zeros = codes(rng, rows_of_scales, 1) if with_zeros else None
    x = rng.standard_normal((count, 96)).astype(np.float32)
    x[-1] = 0
    values = (weight.astype(float) - (0 if zeros is None else zeros)) * scales
    expected = values @ rounded(x, bits, (-1,)).astype(float).T
    found = integers.scaled_dots(weight, scales, zeros, *digits(x, bits), DIGIT_BASE)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    for limit in ("_READ", "_COARSE", "_PIECE"):
        monkeypatch.setattr(integers, limit, 100)
    out = np.empty_like(found)
    divided = integers.scaled_dots(weight, scales, zeros, *digits(x, bits), DIGIT_BASE, out)
    assert divided is out
    np.testing.assert_allclose(divided, found, rtol=0, atol=2e-7 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_alone_has_the_result_of_the_row_among_others(bits: int, dtype: type) -> None:
    """Bit for bit, so that a decode step adds no differences to those of a prefill."""
    rng = np.random.default_rng(bits)
    weight, scales = codes(rng, 300, 1537), rng.random((300, 1), np.float32)
    x = rng.standard_normal((6, 1537)).astype(dtype)
    together = integers.scaled_dots(weight, scales, None, *digits(x, bits), DIGIT_BASE)
    for i in range(len(x)):
        alone = integers.scaled_dots(weight, scales, None, *digits(x[i : i + 1], bits), DIGIT_BASE)
        np.testing.assert_array_equal(alone[:, 0], together[:, i])


def test_float64_is_kept() -> None:
    """With one digit, the result is exact in float64: the sums are integers."""
    rng = np.random.default_rng(0)
    weight, scales, x = codes(rng, 20, 50), rng.random((20, 1), np.float32), rng.standard_normal((3, 50))
    found = integers.scaled_dots(weight, scales, None, *digits(x, 8), DIGIT_BASE)
    expected = (weight * scales.astype(float)) @ rounded(x, 8, (-1,)).T
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-13)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("bits", [4, 8, 16, 32])
def test_digits_sum_to_the_rounded_values(bits: int, order: Any) -> None:
    rng = np.random.default_rng(bits)
    x = np.asarray(rng.standard_normal((4, 33)) * 10.0 ** np.arange(-3, 1)[:, None], np.float32, order=order)
    parts, scale = digits(x, bits)
    assert parts.flags.c_contiguous
    values = sum(part.astype(float) * 256.0**i for i, part in enumerate(parts)) * scale[:, None]
    expected = rounded(x, bits, (-1,))
    largest = np.abs(x).max(axis=1, keepdims=True)
    assert (np.abs(values - expected) <= largest * (1e-7 if bits <= 8 else 2.0**-23)).all()


@pytest.mark.parametrize(
    ("library", "message"),
    [
        (None, "numkong cannot be imported"),
        (SimpleNamespace(dots_pack=None), "version of numkong is not supported"),
        (
            SimpleNamespace(
                dot=lambda a, b, out: out.fill(0),
                dots_pack=lambda b: b,
                dots_packed=lambda a, b, threads: np.zeros((len(a), len(b)), np.int32),
            ),
            "products of numkong are wrong",
        ),
    ],
)
def test_a_library_that_is_absent_or_wrong_is_not_used(
    library: Any, message: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "numkong", library)
    integers._library.cache_clear()
    try:
        assert not integers.available()
        assert not integers.available()
    finally:
        integers._library.cache_clear()
    assert [record.message for record in caplog.records if message in record.message] == [
        record.message for record in caplog.records
    ]
    assert len(caplog.records) == 1
    assert "quantized weights are multiplied as floats, which is slower" in caplog.text
