"""A weight whose every product is a step that a recorder sees."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from einsum_transformer.engine import Leaf, einsum, tap
from einsum_transformer.engine.recorder import tapping
from einsum_transformer.tree import map_named, named_leaves

Array = np.ndarray


class Watched(Leaf):
    """A matrix whose product with what comes in, its bias added, is a step."""

    def __init__(self, place: str, weight: Any, bias: Any = None) -> None:
        self.place, self.weight, self.bias = place, weight, bias
        self.shape, self.dtype = tuple(weight.shape), weight.dtype

    def array(self) -> Array:
        return np.asarray(self.weight)

    def contract(self, equation: str, operands: tuple[Any, ...], position: int) -> Array:
        y = einsum(equation, *operands[:position], self.weight, *operands[position + 1 :])
        if tapping():  # in a forward pass
            tap(self.place, y if self.bias is None else y + self.bias)
        return y


def watched(decoder: Any, kind: type[Watched] = Watched) -> Any:
    """The decoder with its matrices watched, but for experts', which see some of the tokens only, and those
    whose result is a step already."""
    biases = {path: leaf for path, leaf in named_leaves(decoder) if path.endswith("_bias")}

    def leaf(path: str, weight: Any) -> Any:
        # Embeddings, the head and norms are called `weight`.
        if ".experts." in path or path.endswith((".weight", "bias")):
            return weight
        place = re.sub(r"^layers\.\d+\.", "", path)
        return kind(place, weight, biases.get(path.removesuffix("_proj") + "_bias"))

    return map_named(leaf, decoder)
