"""Output head: logits = scale (x . weight^T + bias), with a matrix of its own or the embedding's (tied)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np

from einsum_transformer.engine import einsum, weight_grad
from einsum_transformer.numerics.softcap import softcap, softcap_derivative
from einsum_transformer.tree import static

Array = np.ndarray
Saved = tuple[Array, Array | None]


@dataclass(frozen=True, slots=True)
class Head:
    """Weights in checkpoint layout. A gradient is another Head."""

    weight: Annotated[Array, "v d"]
    bias: Annotated[Array, "v"] | None = None
    cap: float | None = static(default=None)
    """Logits are softly capped, cap * tanh(logits / cap)."""
    scale: float = static(default=1.0)
    """Logits are multiplied by it, before the cap."""

    def forward(self, x: Array, keep: bool = True) -> tuple[Array, Saved]:
        """keep: whether `backward` follows, which needs a copy of capped logits: the loss overwrites them."""
        logits = einsum("btd,vd->btv", x, self.weight)
        if self.bias is not None:
            logits += self.bias
        if self.scale != 1:
            logits *= self.scale
        if self.cap is None:
            return logits, (x, None)
        logits = softcap(logits, self.cap)
        return logits, (x, logits.copy() if keep else None)

    def backward(self, dlogits: Array, saved: Saved) -> tuple[Array, Head]:
        x, capped = saved
        if self.cap is not None:
            # logits = cap * tanh(raw / cap)
            assert capped is not None
            dlogits = dlogits * softcap_derivative(capped, self.cap)
        if self.scale != 1:
            # raw = scale * product
            dlogits = dlogits * self.scale
        # product = einsum("btd,vd->btv", x, weight) + bias
        dx = einsum("btv,vd->btd", dlogits, self.weight)
        dweight = weight_grad("btv,btd->vd", dlogits, x, self.weight)
        return dx, Head(dweight, weight_grad("btv->v", dlogits, self.bias), self.cap, self.scale)
