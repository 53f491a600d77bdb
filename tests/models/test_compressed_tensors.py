"""Folders in the format compressed-tensors: they load again with the values of the codes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import einsum_transformer as et
from einsum_transformer.engine import Leaf
from einsum_transformer.tree import map_named, named_leaves
from golden_files import Folders, Models, load_golden


@pytest.mark.parametrize("name", ["llama_mha_tied", "qwen3_tied", "gemma_untied", "qwen3_moe_window"])
@pytest.mark.parametrize(
    "scheme",
    ["W8A8", "W8A16", "W4A16,channel", "W4A8,channel", "W8A8,asymmetric", "W8A16,asymmetric", "W8A8,tensor"],
)
def test_a_folder_that_others_load(name: str, scheme: str, golden_model: Models, tmp_path: Path) -> None:
    golden, model = load_golden(name), golden_model(name)
    ends = ["embed_tokens", "lm_head"]
    quantized = et.quantize(model, scheme, exclude=ends if model.decoder.lm_head is not None else ends[:1])
    quantized.save(tmp_path, save_format="compressed-tensors")
    values = map_named(lambda _, w: w.array() if isinstance(w, Leaf) else w, quantized.decoder)
    expected = replace(quantized, decoder=values, quantization=None).logits(golden.tokens)
    for packed in (False, True):
        again = et.load(tmp_path, packed=packed)
        np.testing.assert_allclose(again.logits(golden.tokens), expected, rtol=0, atol=1e-5)
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    group = settings["config_groups"]["group_0"]
    assert group["weights"]["num_bits"] == int(scheme[1])
    assert (group["input_activations"] is None) == ("A16" in scheme)
    modules = {
        path.removesuffix(".weight") for path, w in named_leaves(quantized.decoder) if isinstance(w, Leaf)
    }
    assert not modules & set(settings["ignore"])


def test_groups(tmp_path: Path) -> None:
    model = et.load("fast_lora", max_layers=1)
    tokens = np.arange(12)[None]
    for scheme in ("W4A16g32", "W4A16g64,asymmetric"):
        quantized = et.quantize(model, scheme)
        quantized.save(tmp_path / scheme, save_format="compressed-tensors")
        values = map_named(lambda _, w: w.array() if isinstance(w, Leaf) else w, quantized.decoder)
        expected = replace(quantized, decoder=values, quantization=None).logits(tokens)
        found = et.load(tmp_path / scheme, packed=True).logits(tokens)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("name", "scheme", "message"),
    [
        ("llama_gqa", "W3A16", "W4 and W8 with A8 and A16 are supported"),
        ("llama_gqa", "W4A4", "W4 and W8 with A8 and A16 are supported"),
        ("llama_gqa", "W4A16,tensor,asymmetric", "one zero point for a matrix"),
        ("gpt2_plain", "W8A16", "cannot describe"),
    ],
)
def test_what_the_format_cannot_describe(
    name: str, scheme: str, message: str, golden_folder: Folders, tmp_path: Path
) -> None:
    quantized = et.load(golden_folder(name), quantization=scheme)
    with pytest.raises(et.InputError, match=message):
        quantized.save(tmp_path, save_format="compressed-tensors")


def test_other_formats_and_plain_models(golden_model: Models, tmp_path: Path) -> None:
    model = golden_model("llama_gqa")
    with pytest.raises(et.InputError, match="`save_format` is 'awq'"):
        model.save(tmp_path, save_format="awq")
    with pytest.raises(et.InputError, match="the model is not quantized"):
        model.save(tmp_path, save_format="compressed-tensors")
    uneven = et.load("smollm2-135m", max_layers=1, quantization="W4A16g128")
    with pytest.raises(et.InputError, match="not a multiple of 128"):
        uneven.save(tmp_path, save_format="compressed-tensors")
    careful = et.quantize(
        et.load("smollm2-135m", max_layers=1),
        "W4A16g64",
        method="awq",
        calibration="a " * 600,
        calibration_chunks=1,
    )
    with pytest.raises(et.InputError, match="no scales of columns"):
        careful.save(tmp_path, save_format="compressed-tensors")
