"""Feed-forward without a gate: y = down(activation(up(x)))."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np

from einsum_transformer.engine import einsum, weight_grad
from einsum_transformer.numerics.activations import GELU, Activation
from einsum_transformer.tree import static

Array = np.ndarray
Saved = tuple[Array, Array]


@dataclass(frozen=True, slots=True)
class MLP:
    """Weights in checkpoint layout. A gradient is another MLP."""

    up_proj: Annotated[Array, "f d"]
    down_proj: Annotated[Array, "d f"]
    up_bias: Annotated[Array, "f"] | None = None
    down_bias: Annotated[Array, "d"] | None = None
    activation: Activation = static(default=GELU)

    def forward(self, x: Array) -> tuple[Array, Saved]:
        up = einsum("btd,fd->btf", x, self.up_proj)
        if self.up_bias is not None:
            up += self.up_bias
        y = einsum("btf,df->btd", self.activation.forward(up), self.down_proj)
        if self.down_bias is not None:
            y += self.down_bias
        return y, (x, up)

    def backward(self, dy: Array, saved: Saved) -> tuple[Array, MLP]:
        x, up = saved
        hidden, dhidden_dup = self.activation.with_derivative(up)
        # y = einsum("btf,df->btd", hidden, down_proj) + down_bias
        dhidden = einsum("btd,df->btf", dy, self.down_proj)
        ddown_proj = weight_grad("btd,btf->df", dy, hidden, self.down_proj)
        # hidden = activation(up)
        dup = dhidden
        dup *= dhidden_dup
        # up = einsum("btd,fd->btf", x, up_proj) + up_bias
        return einsum("btf,fd->btd", dup, self.up_proj), MLP(
            weight_grad("btf,btd->fd", dup, x, self.up_proj),
            ddown_proj,
            weight_grad("btf->f", dup, self.up_bias),
            weight_grad("btd->d", dy, self.down_bias),
            self.activation,
        )
