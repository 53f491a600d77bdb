"""SwiGLU feed-forward: y = down(silu(gate(x)) * up(x)) (Shazeer, 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np

from einsum_transformer.engine import einsum, weight_grad
from einsum_transformer.numerics.activations import silu, silu_and_derivative

Array = np.ndarray
Saved = tuple[Array, Array, Array]


@dataclass(frozen=True, slots=True)
class SwiGLU:
    """Weights in checkpoint layout. A gradient is another SwiGLU."""

    gate_proj: Annotated[Array, "f d"]
    up_proj: Annotated[Array, "f d"]
    down_proj: Annotated[Array, "d f"]
    gate_bias: Annotated[Array, "f"] | None = None
    up_bias: Annotated[Array, "f"] | None = None
    down_bias: Annotated[Array, "d"] | None = None

    def forward(self, x: Array) -> tuple[Array, Saved]:
        gate = einsum("btd,fd->btf", x, self.gate_proj)
        up = einsum("btd,fd->btf", x, self.up_proj)
        if self.gate_bias is not None:
            gate += self.gate_bias
            up += self.up_bias
        hidden = silu(gate)
        hidden *= up
        y = einsum("btf,df->btd", hidden, self.down_proj)
        if self.down_bias is not None:
            y += self.down_bias
        return y, (x, gate, up)

    def backward(self, dy: Array, saved: Saved) -> tuple[Array, SwiGLU]:
        x, gate, up = saved
        activated, dactivated = silu_and_derivative(gate)
        # y = einsum("btf,df->btd", hidden, down_proj) + down_bias
        dhidden = einsum("btd,df->btf", dy, self.down_proj)
        ddown_proj = weight_grad("btd,btf->df", dy, lambda: activated * up, self.down_proj)
        # hidden = silu(gate) * up
        dup = np.multiply(dhidden, activated, out=activated)
        dgate = dhidden
        dgate *= up
        dgate *= dactivated
        # gate, up = einsum("btd,fd->btf", x, gate_proj / up_proj) + gate_bias / up_bias
        dx = einsum("btf,fd->btd", dgate, self.gate_proj)
        dx += einsum("btf,fd->btd", dup, self.up_proj)
        return dx, SwiGLU(
            weight_grad("btf,btd->fd", dgate, x, self.gate_proj),
            weight_grad("btf,btd->fd", dup, x, self.up_proj),
            ddown_proj,
            weight_grad("btf->f", dgate, self.gate_bias),
            weight_grad("btf->f", dup, self.up_bias),
            weight_grad("btd->d", dy, self.down_bias),
        )
