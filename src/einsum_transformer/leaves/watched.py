"""Weights whose products are passed to a recorder as values."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from einsum_transformer.engine import Equation, Leaf
from einsum_transformer.engine.contract import product
from einsum_transformer.engine.recorder import reads_values, tap_at
from einsum_transformer.tree import map_named, named_leaves

Array = np.ndarray


class Watched(Leaf):
    """A matrix whose product with its input, plus the bias, is passed to readers as the value `path`."""

    def __init__(self, path: str, weight: Any, bias: Any = None) -> None:
        self.path: str = path
        self.weight: Any = weight
        self.bias: Any = bias
        self.shape: tuple[int, ...] = tuple(weight.shape)
        self.dtype: np.dtype = weight.dtype
        self.repeatable: bool = not isinstance(weight, Leaf) or weight.repeatable

    def array(self) -> Array:
        return np.asarray(self.weight)

    def contract(self, equation: str, operands: tuple[Any, ...], position: int, order: str = "K") -> Array:
        y = product(equation, (*operands[:position], self.weight, *operands[position + 1 :]), order)
        parsed = Equation.parse(equation)
        # The first letter of a weight is an output axis; in a backward pass it is summed.
        if not reads_values() or parsed.inputs[position][0] not in parsed.output:
            return y
        whole = y if self.bias is None else y + self.bias
        seen = tap_at(self.path, whole)
        return y if seen is whole else seen if self.bias is None else seen - self.bias


def watched(decoder: Any, kind: type[Watched] = Watched, paths: Collection[str] | None = None) -> Any:
    """The decoder with its matrices watched, except those of experts, which process only some of the tokens,
    and those whose output is a value already. paths: only these matrices."""
    biases = {path: leaf for path, leaf in named_leaves(decoder) if path.endswith("_bias")}

    def leaf(path: str, weight: Any) -> Any:
        if not _is_watched(path) or (paths is not None and path not in paths):
            return weight
        return kind(path, weight, biases.get(path.removesuffix("_proj") + "_bias"))

    return map_named(leaf, decoder)


def watched_paths(decoder: Any) -> list[str]:
    """Return the paths of the matrices that `watched` replaces."""
    return [path for path, _ in named_leaves(decoder) if _is_watched(path)]


def _is_watched(path: str) -> bool:
    # Embeddings, the head and norms are called `weight`.
    return ".experts." not in path and not path.endswith((".weight", "bias"))
