"""Token embedding: x[b, t] = scale * weight[token[b, t]]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np

from einsum_transformer.engine.contract import add_rows, take_rows
from einsum_transformer.tree import static

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class Embedding:
    """Weights in checkpoint layout, one row per token (or per position, for learned positions). Gradients are
    returned as an Embedding."""

    weight: Annotated[Array, "v d"]
    scale: float = static(default=1.0)

    def forward(self, tokens: Array) -> tuple[Array, Array]:
        x = take_rows(self.weight, tokens)
        if self.scale != 1:
            x *= x.dtype.type(self.scale)
        return x, tokens

    def backward(self, dy: Array, saved: Array, into: Any = None) -> Embedding:
        """into: the gradient of the matrix as output head (tied embeddings), to which this one is added."""
        # x = scale * take_rows(weight, tokens): the gradients of repeated tokens are summed
        if self.scale != 1:
            dy = dy * dy.dtype.type(self.scale)
        return Embedding(weight=add_rows(self.weight, saved, dy, into), scale=self.scale)
