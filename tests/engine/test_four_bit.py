"""Products of 4-bit codes by ONNX Runtime: against NumPy, and what happens where it is absent or wrong."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest

import einsum_transformer as et
from einsum_transformer.engine import einsum, four_bit
from einsum_transformer.leaves.quantized import PackedWeight
from einsum_transformer.numerics.uniform import quantize, rounded
from einsum_transformer.tree import named_leaves

Array = np.ndarray


@pytest.fixture(params=["ONNX Runtime", "NumPy"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    assert four_bit.available()
    if request.param == "NumPy":
        monkeypatch.setattr(four_bit, "available", lambda: False)
    return request.param != "NumPy"


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("width", "size"), [(64, 16), (150, 32), (300, 64), (129, 128), (300, 256)])
@pytest.mark.parametrize("rows", [1, 70])
@pytest.mark.parametrize(
    ("low", "high"),
    [(-8, 8), (-7, 8), (0, 16), (-11, 5), (3, 12), (0, 32), (-16, 1), (-127, 128), (-128, 128)],
)
def test_against_numpy(low: int, high: int, rows: int, width: int, size: int, zeros: bool) -> None:
    """Codes of one digit and of two, whatever their range is."""
    rng = np.random.default_rng(width)
    groups = -(-width // size)
    codes = rng.integers(low, high, (rows, width)).astype(np.int8)
    scales = rng.standard_normal((rows, groups), np.float32)
    own = rng.integers(low, high, (rows, groups)).astype(np.int8) if zeros else None
    x = rng.standard_normal((3, width), np.float32)
    offsets = np.repeat(np.zeros((rows, groups)) if own is None else own.astype(int), size, axis=1)
    weight = (codes - offsets[:, :width]) * np.repeat(scales.astype(float), size, axis=1)[:, :width]
    expected = weight @ x.T
    matrix = four_bit.GroupedCodes(codes, scales, own, size)
    atol = 1e-6 * (np.abs(weight) @ np.abs(x.T)).max()
    np.testing.assert_allclose(matrix.product(x), expected, rtol=0, atol=atol)
    out = np.empty((rows, 3), np.float32)
    assert matrix.product(x, out) is out
    np.testing.assert_allclose(out, expected, rtol=0, atol=atol)


def test_large_matrices_are_divided_over_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(four_bit, "_COARSE", 1)
    monkeypatch.setattr("einsum_transformer.engine.blas.free_threads", lambda: 3)
    rng = np.random.default_rng(0)
    codes, zeros = (rng.integers(-8, 8, (70, n)).astype(np.int8) for n in (64, 2))
    scales, x = rng.random((70, 2), np.float32), rng.standard_normal((2, 64), np.float32)
    matrix = four_bit.GroupedCodes(codes, scales, zeros, 32)
    assert len(matrix._sessions) == 3
    weight = (codes - np.repeat(zeros.astype(int), 32, axis=1)) * np.repeat(scales, 32, axis=1)
    np.testing.assert_allclose(matrix.product(x), weight @ x.T, rtol=0, atol=1e-3)


@pytest.mark.parametrize("activation_bits", [4, 8, 16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 32, 48, 64, 1000])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_quantized_weights(
    bits: int, group: int | None, symmetric: bool, activation_bits: int, library: bool
) -> None:
    """Groups, one scale per row and one per tensor, with few rows of activations, which are rounded."""
    rng = np.random.default_rng(bits)
    matrix = rng.standard_normal((40, 200)).astype(np.float32)
    quantized = quantize(matrix, bits, group, symmetric)
    divisor = rng.random(200).astype(np.float32) + 0.5
    quantized = replace(quantized, divisor=divisor)
    leaf = PackedWeight.of(quantized, bits, (40, 200), np.float32, 1, activation_bits)
    how = leaf.by_rows(1)
    assert how is not None
    in_groups = library and group in ((32, 64) if bits == 8 else (32, 64, 1000))
    assert (how.how == "codes in groups") == in_groups
    for count in (1, 4, 5):
        x = rng.standard_normal((1, count, 200)).astype(np.float32)
        values = rounded(x / divisor, activation_bits, (2,)).astype(float) * divisor
        expected = values @ leaf.array().astype(float).T
        found = einsum("btd,fd->btf", x, leaf)
        np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6 * np.abs(expected).max() + 1e-5)


def test_generation_is_the_same(library: bool) -> None:
    """Steps of a replay, with joined matrices; activations are not rounded, which would enlarge last bits."""
    model = et.load("fast_lora", quantization="W4A16g32", max_layers=2)
    for _, leaf in named_leaves(model.decoder):
        if isinstance(leaf, PackedWeight):
            leaf.activation_bits = 32
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, 100))
    cache = model.cache(100)
    steps = [model.decoder.forward(tokens[:, i : i + 1], cache)[0] for i in range(100)]
    assert cache.steps.repeated > 30
    whole = model.logits(tokens)
    np.testing.assert_allclose(np.concatenate(steps, axis=1), whole, rtol=0, atol=1e-4 * np.abs(whole).max())


def test_a_wrong_product_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    four_bit._libraries.cache_clear()
    right = four_bit._run
    monkeypatch.setattr(four_bit, "_run", lambda session, x: right(session, x) + 1)
    try:
        assert not four_bit.available()
        assert not four_bit.available()
        assert [record.getMessage() for record in caplog.records] == [
            "4-bit products of ONNX Runtime are wrong here; codes in groups are multiplied by NumPy, "
            "which is slower"
        ]
        four_bit._libraries.cache_clear()
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        assert not four_bit.available()
    finally:
        four_bit._libraries.cache_clear()
