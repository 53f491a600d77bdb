"""Token embedding: x[b, t] = scale * weight[token[b, t]]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np

from einsum_transformer.engine.contract import add_rows, take_rows
from einsum_transformer.tree import static

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class Embedding:
    """Weights in checkpoint layout, a row for each token (or each position, where positions are learned).
    A gradient is another Embedding."""

    weight: Annotated[Array, "v d"]
    scale: float = static(default=1.0)

    def forward(self, tokens: Array) -> tuple[Array, Array]:
        x = take_rows(self.weight, tokens)
        if self.scale != 1:
            x *= np.asarray(self.scale, x.dtype)
        return x, tokens

    def backward(self, dy: Array, saved: Array) -> Embedding:
        # x = scale * take_rows(weight, tokens): rows of tokens that occur more than once add up
        if self.scale != 1:
            dy = dy * np.asarray(self.scale, dy.dtype)
        return Embedding(weight=add_rows(self.weight, saved, dy), scale=self.scale)
