"""Output head: logits = scale * (x . weight^T + bias), with a separate matrix or tied embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np

from einsum_transformer.engine import einsum, weight_grad
from einsum_transformer.numerics.softcap import softcap, softcap_derivative
from einsum_transformer.tree import static

Array = np.ndarray


class Saved(NamedTuple):
    """Activations saved for `Head.backward`."""

    x: Array
    capped: Array | None
    """A copy of the soft-capped logits; None without a soft cap."""


@dataclass(frozen=True, slots=True)
class Head:
    """Weights in checkpoint layout. Gradients are returned as a Head."""

    weight: Annotated[Array, "v d"]
    bias: Annotated[Array, "v"] | None = None
    scale: float = static(default=1.0)
    cap: float | None = static(default=None)
    """Soft cap of the scaled logits: cap * tanh(logits / cap); None: no soft cap."""

    def forward(self, x: Array, keep: bool = True) -> tuple[Array, Saved]:
        """keep: whether to copy soft-capped logits for `backward`, since the loss overwrites them."""
        logits = einsum("btd,vd->btv", x, self.weight)
        if self.bias is not None:
            logits += self.bias
        if self.scale != 1:
            logits *= logits.dtype.type(self.scale)
        if self.cap is None:
            return logits, Saved(x, None)
        logits = softcap(logits, self.cap)
        return logits, Saved(x, logits.copy() if keep else None)

    def backward(self, dlogits: Array, saved: Saved) -> tuple[Array, Head]:
        x, capped = saved
        if self.cap is not None:
            # logits = cap * tanh(raw / cap)
            assert capped is not None
            dlogits = dlogits * softcap_derivative(capped, self.cap)
        if self.scale != 1:
            dlogits = dlogits * dlogits.dtype.type(self.scale)
        # raw = scale * (einsum("btd,vd->btv", x, weight) + bias)
        dx = einsum("btv,vd->btd", dlogits, self.weight)
        dweight = weight_grad(self.weight, "btv,btd->vd", dlogits, x)
        dbias = weight_grad(self.bias, "btv->v", dlogits)
        return dx, Head(weight=dweight, bias=dbias, scale=self.scale, cap=self.cap)
