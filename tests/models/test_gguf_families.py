"""A GGUF file of each family, written as llama.cpp's converter writes it, is the model that the folder is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import einsum_transformer as et
from gguf_files import write_model_gguf
from golden_files import MODELS, Folders, load_golden, write_folder

# What the format cannot say, in the way it can be said: what llama.cpp takes for granted.
SAYABLE: dict[str, dict[str, Any]] = {
    "gemma2_caps": {"query_pre_attn_scalar": 10},
    "gemma3_text": {"query_pre_attn_scalar": 10},
}
# Settings that no key of the format carries and no published model has.
UNSAYABLE = {
    "llama_rope_yarn_keys",
    "gemma_untied",
    "gemma2_mqa",
    "llama_rope_dynamic",
    "qwen3_window",
    "qwen2_window",
    "gemma3_text_mqa",
    "phi_gqa",
    "gpt2_scaled",
    "gpt_neox_sequential",
    "mpt_clip",
    "olmo2_mqa",
    "smollm3_window",
    "qwen2_moe_dense_layer",
    "qwen2_moe_window",
    "qwen3_moe_window",
    "deepseek_normalized",
    "deepseek_v2_groups",
}


@pytest.mark.parametrize("name", [name for name in MODELS if name not in UNSAYABLE])
def test_same_logits(name: str, tmp_path: Path) -> None:
    golden = load_golden(name)
    config = golden.config | SAYABLE.get(name, {})
    folder = et.load(write_folder(tmp_path / "folder", config, golden.weights))
    # The converter leaves the window out for some, and takes it that a feed-forward is four times the model.
    keys = {"{arch}.attention.sliding_window": config.get("sliding_window") or None}
    if size := config.get("n_inner") or config.get("intermediate_size"):
        keys["{arch}.feed_forward_length"] = size
    file = et.load(write_model_gguf(tmp_path / "m.gguf", config, golden.weights, **keys))
    expected = folder.logits(golden.tokens)
    np.testing.assert_allclose(
        file.logits(golden.tokens), expected, rtol=0, atol=1e-5 * np.abs(expected).max()
    )
    # Without a window, a mistral is a llama.
    kind = "llama" if name == "mistral_full" else folder.config.model_type
    assert file.config.model_type == kind


def test_latent_attention_in_one_tensor(tmp_path: Path) -> None:
    """The older form of the files, with keys and values of all heads in attn_kv_b."""
    golden = load_golden("deepseek_v2_direct")
    whole = write_model_gguf(tmp_path / "a.gguf", golden.config, golden.weights, expanded=True)
    parts = write_model_gguf(tmp_path / "b.gguf", golden.config, golden.weights)
    models = [et.load(path) for path in (whole, parts)]
    np.testing.assert_array_equal(models[0].logits(golden.tokens), models[1].logits(golden.tokens))


@pytest.mark.parametrize(
    "name", ["gemma3_text", "gpt_neox_parallel", "qwen3_moe_normalized", "deepseek_v2_direct"]
)
def test_saved_as_a_folder(name: str, tmp_path: Path) -> None:
    """What a file says about the arithmetic is in the folder, and the weights are as they were."""
    golden = load_golden(name)
    config = golden.config | SAYABLE.get(name, {})
    file = et.load(write_model_gguf(tmp_path / "m.gguf", config, golden.weights))
    file.save(tmp_path / "saved")
    again = et.load(tmp_path / "saved")
    np.testing.assert_array_equal(again.logits(golden.tokens), file.logits(golden.tokens))
    for key, array in again.named_parameters().items():
        np.testing.assert_allclose(array, golden.weights[key], rtol=0, atol=1e-7, err_msg=key)


@pytest.mark.parametrize("budget", [0, 20_000])
@pytest.mark.parametrize("name", ["mixtral_window", "deepseek_v2_direct", "gpt2_plain"])
def test_under_a_budget(name: str, budget: int, golden_folder: Folders, tmp_path: Path) -> None:
    """Matrices that stay in the file, experts and parts of tensors among them."""
    golden = load_golden(name)
    lazy = et.load(golden_folder(name), weight_budget=budget).logits(golden.tokens)
    np.testing.assert_allclose(lazy, golden.logits, rtol=0, atol=1e-4)
    if name != "gpt2_plain":
        file = write_model_gguf(tmp_path / "m.gguf", golden.config, golden.weights)
        np.testing.assert_allclose(
            et.load(file, weight_budget=budget).logits(golden.tokens),
            et.load(file).logits(golden.tokens),
            rtol=0,
            atol=1e-5,
        )
