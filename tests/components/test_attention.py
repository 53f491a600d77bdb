"""Attention's results do not depend on how it is computed: blocks, threads, groups, padding."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from einsum_transformer.components.attention import Attention
from einsum_transformer.components.context import Context
from einsum_transformer.components.mixing import Mixing, exponentials
from einsum_transformer.components.rope import RopeConfig, Rotation, rotation
from einsum_transformer.engine import blas, einsum
from einsum_transformer.tree import tree_map

Array = np.ndarray
K, G, H, D = 2, 2, 4, 12


def weights(dtype: str = "float64", **settings: float | None) -> Attention:
    rng = np.random.default_rng(0)
    shapes = [(K, G, H, D), (K, H, D), (K, H, D), (D, K, G, H)]
    arrays = [(rng.standard_normal(shape) * 0.5).astype(dtype) for shape in shapes]
    return Attention(*arrays, mixing=Mixing(**{"scale": H**-0.5} | settings))


def turn(places: Array, dtype: str = "float64") -> Rotation:
    return rotation(RopeConfig(), H, places, np.dtype(dtype))


def tokens(b: int, t: int, dtype: str = "float64") -> Array:
    return np.random.default_rng(1).standard_normal((b, t, D)).astype(dtype)


def run(attention: Attention, x: Array, pads: Array | None = None) -> Array:
    queries = np.arange(x.shape[1])
    places = np.broadcast_to(queries, x.shape[:2]) if pads is None else np.maximum(queries - pads[:, None], 0)
    return attention.forward(x, Context(queries, turn(places, str(x.dtype)), pads))[0]


@pytest.mark.parametrize("window", [None, 1, 3, 29, 30, 31, 1000])
@pytest.mark.parametrize("block", [1, 7, 30, 31])
def test_blocks_of_queries_do_not_matter(block: int, window: int | None) -> None:
    x = tokens(2, 30)
    whole, parts = (weights(window=window, query_block=size) for size in (30, block))
    np.testing.assert_allclose(run(parts, x), run(whole, x), rtol=0, atol=1e-12)


def test_a_window_of_one_looks_at_itself() -> None:
    """The softmax of one score is 1, so the output is the value's."""
    x, attention = tokens(1, 5), weights(window=1)
    v = einsum("btd,khd->btkh", x, attention.v_proj)
    expected = np.einsum("btkh,dkgh->btd", v, attention.o_proj)
    np.testing.assert_allclose(run(attention, x), expected, atol=1e-13)


def test_a_key_value_head_serves_its_own_group() -> None:
    """GQA equals MHA with every key/value head repeated for its g query heads, next to each other."""
    gqa, x = weights(), tokens(2, 9)

    def repeated(a: Array) -> Array:
        return np.repeat(a, G, axis=0)

    mha = replace(
        gqa,
        q_proj=gqa.q_proj.reshape(K * G, 1, H, D),
        k_proj=repeated(gqa.k_proj),
        v_proj=repeated(gqa.v_proj),
        o_proj=gqa.o_proj.reshape(D, K * G, 1, H),
    )
    np.testing.assert_allclose(run(gqa, x), run(mha, x), atol=1e-12)


def test_threads_change_nothing() -> None:
    """Enough scores for several threads: the same to the bit as on one."""
    x, attention = tokens(1, 700, "float32"), weights("float32", query_block=64)
    before = blas.get_threads()
    try:
        blas.set_threads(1)
        alone = run(attention, x)
        blas.set_threads(2)
        np.testing.assert_array_equal(run(attention, x), alone)
        assert blas.get_threads() == 2
    finally:
        blas.set_threads(before)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("pads", [[0, 3], [6, 2], [6, 6]])
def test_a_row_that_sees_no_key(pads: list[int], window: int | None, dtype: str) -> None:
    """Padding gives zeros, takes no part in any gradient, and nothing is infinite or NaN; 6 of 6 is a
    whole row."""
    x, padding = tokens(2, 6, dtype), np.array(pads)
    attention, queries = weights(dtype, window=window, query_block=2), np.arange(6)
    rope = turn(np.maximum(queries - padding[:, None], 0), dtype)
    y, saved = attention.forward(x, Context(queries, rope, padding))
    hidden = queries < padding[:, None]
    assert np.isfinite(y).all()
    assert not y[hidden].any()
    dx, gradient = attention.backward(np.ones_like(y), saved, Context(queries, rope, padding))
    assert not dx[hidden].any()
    for array in (dx, gradient.q_proj, gradient.k_proj, gradient.v_proj, gradient.o_proj):
        assert np.isfinite(array).all()


def test_what_lies_in_the_padding_does_not_matter() -> None:
    """Not even enormous values."""
    x, pads = tokens(2, 8, "float32"), np.array([0, 5])
    wild = x.copy()
    wild[1, :5] = 1e15
    attention = weights("float32")
    np.testing.assert_array_equal(run(attention, wild, pads)[1, 5:], run(attention, x, pads)[1, 5:])


def test_no_query_sees_the_future() -> None:
    x, attention = tokens(1, 12), weights(query_block=5)
    changed = x.copy()
    changed[:, 7:] = -3
    np.testing.assert_array_equal(run(attention, changed)[:, :7], run(attention, x)[:, :7])


def test_scores_of_any_size() -> None:
    """Scores near 1e4 in float32: the softmax picks one key and stays finite."""
    x, attention = tokens(1, 6, "float32"), weights("float32")
    huge = replace(attention, q_proj=attention.q_proj * 1e2, k_proj=attention.k_proj * 1e2)
    y, saved = huge.forward(x, Context(np.arange(6), turn(np.arange(6)[None], "float32")))
    dx, _ = huge.backward(np.ones_like(y), saved, Context(np.arange(6), turn(np.arange(6)[None], "float32")))
    assert np.isfinite(y).all()
    assert np.isfinite(dx).all()
    np.testing.assert_allclose(y, run(weights_in_float64(huge), x.astype(np.float64)), atol=1e-2)


@pytest.mark.parametrize("shift", [-1e4, -300, -104, -88, -70, -60, 60, 69, 88, 104, 300, 1e4])
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_a_constant_on_all_scores_changes_nothing(spread: float, shift: float) -> None:
    """In float32 too, whether or not exp of the scores themselves is in range; nor does the gradient
    change."""
    rng = np.random.default_rng(3)
    x, dy = tokens(1, 9, "float32"), tokens(1, 9, "float32")
    q = np.eye(H)[0] * H**0.5
    shapes = [(K, G, H), (K, H), (K, H), (D,)]
    q_bias, k_bias = np.broadcast_to(q, shapes[0]), np.broadcast_to(np.eye(H)[0] * shift, shapes[1])
    base = replace(
        weights(), q_proj=np.zeros((K, G, H, D)), k_proj=rng.standard_normal((K, H, D)) * spread / 4
    )
    plain = replace(base, q_bias=q_bias, k_bias=np.zeros(shapes[1]), v_bias=np.zeros(shapes[2]))
    shifted = narrow(replace(plain, k_bias=k_bias))
    still, queries = turn(np.zeros((1, 9)), "float32"), np.arange(9)
    y, saved = shifted.forward(x, Context(queries, still))
    dx, gradient = shifted.backward(dy, saved, Context(queries, still))
    wide, saved = plain.forward(x.astype(np.float64), Context(queries, turn(np.zeros((1, 9)))))
    exact_dx, exact = plain.backward(dy.astype(np.float64), saved, Context(queries, turn(np.zeros((1, 9)))))
    # float32 scores near `shift` are themselves only this exact.
    tolerance = 1e-5 + 4 * np.spacing(np.float32(abs(shift)))
    for name, got, expected in (("y", y, wide), ("dx", dx, exact_dx), ("dv", gradient.v_proj, exact.v_proj)):
        np.testing.assert_allclose(
            got, expected, rtol=0, atol=tolerance * np.abs(expected).max() * spread, err_msg=name
        )


def narrow(attention: Attention) -> Attention:
    return tree_map(lambda a: a.astype(np.float32), attention)


def weights_in_float64(attention: Attention) -> Attention:
    return tree_map(lambda a: a.astype(np.float64), attention)


@pytest.mark.parametrize("count", [3, 100])
@pytest.mark.parametrize("bad", [np.nan, 800.0, -800.0])
@pytest.mark.parametrize("where", [0, 1, -1])
def test_sums_out_of_range_are_found(count: int, bad: float, where: int) -> None:
    """In any place, among few sums and among many: NaN, overflow and underflow."""
    scores = np.zeros((1, 1, 1, count, 4))
    assert exponentials(scores.copy()) is not None
    scores[..., where, :] = bad
    assert exponentials(scores) is None
