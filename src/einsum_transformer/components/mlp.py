"""Feed-forward without a gate: y = down(activation(up(x)))."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np

from einsum_transformer.engine import einsum, tap, tap_gradient, weight_grad
from einsum_transformer.numerics.activations import GELU, Activation
from einsum_transformer.tree import static

Array = np.ndarray


class Saved(NamedTuple):
    """Activations saved for `MLP.backward`."""

    x: Array
    up: Array


@dataclass(frozen=True, slots=True)
class MLP:
    """Weights in checkpoint layout. Gradients are returned as an MLP."""

    up_proj: Annotated[Array, "f d"]
    down_proj: Annotated[Array, "d f"]
    up_bias: Annotated[Array, "f"] | None = None
    down_bias: Annotated[Array, "d"] | None = None
    activation: Activation = static(default=GELU)

    def forward(self, x: Array) -> tuple[Array, Saved]:
        up = einsum("btd,fd->btf", x, self.up_proj)
        if self.up_bias is not None:
            up += self.up_bias
        up = tap("up", up, requested=True)
        hidden = tap("hidden", self.activation.forward(up), requested=True)
        y = einsum("btf,df->btd", hidden, self.down_proj)
        if self.down_bias is not None:
            y += self.down_bias
        return y, Saved(x, up)

    def backward(self, dy: Array, saved: Saved) -> tuple[Array, MLP]:
        x, up = saved
        hidden, dhidden_dup = self.activation.with_derivative(up)
        # y = einsum("btf,df->btd", hidden, down_proj) + down_bias
        dhidden = einsum("btd,df->btf", dy, self.down_proj)
        tap_gradient("hidden", dhidden)
        ddown_proj = weight_grad(self.down_proj, "btd,btf->df", dy, hidden)
        # hidden = activation(up)
        dup = dhidden
        dup *= dhidden_dup
        tap_gradient("up", dup)
        # up = einsum("btd,fd->btf", x, up_proj) + up_bias
        return einsum("btf,fd->btd", dup, self.up_proj), MLP(
            up_proj=weight_grad(self.up_proj, "btf,btd->fd", dup, x),
            down_proj=ddown_proj,
            up_bias=weight_grad(self.up_bias, "btf->f", dup),
            down_bias=weight_grad(self.down_bias, "btd->d", dy),
            activation=self.activation,
        )
