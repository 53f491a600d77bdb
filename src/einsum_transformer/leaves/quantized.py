"""Quantized weights: codes and scales in memory (real), or their values as an array (simulated).

Both round the activations that they are multiplied with in a forward pass. They have no gradient. That of the
activations is exact for the rounded weight, and passes the rounding of activations unchanged
(straight-through, Bengio et al., 2013).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from einsum_transformer.engine import Equation, Leaf, ShapeArray
from einsum_transformer.engine.blas import FEW, shares
from einsum_transformer.engine.contract import product
from einsum_transformer.engine.parallel import for_each
from einsum_transformer.numerics.uniform import (
    Quantized,
    dequantize,
    pack_nibbles,
    rounded,
    unpack_nibbles,
)

Array = np.ndarray

_COARSE = 1 << 19
"""Elements of a weight from which its blocks are divided over the threads."""
_BLOCK = 1 << 21
"""Elements that are dequantized at once: 8 MB of float32, which stay in the CPU cache."""


class QuantizedWeight(Leaf):
    """A weight with values of a few bits, and the bits of the activations that it is multiplied with.

    out_axes: number of leading axes of `shape` that are outputs, the rows of the quantized matrix.
    """

    trained = False

    def __init__(
        self, bits: int, shape: tuple[int, ...], dtype: Any, out_axes: int, activation_bits: int
    ) -> None:
        self.bits: int = bits
        self.shape: tuple[int, ...] = shape
        self.dtype: np.dtype = np.dtype(dtype)
        self.out_axes: int = out_axes
        self.activation_bits: int = activation_bits

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

    def writable(self) -> QuantizedWeight:
        return self

    def contract(self, equation: str, operands: tuple[Any, ...], position: int, order: str = "K") -> Array:
        parsed = Equation.parse(equation)
        if len(operands) != 2:
            return product(equation, (*operands[:position], self.array(), *operands[position + 1 :]), order)
        x, weight, term = operands[1 - position], parsed.inputs[position], parsed.inputs[1 - position]
        inputs = weight[self.out_axes :]
        if not set(inputs) & set(parsed.output) and not isinstance(x, ShapeArray):
            x = rounded(x, self.activation_bits, tuple(map(term.index, inputs)))
        return self._product(equation, parsed, x, position, order)

    def _product(self, equation: str, parsed: Equation, x: Any, position: int, order: str) -> Array:
        """The product with x."""
        weight = ShapeArray(self.shape, self.dtype) if isinstance(x, ShapeArray) else self.array()
        return product(equation, (weight, x) if position == 0 else (x, weight), order)


class SimulatedWeight(QuantizedWeight):
    """The values of a quantized weight as an array: float products, without less memory."""

    def __init__(self, weight: Array, bits: int, out_axes: int, activation_bits: int) -> None:
        super().__init__(bits, weight.shape, weight.dtype, out_axes, activation_bits)
        self.weight: Array = weight

    def array(self) -> Array:
        return self.weight

    def values(self, indices: Array) -> Array:
        return np.take(self.weight, indices, axis=0)

    def parts(self) -> dict[str, Any]:
        return {"weight": self.weight}

    def with_parts(self, parts: Mapping[str, Any]) -> SimulatedWeight:
        return SimulatedWeight(parts["weight"], self.bits, self.out_axes, self.activation_bits)


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
    ) -> None:
        super().__init__(bits, shape, dtype, out_axes, activation_bits)
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
        return cls(*parts, bits, shape, dtype, out_axes, activation_bits)

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
        parts = {"codes": self.codes, "scales": self.scales}
        return parts if self.zeros is None else {**parts, "zeros": self.zeros}

    def with_parts(self, parts: Mapping[str, Any]) -> PackedWeight:
        own = parts["codes"], parts["scales"], parts.get("zeros"), self.group, self.bits
        return PackedWeight(*own, self.shape, self.dtype, self.out_axes, self.activation_bits)

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
            codes = unpack_nibbles(codes, self.width, signed=zeros is None)
        if len(scales) > 1:
            scales, zeros = scales[rows], None if zeros is None else zeros[rows]
        return dequantize(Quantized(codes, scales, zeros, self.group), self.dtype, out)
