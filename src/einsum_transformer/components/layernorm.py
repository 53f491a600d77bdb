"""LayerNorm: y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias (Ba, Kiros and Hinton, 2016)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np

from einsum_transformer.engine import einsum, weight_grad
from einsum_transformer.tree import static

Array = np.ndarray


class Saved(NamedTuple):
    """Activations saved for `LayerNorm.backward`."""

    x: Array
    mean: Array
    rstd: Array


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """Weights in checkpoint layout. Gradients are returned as a LayerNorm."""

    weight: Annotated[Array, "d"]
    bias: Annotated[Array, "d"] | None = None
    eps: float = static(default=1e-5)

    def forward(self, x: Array) -> tuple[Array, Saved]:
        mean = einsum("btd->bt", x) / x.shape[-1]
        y = x - mean[..., None]
        rstd = 1 / np.sqrt(einsum("btd,btd->bt", y, y) / x.shape[-1] + self.eps)
        y *= rstd[..., None]
        y *= self.weight
        if self.bias is not None:
            y += self.bias
        return y, Saved(x, mean, rstd)

    def backward(self, dy: Array, saved: Saved) -> tuple[Array, LayerNorm]:
        x, mean, rstd = saved
        # y = normed * weight + bias
        normed = x - mean[..., None]
        normed *= rstd[..., None]
        dweight = weight_grad(self.weight, "btd,btd->d", dy, normed)
        dbias = weight_grad(self.bias, "btd->d", dy)
        dnormed = dy * self.weight
        # normed = (x - mean) * rstd, and both depend on every x of the row
        projection = einsum("btd,btd->bt", dnormed, normed) / x.shape[-1]
        dx = dnormed
        dx -= (einsum("btd->bt", dnormed) / x.shape[-1])[..., None]
        dx -= np.multiply(normed, projection[..., None], out=normed)
        dx *= rstd[..., None]
        return dx, LayerNorm(weight=dweight, bias=dbias, eps=self.eps)
