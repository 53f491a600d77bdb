"""Weights in bfloat16: their values, products with few rows, and models that are loaded in it."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import einsum_transformer as et
from einsum_transformer.engine import Leaf, einsum, integers
from einsum_transformer.leaves.bfloat16 import Bfloat16Weight
from einsum_transformer.tree import named_leaves
from golden_files import Folders, load_golden

Array = np.ndarray


def weight(rows: int, width: int) -> Bfloat16Weight:
    rng = np.random.default_rng(rows)
    values = rng.standard_normal((rows, width)).astype(ml_dtypes.bfloat16)
    return Bfloat16Weight(values, (rows, width), 1)


@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize("count", [1, 3, 4, 5, 40])
def test_products(count: int, library: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The activations are not rounded."""
    monkeypatch.setattr(integers, "bfloat16_available", lambda: library)
    leaf = weight(70, 131)
    x = np.random.default_rng(count).standard_normal((1, count, 131)).astype(np.float32)
    found = einsum("btd,fd->btf", x, leaf)
    assert found.dtype == np.float32
    expected = x.astype(float) @ leaf.array().astype(float).T
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6 * np.abs(expected).max())


def test_all_values_are_exact() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16).reshape(256, 256)
    leaf = Bfloat16Weight(every, (256, 256), 1)
    np.testing.assert_array_equal(leaf.array().view(np.uint32) >> 16, every.view(np.uint16))


def test_a_model_in_bfloat16(golden_folder: Folders, tmp_path: Path) -> None:
    folder, golden = golden_folder("llama_gqa"), load_golden("llama_gqa")
    model, exact = et.load(folder, dtype="bfloat16"), et.load(folder)
    held = {path: leaf for path, leaf in named_leaves(model.decoder) if isinstance(leaf, Leaf)}
    for path, array in named_leaves(exact.decoder):
        if array.ndim > 1:
            assert held[path].nbytes * 2 == array.nbytes
            rounded = array.astype(ml_dtypes.bfloat16).astype(np.float32)
            np.testing.assert_array_equal(held[path].array(), rounded)
    model.save(tmp_path, dtype="bfloat16")
    again = et.load(tmp_path)
    np.testing.assert_allclose(model.logits(golden.tokens), again.logits(golden.tokens), rtol=0, atol=1e-5)
    random = et.load("fast_lora", dtype="bfloat16", max_layers=1)
    assert isinstance(random.decoder.layers[0].mlp.up_proj, Bfloat16Weight)
    with pytest.raises(et.InputError, match="`weight_budget` excludes `dtype` bfloat16"):
        et.load(folder, dtype="bfloat16", weight_budget=1000)


def test_training_of_all_weights_and_of_adapters(golden_folder: Folders) -> None:
    """Weights that are trained become arrays; adapters are trained beside weights in bfloat16."""
    settings = et.TrainingSettings(et.Schedule(1e-2, 3, "constant"))
    for adapted in (False, True):
        model = et.load(golden_folder("llama_gqa"), dtype="bfloat16")
        model = et.with_lora(model, et.LoRAConfig(r=2, target_modules="all-linear")) if adapted else model
        batches = et.RandomTokens(model.config.vocab_size, 2, 8, fixed=True)
        trainer = et.Trainer(model, batches, settings)
        losses = [report.loss for report in trainer.run(3)]
        assert losses[-1] < losses[0]
