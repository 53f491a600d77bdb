"""Every component's backward pass against differences of its forward pass, in float64, for each parameter by
itself."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from components.gradient import assert_gradient, assert_weight_gradients
from einsum_transformer.components.attention import Attention
from einsum_transformer.components.context import Context
from einsum_transformer.components.embedding import Embedding
from einsum_transformer.components.gated_mlp import GatedMLP
from einsum_transformer.components.head import Head
from einsum_transformer.components.mixing import Mixing
from einsum_transformer.components.rmsnorm import RMSNorm
from einsum_transformer.components.rope import RopeConfig, Rotation, rotation
from einsum_transformer.engine.parallel import for_each
from einsum_transformer.leaves.frozen import Frozen
from einsum_transformer.numerics.activations import silu, silu_and_derivative
from einsum_transformer.numerics.softmax import IGNORE_INDEX, cross_entropy, cross_entropy_backward

Array = np.ndarray
B, T, D, F, V, H = 2, 10, 12, 15, 7, 4
HEADS = {"mha": (4, 1), "gqa": (2, 2), "mqa": (1, 4)}
WIDE = np.dtype(np.float64)


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def turn(positions: Array, interleaved: bool = False, partial: float = 1.0) -> Rotation:
    rope = RopeConfig(partial_rotary_factor=partial, interleaved=interleaved)
    return rotation(rope, H, positions, WIDE)


def attention(heads: tuple[int, int], biased: bool, window: int | None, query_block: int) -> Attention:
    k, g = heads
    biases = (normal(k, g, H, seed=5), normal(k, H, seed=6), normal(k, H, seed=7), normal(D, seed=8))
    return Attention(
        normal(k, g, H, D, seed=1) * D**-0.5,
        normal(k, H, D, seed=2) * D**-0.5,
        normal(k, H, D, seed=3),
        normal(D, k, g, H, seed=4),
        *(biases if biased else ()),
        mixing=Mixing(H**-0.5, window, query_block=query_block),
    )


def assert_attention(weights: Attention, x: Array, pads: Array | None) -> None:
    queries = np.arange(x.shape[1])
    rope = turn(np.maximum(queries - (0 if pads is None else pads[:, None]), np.zeros((len(x), 1), int)))
    y, saved = weights.forward(x, Context(queries, rope, pads))
    dy = normal(*y.shape, seed=9)
    dx, gradient = weights.backward(dy, saved, Context(queries, rope, pads))
    assert_gradient("x", lambda p: weights.forward(p, Context(queries, rope, pads))[0], x, dx, dy)
    assert_weight_gradients(lambda w: w.forward(x, Context(queries, rope, pads))[0], weights, gradient, dy)


def test_embedding_adds_up_tokens_that_repeat() -> None:
    tokens = np.array([[3, 1, 3, 3], [0, 6, 1, 1]])
    weights = Embedding(normal(V, D))
    y, saved = weights.forward(tokens)
    dy = normal(*y.shape)
    assert_weight_gradients(lambda w: w.forward(tokens)[0], weights, weights.backward(dy, saved), dy)


@pytest.mark.parametrize("eps", [1e-6, 1.0])
def test_rmsnorm(eps: float) -> None:
    x, weights = normal(B, T, D), RMSNorm(normal(D), eps)
    y, saved = weights.forward(x)
    dy = normal(*y.shape, seed=1)
    dx, gradient = weights.backward(dy, saved)
    assert_gradient("x", lambda p: weights.forward(p)[0], x, dx, dy)
    assert_weight_gradients(lambda w: w.forward(x)[0], weights, gradient, dy)


@pytest.mark.parametrize("partial", [1.0, 0.5])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("heads", [(2,), (2, 3)])
def test_rotation(heads: tuple[int, ...], interleaved: bool, partial: float) -> None:
    x = normal(B, T, *heads, H)
    rope = turn(np.arange(B * T).reshape(B, T), interleaved, partial)
    dy = normal(*x.shape, seed=1)
    assert_gradient("x", rope.forward, x, rope.backward(dy), dy)


@pytest.mark.parametrize("query_block", [1, 3, 5, 64])
@pytest.mark.parametrize(("biased", "windowed", "padded"), list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize("heads", HEADS)
def test_attention(heads: str, biased: bool, windowed: bool, padded: bool, query_block: int) -> None:
    """10 queries: blocks of 3 leave one over, 5 fit evenly; row 1 begins with 4 tokens of padding."""
    pads = np.array([0, 4]) if padded else None
    weights = attention(HEADS[heads], biased, 3 if windowed else None, query_block)
    assert_attention(weights, normal(B, T, D), pads)


@pytest.mark.parametrize("without", [("o_bias",), ("q_bias", "k_bias", "v_bias")])
def test_attention_with_some_biases(without: tuple[str, ...]) -> None:
    """On the projections in alone, and on the projection out alone."""
    every = attention(HEADS["gqa"], True, None, 4)
    assert_attention(replace(every, **dict.fromkeys(without)), normal(B, T, D), None)


@pytest.mark.parametrize("length", [1, 2])
def test_attention_of_few_tokens(length: int) -> None:
    assert_attention(attention(HEADS["gqa"], True, None, 4), normal(B, length, D), None)


@pytest.mark.parametrize("biased", [False, True])
def test_swiglu(biased: bool) -> None:
    biases = (normal(F, seed=4), normal(F, seed=5), normal(D, seed=6)) if biased else ()
    x, weights = (
        normal(B, T, D),
        GatedMLP(normal(F, D, seed=1), normal(F, D, seed=2), normal(D, F, seed=3), *biases),
    )
    y, saved = weights.forward(x)
    dy = normal(*y.shape, seed=7)
    dx, gradient = weights.backward(dy, saved)
    assert_gradient("x", lambda p: weights.forward(p)[0], x, dx, dy)
    assert_weight_gradients(lambda w: w.forward(x)[0], weights, gradient, dy)


def test_head() -> None:
    x, weights = normal(B, T, D), Head(normal(V, D))
    y, saved = weights.forward(x)
    dy = normal(*y.shape, seed=1)
    dx, gradient = weights.backward(dy, saved)
    assert_gradient("x", lambda p: weights.forward(p)[0], x, dx, dy)
    assert_weight_gradients(lambda w: w.forward(x)[0], weights, gradient, dy)


def test_silu() -> None:
    x = np.concatenate([normal(50), [0.0, -30.0, 30.0]])
    dy = normal(x.size, seed=1)
    assert_gradient("x", silu, x, dy * silu_and_derivative(x)[1], dy)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_silu_of_extremes(dtype: type) -> None:
    """No warning, no NaN; the slope is 0 on the far left and 1 on the far right."""
    x = np.array([-np.finfo(dtype).max, -1e4, -800, 0, 800, 1e4, np.finfo(dtype).max], dtype)
    np.testing.assert_array_equal(silu(x), np.maximum(x, 0))
    np.testing.assert_allclose(silu_and_derivative(x)[1], [0, 0, 0, 0.5, 1, 1, 1])


@pytest.mark.parametrize("ignored", [0, 3, B * T])
def test_cross_entropy(ignored: int) -> None:
    """Ignored targets count neither in the sum nor in the mean; with none left, loss and gradient are 0."""
    logits = 3 * normal(B, T, V)
    targets = np.random.default_rng(0).integers(0, V, (B, T))
    targets.ravel()[:ignored] = IGNORE_INDEX
    loss, saved = cross_entropy(logits.copy(), targets)  # it works in the memory of the scores
    rows = [
        (row, target) for row, target in zip(logits.reshape(-1, V), targets.ravel()) if target != IGNORE_INDEX
    ]
    expected = [-np.log(np.exp(row[target]) / np.exp(row).sum()) for row, target in rows]
    assert loss == pytest.approx(np.mean(expected) if expected else 0.0, rel=1e-12)
    dlogits = cross_entropy_backward(saved)
    assert not dlogits[targets == IGNORE_INDEX].any()
    if rows:
        assert_gradient(
            "logits", lambda p: np.array(cross_entropy(p.copy(), targets)[0]), logits, dlogits, np.ones(())
        )


def test_cross_entropy_of_parts() -> None:
    """Parts of a batch, each divided by the count of all, add up to the mean of the whole."""
    logits, targets = 3 * normal(B, T, V), np.random.default_rng(0).integers(0, V, (B, T))
    targets[0, :7] = IGNORE_INDEX
    whole, saved = cross_entropy(logits.copy(), targets)
    count = int((targets != IGNORE_INDEX).sum())
    parts = [cross_entropy(logits[:, i : i + 3].copy(), targets[:, i : i + 3], count) for i in range(0, T, 3)]
    assert sum(loss for loss, _ in parts) == pytest.approx(whole, rel=1e-12)
    gradients = [cross_entropy_backward(saved) for _, saved in parts]
    np.testing.assert_allclose(np.concatenate(gradients, 1), cross_entropy_backward(saved), rtol=1e-12)


def test_cross_entropy_of_extreme_logits() -> None:
    """Scores of 1e4 neither overflow nor lose the target's probability."""
    loss, saved = cross_entropy(np.array([[[1e4, 0.0, -1e4]]], np.float32), np.array([[1]]))
    assert loss == 1e4
    np.testing.assert_array_equal(cross_entropy_backward(saved), [[[1.0, -1.0, 0.0]]])


def test_a_backward_pass_changes_no_argument() -> None:
    """Neither dy nor what was saved: a second backward gives the same."""
    x, weights = normal(B, T, D), GatedMLP(normal(F, D, seed=1), normal(F, D, seed=2), normal(D, F, seed=3))
    attends, norm = attention(HEADS["gqa"], True, 3, 3), RMSNorm(normal(D))
    rope, queries = turn(np.broadcast_to(np.arange(T), (B, T))), np.arange(T)
    dy, kept = normal(B, T, D, seed=1), normal(B, T, D, seed=1)
    saved_mlp, saved_norm, saved_attention = (
        weights.forward(x)[1],
        norm.forward(x)[1],
        attends.forward(x, Context(queries, rope))[1],
    )
    for backward in (
        lambda: weights.backward(dy, saved_mlp)[0],
        lambda: norm.backward(dy, saved_norm)[0],
        lambda: attends.backward(dy, saved_attention, Context(queries, rope))[0],
    ):
        np.testing.assert_array_equal(backward(), backward())
    np.testing.assert_array_equal(dy, kept)
    np.testing.assert_array_equal(x, normal(B, T, D))


def test_cross_entropy_in_parallel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits whatever runs the pieces of the vocabulary, in whatever order."""
    monkeypatch.setattr("einsum_transformer.numerics.softmax._PIECE", 64)
    rng = np.random.default_rng(3)
    logits, targets = rng.standard_normal((2, 5, 61)), rng.integers(0, 61, (2, 5))

    def backward_in_time(task: Any, arguments: Any) -> None:
        for given in reversed(arguments):
            task(*given)

    results = []
    for run in (partial(for_each, coarse=False), for_each, backward_in_time):
        loss, saved = cross_entropy(logits.copy(), targets, None, run)
        results.append((loss, cross_entropy_backward(saved, run).tobytes()))
    assert len(set(results)) == 1


@pytest.mark.parametrize("layout", ["C", "F"])
def test_embedding_gradient_added_to_that_of_the_head(layout: str) -> None:
    """Tied embeddings: the gradient of the head is changed in place, in its own layout."""
    rng = np.random.default_rng(4)
    weight, dy = rng.standard_normal((11, 3)), rng.standard_normal((2, 5, 3))
    tokens = np.array([[1, 2, 2, 10, 0], [1, 1, 1, 1, 9]])
    head = np.asarray(rng.standard_normal((11, 3)), order=layout)  # type: ignore[call-overload]
    embedding = Embedding(weight, scale=2.0)
    alone = embedding.backward(dy, tokens).weight
    expected = head + alone
    both = embedding.backward(dy, tokens, head).weight
    assert both is head
    np.testing.assert_allclose(both, expected, rtol=1e-13)
    frozen = Embedding(Frozen(weight))
    assert frozen.backward(dy, tokens, head).weight is None
