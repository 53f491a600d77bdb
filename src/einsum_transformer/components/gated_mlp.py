"""Gated feed-forward: y = down(activation(gate(x)) * up(x)); silu: SwiGLU, gelu: GeGLU (Shazeer, 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np

from einsum_transformer.engine import einsum, einsums, is_trained, tap, tap_gradient, weight_grad
from einsum_transformer.numerics.activations import SILU, Activation
from einsum_transformer.tree import static

Array = np.ndarray


class Saved(NamedTuple):
    """Activations saved for `GatedMLP.backward`."""

    x: Array
    gate: Array
    up: Array


@dataclass(frozen=True, slots=True)
class GatedMLP:
    """Weights in checkpoint layout. Gradients are returned as a GatedMLP."""

    gate_proj: Annotated[Array, "f d"]
    up_proj: Annotated[Array, "f d"]
    down_proj: Annotated[Array, "d f"]
    gate_bias: Annotated[Array, "f"] | None = None
    up_bias: Annotated[Array, "f"] | None = None
    down_bias: Annotated[Array, "d"] | None = None
    activation: Activation = static(default=SILU)

    def forward(self, x: Array) -> tuple[Array, Saved]:
        gate, up = einsums(x, ("btd,fd->btf", self.gate_proj), ("btd,fd->btf", self.up_proj))
        if self.gate_bias is not None:
            gate += self.gate_bias
            up += self.up_bias
        gate, up = tap("gate", gate, requested=True), tap("up", up, requested=True)
        hidden = self.activation.forward(gate)
        hidden *= up
        hidden = tap("hidden", hidden, requested=True)
        y = einsum("btf,df->btd", hidden, self.down_proj)
        if self.down_bias is not None:
            y += self.down_bias
        return y, Saved(x, gate, up)

    def backward(self, dy: Array, saved: Saved) -> tuple[Array, GatedMLP]:
        x, gate, up = saved
        activated, dactivated = self.activation.with_derivative(gate)
        # y = einsum("btf,df->btd", hidden, down_proj) + down_bias
        dhidden = einsum("btd,df->btf", dy, self.down_proj)
        tap_gradient("hidden", dhidden)
        hidden = activated * up if is_trained(self.down_proj) else None
        ddown_proj = weight_grad(self.down_proj, "btd,btf->df", dy, hidden)
        del hidden  # free it early: it is as large as gate and up
        # hidden = activation(gate) * up
        dup = np.multiply(dhidden, activated, out=activated)
        dgate = dhidden
        dgate *= up
        dgate *= dactivated
        tap_gradient("gate", dgate)
        tap_gradient("up", dup)
        # gate, up = einsum("btd,fd->btf", x, gate_proj / up_proj) + gate_bias / up_bias
        dx = einsum("btf,fd->btd", dgate, self.gate_proj)
        dx += einsum("btf,fd->btd", dup, self.up_proj)
        return dx, GatedMLP(
            gate_proj=weight_grad(self.gate_proj, "btf,btd->fd", dgate, x),
            up_proj=weight_grad(self.up_proj, "btf,btd->fd", dup, x),
            down_proj=ddown_proj,
            gate_bias=weight_grad(self.gate_bias, "btf->f", dgate),
            up_bias=weight_grad(self.up_bias, "btf->f", dup),
            down_bias=weight_grad(self.down_bias, "btd->d", dy),
            activation=self.activation,
        )


class FusedSaved(NamedTuple):
    """Activations saved for `FusedGatedMLP.backward`."""

    x: Array
    gate_up: Array


@dataclass(frozen=True, slots=True)
class FusedGatedMLP:
    """GatedMLP with one matrix for gate and up; the rows of gate come first. Gradients are returned as a
    FusedGatedMLP."""

    gate_up_proj: Annotated[Array, "j d"]
    down_proj: Annotated[Array, "d f"]
    activation: Activation = static(default=SILU)

    def forward(self, x: Array) -> tuple[Array, FusedSaved]:
        gate_up = einsum("btd,jd->btj", x, self.gate_up_proj)
        gate, up = _halves(gate_up)
        gate, up = tap("gate", gate, requested=True), tap("up", up, requested=True)
        hidden = self.activation.forward(gate)
        hidden *= up
        hidden = tap("hidden", hidden, requested=True)
        return einsum("btf,df->btd", hidden, self.down_proj), FusedSaved(x, gate_up)

    def backward(self, dy: Array, saved: FusedSaved) -> tuple[Array, FusedGatedMLP]:
        x, gate_up = saved
        gate, up = _halves(gate_up)
        activated, dactivated = self.activation.with_derivative(gate)
        # y = einsum("btf,df->btd", hidden, down_proj)
        dhidden = einsum("btd,df->btf", dy, self.down_proj)
        tap_gradient("hidden", dhidden)
        hidden = activated * up if is_trained(self.down_proj) else None
        ddown_proj = weight_grad(self.down_proj, "btd,btf->df", dy, hidden)
        del hidden  # free it early: it is as large as gate and up
        # hidden = activation(gate) * up
        dgate_up = np.empty_like(gate_up)
        dgate, dup = _halves(dgate_up)
        np.multiply(dhidden, activated, out=dup)
        np.multiply(dhidden, up, out=dgate)
        dgate *= dactivated
        tap_gradient("gate", dgate)
        tap_gradient("up", dup)
        # gate_up = einsum("btd,jd->btj", x, gate_up_proj)
        dx = einsum("btj,jd->btd", dgate_up, self.gate_up_proj)
        dgate_up_proj = weight_grad(self.gate_up_proj, "btj,btd->jd", dgate_up, x)
        return dx, FusedGatedMLP(gate_up_proj=dgate_up_proj, down_proj=ddown_proj, activation=self.activation)


def _halves(gate_up: Array) -> tuple[Array, Array]:
    half = gate_up.shape[-1] // 2
    return gate_up[..., :half], gate_up[..., half:]
