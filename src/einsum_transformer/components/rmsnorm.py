"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * (offset + weight) (Zhang and Sennrich, 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np

from einsum_transformer.engine import einsum, weight_grad
from einsum_transformer.tree import static

Array = np.ndarray


class Saved(NamedTuple):
    """Activations saved for `RMSNorm.backward`."""

    x: Array
    rstd: Array


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """Weights in checkpoint layout. Gradients are returned as an RMSNorm."""

    weight: Annotated[Array, "d"]
    eps: float = static(default=1e-5)
    offset: float = static(default=0.0)
    """1 for checkpoints that store scale - 1 (Gemma)."""

    def forward(self, x: Array) -> tuple[Array, Saved]:
        rstd = 1 / np.sqrt(einsum("btd,btd->bt", x, x) / x.shape[-1] + self.eps)
        y = einsum("btd,bt->btd", x, rstd)
        y *= norm_scale(self.weight, self.offset, y)
        return y, Saved(x, rstd)

    def backward(self, dy: Array, saved: Saved) -> tuple[Array, RMSNorm]:
        x, rstd = saved
        # y = normed * (offset + weight)
        normed = einsum("btd,bt->btd", x, rstd)
        dweight = weight_grad(self.weight, "btd,btd->d", dy, normed)
        dnormed = dy * norm_scale(self.weight, self.offset, dy)
        # normed = x * rstd, and rstd depends on every x of its row
        projection = einsum("btd,btd->bt", dnormed, normed) / x.shape[-1]
        dx = dnormed
        dx -= einsum("btd,bt->btd", normed, projection)
        dx *= rstd[..., None]
        return dx, RMSNorm(weight=dweight, eps=self.eps, offset=self.offset)


def norm_scale(weight: Array, offset: float, like: Array) -> Array:
    """offset + weight, as an array of the kind of `like` (see `engine.replay.Traced`)."""
    return np.add(weight, offset, out=np.empty_like(like, shape=weight.shape)) if offset else weight
