"""Quantized weights: codes and scales in memory (real), or their values as an array (simulated).

Both round the activations that they are multiplied with in a forward pass. They have no gradient. That of the
activations is exact for the rounded weight, and passes the rounding of activations unchanged
(straight-through, Bengio et al., 2013).
"""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from einsum_transformer.engine import Equation, Leaf, ShapeArray, integers
from einsum_transformer.engine.blas import FEW, matmul, shares
from einsum_transformer.engine.contract import product, report
from einsum_transformer.engine.parallel import for_each
from einsum_transformer.engine.recorder import reads_events
from einsum_transformer.engine.replay import recorded
from einsum_transformer.engine.side_by_side import consecutive
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

_COARSE = 1 << 19
"""Elements of a weight from which its blocks are divided over the threads."""
_PIECE = 1 << 19
"""Elements that are converted at once for few rows, so that they stay in the cache of one core."""
_COARSE_FEW = 1 << 22
"""Elements of a weight from which a product with few rows is divided over the threads."""
_FEW_ROWS = 8
"""Rows of x up to which three integer products, for more than 8 bits, are faster than one of floats."""
_ROWS = 128
"""Rows of activations that are quantized at once, so that they stay in the CPU cache."""
_BLOCK = 1 << 21
"""Elements that are dequantized at once: 8 MB of float32, which stay in the CPU cache."""


class QuantizedWeight(Leaf):
    """A weight with values of a few bits, and the bits of the activations that it is multiplied with.

    out_axes: number of leading axes of `shape` that are outputs, the rows of the quantized matrix. divisor:
    the columns of the matrix are divided by it (see `quantization.awq`), and so are the activations before
    they are rounded; None: they are not.
    """

    trained = False

    def __init__(
        self,
        bits: int,
        shape: tuple[int, ...],
        dtype: Any,
        out_axes: int,
        activation_bits: int,
        divisor: Array | None = None,
    ) -> None:
        self.bits: int = bits
        self.shape: tuple[int, ...] = shape
        self.dtype: np.dtype = np.dtype(dtype)
        self.out_axes: int = out_axes
        self.activation_bits: int = activation_bits
        self.divisor: Array | None = divisor

    @abstractmethod
    def values(self, indices: Array) -> Array:
        """Return the values at indices of the first axis."""

    def rows(self, indices: Array) -> Any:
        """The rows of an embedding, rounded as the activations are."""
        if any(isinstance(part, ShapeArray) for part in self.parts().values()):
            return ShapeArray((*indices.shape, *self.shape[1:]), self.dtype)
        return rounded(self.values(indices), self.activation_bits, (-1,))

    def add_rows(self, indices: Array, dy: Array) -> None:
        return None

    def bits_per_element(self) -> int:
        return self.bits

    def writable(self) -> QuantizedWeight:
        return self

    def contract(self, equation: str, operands: tuple[Any, ...], position: int, order: str = "K") -> Array:
        parsed = Equation.parse(equation)
        if len(operands) != 2:
            return product(equation, (*operands[:position], self.array(), *operands[position + 1 :]), order)
        x, weight, term = operands[1 - position], parsed.inputs[position], parsed.inputs[1 - position]
        inputs = weight[self.out_axes :]
        if not set(inputs) & set(parsed.output) and not isinstance(x, ShapeArray):
            y = self._by_rows(equation, parsed, x, position)
            if y is not None:
                return y
            axes = tuple(map(term.index, inputs))
            if self.divisor is None:
                x = rounded(x, self.activation_bits, axes)
            else:
                divisor = self.divisor.reshape(self.shape[self.out_axes :]).transpose(np.argsort(axes))
                sizes = [x.shape[i] if i in axes else 1 for i in range(len(term))]
                divisor = divisor.reshape(sizes)
                x = rounded(x / divisor, self.activation_bits, axes) * divisor
        return self._product(equation, parsed, x, position, order)

    def _by_rows(self, equation: str, parsed: Equation, x: Any, position: int) -> Array | None:
        """The product with the rows of x, before they are rounded, or None if it is computed in blocks."""
        return None

    def _product(self, equation: str, parsed: Equation, x: Any, position: int, order: str) -> Array:
        """The product with x."""
        weight = ShapeArray(self.shape, self.dtype) if isinstance(x, ShapeArray) else self.array()
        return product(equation, (weight, x) if position == 0 else (x, weight), order)


class SimulatedWeight(QuantizedWeight):
    """The values of a quantized weight as an array: float products, without less memory."""

    def __init__(
        self, weight: Array, bits: int, out_axes: int, activation_bits: int, divisor: Array | None = None
    ) -> None:
        super().__init__(bits, weight.shape, weight.dtype, out_axes, activation_bits, divisor)
        self.weight: Array = weight

    def array(self) -> Array:
        return self.weight

    def values(self, indices: Array) -> Array:
        return np.take(self.weight, indices, axis=0)

    def parts(self) -> dict[str, Any]:
        return {"weight": self.weight} | ({} if self.divisor is None else {"divisor": self.divisor})

    def with_parts(self, parts: Mapping[str, Any]) -> SimulatedWeight:
        own = parts["weight"], self.bits, self.out_axes, self.activation_bits
        return SimulatedWeight(*own, parts.get("divisor"))


class PackedWeight(QuantizedWeight):
    """A weight as integer codes, two per byte with at most 4 bits, and scales; dequantized in blocks."""

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
        super().__init__(bits, shape, dtype, out_axes, activation_bits, divisor)
        self.codes: Array = codes
        self.scales: Array = scales
        self.zeros: Array | None = zeros
        self.group: int = group
        self.width: int = math.prod(shape[out_axes:])
        self._inner = math.prod(shape[1:out_axes])
        """Rows of the matrix per element of the first axis."""

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

    def array(self) -> Array:
        return self._block(0, self.shape[0])

    def _block(self, start: int, stop: int) -> Array:
        """The values at start:stop of the first axis."""
        matrix = np.empty(((stop - start) * self._inner, self.width), self.dtype)
        step = max(1, -(-len(matrix) // shares()))

        def fill(first: int) -> None:
            rows = slice(first, min(first + step, len(matrix)))
            self._matrix(
                slice(start * self._inner + rows.start, start * self._inner + rows.stop), matrix[rows]
            )

        firsts = [(first,) for first in range(0, len(matrix), step)]
        for_each(fill, firsts, coarse=matrix.size >= _COARSE)
        return matrix.reshape(-1, *self.shape[1:])

    def values(self, indices: Array) -> Array:
        return self._matrix(indices.ravel()).reshape(*indices.shape, *self.shape[1:])

    def parts(self) -> dict[str, Any]:
        parts = {"codes": self.codes, "scales": self.scales, "zeros": self.zeros, "divisor": self.divisor}
        return {name: part for name, part in parts.items() if part is not None}

    def with_parts(self, parts: Mapping[str, Any]) -> PackedWeight:
        own = parts["codes"], parts["scales"], parts.get("zeros"), self.group, self.bits
        form = self.shape, self.dtype, self.out_axes, self.activation_bits
        return PackedWeight(*own, *form, parts.get("divisor"))

    def packed(self) -> tuple[dict[str, Array], list[int]]:
        return self.parts(), [len(self.codes), self.width, self.bits, self.group]

    @property
    def repeatable(self) -> bool:  # type: ignore[override]
        return True

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

    def _by_rows(self, equation: str, parsed: Equation, x: Any, position: int) -> Array | None:
        """With integers, if they are exact or the rows are few, or with floats, if the rows are few."""
        weight, term = parsed.inputs[position], parsed.inputs[1 - position]
        outer, outputs, inputs = (
            self._outer(parsed, position),
            weight[: self.out_axes],
            weight[self.out_axes :],
        )
        if outer is None:
            return None
        count = math.prod(x.shape[term.index(letter)] for letter in outer)
        digit = self.activation_bits <= 8
        integer = self.bits == 8 and self.scales.shape[1] == 1 and self.width <= integers.LONGEST
        integer = integer and (digit or (count <= _FEW_ROWS and self.dtype == np.float32))
        integer = integer and integers.available()
        if count > (math.inf if integer else FEW):
            return None
        parsed.sizes([self.shape, x.shape] if position == 0 else [x.shape, self.shape])
        start = time.perf_counter()
        rows = x.transpose([term.index(letter) for letter in outer + inputs])
        shape = rows.shape[: len(outer)]
        rows = rows.reshape(count, self.width)
        rows = rows if self.divisor is None else rows / self.divisor
        given = self.codes, self.scales, self.zeros, rows, self.activation_bits
        if integer:
            y = recorded(_integer_product, *given)
        else:
            y = recorded(_float_product, *given, self.bits, self.group)
        y = y.reshape(*self.shape[: self.out_axes], *shape)
        y = y.transpose([(outputs + outer).index(letter) for letter in parsed.output])
        if reads_events():
            ordered = [x, ShapeArray(self.shape, self.codes.dtype)]
            kind = f"{1 if digit else 3} int8" if integer else "dequantized"
            how = f"{kind}: {len(self.codes)} x {self.width} x {count}"
            seconds = time.perf_counter() - start
            report(equation, parsed, ordered[::-1] if position == 0 else ordered, y, how, seconds)
        return y

    def _outer(self, parsed: Equation, position: int) -> str | None:
        """The letters of x besides the inputs of the weight, if the product is that of two matrices: x has
        none of the outputs, and all letters but the inputs are in the result."""
        weight, term = parsed.inputs[position], parsed.inputs[1 - position]
        outputs, inputs = weight[: self.out_axes], weight[self.out_axes :]
        outer = "".join(letter for letter in term if letter not in inputs)
        plain = len(set(term)) == len(term) and len(set(weight)) == len(weight) and set(inputs) <= set(term)
        if not plain or set(outer) & set(outputs) or sorted(outer + outputs) != sorted(parsed.output):
            return None
        return outer

    def _product(self, equation: str, parsed: Equation, x: Any, position: int, order: str) -> Array:
        """The product with x, in blocks of the weight's first axis."""

        def of(weight: Any, x: Any) -> Array:
            return product(equation, (weight, x) if position == 0 else (x, weight), order)

        if isinstance(x, ShapeArray):
            return super()._product(equation, parsed, x, position, order)
        weight, term = parsed.inputs[position], parsed.inputs[1 - position]
        count, step = self.shape[0], max(1, _BLOCK // math.prod(self.shape[1:]))
        few = math.prod(size for letter, size in zip(term, x.shape) if letter not in weight) <= FEW
        coarse = few and math.prod(self.shape) >= _COARSE
        if coarse:
            # Each thread multiplies its own blocks, which stay in its cache.
            step = min(step, -(-count // shares()))
        if count <= step:
            return super()._product(equation, parsed, x, position, order)
        letter = weight[0]
        parts: list[Any] = [None] * -(-count // step)

        def run(i: int) -> None:
            block = slice(i * step, min((i + 1) * step, count))
            part = x[(slice(None),) * term.index(letter) + (block,)] if letter in term else x
            parts[i] = of(self._block(block.start, block.stop), part)

        for_each(run, [(i,) for i in range(len(parts))], coarse)
        if letter in parsed.output:
            return np.concatenate(parts, axis=parsed.output.index(letter))
        total = parts[0]
        for part in parts[1:]:
            total += part
        return total

    def _matrix(self, rows: Any, out: Array | None = None) -> Array:
        """The values of rows of the matrix."""
        codes, scales, zeros = self.codes[rows], self.scales, self.zeros
        if self.bits <= 4:
            codes = unpack_nibbles(codes, self.width)
        if len(scales) > 1:
            scales, zeros = scales[rows], None if zeros is None else zeros[rows]
        return dequantize(Quantized(codes, scales, zeros, self.group, self.divisor), self.dtype, out)


def _integer_product(
    codes: Array, scales: Array, zeros: Array | None, x: Array, bits: int, out: Array | None = None
) -> Array:
    """Return the product (n, m) of a quantized matrix (n, k) with the rows x (m, k) as integers."""
    m, width = x.shape
    if m <= _ROWS:
        return integers.scaled_dots(codes, scales, zeros, *digits(x, bits), DIGIT_BASE, out)
    parts: list[Any] = [None] * -(-m // _ROWS)

    def run(i: int) -> None:
        parts[i] = digits(x[i * _ROWS : (i + 1) * _ROWS], bits)

    for_each(run, [(i,) for i in range(len(parts))], coarse=m * width >= _COARSE)
    of_x = np.concatenate([part for part, _ in parts], axis=1), np.concatenate([scale for _, scale in parts])
    return integers.scaled_dots(codes, scales, zeros, *of_x, DIGIT_BASE, out)


def _float_product(
    codes: Array,
    scales: Array,
    zeros: Array | None,
    x: Array,
    activation_bits: int,
    bits: int,
    group: int,
    out: Array | None = None,
) -> Array:
    """Return the product (n, m) of a quantized matrix (n, k) with a few rows x (m, k) as floats.

    A group of codes is multiplied with its part of x before its scale: y[n, m] = sum_g scales[n, g] *
    (sum_k codes[n, g, k] x[m, g, k] - zeros[n, g] sum_k x[m, g, k]).
    """
    x = rounded(x, activation_bits, (-1,))
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
