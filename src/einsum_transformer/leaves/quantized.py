"""Quantized weights: codes and scales in memory (real), or their values as an array (simulated).

Both round the activations that they are multiplied with in a forward pass. They have no gradient. That of the
activations is exact for the rounded weight, and passes the rounding of activations unchanged
(straight-through, Bengio et al., 2013).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from einsum_transformer.engine import Equation, Leaf, ShapeArray, four_bit, integers
from einsum_transformer.engine.blas import FEW, matmul, shares
from einsum_transformer.engine.contract import product
from einsum_transformer.engine.four_bit import GroupedCodes
from einsum_transformer.engine.parallel import for_each
from einsum_transformer.engine.side_by_side import consecutive
from einsum_transformer.leaves.blockwise import COARSE, Blockwise, ByRows
from einsum_transformer.numerics.uniform import (
    DIGIT_BASE,
    Quantized,
    dequantize,
    digits,
    halves,
    pack_nibbles,
    rounded,
    unpack_nibbles,
)

Array = np.ndarray

_PIECE = 1 << 19
"""Elements that are converted at once for few rows, so that they stay in the cache of one core."""
_COARSE_FEW = 1 << 22
"""Elements of a weight from which a product with few rows is divided over the threads."""
_FEW_ROWS = 8
"""Rows of x up to which three integer products, for more than 8 bits, are faster than one of floats."""
_ROWS = 128
"""Rows of activations that are quantized at once, so that they stay in the CPU cache."""


class SimulatedWeight(Leaf):
    """The values of a quantized weight as an array: float products, without less memory.

    bits: of a code. out_axes: number of leading axes that are outputs. activation_bits, divisor: see
    `PackedWeight`.
    """

    trained = False

    def __init__(
        self, weight: Array, bits: int, out_axes: int, activation_bits: int, divisor: Array | None = None
    ) -> None:
        self.weight: Array = weight
        self.shape: tuple[int, ...] = weight.shape
        self.dtype: np.dtype = weight.dtype
        self.bits: int = bits
        self.out_axes: int = out_axes
        self.activation_bits: int = activation_bits
        self.divisor: Array | None = divisor

    def array(self) -> Array:
        return self.weight

    def rows(self, indices: Array) -> Any:
        """The rows of an embedding, rounded as the activations are."""
        if isinstance(self.weight, ShapeArray):
            return ShapeArray((*indices.shape, *self.shape[1:]), self.dtype)
        return rounded(np.take(self.weight, indices, axis=0), self.activation_bits, (-1,))

    def add_rows(self, indices: Array, dy: Array) -> None:
        return None

    def writable(self) -> SimulatedWeight:
        return self

    def bits_per_element(self) -> int:
        return self.bits

    def parts(self) -> dict[str, Any]:
        return {"weight": self.weight} | ({} if self.divisor is None else {"divisor": self.divisor})

    def with_parts(self, parts: Mapping[str, Any]) -> SimulatedWeight:
        own = parts["weight"], self.bits, self.out_axes, self.activation_bits
        return SimulatedWeight(*own, parts.get("divisor"))

    def contract(self, equation: str, operands: tuple[Any, ...], position: int, order: str = "K") -> Array:
        parsed = Equation.parse(equation)
        inputs = parsed.inputs[position][self.out_axes :]
        given = list(operands)
        given[position] = self.weight
        if len(operands) == 2 and not set(inputs) & set(parsed.output):
            x, term = operands[1 - position], parsed.inputs[1 - position]
            if set(inputs) <= set(term) and not isinstance(x, ShapeArray):
                axes = tuple(map(term.index, inputs))
                given[1 - position] = _rounded(x, self.activation_bits, axes, self.divisor)
        return product(equation, tuple(given), order)


class PackedWeight(Blockwise):
    """A weight as integer codes, two per byte with at most 4 bits, and scales.

    codes, scales, zeros, group: see `Quantized`. activation_bits: of the activations that it is multiplied
    with. divisor: the columns of the matrix are divided by it (see `quantization.awq`), and so are the
    activations before they are rounded; None: they are not.
    """

    trained = False

    def __init__(
        self,
        codes: Array,
        scales: Array,
        zeros: Array | None,
        group: int,
        bits: int,
        shape: tuple[int, ...],
        dtype: Any,
        out_axes: int,
        activation_bits: int,
        divisor: Array | None = None,
    ) -> None:
        super().__init__(shape, dtype, out_axes)
        self.codes: Array = codes
        self.scales: Array = scales
        self.zeros: Array | None = zeros
        self.group: int = group
        self.bits: int = bits
        self.activation_bits: int = activation_bits
        self.divisor: Array | None = divisor
        self._few: GroupedCodes | None = None

    @classmethod
    def of(
        cls,
        quantized: Quantized,
        bits: int,
        shape: tuple[int, ...],
        dtype: Any,
        out_axes: int,
        activation_bits: int,
    ) -> PackedWeight:
        """Pack a quantized matrix."""
        codes = pack_nibbles(quantized.codes) if bits <= 4 else quantized.codes
        parts = codes, quantized.scales, quantized.zeros, quantized.group
        return cls(*parts, bits, shape, dtype, out_axes, activation_bits, quantized.divisor)

    @property
    def product_type(self) -> str:
        return "int8" if self.activation_bits <= 8 else super().product_type

    def rows(self, indices: Array) -> Any:
        """The rows of an embedding, rounded as the activations are."""
        values = super().rows(indices)
        return values if isinstance(values, ShapeArray) else rounded(values, self.activation_bits, (-1,))

    def add_rows(self, indices: Array, dy: Array) -> None:
        return None

    def writable(self) -> PackedWeight:
        return self

    def bits_per_element(self) -> int:
        return self.bits

    def parts(self) -> dict[str, Any]:
        parts = {"codes": self.codes, "scales": self.scales, "zeros": self.zeros, "divisor": self.divisor}
        return {name: part for name, part in parts.items() if part is not None}

    def with_parts(self, parts: Mapping[str, Any]) -> PackedWeight:
        own = parts["codes"], parts["scales"], parts.get("zeros"), self.group, self.bits
        form = self.shape, self.dtype, self.out_axes, self.activation_bits
        return PackedWeight(*own, *form, parts.get("divisor"))

    def packed(self) -> tuple[dict[str, Array], list[int]]:
        return self.parts(), [len(self.codes), self.width, self.bits, self.group]

    def joined(self, others: Sequence[Leaf]) -> Leaf | None:
        weights = [self, *(each for each in others if isinstance(each, PackedWeight))]
        if len(weights) <= len(others) or any(each._form != self._form for each in weights):
            return None
        if self.out_axes != self.ndim - 1 or any(len(each.scales) == 1 for each in weights):
            return None
        codes, scales = _rows([each.codes for each in weights]), _rows([each.scales for each in weights])
        zeros = None if self.zeros is None else _rows([each.zeros for each in weights])
        if codes is None or scales is None or (zeros is None) != (self.zeros is None):
            return None
        divisor = self.divisor
        if divisor is not None and not all(np.array_equal(divisor, each.divisor) for each in weights[1:]):
            return None
        own = codes, scales, zeros, self.group, self.bits
        return PackedWeight(*own, (len(codes), self.width), self.dtype, 1, self.activation_bits, divisor)

    @property
    def _form(self) -> tuple[Any, ...]:
        """Equal for weights whose rows can be those of one weight."""
        form = self.bits, self.group, self.width, self.dtype, self.activation_bits
        return *form, self.zeros is None, self.divisor is None, self.shape[-1], self.ndim - self.out_axes

    def matrix(self, rows: Any, out: Array | None = None) -> Array:
        codes, scales, zeros = self.codes[rows], self.scales, self.zeros
        if self.bits <= 4:
            codes = unpack_nibbles(codes, self.width)
        if len(scales) > 1:
            scales, zeros = scales[rows], None if zeros is None else zeros[rows]
        return dequantize(Quantized(codes, scales, zeros, self.group, self.divisor), self.dtype, out)

    def prepared(self, x: Array, axes: tuple[int, ...]) -> Array:
        return _rounded(x, self.activation_bits, axes, self.divisor)

    def by_rows(self, count: int) -> ByRows | None:
        """With integers, if they are exact or the rows are few, or with floats, if the rows are few."""
        parts = self.codes, self.scales, self.zeros, self.divisor, self.activation_bits
        exact = self.activation_bits <= 8
        if self.bits == 8 and self.scales.shape[1] == 1 and self.width <= integers.LONGEST:
            few = count <= _FEW_ROWS and self.dtype == np.float32
            if (exact or few) and integers.available():
                return ByRows(_integer_product, parts, f"{1 if exact else 3} int8")
        size = self._block_size
        if count <= four_bit.FEW and size and self.dtype == np.float32 and four_bit.available():
            own = self.divisor, self.activation_bits, self._grouped(size)
            return ByRows(_grouped_product, own, "codes in groups")
        if count > FEW:
            return None
        return ByRows(_float_product, (*parts, self.bits, self.group), "dequantized")

    @property
    def _block_size(self) -> int:
        """The size of the groups for `four_bit`, or 0: those that it has, or one group per row."""
        if len(self.scales) == 1:
            return 0
        if self.scales.shape[1] == 1:
            return four_bit.SIZES[-1] if self.bits <= 4 else 0
        return self.group if self.group in four_bit.SIZES else 0

    def _grouped(self, size: int) -> GroupedCodes:
        """The codes for products with a few rows, made for the first one."""
        if self._few is None:
            count = -(-self.width // size) if self.scales.shape[1] == 1 else self.scales.shape[1]
            shape = len(self.codes), count
            scales = np.broadcast_to(self.scales, shape).astype(np.float32)
            zeros = None if self.zeros is None else np.broadcast_to(self.zeros, shape)
            codes = unpack_nibbles(self.codes, self.width) if self.bits <= 4 else self.codes
            self._few = GroupedCodes(codes, scales, zeros, size)
        return self._few


def _rounded(x: Array, bits: int, axes: tuple[int, ...], divisor: Array | None) -> Array:
    """x with rounded activations; axes: those of the inputs of the weight."""
    if divisor is None:
        return rounded(x, bits, axes)
    sizes = [x.shape[axis] for axis in axes]
    ordered = divisor.reshape(sizes).transpose(np.argsort(axes))
    ordered = ordered.reshape([n if i in axes else 1 for i, n in enumerate(x.shape)])
    return rounded(x / ordered, bits, axes) * ordered


def _integer_product(
    x: Array,
    codes: Array,
    scales: Array,
    zeros: Array | None,
    divisor: Array | None,
    bits: int,
    out: Array | None = None,
) -> Array:
    """Return the product (n, m) of a quantized matrix (n, k) with the rows x (m, k) as integers."""
    x = x if divisor is None else x / divisor
    m, width = x.shape
    if m <= _ROWS:
        return integers.scaled_dots(codes, scales, zeros, *digits(x, bits), DIGIT_BASE, out)
    parts: list[Any] = [None] * -(-m // _ROWS)

    def run(i: int) -> None:
        parts[i] = digits(x[i * _ROWS : (i + 1) * _ROWS], bits)

    for_each(run, [(i,) for i in range(len(parts))], coarse=m * width >= COARSE)
    of_x = np.concatenate([part for part, _ in parts], axis=1), np.concatenate([scale for _, scale in parts])
    return integers.scaled_dots(codes, scales, zeros, *of_x, DIGIT_BASE, out)


def _grouped_product(
    x: Array, divisor: Array | None, activation_bits: int, matrix: GroupedCodes, out: Array | None = None
) -> Array:
    """Return the product (n, m) of a matrix (n, k) of codes in groups with a few rows x (m, k)."""
    return matrix.product(rounded(x if divisor is None else x / divisor, activation_bits, (-1,)), out)


def _float_product(
    x: Array,
    codes: Array,
    scales: Array,
    zeros: Array | None,
    divisor: Array | None,
    activation_bits: int,
    bits: int,
    group: int,
    out: Array | None = None,
) -> Array:
    """Return the product (n, m) of a quantized matrix (n, k) with a few rows x (m, k) as floats.

    A group of codes is multiplied with its part of x before its scale: y[n, m] = sum_g scales[n, g] *
    (sum_k codes[n, g, k] x[m, g, k] - zeros[n, g] sum_k x[m, g, k]).
    """
    x = rounded(x if divisor is None else x / divisor, activation_bits, (-1,))
    n, (m, width) = len(codes), x.shape
    y = np.empty((n, m), x.dtype) if out is None else out
    half = codes.shape[1]  # of the width, with two codes per byte
    runs = [(i, *run) for i in range(0, width, half) for run in _runs(i, min(i + half, width), group)]
    # The columns of x for each run, (groups, size, m), and their sums.
    columns = [
        np.ascontiguousarray(x[:, first : first + count * size].reshape(m, count, size).transpose(1, 2, 0))
        for _, first, count, size in runs
    ]
    totals = [] if zeros is None else [part.sum(axis=1, keepdims=True) for part in columns]
    step = max(1, min(_PIECE // width, -(-n // shares())))

    def run(start: int) -> None:
        rows = slice(start, min(start + step, n))
        own = halves(codes[rows]) if bits <= 4 else (codes[rows],)
        values = [part.astype(x.dtype) for part in own]
        scale = scales if len(scales) == 1 else scales[rows]
        zero = zeros if zeros is None or len(zeros) == 1 else zeros[rows]
        total = y[rows]
        total[...] = 0
        for i, (begin, first, count, size) in enumerate(runs):
            part = values[begin // half][:, first - begin : first - begin + count * size]
            sums = matmul(part.reshape(-1, count, size).transpose(1, 0, 2), columns[i])
            groups = slice(first // group, first // group + count)
            if zero is not None:
                sums -= zero[:, groups].T[:, :, None] * totals[i]
            sums *= scale[:, groups].T[:, :, None]
            total += sums.sum(axis=0)

    for_each(run, [(start,) for start in range(0, n, step)], coarse=n * width >= _COARSE_FEW)
    return y


def _runs(start: int, stop: int, group: int) -> Iterator[tuple[int, int, int]]:
    """Divide the columns start:stop into groups: (first column, number of groups, size), where a group that
    is cut at an end is separate."""
    first = min(stop, -(-start // group) * group)
    whole = (stop - first) // group
    rest = first + whole * group
    if first > start:
        yield start, 1, first - start
    if whole:
        yield first, whole, group
    if stop > rest:
        yield rest, 1, stop - rest


def _rows(parts: Sequence[Array | None]) -> Array | None:
    """The consecutive rows of arrays in memory as one matrix, or None."""
    arrays = [part for part in parts if isinstance(part, np.ndarray)]
    return consecutive(arrays) if len(arrays) == len(parts) else None
