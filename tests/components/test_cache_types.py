"""Types of the KV cache: rounding, bytes, and equality with rounded values that are stored as floats."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import einsum_transformer as et
from einsum_transformer.components.cache_types import UNCHANGED, cache_type
from golden_files import MODELS, Models

Array = np.ndarray


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [0, 1, 3, 63, 64, 65, 200])
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_round_to_half_a_step(bits: int, size: int, dtype: type) -> None:
    rng = np.random.default_rng(size)
    new = (rng.standard_normal((2, 3, size, 5)) * 10.0 ** np.arange(-3, 2)).astype(dtype)
    new[0, 0] = 0
    kind = cache_type(bits)
    codes, scales = kind.encode(new)
    assert codes.dtype == np.int8
    assert codes.shape[2] == (size if bits == 8 else -(-size // 2))
    assert scales.shape == (2, 3, -(-size // 64), 5)
    y = kind.decode((codes, scales), new)
    assert y.dtype == dtype
    assert y.shape == new.shape
    assert not y[0, 0].any()
    for start in range(0, size, 64):
        group = new[:, :, start : start + 64]
        step = np.abs(group).max(axis=2, keepdims=True) / (127 if bits == 8 else 7)
        assert (np.abs(y[:, :, start : start + 64] - group) <= step * 0.501).all()


def test_float16() -> None:
    new = np.array([[[[1.0, 1 / 3, 1e6, -1e6, 1e-9]]]], np.float32)
    kind = cache_type(16)
    (stored,) = kind.encode(new)
    assert stored.dtype == np.float16
    expected = [1, np.float16(1 / 3), 65504, -65504, 0]
    np.testing.assert_array_equal(kind.decode((stored,), new).ravel(), np.float32(expected))


@pytest.mark.parametrize("slack", [0, 3])
@pytest.mark.parametrize("name", MODELS)
def test_stored_and_simulated_caches_have_the_same_logits(
    name: str, slack: int, golden_model: Models
) -> None:
    """In chunks and step by step, with windows, heads of several sizes and latent attention."""
    model = golden_model(name)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 24))
    plain = model.logits(tokens)
    for bits in (16, 8, 4):
        found: list[Array] = []
        for simulated in (False, True):
            types = cache_type(bits, simulated), cache_type(bits if bits > 4 else 8, simulated)
            cache = replace(model, cache_types=types).cache(slack=slack)
            steps = [slice(0, 7), slice(7, 8), slice(8, 15), *(slice(i, i + 1) for i in range(15, 24))]
            logits = [model.decoder.forward(tokens[:, step], cache)[0] for step in steps]
            found.append(np.concatenate(logits, axis=1))
        # Their layouts differ, and with them the last bits of products.
        scale = np.abs(plain).max()
        np.testing.assert_allclose(found[0], found[1], rtol=0, atol=5e-6 * max(1, scale))
        assert np.abs(found[0] - plain).max() > 0


def test_bytes(golden_model: Models) -> None:
    """8 bits and a float32 scale per head of 16 elements: 20 bytes instead of 64."""
    model = golden_model("llama_gqa")
    tokens = np.zeros((1, 9), int)
    used = {}
    for bits in (None, 16, 8, 4):
        cache = replace(model, cache_types=(cache_type(bits), cache_type(bits))).cache(48)
        model.decoder.forward(tokens, cache)
        used[bits] = cache.nbytes
    head = model.config.head_dim
    assert used[16] * 2 == used[None]
    assert used[8] * 4 * head == used[None] * (head + 4)
    assert used[4] * 4 * head == used[None] * (head // 2 + 4)


def test_names_of_types(golden_model: Models) -> None:
    loaded = et.load("fast_lora", cache_type_k="int8", cache_type_v="q4_0", max_layers=1)
    assert [each.name for each in loaded.cache_types] == ["int8", "int4"]
    loaded = et.load("fast_lora", quantization="W8A8KV8", cache_type_v="f32", max_layers=1)
    assert [each.name for each in loaded.cache_types] == ["int8", "unchanged"]
    simulated = et.quantize(golden_model("llama_gqa"), "W8A8KV4", mode="simulated")
    assert [each.name for each in simulated.cache_types] == ["int4 (simulated)"] * 2
    assert golden_model("llama_gqa").cache_types == (UNCHANGED, UNCHANGED)
    assert str(simulated.quantization) == "W8A8KV4,channel (simulated)"
    with pytest.raises(et.InputError, match="`cache_type_k` is 'int5': expected one of float32, float16"):
        et.load("fast_lora", cache_type_k="int5")
