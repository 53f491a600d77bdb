"""Token embedding: x[b, t] = weight[token[b, t]]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np

from einsum_transformer.engine.contract import add_rows, take_rows

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class Embedding:
    """Weights in checkpoint layout. A gradient is another Embedding."""

    weight: Annotated[Array, "v d"]

    def forward(self, tokens: Array) -> tuple[Array, Array]:
        return take_rows(self.weight, tokens), tokens

    def backward(self, dy: Array, saved: Array) -> Embedding:
        # x = take_rows(weight, tokens): rows of tokens that occur more than once add up
        return Embedding(add_rows(self.weight, saved, dy))
