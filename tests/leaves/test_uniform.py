"""Uniform quantization: the error, the range of the codes, exact zeros, and packed nibbles."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from einsum_transformer.numerics.uniform import (
    code_range,
    dequantize,
    pack_nibbles,
    quantize,
    rounded,
    spread,
    unpack_nibbles,
)

Array = np.ndarray
BITS = (2, 3, 4, 8)

matrices = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=40),
    elements=st.floats(-1e6, 1e6, width=32),
)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
@given(x=matrices, group=st.sampled_from([None, 1, 7, 32, 1000]))
def test_round_trip(bits: int, symmetric: bool, x: Array, group: int | None) -> None:
    """The error is at most half a step, codes are in their range, and zero is exactly zero."""
    found = quantize(x, bits, group, symmetric)
    lowest, highest = code_range(bits, symmetric)
    assert found.codes.dtype == np.int8
    assert found.codes.min() >= lowest
    assert found.codes.max() <= highest
    assert found.scales.dtype in (np.float32, np.float16)
    y = dequantize(found, np.float64)
    step = spread(found.scales, found.group, x.shape[1]).astype(np.float64)
    assert (np.abs(y - x) <= step * 0.5 * (1 + 1e-4)).all()
    assert (y[x == 0] == 0).all()
    assert ((found.codes == lowest) | (found.codes == highest)).any() or np.abs(x).max() < 1e-30


def test_one_scale_per_group() -> None:
    """The last group of a row is shorter."""
    x = np.array([[1.0, -3.0, 8.0, 4.0, 2.0], [0.0, 0.0, 1.0, -1.0, 7.0]], np.float32)
    found = quantize(x, 4, 2)
    exact = np.array([[3, 8, 2], [7, 1, 7]]) / 7  # a group of zeros: 1
    assert found.scales.dtype == np.float16
    assert (found.scales >= exact).all()
    np.testing.assert_allclose(found.scales, exact, rtol=2**-10)
    assert quantize(x * 1e-6, 4, 2).scales.dtype == np.float32  # not in the range of float16
    np.testing.assert_array_equal(quantize(x, 4, None).scales, [[8 / np.float32(7)]])


def test_asymmetric_codes_use_the_whole_range() -> None:
    x = np.array([[0.0, 1.0, 2.0, 3.0]], np.float32)
    found = quantize(x, 2, 4, symmetric=False)
    np.testing.assert_array_equal(found.codes, [[-2, -1, 0, 1]])
    np.testing.assert_array_equal(dequantize(found), x)
    shifted = quantize(x - 1, 2, 4, symmetric=False)
    assert shifted.zeros is not None
    np.testing.assert_array_equal(shifted.zeros, [[-1]])


@pytest.mark.parametrize("width", [1, 2, 5, 16, 33])
def test_nibbles(width: int) -> None:
    rng = np.random.default_rng(width)
    codes = rng.integers(-8, 8, (3, width), np.int8)
    packed = pack_nibbles(codes)
    assert packed.shape == (3, -(-width // 2))
    assert packed.dtype == np.uint8
    np.testing.assert_array_equal(unpack_nibbles(packed, width), codes)


@pytest.mark.parametrize("bits", [4, 8])
def test_activations_have_one_scale_per_token(bits: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 5)).astype(np.float32)
    x[0, 1] = 0
    y = rounded(x, bits, (2,))
    highest = code_range(bits, True)[1]
    scale = np.abs(x).max(axis=2, keepdims=True) / highest
    np.testing.assert_allclose(y, np.rint(x / np.where(scale == 0, 1, scale)) * scale, atol=1e-6)
    np.testing.assert_array_equal(rounded(x.reshape(6, 5), bits, (1,)), y.reshape(6, 5))


def test_all_values_of_float16_and_those_between() -> None:
    """Rounding by bits gives what two conversions give: ties, subnormal numbers, overflow, nan and inf."""
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    own = every[np.isfinite(every)].astype(np.float32)
    between = np.arange(0, 1 << 32, 65521, dtype=np.uint64).astype(np.uint32).view(np.float32)
    edges = np.array([65519.996, 65520, -65520, 1e38, np.inf, -np.inf, np.nan], np.float32)
    x = np.concatenate([own, np.nextafter(own, np.float32(1e9)), (own[:-1] + own[1:]) / 2, between, edges])
    with np.errstate(over="ignore", invalid="ignore"):
        expected = np.clip(x.astype(np.float16).astype(np.float32), -65504, 65504)
        found = rounded(x, 16, (0,))
    np.testing.assert_array_equal(found, expected)


def test_float16_in_any_memory_layout() -> None:
    x = np.random.default_rng(0).standard_normal((40, 50, 60)).astype(np.float32)
    views = (
        x,
        x.transpose(2, 0, 1),
        x[::2],
        x.T[:, 3:],
        x[:, ::-1],
        np.broadcast_to(x[:1], x.shape),
        x[:, :, :1],
    )
    for view in views:
        expected = view.astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(
            rounded(np.repeat(view, 3, axis=0), 16, (0,)), expected.repeat(3, axis=0)
        )
        np.testing.assert_array_equal(rounded(view, 16, (0,)), expected)


def test_activations_in_float16() -> None:
    x = np.array([1.0, 1.0001, -1e6, 1e6, 3e-9], np.float32)
    np.testing.assert_array_equal(rounded(x, 16, (0,)), [1.0, 1.0, -65504, 65504, 0])
