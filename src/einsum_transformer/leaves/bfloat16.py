"""Matrices in bfloat16, two bytes per element, which are multiplied with float32 activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from einsum_transformer.engine import Leaf, blas, integers
from einsum_transformer.engine.side_by_side import consecutive
from einsum_transformer.leaves.blockwise import Blockwise, ByRows

Array = np.ndarray

_TERMS = 3
"""Terms of bfloat16, 8 bits each, that sum up to a float32."""
_FEW_ROWS = 4
"""Rows of x up to which products of bfloat16 are faster than converted blocks."""


class Bfloat16Weight(Blockwise):
    """A matrix (n, k) of ml_dtypes.bfloat16. Products are those with its values in `dtype`."""

    def __init__(self, weight: Array, shape: tuple[int, ...], out_axes: int, dtype: Any = np.float32) -> None:
        super().__init__(shape, dtype, out_axes)
        self.weight: Array = weight

    @property
    def product_type(self) -> str:
        return "bfloat16"

    def parts(self) -> dict[str, Any]:
        return {"weight": self.weight}

    def with_parts(self, parts: Mapping[str, Any]) -> Bfloat16Weight:
        return Bfloat16Weight(parts["weight"], self.shape, self.out_axes, self.dtype)

    def joined(self, others: Sequence[Leaf]) -> Leaf | None:
        weights = [self, *(each for each in others if isinstance(each, Bfloat16Weight))]
        arrays = [each.weight for each in weights if isinstance(each.weight, np.ndarray)]
        if len(arrays) <= len(others) or any(each.out_axes != each.ndim - 1 for each in weights):
            return None
        if any(each.width != self.width for each in weights):
            return None
        matrix = consecutive(arrays)
        return None if matrix is None else Bfloat16Weight(matrix, matrix.shape, 1, self.dtype)

    def matrix(self, rows: Any, out: Array | None = None) -> Array:
        stored = self.weight[rows].view(np.uint16)
        y = np.empty(stored.shape, self.dtype) if out is None else out
        values = y if y.dtype == np.float32 else np.empty(stored.shape, np.float32)
        # The upper half of the bits of a float32.
        bits = values.view(np.uint32)
        np.copyto(bits, stored)
        bits <<= 16
        if values is not y:
            np.copyto(y, values)
        return y

    def by_rows(self, count: int) -> ByRows | None:
        if count > _FEW_ROWS or self.dtype != np.float32 or not integers.bfloat16_available():
            return None
        return ByRows(_product, (self.weight,), f"{_TERMS} bfloat16")


def _product(x: Array, weight: Array, out: Array | None = None) -> Array:
    """Return the product (n, m) of a matrix (n, k) with rows x (m, k), each as the sum of three bfloat16."""
    parts, rest = [], x
    for _ in range(_TERMS):
        parts.append(rest.astype(ml_dtypes.bfloat16))
        rest = rest - parts[-1].astype(np.float32)
    columns = np.ascontiguousarray(np.concatenate(parts))
    y = integers.bfloat16_dots(weight, columns, blas.free_threads())
    return y.reshape(len(weight), _TERMS, len(x)).sum(axis=1, out=out)
