"""Matrices in the encodings of GGUF files: products with few and with many rows."""

from __future__ import annotations

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from einsum_transformer.engine import einsum
from einsum_transformer.formats.dequantize import GROUPS
from einsum_transformer.formats.encodings import Blocks
from einsum_transformer.leaves.encoded import EncodedWeight

KINDS = [*GROUPS, "TQ1_0", "IQ3_S"]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_values(kind: str, dtype: str) -> None:
    """y = W x and x = W^T y for one row, several, and more than are multiplied group by group."""
    code = GGMLQuantizationType[kind]
    elements, nbytes = GGML_QUANT_SIZES[code]
    rng = np.random.default_rng(0)
    width = 2 * max(elements, 128)
    # Bytes below 60 make finite scales.
    stored = rng.integers(1, 60, (70, width // elements * nbytes), dtype=np.uint8)
    values = dequantize(stored, code)
    assert np.isfinite(values).all()
    leaf = EncodedWeight({"stored": stored}, Blocks(kind, elements, nbytes), (70, width), dtype, 1)
    np.testing.assert_array_equal(leaf.array(), values)
    np.testing.assert_array_equal(leaf.rows(np.array([[3, 69]])), values[[[3, 69]]])
    for count in (1, 5, 40):
        x = rng.standard_normal((1, count, width)).astype(dtype)
        y = einsum("btd,fd->btf", x, leaf)
        assert y.dtype == dtype
        expected = x.astype(np.float64) @ values.T.astype(np.float64)
        atol = (1e-6 if dtype == "float32" else 1e-14) * np.abs(x).sum(-1).max() * np.abs(values).max()
        np.testing.assert_allclose(y, expected, rtol=0, atol=atol)
        back = einsum("btf,fd->btd", y, leaf)
        np.testing.assert_allclose(back, expected @ values, rtol=1e-5, atol=atol * 70 * np.abs(values).max())


def test_weights_of_different_types_are_not_joined() -> None:
    memory = np.zeros(2 * 4 * 34 * 2, np.uint8)
    first, second = memory[:272].reshape(4, 68), memory[272:].reshape(4, 68)
    a = EncodedWeight({"stored": first}, Blocks("Q8_0", 32, 34), (4, 64), np.float32, 1)
    b = EncodedWeight({"stored": second}, Blocks("Q8_0", 32, 34), (4, 64), np.float32, 1)
    joined = a.joined([b])
    assert joined is not None
    assert joined.shape == (8, 64)
    other = EncodedWeight({"stored": second}, Blocks("Q8_1", 32, 34), (4, 64), np.float32, 1)
    assert a.joined([other]) is None
