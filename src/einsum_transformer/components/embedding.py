"""Token embedding: x[b, t] = weight[token[b, t]]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np

from einsum_transformer.engine.contract import take_rows

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class Embedding:
    """Weights in checkpoint layout. A gradient is another Embedding."""

    weight: Annotated[Array, "v d"]

    def forward(self, tokens: Array) -> tuple[Array, Array]:
        return take_rows(self.weight, tokens), tokens

    def backward(self, dy: Array, saved: Array) -> Embedding:
        # Rows of tokens that occur more than once add up.
        dweight = np.zeros(self.weight.shape, dy.dtype)
        np.add.at(dweight, saved.ravel(), np.ascontiguousarray(dy).reshape(saved.size, -1))
        return Embedding(dweight)
