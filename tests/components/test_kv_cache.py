"""The cache with the mask: every query sees exactly its own keys, however the tokens came in."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from einsum_transformer.components.attention import Attention
from einsum_transformer.components.context import Context
from einsum_transformer.components.kv_cache import KVCache, layer_cache
from einsum_transformer.components.mixing import Mixing
from einsum_transformer.components.rope import RopeConfig, Rotation, rotation

Array = np.ndarray
B, K, H = 2, 3, 4


def marked(start: int, count: int, batch: int = B) -> tuple[Array, Array]:
    """Keys and values (b, t, k, h) that say their row, position, head and dimension."""
    b, t, k, h = np.ogrid[:batch, start : start + count, :K, :H]
    keys = (b * 1e7 + t * 100 + k * 10 + h).astype(np.float64)
    return keys, -keys


def seen(positions: int, window: int | None, block: int) -> Attention:
    """An attention that shows what it looks at: scores all 0 and values one-hot, so that each row of its
    output is 1 / count at the keys that are visible."""
    eye = np.eye(positions)
    zero = np.zeros((1, 1, positions, positions))
    heads = (zero, zero[0], eye[None], eye[:, None, None])
    return Attention(*heads, mixing=Mixing(window=window, query_block=block))


def turn(positions: int, batch: int, count: int) -> Rotation:
    return rotation(RopeConfig(), positions, np.zeros((batch, count), int), np.dtype(np.float64))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    chunks=st.lists(st.integers(1, 9), min_size=1, max_size=9),
    window=st.none() | st.integers(1, 15),
    pads=st.none() | st.lists(st.integers(0, 12), min_size=1, max_size=3),
    block=st.integers(1, 8),
    capacity=st.sampled_from([0, 5, 1000]),
)
def test_every_query_sees_its_window_and_nothing_else(
    chunks: list[int], window: int | None, pads: list[int] | None, block: int, capacity: int
) -> None:
    """Whole or in chunks of any sizes, through a ring or not: the last min(i + 1, window) keys, and no
    padding."""
    total = sum(chunks)
    size = total + total % 2
    paddings = np.zeros(1, int) if pads is None else np.minimum(pads, total)
    attention, start = seen(size, window, block), 0
    query, key = np.ogrid[:total, :total]
    visible = (key <= query) & (key > query - (window or total)) & (key >= paddings[:, None, None])
    counts = visible.sum(axis=-1, keepdims=True)
    np.testing.assert_array_equal(
        counts[..., 0], np.clip(np.arange(total) + 1 - paddings[:, None], 0, window or total)
    )
    expected = visible / np.maximum(counts, 1)
    cache = layer_cache(window, capacity)
    for count in chunks:
        queries = np.arange(start, start + count)
        x = np.broadcast_to(np.eye(size)[queries], (len(paddings), count, size))
        y, _ = attention.forward(
            x, Context(queries, turn(size, len(paddings), count), None if pads is None else paddings, cache)
        )
        np.testing.assert_allclose(y[..., :total], expected[:, queries], rtol=0, atol=1e-12)
        start += count


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    t=st.integers(1, 24),
    window=st.none() | st.integers(1, 26),
    pads=st.none() | st.lists(st.integers(0, 24), min_size=1, max_size=3),
    block=st.integers(1, 24),
)
def test_a_whole_pass_without_a_cache_sees_the_same(
    t: int, window: int | None, pads: list[int] | None, block: int
) -> None:
    size, paddings = t + t % 2, np.zeros(1, int) if pads is None else np.minimum(pads, t)
    x = np.broadcast_to(np.eye(size)[:t], (len(paddings), t, size))
    y, _ = seen(size, window, block).forward(
        x, Context(np.arange(t), turn(size, len(x), t), None if pads is None else paddings)
    )
    query, key = np.ogrid[:t, :size]
    visible = (key <= query) & (key > query - (window or t)) & (key >= paddings[:, None, None])
    np.testing.assert_allclose(y, visible / np.maximum(visible.sum(-1, keepdims=True), 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_growth_is_geometric(dtype: type) -> None:
    """3,000 tokens one by one move the memory a dozen times at most, and hold no more than twice what they
    need."""
    cache, sizes = layer_cache(None), []
    for position in range(3000):
        keys, values = marked(position, 1)
        cache.append(keys.astype(dtype), values.astype(dtype))
        sizes.append(cache.nbytes)
    needed = 2 * B * K * H * 3000 * np.dtype(dtype).itemsize
    assert needed <= sizes[-1] <= 2.1 * needed
    assert len(set(sizes)) <= math.log2(3000)


@pytest.mark.parametrize("step", [1, 7])
def test_a_ring_is_never_longer_than_its_window(step: int) -> None:
    cache = layer_cache(window=20)
    for start in range(0, 210, step):
        cache.append(*marked(start, step))
        assert cache.nbytes <= 2 * B * K * H * 20 * 8


@pytest.mark.parametrize("window", [None, 50])
def test_a_capacity_is_taken_at_once(window: int | None) -> None:
    cache, sizes = layer_cache(window, capacity=700), set()
    for start in range(0, 700, 10):
        cache.append(*marked(start, 10))
        sizes.add(cache.nbytes)
    assert len(sizes) == 1


def test_what_was_returned_is_not_overwritten_by_a_longer_cache() -> None:
    """Keys of a first append stay as they were while later ones go behind them."""
    cache = layer_cache(None)
    keys, _, _ = cache.append(*marked(0, 5))
    before = keys.copy()
    for start in range(5, 1000):
        cache.append(*marked(start, 1))
    np.testing.assert_array_equal(keys, before)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    first=st.integers(1, 30),
    back=st.integers(0, 30),
    again=st.integers(1, 30),
    window=st.sampled_from([None, 40]),
)
def test_truncate_forgets(first: int, back: int, again: int, window: int | None) -> None:
    """Tokens appended afterwards stand where the forgotten ones stood."""
    length = max(0, first - back)
    cache = layer_cache(window)
    cache.append(*marked(500, first))
    cache.truncate(length)
    assert cache.length == length
    keys, values, index = cache.append(*marked(0, again))
    expected = [np.concatenate(pair, axis=1) for pair in zip(marked(500, length), marked(0, again))]
    order = np.argsort(index)
    held = len(index)
    np.testing.assert_array_equal(keys[:, order], expected[0][:, -held:])
    np.testing.assert_array_equal(values[:, order], expected[1][:, -held:])
    assert sorted(index) == list(range(length + again - held, length + again))


@pytest.mark.parametrize("length", [-1, 6])
def test_truncate_to_an_impossible_length(length: int) -> None:
    cache = layer_cache(None)
    cache.append(*marked(0, 5))
    with pytest.raises(ValueError, match="5 tokens"):
        cache.truncate(length)
    assert cache.length == 5


def test_truncate_of_a_ring() -> None:
    """A full ring that has not wrapped can go back; one that has wrapped refuses, whatever the length."""
    cache = layer_cache(window=5)
    cache.append(*marked(0, 5))
    cache.truncate(3)
    cache.append(*marked(3, 2))
    cache.append(*marked(5, 1))
    for length in (0, 1, 5):
        with pytest.raises(ValueError, match="wrapped"):
            cache.truncate(length)
    keys, _, index = cache.append(*marked(6, 1))
    np.testing.assert_array_equal(keys[:, np.argsort(index)], marked(2, 5)[0])


def test_truncate_to_the_present_length_changes_nothing() -> None:
    """Also in a ring that has wrapped: nothing is to be forgotten."""
    for window in (None, 5):
        cache = layer_cache(window)
        cache.append(*marked(0, 8))
        cache.truncate(8)
        keys, _, index = cache.append(*marked(8, 1))
        np.testing.assert_array_equal(keys[:, np.argsort(index)], marked(index.min(), len(index))[0])


@pytest.mark.parametrize("rows", [[1], [1, 0], [0, 0, 1], np.array([1]), []])
@pytest.mark.parametrize("window", [None, 4])
def test_select_rows(rows: list[int], window: int | None) -> None:
    """In that order, also repeated, with their padding; the kept rows go on as if alone."""
    cache = KVCache([window, None], pads=np.array([0, 2]))
    for layer in cache.layers:
        layer.append(*marked(0, 6))
    cache.select(rows)
    assert cache.pads is not None
    assert list(cache.pads) == [[0, 2][row] for row in rows]
    for layer in cache.layers:
        keys, values, index = layer.append(*(a[np.array(rows, int)] for a in marked(6, 1)))
        order = np.argsort(index)
        np.testing.assert_array_equal(keys[:, order], marked(index.min(), len(index))[0][np.array(rows, int)])
        np.testing.assert_array_equal(values, -keys)


def test_an_empty_cache() -> None:
    cache = KVCache([None, 3])
    assert (cache.length, cache.nbytes) == (0, 0)
    cache.truncate(0)
    cache.select([0])
    assert cache.length == 0
