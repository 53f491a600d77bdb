"""Frozen weights, which are used in products but get no gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from einsum_transformer.engine import Leaf
from einsum_transformer.engine.contract import product, take_rows

Array = np.ndarray


class Frozen(Leaf):
    """`weight`, an array or another leaf, without a gradient."""

    trained = False

    def __init__(self, weight: Any) -> None:
        self.weight = weight
        self.shape: tuple[int, ...] = tuple(weight.shape)
        self.dtype: np.dtype = weight.dtype
        self.repeatable: bool = not isinstance(weight, Leaf) or weight.repeatable

    def base_weight(self) -> Any:
        return self.weight

    def array(self) -> Array:
        return self.weight.array() if isinstance(self.weight, Leaf) else self.weight

    def resident(self) -> Array | None:
        return self.weight if isinstance(self.weight, Array) else None

    def rows(self, indices: Array) -> Array:
        return take_rows(self.weight, indices)

    def contract(self, equation: str, operands: tuple[Any, ...], position: int, order: str = "K") -> Array:
        return product(equation, (*operands[:position], self.weight, *operands[position + 1 :]), order)

    def add_rows(self, indices: Array, dy: Array) -> None:
        return None

    def parts(self) -> dict[str, Any]:
        return {"weight": self.weight}

    def with_parts(self, parts: Mapping[str, Any]) -> Frozen:
        return Frozen(**parts)

    def writable(self) -> Frozen:
        return self
