"""The gradient check rejects the wrong backward passes that projects of this kind have shipped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from components.gradient import assert_gradient, assert_weight_gradients
from einsum_transformer.components.gated_mlp import GatedMLP
from einsum_transformer.components.rmsnorm import RMSNorm

Array = np.ndarray
RNG = np.random.default_rng(0)
X, DY = RNG.standard_normal((2, 2, 5, 8))
NORM = RMSNorm(RNG.standard_normal(8))
GATE, UP = RNG.standard_normal((2, 12, 8))
MLP = GatedMLP(GATE, UP, RNG.standard_normal((8, 12)))


def residual(x: Array) -> Array:
    """x + mlp(norm(x)), the half of a block."""
    return x + MLP.forward(NORM.forward(x)[0])[0]


def parts() -> tuple[Array, Array, Callable[[Array], Array], GatedMLP]:
    """(gradient by the normed input, the residual's own, the norm's backward, gradient by the weights)."""
    normed, saved_norm = NORM.forward(X)
    dnormed, dmlp = MLP.backward(DY, MLP.forward(normed)[1])
    return dnormed, DY, lambda dy: NORM.backward(dy, saved_norm)[0], dmlp


def test_right() -> None:
    dnormed, around, through, _ = parts()
    assert_gradient("x", residual, X, through(dnormed) + around, DY)


def wrong_inputs() -> dict[str, Array]:
    dnormed, around, through, _ = parts()
    right = through(dnormed) + around
    _, gate, _ = MLP.forward(NORM.forward(X)[0])[1]
    dup = np.einsum("btd,df->btf", DY, MLP.down_proj) * gate / (1 + np.exp(-gate))
    return {
        "residual through the norm": through(dnormed + around),
        "residual around and through the norm": through(dnormed + around) + around,
        "residual forgotten": through(dnormed),
        "clipped": np.clip(right, -1, 1),
        "clipped by norm": right / np.linalg.norm(right),
        "without the up projection": right - through(np.einsum("btf,fd->btd", dup, MLP.up_proj)),
        "norm taken for a constant factor": dnormed * NORM.weight / np.sqrt((X**2).mean(-1, keepdims=True))
        + around,
        "a thousandth off": right * 1.001,
        "one element off": right + 1e-3 * (np.arange(X.size) == 7).reshape(X.shape),
    }


@pytest.mark.parametrize("name", wrong_inputs())
def test_wrong_input_gradient_is_rejected(name: str) -> None:
    with pytest.raises(AssertionError, match="by differences"):
        assert_gradient("x", residual, X, wrong_inputs()[name], DY)


@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
def test_one_wrong_weight_gradient_among_right_ones_is_rejected(name: str) -> None:
    normed = NORM.forward(X)[0]
    dmlp = parts()[3]
    assert_weight_gradients(lambda w: w.forward(normed)[0], MLP, dmlp, DY)
    for wrong in (np.zeros_like, lambda a: np.clip(a, -1, 1), lambda a: -a, lambda a: a / 2):
        broken = replace(dmlp, **{name: wrong(getattr(dmlp, name))})
        with pytest.raises(AssertionError, match=name):
            assert_weight_gradients(lambda w: w.forward(normed)[0], MLP, broken, DY)


def test_missing_narrow_and_misshapen_gradients_are_rejected() -> None:
    normed = NORM.forward(X)[0]
    dmlp = parts()[3]
    for broken in (None, dmlp.gate_proj.astype(np.float32), dmlp.gate_proj.T):
        with pytest.raises(AssertionError):
            assert_weight_gradients(lambda w: w.forward(normed)[0], MLP, replace(dmlp, gate_proj=broken), DY)
