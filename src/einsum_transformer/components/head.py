"""Output head: logits = x . weight^T, with a matrix of its own or the embedding's (tied)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np

from einsum_transformer.engine import einsum, weight_grad

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class Head:
    """Weights in checkpoint layout. A gradient is another Head."""

    weight: Annotated[Array, "v d"]

    def forward(self, x: Array) -> tuple[Array, Array]:
        return einsum("btd,vd->btv", x, self.weight), x

    def backward(self, dlogits: Array, saved: Array) -> tuple[Array, Head]:
        x = saved
        # logits = einsum("btd,vd->btv", x, weight)
        dx = einsum("btv,vd->btd", dlogits, self.weight)
        return dx, Head(weight_grad("btv,btd->vd", dlogits, x, self.weight))
