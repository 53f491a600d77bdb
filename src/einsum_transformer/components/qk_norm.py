"""RMSNorm of queries or keys before RoPE: y = x / sqrt(mean(x^2) + eps) * (offset + weight).

It bounds the attention scores. Keys have the axes of queries, (b, t, k, g, h), with g = 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np

from einsum_transformer.components.rmsnorm import norm_scale
from einsum_transformer.engine import einsum, weight_grad
from einsum_transformer.tree import static

Array = np.ndarray


class Saved(NamedTuple):
    """Activations saved for `backward`."""

    x: Array
    rstd: Array


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """Per-head norm: the mean of x^2 is taken over `h`, and all heads share one weight."""

    weight: Annotated[Array, "h"]
    eps: float = static(default=1e-6)
    offset: float = static(default=0.0)

    def forward(self, x: Array) -> tuple[Array, Saved]:
        rstd = 1 / np.sqrt(einsum("btkgh,btkgh->btkg", x, x) / x.shape[-1] + self.eps)
        y = einsum("btkgh,btkg->btkgh", x, rstd)
        y *= norm_scale(self.weight, self.offset, y)
        return y, Saved(x, rstd)

    def backward(self, dy: Array, saved: Saved) -> tuple[Array, HeadNorm]:
        x, rstd = saved
        # y = normed * (offset + weight)
        normed = einsum("btkgh,btkg->btkgh", x, rstd)
        dweight = weight_grad(self.weight, "btkgh,btkgh->h", dy, normed)
        dnormed = dy * norm_scale(self.weight, self.offset, dy)
        # normed = x * rstd, and rstd depends on every x of its head
        projection = einsum("btkgh,btkgh->btkg", dnormed, normed) / x.shape[-1]
        dx = dnormed
        dx -= einsum("btkgh,btkg->btkgh", normed, projection)
        dx *= rstd[..., None]
        return dx, HeadNorm(weight=dweight, eps=self.eps, offset=self.offset)


@dataclass(frozen=True, slots=True)
class WholeNorm:
    """Norm over all heads: the mean of x^2 is taken over `k`, `g` and `h`, with one weight per element."""

    weight: Annotated[Array, "(k g h)"]
    eps: float = static(default=1e-6)

    def forward(self, x: Array) -> tuple[Array, Saved]:
        rstd = 1 / np.sqrt(einsum("btkgh,btkgh->bt", x, x) / x[0, 0].size + self.eps)
        y = einsum("btkgh,bt->btkgh", x, rstd)
        y *= self.weight
        return y, Saved(x, rstd)

    def backward(self, dy: Array, saved: Saved) -> tuple[Array, WholeNorm]:
        x, rstd = saved
        # y = normed * weight
        normed = einsum("btkgh,bt->btkgh", x, rstd)
        dweight = weight_grad(self.weight, "btkgh,btkgh->kgh", dy, normed)
        dnormed = dy * self.weight
        # normed = x * rstd, and rstd depends on every x of its token
        projection = einsum("btkgh,btkgh->bt", dnormed, normed) / x[0, 0].size
        dx = dnormed
        dx -= einsum("btkgh,bt->btkgh", normed, projection)
        dx *= rstd[..., None, None, None]
        return dx, WholeNorm(weight=dweight, eps=self.eps)


QKNorm = HeadNorm | WholeNorm
