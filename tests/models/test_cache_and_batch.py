"""One forward pass for everything: in chunks through a cache or whole, alone or in a batch, the scores are
the same."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import einsum_transformer as et
from einsum_transformer.components.kv_cache import KVCache
from einsum_transformer.tree import tree_map
from tiny_models import LLAMA3, hf_config, random_weights, reference_logits, tiny_model

Array = np.ndarray
TOLERANCE = 1e-5
WINDOW = 5
MODELS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mqa": {"num_key_value_heads": 1},
    "mha, tied, biased": {"num_key_value_heads": 8, "attention_bias": True, "tie_word_embeddings": True},
    "window": {"model_type": "mistral", "sliding_window": WINDOW},
    "llama3": {"rope_scaling": LLAMA3},
    "yarn": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
}
BUILT = {name: tiny_model(**changes) for name, changes in MODELS.items()}


def tokens(b: int, t: int) -> Array:
    return np.random.default_rng(b * 1000 + t).integers(0, 61, (b, t))


def in_chunks(model: et.Model, ids: Array, sizes: list[int], cache: KVCache | None = None) -> Array:
    """The scores of all positions, `sizes` tokens at a time, the rest at the end."""
    cache = model.cache() if cache is None else cache
    bounds = np.cumsum([0, *sizes])
    bounds = [*bounds[bounds < ids.shape[1]], ids.shape[1]]
    return np.concatenate([model.decoder.forward(ids[:, a:b], cache)[0] for a, b in pairwise(bounds)], axis=1)


def assert_close(got: Array, expected: Array) -> None:
    assert got.shape == expected.shape
    np.testing.assert_allclose(
        got, expected, rtol=0, atol=TOLERANCE * max(1.0, float(np.abs(expected).max()))
    )


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_reference(name: str) -> None:
    """A second implementation, with loops and complex numbers for RoPE, in float64."""
    config = hf_config(**MODELS[name])
    ids = tokens(2, 24)
    expected = [reference_logits(config, random_weights(config), list(row)) for row in ids]
    assert_close(BUILT[name].logits(ids), np.array(expected))
    wide = tiny_model("float64", **MODELS[name]).logits(ids)
    assert wide.dtype == np.float64
    np.testing.assert_allclose(wide, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(1, 20), max_size=8), t=st.integers(1, 40))
def test_any_split_gives_the_whole(name: str, sizes: list[int], t: int) -> None:
    model, ids = BUILT[name], tokens(2, t)
    assert_close(in_chunks(model, ids, sizes), model.logits(ids))


@pytest.mark.parametrize("length", [WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW])
@pytest.mark.parametrize("chunk", [1, 2, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 1])
def test_window_lengths(length: int, chunk: int) -> None:
    """Around the ring's wrap: then decoded one by one to beyond the next wrap."""
    model, ids = BUILT["window"], tokens(1, length + WINDOW + 2)
    sizes = [chunk] * (length // chunk) + [length % chunk] * bool(length % chunk) + [1] * (WINDOW + 2)
    assert_close(in_chunks(model, ids, sizes), model.logits(ids))


@pytest.mark.parametrize("window", [1, 2, 39, 40, 41])
def test_extreme_windows(window: int) -> None:
    model = tiny_model(model_type="mistral", sliding_window=window)
    ids = tokens(1, 40)
    assert_close(in_chunks(model, ids, [7, 13] + [1] * 20), model.logits(ids))


def test_a_window_hides_what_lies_before_it() -> None:
    """Two layers reach 2 (W - 1) back and not one token further."""
    model, ids = BUILT["window"], tokens(1, 30)
    for first, changes in ((29 - 2 * (WINDOW - 1), True), (28 - 2 * (WINDOW - 1), False)):
        changed = ids.copy()
        changed[0, first] = (ids[0, first] + 1) % 61
        assert (model.logits(changed)[0, -1] != model.logits(ids)[0, -1]).any() == changes


@pytest.mark.parametrize("pad", [0, 1, 2, WINDOW, 31, 99, 100])
@pytest.mark.parametrize("name", ["gqa", "window", "llama3"])
def test_left_padding(name: str, pad: int) -> None:
    """A row beside a longer one gives what it gives alone, also in chunks and in what follows; padding may
    be any id."""
    model, ids = BUILT[name], tokens(2, 106)
    for filler in (0, 60):
        ids[1, :pad] = filler
        alone = model.logits(ids[1:, pad:])
        for sizes in ([101, 1, 1, 1, 1, 1], [64, 64]):
            got = in_chunks(model, ids, sizes, model.cache(pads=np.array([0, pad])))
            assert_close(got[1:, pad:], alone)
            assert_close(got[:1], model.logits(ids[:1]))
            assert np.isfinite(got).all()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    sizes=st.lists(st.integers(1, 30), max_size=4),
    name=st.sampled_from(["gqa", "mqa", "window", "yarn"]),
)
def test_mixed_lengths(lengths: list[int], sizes: list[int], name: str) -> None:
    model, longest = BUILT[name], max(lengths)
    rows = [tokens(i + 1, length)[0] for i, length in enumerate(lengths)]
    pads = np.array([longest - length for length in lengths])
    ids = np.array([[0] * int(pad) + list(row) for pad, row in zip(pads, rows)])
    got = in_chunks(model, ids, sizes, model.cache(pads=pads))
    for row, pad, scores in zip(rows, pads, got):
        assert_close(scores[pad:], model.logits(row[None])[0])


@pytest.mark.parametrize("name", ["gqa", "window"])
def test_rows_that_go_on_after_others_are_done(name: str) -> None:
    """select() between decode steps, down to one row, in another order."""
    model, ids, pads = BUILT[name], tokens(3, 20), np.array([0, 3, 8])
    cache = model.cache(pads=pads)
    in_chunks(model, ids[:, :10], [], cache)
    cache.select([2, 0])
    both = in_chunks(model, ids[[2, 0], 10:14], [1] * 4, cache)
    cache.select([1])
    last = in_chunks(model, ids[:1, 14:], [1] * 6, cache)
    assert_close(both[0], model.logits(ids[2:, 8:14])[0, 2:])
    assert_close(np.concatenate([both[1:], last], axis=1), model.logits(ids[:1])[:, 10:])


@pytest.mark.parametrize("back", [0, 1, 5, 12])
def test_truncate_and_go_on(back: int) -> None:
    """What a rejected draft leaves behind."""
    model, ids, wrong = BUILT["gqa"], tokens(2, 20), tokens(3, 20)[:2]
    cache = model.cache()
    in_chunks(model, np.concatenate([ids[:, : 12 - back], wrong[:, :back]], axis=1), [5], cache)
    cache.truncate(12 - back)
    got = in_chunks(model, ids[:, 12 - back :], [1, 2], cache)
    assert_close(got, model.logits(ids)[:, 12 - back :])
    assert cache.length == 20


def test_last_and_none_compute_the_same_cache() -> None:
    model, ids = BUILT["gqa"], tokens(2, 9)
    full = model.logits(ids)
    cache = model.cache()
    assert model.decoder.forward(ids[:, :5], cache, "none")[0].shape == (2, 0, 61)
    assert_close(model.decoder.forward(ids[:, 5:], cache, "last")[0], full[:, -1:])


@pytest.mark.parametrize("name", ["llama3", "yarn", "linear"])
def test_beyond_the_context_trained_on(name: str) -> None:
    """Position 300 of a model made for 32 or 64: cached, padded and whole are one, and equal the
    reference."""
    model, config, ids = BUILT[name], hf_config(**MODELS[name]), tokens(1, 300)
    whole = model.logits(ids)
    assert_close(in_chunks(model, ids, [40, 150] + [1] * 60), whole)
    expected = reference_logits(config, random_weights(config), list(ids[0, :70]))
    assert_close(whole[0, :70], expected)


def test_dynamic_rope_until_the_trained_length() -> None:
    """Within it nothing is stretched, so a cache changes nothing; beyond it a whole pass is what transformers
    gives, while cached keys keep the angles of the step in which they came."""
    model = tiny_model(
        max_position_embeddings=20, rope_scaling={"type": "dynamic", "factor": 2.0}, num_hidden_layers=1
    )
    ids = tokens(1, 28)
    assert_close(in_chunks(model, ids[:, :20], [3, 9] + [1] * 8), model.logits(ids[:, :20]))
    cached = in_chunks(model, ids, [20] + [1] * 8)
    assert_close(cached[:, :20], model.logits(ids[:, :20]))
    assert np.isfinite(cached).all()


def test_dynamic_rope_of_a_row_does_not_depend_on_the_batch() -> None:
    """A short row beside one beyond the trained length gives what it gives alone."""
    model = tiny_model(max_position_embeddings=20, rope_scaling={"type": "dynamic", "factor": 2.0})
    ids, pads = tokens(2, 28), np.array([0, 12])
    got = in_chunks(model, ids, [], model.cache(pads=pads))
    assert_close(got[1, 12:], model.logits(ids[1:, 12:])[0])


@pytest.mark.parametrize("block", [1, 3, 16, 1000])
def test_the_attention_block_changes_no_result(block: int) -> None:
    model, ids = BUILT["window"], tokens(2, 33)
    attentions = [layer.self_attn for layer in model.decoder.layers]
    tiled = [replace(each, mixing=replace(each.mixing, query_block=block)) for each in attentions]
    layers = tuple(replace(layer, self_attn=each) for layer, each in zip(model.decoder.layers, tiled))
    other = replace(model, decoder=replace(model.decoder, layers=layers))
    assert_close(other.logits(ids), model.logits(ids))


def test_wide_weights_in_either_memory_layout() -> None:
    """Column-major weights give the scores and gradients of row-major ones."""
    model, ids = tiny_model(attention_bias=True), tokens(2, 7)
    turned = replace(model, decoder=tree_map(np.asfortranarray, model.decoder))
    assert_close(turned.logits(ids), model.logits(ids))
    assert_close(turned.logits(ids[:1, :1]), model.logits(ids[:1, :1]))
    loss, gradients = model.loss_and_gradients(ids, ids)
    other_loss, others = turned.loss_and_gradients(ids, ids)
    assert other_loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():
        assert_close(others[name], gradient)
