"""Matrices that stay in the encoding of a GGUF file, and are dequantized inside a product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from einsum_transformer.engine import Leaf, four_bit
from einsum_transformer.engine.blas import FEW, matmul, shares
from einsum_transformer.engine.four_bit import GroupedCodes
from einsum_transformer.engine.parallel import for_each
from einsum_transformer.engine.side_by_side import consecutive
from einsum_transformer.formats.dequantize import GROUPS, dequantize
from einsum_transformer.leaves.blockwise import Blockwise, ByRows

Array = np.ndarray

_PIECE = 1 << 18
"""Elements that are unpacked at once for few rows of x, so that they stay in the cache of one core."""
_COARSE = 1 << 20
"""Elements of a weight from which a product with few rows of x is divided over the threads."""


class EncodedWeight(Blockwise):
    """A matrix (n, k) as the bytes of its rows in a GGUF file.

    stored: uint8 (n, bytes of a row). encoding: the type in the file, such as Q4_K. block: elements and
    bytes of a block. Products are those with its dequantized values, which are exact.
    """

    def __init__(
        self,
        stored: Array,
        encoding: str,
        block: tuple[int, int],
        shape: tuple[int, ...],
        dtype: Any,
        out_axes: int,
    ) -> None:
        super().__init__(shape, dtype, out_axes)
        self.stored: Array = stored
        self.encoding: str = encoding
        self.block: tuple[int, int] = block
        self._few: tuple[GroupedCodes, Array | None, int] | None = None

    def parts(self) -> dict[str, Any]:
        return {"stored": self.stored}

    def with_parts(self, parts: Mapping[str, Any]) -> EncodedWeight:
        form = self.encoding, self.block, self.shape, self.dtype, self.out_axes
        return EncodedWeight(parts["stored"], *form)

    def joined(self, others: Sequence[Leaf]) -> Leaf | None:
        weights = [self, *(each for each in others if isinstance(each, EncodedWeight))]
        arrays = [each.stored for each in weights if isinstance(each.stored, np.ndarray)]
        if len(arrays) <= len(others) or any(each.out_axes != each.ndim - 1 for each in weights):
            return None
        if any((each.encoding, each.width) != (self.encoding, self.width) for each in weights):
            return None
        stored = consecutive(arrays)
        if stored is None:
            return None
        shape = len(stored), self.width
        return EncodedWeight(stored, self.encoding, self.block, shape, self.dtype, 1)

    def matrix(self, rows: Any, out: Array | None = None) -> Array:
        stored = np.ascontiguousarray(self.stored[rows])
        y = np.empty((len(stored), self.width), self.dtype) if out is None else out
        whole = y.dtype == np.float32 and y.flags.c_contiguous
        values = y if whole else np.empty(y.shape, np.float32)
        dequantize(stored.reshape(-1), self.encoding, self.block, values.reshape(-1))
        if values is not y:
            np.copyto(y, values)
        return y

    def _grouped(self) -> tuple[GroupedCodes, Array | None, int]:
        """The codes for products with a few rows, the minimums of the groups and their size, made for the
        first product."""
        if self._few is None:
            n = len(self.stored)
            codes, scales, minimums, subtracted = GROUPS[self.encoding](self.stored.reshape(-1))
            codes, size = codes.view(np.int8), codes.shape[-1]
            matrix = GroupedCodes(codes.reshape(n, -1), scales.reshape(n, -1), None, size)
            if minimums is not None:
                minimums = (-minimums if subtracted else minimums).reshape(n, -1)
            self._few = matrix, minimums, size
        return self._few

    def by_rows(self, count: int) -> ByRows | None:
        # In float64, values that are rounded to float32 are needed.
        if count > FEW or self.encoding not in GROUPS or self.dtype != np.float32:
            return None
        if count <= four_bit.FEW and four_bit.available():
            return ByRows(_grouped_product, self._grouped(), self.encoding)
        return ByRows(_product, (self.stored, self.encoding, self.block), self.encoding)


def _grouped_product(
    x: Array, matrix: GroupedCodes, minimums: Array | None, size: int, out: Array | None = None
) -> Array:
    """Return the product (n, m) of a matrix (n, k) of codes in groups with a few rows x (m, k)."""
    y = matrix.product(x, out)
    if minimums is not None:
        y += matmul(minimums, x.reshape(len(x), -1, size).sum(axis=2).T)
    return y


@cache
def _group_size(encoding: str, block: tuple[int, int]) -> int:
    return GROUPS[encoding](np.zeros(block[1], np.uint8)).codes.shape[-1]


def _product(
    x: Array, stored: Array, encoding: str, block: tuple[int, int], out: Array | None = None
) -> Array:
    """Return the product (n, m) of a matrix (n, k) in an encoding of groups with a few rows x (m, k).

    y[n, m] = sum_g scales[n, g] * sum_k codes[n, g, k] x[m, g, k] + minimums[n, g] * sum_k x[m, g, k].
    """
    n, (m, width) = len(stored), x.shape
    y = np.empty((n, m), x.dtype) if out is None else out
    unpack, size = GROUPS[encoding], _group_size(encoding, block)
    columns = np.ascontiguousarray(x.reshape(m, -1, size).transpose(1, 2, 0))
    totals = columns.sum(axis=1)
    step = max(1, min(_PIECE // width, -(-n // shares())))

    def run(start: int) -> None:
        rows = slice(start, min(start + step, n))
        codes, scales, minimums, subtracted = unpack(stored[rows].reshape(-1))
        values = codes.astype(x.dtype).reshape(-1, width // size, size)
        sums = matmul(values.transpose(1, 0, 2), columns)
        sums *= scales.reshape(len(values), -1).T[:, :, None]
        total = sums.sum(axis=0)
        if minimums is not None:
            least = matmul(minimums.reshape(len(values), -1).astype(x.dtype, copy=False), totals)
            total += -least if subtracted else least
        y[rows] = total

    for_each(run, [(start,) for start in range(0, n, step)], coarse=n * width >= _COARSE)
    return y
