"""Matrices that are stored in few bytes and converted to floats in blocks, inside a product."""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from einsum_transformer.engine import Equation, Leaf, ShapeArray
from einsum_transformer.engine.blas import FEW, shares
from einsum_transformer.engine.contract import product, report
from einsum_transformer.engine.parallel import for_each
from einsum_transformer.engine.recorder import reads_events
from einsum_transformer.engine.replay import recorded

Array = np.ndarray

COARSE = 1 << 19
"""Elements of a weight from which its blocks are divided over the threads."""
_BLOCK = 1 << 21
"""Elements that are converted at once: 8 MB of float32, which stay in the CPU cache."""


class ByRows(NamedTuple):
    """How a matrix (n, k) is multiplied with rows of x (m, k)."""

    function: Callable[..., Array]
    """(rows, *arguments) -> (n, m); it has an argument `out` too."""
    arguments: tuple[Any, ...]
    how: str


class Blockwise(Leaf):
    """A weight that is a matrix (n, k) in memory.

    out_axes: number of leading axes of `shape` that are outputs, the rows of the matrix. width: k.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any, out_axes: int) -> None:
        self.shape: tuple[int, ...] = shape
        self.dtype: np.dtype = np.dtype(dtype)
        self.out_axes: int = out_axes
        self.width: int = math.prod(shape[out_axes:])
        self._inner = math.prod(shape[1:out_axes])
        """Rows of the matrix per element of the first axis."""

    @property
    def repeatable(self) -> bool:  # type: ignore[override]
        return True

    @abstractmethod
    def matrix(self, rows: Any, out: Array | None = None) -> Array:
        """Return the values of rows of the matrix, in `out` if it is given."""

    @abstractmethod
    def by_rows(self, count: int) -> ByRows | None:
        """Return how the matrix is multiplied with `count` rows of x; None: in blocks."""

    def product_with_rows(self, count: int) -> str | None:
        how = self.by_rows(count)
        stored = next(iter(self.parts().values()))
        return None if how is None else f"{how.how}: {len(stored)} x {self.width} x {count}"

    @property
    def stored_type(self) -> np.dtype:
        return next(iter(self.parts().values())).dtype

    def prepared(self, x: Array, axes: tuple[int, ...]) -> Array:
        """Return x for a product in blocks; axes: those of the inputs of the weight."""
        return x

    def array(self) -> Array:
        return self._block(0, self.shape[0])

    def _block(self, start: int, stop: int) -> Array:
        """The values at start:stop of the first axis."""
        matrix = np.empty(((stop - start) * self._inner, self.width), self.dtype)
        step = max(1, -(-len(matrix) // shares()))

        def fill(first: int) -> None:
            rows = slice(first, min(first + step, len(matrix)))
            begin = start * self._inner
            self.matrix(slice(begin + rows.start, begin + rows.stop), matrix[rows])

        firsts = [(first,) for first in range(0, len(matrix), step)]
        for_each(fill, firsts, coarse=matrix.size >= COARSE)
        return matrix.reshape(-1, *self.shape[1:])

    def rows(self, indices: Array) -> Any:
        if any(isinstance(part, ShapeArray) for part in self.parts().values()):
            return ShapeArray((*indices.shape, *self.shape[1:]), self.dtype)
        return self.matrix(indices.ravel()).reshape(*indices.shape, *self.shape[1:])

    def contract(self, equation: str, operands: tuple[Any, ...], position: int, order: str = "K") -> Array:
        if len(operands) != 2:
            return product(equation, (*operands[:position], self.array(), *operands[position + 1 :]), order)
        parsed, x = Equation.parse(equation), operands[1 - position]
        if isinstance(x, ShapeArray):
            weight = ShapeArray.unallocated(self.shape, self.dtype)
            return product(equation, (weight, x) if position == 0 else (x, weight), order)
        weight, term = parsed.inputs[position], parsed.inputs[1 - position]
        inputs = weight[self.out_axes :]
        if set(inputs) <= set(term) and not set(inputs) & set(parsed.output):
            y = self._forward(equation, parsed, x, position)
            if y is not None:
                return y
            x = self.prepared(x, tuple(map(term.index, inputs)))
        return self._in_blocks(equation, parsed, x, position, order)

    def _forward(self, equation: str, parsed: Equation, x: Any, position: int) -> Array | None:
        """The product as one of two matrices, or None."""
        weight, term = parsed.inputs[position], parsed.inputs[1 - position]
        outputs, inputs = weight[: self.out_axes], weight[self.out_axes :]
        outer = "".join(letter for letter in term if letter not in inputs)
        once = len(set(term)) == len(term) and len(set(weight)) == len(weight)
        if not once or set(outer) & set(outputs) or sorted(outer + outputs) != sorted(parsed.output):
            return None
        count = math.prod(x.shape[term.index(letter)] for letter in outer)
        how = self.by_rows(count)
        if how is None:
            return None
        parsed.sizes([self.shape, x.shape] if position == 0 else [x.shape, self.shape])
        start = time.perf_counter()
        rows = x.transpose([term.index(letter) for letter in outer + inputs])
        shape = rows.shape[: len(outer)]
        y = recorded(how.function, rows.reshape(count, self.width), *how.arguments)
        y = y.reshape(*self.shape[: self.out_axes], *shape)
        y = y.transpose([(outputs + outer).index(letter) for letter in parsed.output])
        if reads_events():
            operands = [x, ShapeArray.unallocated(self.shape, self.stored_type)]
            text, seconds = self.product_with_rows(count) or "", time.perf_counter() - start
            report(equation, parsed, operands[::-1] if position == 0 else operands, y, text, start, seconds)
        return y

    def _in_blocks(self, equation: str, parsed: Equation, x: Any, position: int, order: str) -> Array:
        """The product with x, in blocks of the weight's first axis."""

        def of(weight: Any, x: Any) -> Array:
            return product(equation, (weight, x) if position == 0 else (x, weight), order)

        weight, term = parsed.inputs[position], parsed.inputs[1 - position]
        count, step = self.shape[0], max(1, _BLOCK // math.prod(self.shape[1:]))
        few = math.prod(size for letter, size in zip(term, x.shape) if letter not in weight) <= FEW
        coarse = few and math.prod(self.shape) >= COARSE
        if coarse:
            # Each thread multiplies its own blocks, which stay in its cache.
            step = min(step, -(-count // shares()))
        if count <= step:
            return of(self.array(), x)
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
