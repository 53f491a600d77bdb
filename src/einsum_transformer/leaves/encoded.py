"""Matrices that stay in the encoding of their file, and are dequantized inside a product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from einsum_transformer.engine import Leaf, four_bit
from einsum_transformer.engine.blas import FEW, matmul, shares
from einsum_transformer.engine.four_bit import GroupedCodes
from einsum_transformer.engine.parallel import for_each
from einsum_transformer.engine.side_by_side import consecutive
from einsum_transformer.formats.dequantize import Groups
from einsum_transformer.formats.encodings import SHARED, Encoding
from einsum_transformer.leaves.blockwise import Blockwise, ByRows

Array = np.ndarray

_PIECE = 1 << 18
"""Elements that are unpacked at once for few rows of x, so that they stay in the cache of one core."""
_COARSE = 1 << 20
"""Elements of a weight from which a product with few rows of x is divided over the threads."""


class EncodedWeight(Blockwise):
    """A matrix (n, k) in the encoding of its file.

    parts, form: see `formats.encodings`. Products are those with the dequantized values.
    """

    def __init__(
        self, parts: Mapping[str, Array], form: Encoding, shape: tuple[int, ...], dtype: Any, out_axes: int
    ) -> None:
        super().__init__(shape, dtype, out_axes)
        self.form: Encoding = form
        self.encoding: str = form.name
        self._parts = dict(parts)
        self._few: tuple[GroupedCodes, Array | None, int] | None = None
        self._groups: tuple[bool, int] | None = None

    def parts(self) -> dict[str, Any]:
        return dict(self._parts)

    def with_parts(self, parts: Mapping[str, Any]) -> EncodedWeight:
        return EncodedWeight(parts, self.form, self.shape, self.dtype, self.out_axes)

    def joined(self, others: Sequence[Leaf]) -> Leaf | None:
        weights = [self, *(each for each in others if isinstance(each, EncodedWeight))]
        if len(weights) <= len(others) or any(each.out_axes != each.ndim - 1 for each in weights):
            return None
        if any(each.form != self.form or each.width != self.width for each in weights):
            return None
        parts: dict[str, Array] = {}
        for name, own in self._parts.items():
            arrays = [each._parts.get(name) for each in weights]
            found = [each for each in arrays if isinstance(each, np.ndarray)]
            if name in SHARED or len(found) < len(weights):
                return None
            rows = consecutive(found)
            if rows is None or any(each.dtype != own.dtype for each in found):
                return None
            parts[name] = rows
        rows = sum(count_rows(each._parts) for each in weights)
        return EncodedWeight(parts, self.form, (rows, self.width), self.dtype, 1)

    def matrix(self, rows: Any, out: Array | None = None) -> Array:
        parts = chosen(self._parts, rows)
        y = np.empty((count_rows(parts), self.width), self.dtype) if out is None else out
        values = y if y.dtype == np.float32 and y.flags.c_contiguous else np.empty(y.shape, np.float32)
        self.form.values(parts, values)
        if values is not y:
            np.copyto(y, values)
        return y

    def by_rows(self, count: int) -> ByRows | None:
        # In float64, values that are rounded to float32 are needed.
        if count > FEW or self.dtype != np.float32:
            return None
        if self._groups is None:
            first = self.form.groups(chosen(self._parts, slice(0, 1)))
            self._groups = first is not None, _size(first)
        has_groups, size = self._groups
        if not has_groups:
            return None
        if count <= four_bit.FEW and size and four_bit.available():
            return ByRows(_grouped_product, self._grouped(), self.encoding)
        return ByRows(_product, (self._parts, self.form, count_rows(self._parts)), self.encoding)

    def _grouped(self) -> tuple[GroupedCodes, Array | None, int]:
        """The codes for products with a few rows, the minimums of the groups and their size, made for the
        first product."""
        if self._few is None:
            groups = self.form.groups(self._parts)
            assert groups is not None
            codes, scales, minimums, _ = groups
            n, size = len(codes), _size(groups)
            repeats = codes.shape[-1] // size
            scales = np.repeat(scales, repeats, axis=1)
            matrix = GroupedCodes(codes.reshape(n, -1), scales, None, size)
            self._few = matrix, minimums, codes.shape[-1]
        return self._few


def chosen(parts: Mapping[str, Array], rows: Any) -> dict[str, Array]:
    """The parts of some rows."""
    return {
        name: part if name in SHARED else np.ascontiguousarray(part[rows]) for name, part in parts.items()
    }


def count_rows(parts: Mapping[str, Array]) -> int:
    """The number of rows of the matrix."""
    return len(next(part for name, part in parts.items() if name not in SHARED))


def _size(groups: Groups | None) -> int:
    """The size of the groups for `four_bit`, which divides that of the encoding; 0 if there is none."""
    if groups is None or groups.codes.dtype != np.int8:
        return 0
    return next((size for size in reversed(four_bit.SIZES) if groups.codes.shape[-1] % size == 0), 0)


def _grouped_product(
    x: Array, matrix: GroupedCodes, minimums: Array | None, size: int, out: Array | None = None
) -> Array:
    """Return the product (n, m) of a matrix (n, k) of codes in groups with a few rows x (m, k)."""
    y = matrix.product(x, out)
    if minimums is not None:
        y += matmul(minimums, x.reshape(len(x), -1, size).sum(axis=2).T)
    return y


def _product(x: Array, parts: Mapping[str, Array], form: Encoding, n: int, out: Array | None = None) -> Array:
    """Return the product (n, m) of a matrix (n, k) in an encoding of groups with a few rows x (m, k).

    y[n, m] = sum_g scales[n, g] * sum_k codes[n, g, k] x[m, g, k] + minimums[n, g] * sum_k x[m, g, k].
    """
    m, width = x.shape
    y = np.empty((n, m), x.dtype) if out is None else out
    step = max(1, min(_PIECE // width, -(-n // shares())))
    columns: dict[int, tuple[Array, Array]] = {}

    def run(start: int) -> None:
        rows = slice(start, min(start + step, n))
        groups = form.groups(chosen(parts, rows))
        assert groups is not None
        codes, scales, minimums, _ = groups
        size = codes.shape[-1]
        if size not in columns:
            of_groups = np.ascontiguousarray(x.reshape(m, -1, size).transpose(1, 2, 0))
            columns[size] = of_groups, of_groups.sum(axis=1)
        own, totals = columns[size]
        sums = matmul(codes.astype(x.dtype).transpose(1, 0, 2), own)
        sums *= scales.T[:, :, None]
        total = sums.sum(axis=0)
        if minimums is not None:
            total += matmul(minimums, totals)
        y[rows] = total

    for_each(run, [(start,) for start in range(0, n, step)], coarse=n * width >= _COARSE)
    return y
