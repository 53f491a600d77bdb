"""Weights that sum up the activations that they are multiplied with."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from einsum_transformer.engine import Equation, Leaf, ShapeArray, einsum
from einsum_transformer.engine.contract import product

Array = np.ndarray


class Calibrated(Leaf):
    """A matrix, and the second moments of its inputs in forward passes.

    hessian: the sum of x_i x_l over the rows x, (i, l) in float64; None before the first product. count: the
    number of rows. Products in which x is not a set of rows (a batch letter of the weight) are not counted.
    """

    def __init__(self, weight: Any, out_axes: int) -> None:
        self.weight: Any = weight
        self.shape: tuple[int, ...] = tuple(weight.shape)
        self.dtype: np.dtype = weight.dtype
        self.out_axes: int = out_axes
        self.hessian: Array | None = None
        self.count: int = 0

    def array(self) -> Array:
        return np.asarray(self.weight)

    def contract(self, equation: str, operands: tuple[Any, ...], position: int, order: str = "K") -> Array:
        if len(operands) == 2 and not isinstance(operands[1 - position], ShapeArray):
            self._add(Equation.parse(equation), operands[1 - position], position)
        return product(equation, (*operands[:position], self.weight, *operands[position + 1 :]), order)

    def _add(self, parsed: Equation, x: Array, position: int) -> None:
        weight, term = parsed.inputs[position], parsed.inputs[1 - position]
        outputs, inputs = weight[: self.out_axes], weight[self.out_axes :]
        outer = "".join(letter for letter in term if letter not in inputs)
        if set(outputs) & set(term) or not set(inputs) <= set(term) or set(inputs) & set(parsed.output):
            return
        rows = x.transpose([term.index(letter) for letter in outer + inputs])
        rows = rows.reshape(-1, math.prod(self.shape[self.out_axes :]))
        added = einsum("ti,tl->il", rows, rows)
        self.count += len(rows)
        self.hessian = added.astype(np.float64) if self.hessian is None else self.hessian + added
