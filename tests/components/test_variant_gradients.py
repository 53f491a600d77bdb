"""Backward passes of the components that a family may ask for, against differences, in float64."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from components.gradient import assert_gradient, assert_weight_gradients
from einsum_transformer.components.attention import Attention, FusedAttention
from einsum_transformer.components.context import Context
from einsum_transformer.components.embedding import Embedding
from einsum_transformer.components.gated_mlp import FusedGatedMLP, GatedMLP
from einsum_transformer.components.head import Head
from einsum_transformer.components.latent_attention import DirectQuery, LatentAttention, LatentQuery
from einsum_transformer.components.layernorm import LayerNorm
from einsum_transformer.components.masks import alibi_slopes
from einsum_transformer.components.mixing import Mixing
from einsum_transformer.components.mlp import MLP
from einsum_transformer.components.moe import MoE, Routing
from einsum_transformer.components.qk_norm import HeadNorm, WholeNorm
from einsum_transformer.components.rmsnorm import RMSNorm
from einsum_transformer.components.rope import RopeConfig, rotation
from einsum_transformer.engine import Recorder
from einsum_transformer.numerics.activations import ACTIVATIONS, GELU, GELU_TANH, gelu
from einsum_transformer.numerics.softcap import softcap, softcap_derivative
from einsum_transformer.numerics.softmax import softmax
from einsum_transformer.tree import named_leaves

Array = np.ndarray
B, T, D, F, V, K, G, H = 2, 7, 10, 13, 11, 2, 3, 4
WIDE = np.dtype(np.float64)


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def assert_component(weights: Any, *shape: int) -> None:
    """Gradients by the input and by every weight."""
    x = normal(*(shape or (B, T, D)), seed=20)
    y, saved = weights.forward(x)
    dy = normal(*y.shape, seed=21)
    dx, gradient = weights.backward(dy, saved)
    assert_gradient("x", lambda p: weights.forward(p)[0], x, dx, dy)
    assert_weight_gradients(lambda w: w.forward(x)[0], weights, gradient, dy)


def assert_attention(weights: Any, pads: Array | None = None, turned: int = H, **rope: Any) -> None:
    """The same of an attention, with RoPE where it is turned."""
    queries, x = np.arange(T), normal(B, T, D, seed=20)
    places = np.maximum(queries - (0 if pads is None else pads[:, None]), np.zeros((B, 1), int))
    turn = None if weights.rope is None else rotation(RopeConfig(**rope), turned, places, WIDE)
    y, saved = weights.forward(x, Context(queries, turn, pads))
    dy = normal(*y.shape, seed=21)
    dx, gradient = weights.backward(dy, saved, Context(queries, turn, pads))
    assert_gradient("x", lambda p: weights.forward(p, Context(queries, turn, pads))[0], x, dx, dy)
    assert_weight_gradients(lambda w: w.forward(x, Context(queries, turn, pads))[0], weights, gradient, dy)


@pytest.mark.parametrize("biased", [False, True])
def test_layernorm(biased: bool) -> None:
    assert_component(LayerNorm(normal(D), normal(D, seed=1) if biased else None, 1e-3))


def test_layernorm_removes_mean_and_scale() -> None:
    norm, x = LayerNorm(np.ones(D), np.zeros(D), 0.0), normal(B, T, D)
    np.testing.assert_allclose(norm.forward(3 * x + 5)[0], norm.forward(x)[0], atol=1e-12)


def test_norms_with_an_offset() -> None:
    """1 + weight: a weight of zero leaves the normed numbers as they are."""
    assert_component(RMSNorm(normal(D), 1e-3, 1.0))
    assert_component(HeadNorm(normal(H), 1e-3, 1.0), B, T, K, G, H)
    x = normal(B, T, D)
    np.testing.assert_array_equal(
        RMSNorm(np.zeros(D), 1e-3, 1.0).forward(x)[0], RMSNorm(np.ones(D), 1e-3).forward(x)[0]
    )


def test_norms_of_queries() -> None:
    assert_component(HeadNorm(normal(H), 1e-3), B, T, K, G, H)
    assert_component(WholeNorm(normal(K, G, H), 1e-3), B, T, K, G, H)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("activation", [GELU, GELU_TANH], ids=["gelu", "gelu_tanh"])
def test_mlp(activation: Any, biased: bool) -> None:
    biases = (normal(F, seed=2), normal(D, seed=3)) if biased else (None, None)
    assert_component(MLP(normal(F, D), normal(D, F, seed=1), *biases, activation))


@pytest.mark.parametrize("activation", [GELU, GELU_TANH], ids=["gelu", "gelu_tanh"])
def test_geglu(activation: Any) -> None:
    weights = GatedMLP(normal(F, D), normal(F, D, seed=1), normal(D, F, seed=2), activation=activation)
    assert_component(weights)


def test_fused_gated_mlp() -> None:
    """Its gradients, and that it is the gated one with both matrices in one."""
    fused = FusedGatedMLP(normal(2 * F, D), normal(D, F, seed=1))
    assert_component(fused)
    apart = GatedMLP(fused.gate_up_proj[:F], fused.gate_up_proj[F:], fused.down_proj)
    x = normal(B, T, D)
    np.testing.assert_allclose(fused.forward(x)[0], apart.forward(x)[0], atol=1e-12)


def fused_attention(by_head: bool, **settings: Any) -> FusedAttention:
    joined = (K * G + 2 * K) * H
    matrices = normal(joined, D) * D**-0.5, normal(D, K, G, H, seed=1)
    biases = normal(joined, seed=2), normal(D, seed=3)
    return FusedAttention(*matrices, *biases, by_head=by_head, mixing=Mixing(H**-0.5), **settings)


@pytest.mark.parametrize("by_head", [False, True])
def test_fused_attention(by_head: bool) -> None:
    weights = fused_attention(by_head, rope=None)
    assert_attention(replace(weights, rope=0))
    # A limit that no number is near, since there is a kink.
    x = normal(B, T, D, seed=20)
    sizes = np.sort(np.abs(np.einsum("btd,jd->btj", x, weights.qkv_proj) + weights.qkv_bias).ravel())
    middle = sizes[len(sizes) // 3 : len(sizes) // 3 * 2]
    gap = int(np.argmax(np.diff(middle)))
    assert_attention(replace(weights, clip=float(middle[gap : gap + 2].mean())))


@pytest.mark.parametrize("by_head", [False, True])
def test_fused_attention_is_attention(by_head: bool) -> None:
    """With its rows taken apart."""
    fused = fused_attention(by_head)
    if by_head:
        rows = fused.qkv_proj.reshape(K, G + 2, H, D)
        bias = fused.qkv_bias.reshape(K, G + 2, H)
        parts = rows[:, :G], rows[:, G], rows[:, G + 1]
        biases = bias[:, :G], bias[:, G], bias[:, G + 1]
    else:
        ends = [K * G * H, K * G * H + K * H]
        shapes = (K, G, H), (K, H), (K, H)
        parts = [part.reshape(*shape, D) for part, shape in zip(np.split(fused.qkv_proj, ends), shapes)]
        biases = [part.reshape(shape) for part, shape in zip(np.split(fused.qkv_bias, ends), shapes)]
    apart = Attention(*parts, fused.o_proj, *biases, fused.o_bias, mixing=fused.mixing)
    x, queries = normal(B, T, D), np.arange(T)
    turn = rotation(RopeConfig(), H, np.broadcast_to(queries, (B, T)), WIDE)
    np.testing.assert_allclose(
        fused.forward(x, Context(queries, turn))[0], apart.forward(x, Context(queries, turn))[0], atol=1e-12
    )


def attention(**settings: Any) -> Attention:
    shapes = [(K, G, H, D), (K, H, D), (K, H, D), (D, K, G, H)]
    matrices = [normal(*shape, seed=i) * D**-0.5 for i, shape in enumerate(shapes)]
    return Attention(*matrices, **settings)


@pytest.mark.parametrize("query_block", [2, 64])
@pytest.mark.parametrize(
    ("cap", "bias_max", "window", "padded"),
    list(itertools.product([None, 0.5], [None, 4.0], [None, 3], [False, True])),
)
def test_soft_caps_and_alibi(
    cap: float | None, bias_max: float | None, window: int | None, padded: bool, query_block: int
) -> None:
    mixing = Mixing(1.3, window, cap, bias_max, query_block)
    rope = 0 if bias_max is None else None
    assert_attention(attention(mixing=mixing, rope=rope), np.array([0, 3]) if padded else None)


def test_attention_with_norms_of_queries_and_keys() -> None:
    assert_attention(attention(q_norm=HeadNorm(normal(H)), k_norm=HeadNorm(normal(H, seed=1), 1e-6, 1.0)))
    assert_attention(attention(q_norm=WholeNorm(normal(K, G, H)), k_norm=WholeNorm(normal(K, 1, H, seed=1))))


@pytest.mark.parametrize("query_block", [2, 64])
@pytest.mark.parametrize("size", [1.0, 200.0])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_sinks(padded: bool, window: int | None, size: float, query_block: int) -> None:
    """Also sinks that are far above and far below every score, whose exponentials leave float64."""
    mixing = Mixing(1.3, window, query_block=query_block)
    weights = attention(mixing=mixing, sinks=size * normal(K, G))
    assert_attention(weights, np.array([0, 3]) if padded else None)


def test_a_sink_of_minus_infinity_is_none() -> None:
    """Also in a padded row that sees no key."""
    sinks, pads = np.full((K, G), -np.inf), np.array([0, T])
    weights, x = attention(mixing=Mixing(), sinks=sinks), normal(B, T, D)
    context = Context(np.arange(T), pads=pads)
    y, saved = weights.forward(x, context)
    dx, gradient = weights.backward(np.ones_like(y), saved, context)
    plain, saved = replace(weights, sinks=None).forward(x, context)
    expected, _ = replace(weights, sinks=None).backward(np.ones_like(y), saved, context)
    np.testing.assert_array_equal(y, plain)
    np.testing.assert_array_equal(dx, expected)
    np.testing.assert_array_equal(gradient.sinks, 0)


def test_a_sink_is_a_key_whose_value_is_zero() -> None:
    """Against a softmax over one more score; the weights of the other values are what a reader sees."""
    x, queries = normal(1, T, D), np.arange(T)
    weights = attention(mixing=Mixing(), rope=None, sinks=normal(K, G))
    with Recorder(values="pattern") as recorder:
        weights.forward(x, Context(queries))
    q, k = np.einsum("btd,kghd->bkgth", x, weights.q_proj), np.einsum("btd,khd->bkth", x, weights.k_proj)
    scores = np.einsum("bkgth,bksh->bkgts", q, k)
    scores = np.where(queries[:, None] >= queries, scores, -np.inf)
    sinks = np.broadcast_to(weights.sinks[:, :, None, None], (1, K, G, T, 1))
    expected = softmax(np.concatenate([scores, sinks], axis=-1))[..., :-1]
    np.testing.assert_allclose(recorder.values["pattern"], expected, atol=1e-12)


def test_alibi_is_a_bias_by_distance() -> None:
    """Against a softmax over scores with the bias written out, queries and keys being zero."""
    zero = attention(mixing=Mixing(alibi_bias_max=8.0), rope=None)
    zero = replace(zero, q_proj=0 * zero.q_proj, o_proj=np.eye(K * G * H).reshape(-1, K, G, H))
    x, queries = normal(1, T, D), np.arange(T)
    mixed = zero.forward(x, Context(queries))[0].reshape(T, K * G, H)
    v = np.einsum("td,khd->tkh", x[0], zero.v_proj)
    for head, slope in enumerate(alibi_slopes(K * G)):
        distance = np.where(queries[None] <= queries[:, None], queries[None] - queries[:, None], -np.inf)
        expected = softmax(slope * distance) @ v[:, head // G]
        np.testing.assert_allclose(mixed[:, head], expected, atol=1e-12)


def test_alibi_slopes() -> None:
    """As in the paper for a power of two; else every second of the next one's first, then the others."""
    np.testing.assert_allclose(alibi_slopes(8), [2.0**-i for i in range(1, 9)])
    of_eight = alibi_slopes(8)
    np.testing.assert_allclose(alibi_slopes(6), [*of_eight[1::2], *of_eight[:3:2]])
    np.testing.assert_allclose(alibi_slopes(1), [2.0**-8])


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("biased", [False, True])
def test_head(biased: bool, cap: float | None, scale: float) -> None:
    assert_component(Head(normal(V, D), normal(V, seed=1) if biased else None, scale, cap))


def test_the_loss_may_overwrite_capped_logits() -> None:
    """`cross_entropy` works in the memory of the logits; the head's backward pass does not read them."""
    head, x = Head(normal(V, D), cap=2.0), normal(B, T, D)
    logits, saved = head.forward(x)
    dy = normal(B, T, V, seed=1)
    expected = head.backward(dy, saved)[0]
    logits[...] = np.nan
    np.testing.assert_array_equal(head.backward(dy, saved)[0], expected)


def test_scaled_embedding() -> None:
    tokens, weights = np.array([[3, 1, 3], [0, 6, 1]]), Embedding(normal(V, D), 2.5)
    y, saved = weights.forward(tokens)
    np.testing.assert_allclose(y, 2.5 * weights.weight[tokens])
    dy = normal(*y.shape)
    assert_weight_gradients(lambda w: w.forward(tokens)[0], weights, weights.backward(dy, saved), dy)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name: str) -> None:
    activation, x = ACTIVATIONS[name], np.concatenate([normal(60) * 3, [0.0, -12.0, 12.0]])
    y, derivative = activation.with_derivative(x)
    np.testing.assert_allclose(y, activation.forward(x), rtol=0, atol=1e-14)
    dy = normal(x.size, seed=1)
    assert_gradient("x", activation.forward, x, dy * derivative, dy)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-13), (np.float32, 1e-6)])
def test_gelu_is_exact(dtype: type, tolerance: float) -> None:
    x = np.linspace(-12, 12, 4001).astype(dtype)
    expected = [each * 0.5 * math.erfc(-each / math.sqrt(2)) for each in x.astype(float)]
    np.testing.assert_allclose(gelu(x), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["gelu", "gelu_new"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_activation_of_extremes(dtype: type, name: str) -> None:
    """No warning, no NaN; the slope is 0 on the far left and 1 on the far right."""
    x = np.array([-np.finfo(dtype).max, -1e4, 0, 1e4, np.finfo(dtype).max], dtype)
    y, slope = ACTIVATIONS[name].with_derivative(x)
    np.testing.assert_array_equal(y, np.maximum(x, 0))
    np.testing.assert_array_equal(ACTIVATIONS[name].forward(x), np.maximum(x, 0))
    np.testing.assert_allclose(slope, [0, 0, 0.5, 1, 1], atol=1e-30)


def test_softcap() -> None:
    x, dy = normal(50) * 5, normal(50, seed=1)
    y = softcap(x.copy(), 3.0)
    assert (np.abs(y) < 3).all()
    assert_gradient("x", lambda p: softcap(p.copy(), 3.0), x, dy * softcap_derivative(y, 3.0), dy)


def mixture(experts: int = 5, shared: bool = False, gated: bool = False, **routing: Any) -> MoE:
    def expert(seed: int) -> GatedMLP:
        matrices = (normal(F, D, seed=seed), normal(F, D, seed=seed + 1), normal(D, F, seed=seed + 2))
        return GatedMLP(*(0.5 * each for each in matrices))

    return MoE(
        normal(experts, D),
        tuple(expert(10 * e) for e in range(experts)),
        expert(99) if shared else None,
        normal(1, D, seed=5) if gated else None,
        Routing(**routing),
    )


ROUTINGS: list[dict[str, Any]] = [
    {"top_k": 1, "normalize": False},
    {"top_k": 2},
    {"top_k": 2, "normalize": False, "scaling": 2.5},
    {"top_k": 5},
    {"top_k": 3, "scoring": "sigmoid"},
    {"top_k": 2, "scoring": "sigmoid", "normalize": False},
    {"experts": 6, "top_k": 2, "groups": 3, "top_groups": 1, "normalize": False},
    {"top_k": 2, "shared": True},
    {"top_k": 2, "shared": True, "gated": True},
]


@pytest.mark.parametrize("settings", ROUTINGS, ids=str)
def test_mixture_of_experts(settings: dict[str, Any]) -> None:
    assert_component(mixture(**settings))


@pytest.mark.parametrize("settings", ROUTINGS, ids=str)
def test_mixture_is_the_sum_over_all_experts(settings: dict[str, Any]) -> None:
    """Token by token, every expert computed and most multiplied by zero."""
    moe, x = mixture(**settings), normal(B, T, D, seed=3)
    chosen, w, p = moe.routing.forward(np.einsum("btd,ed->bte", x, moe.gate))
    weights = np.zeros_like(p)
    np.put_along_axis(weights, chosen, w, axis=-1)
    expected = sum(weights[..., e, None] * expert.forward(x)[0] for e, expert in enumerate(moe.experts))
    if moe.shared_expert is not None:
        said = moe.shared_expert.forward(x)[0]
        gate = moe.shared_expert_gate
        expected = expected + (
            said if gate is None else said / (1 + np.exp(-np.einsum("btd,ed->bte", x, gate)))
        )
    np.testing.assert_allclose(moe.forward(x)[0], expected, atol=1e-12)


def test_routing_takes_the_largest() -> None:
    scores = np.array([[[0.1, 3.0, -1.0, 2.0, 2.5, 0.0]]])
    for settings, expected in (
        ({"top_k": 2}, [1, 4]),
        ({"top_k": 3}, [1, 3, 4]),
        ({"top_k": 2, "groups": 3, "top_groups": 1}, [0, 1]),
        ({"top_k": 3, "groups": 2, "top_groups": 1}, [0, 1, 2]),
    ):
        chosen, w, p = Routing(**settings).forward(scores)
        assert chosen.tolist() == [[expected]]
        assert w.sum() == pytest.approx(1)
        assert p.sum() == pytest.approx(1)


def test_an_expert_that_no_token_reached_has_a_gradient_of_zeros() -> None:
    moe = mixture(experts=5, top_k=1, normalize=False)
    gate = moe.gate.copy()
    gate[3] = 0
    moe, x = replace(moe, gate=gate), np.abs(normal(B, T, D))
    moe = replace(moe, gate=np.where(np.arange(5)[:, None] == 3, -1.0, np.abs(moe.gate)))
    y, saved = moe.forward(x)
    _, gradient = moe.backward(np.ones_like(y), saved)
    assert not any(array.any() for _, array in named_leaves(gradient.experts[3]))
    assert any(array.any() for _, array in named_leaves(gradient.experts))


def test_only_the_experts_that_are_chosen_run() -> None:
    """The others may be anything, also not finite."""
    moe, x = mixture(experts=5, top_k=2), normal(1, 1, D)
    chosen = moe.routing.forward(np.einsum("btd,ed->bte", x, moe.gate))[0].ravel()
    broken = GatedMLP(*(np.full_like(each, np.nan) for _, each in named_leaves(moe.experts[0])))
    experts = tuple(expert if e in chosen else broken for e, expert in enumerate(moe.experts))
    np.testing.assert_array_equal(replace(moe, experts=experts).forward(x)[0], moe.forward(x)[0])


def latent(form: str, direct: bool, biased: bool = False) -> LatentAttention:
    """3 heads; queries and keys of 4 + 2 dimensions, values of 5, a latent of 6, that of queries 7."""
    heads, plain, turned, value, rank = 3, 4, 2, 5, 6
    query: Any = DirectQuery(normal(heads, plain + turned, D, seed=1))
    if not direct:
        norm, up = RMSNorm(normal(7, seed=3), 1e-3), normal(heads, plain + turned, 7, seed=4)
        query = LatentQuery(normal(7, D, seed=2), norm, up, normal(7, seed=9) if biased else None)
    return LatentAttention(
        query,
        normal(rank + turned, D, seed=5),
        RMSNorm(normal(rank, seed=6), 1e-3),
        normal(heads, plain + value, rank, seed=7),
        normal(D, heads, value, seed=8),
        normal(rank + turned, seed=10) if biased else None,
        normal(D, seed=11) if biased else None,
        rope_size=turned,
        form=form,
        mixing=Mixing(0.3),
    )


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_latent_attention(form: str, direct: bool, biased: bool) -> None:
    assert_attention(latent(form, direct, biased), turned=2, interleaved=True)


def test_latent_attention_expanded_is_absorbed() -> None:
    """Output and gradients."""
    expanded, absorbed = latent("expanded", False), latent("absorbed", False)
    x, queries = normal(B, T, D), np.arange(T)
    turn = rotation(RopeConfig(interleaved=True), 2, np.broadcast_to(queries, (B, T)), WIDE)
    context = Context(queries, turn, np.array([0, 2]))
    (y, saved), (other, other_saved) = (each.forward(x, context) for each in (expanded, absorbed))
    np.testing.assert_allclose(other, y, atol=1e-12)
    dy = normal(B, T, D, seed=1)
    dx, gradient = expanded.backward(dy, saved, context)
    other_dx, other_gradient = absorbed.backward(dy, other_saved, context)
    np.testing.assert_allclose(other_dx, dx, atol=1e-11)
    for (name, array), (_, twin) in zip(named_leaves(gradient), named_leaves(other_gradient), strict=True):
        np.testing.assert_allclose(twin, array, atol=1e-11, err_msg=name)
