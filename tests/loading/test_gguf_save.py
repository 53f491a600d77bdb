"""`convert`: the files equal those of llama.cpp's converter, and load as the model they were made of."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize

import einsum_transformer as et
from einsum_transformer.formats.gguf import GGUFFile
from einsum_transformer.formats.gguf_write import FILE_TYPES
from gguf_files import write_model_gguf
from golden_files import MODELS, Folders, load_golden, write_folder
from tiny_models import hf_config, random_weights, write_gguf, write_tiny

IDS = np.random.default_rng(3).integers(0, 61, (1, 40))
REFUSED = {
    "llama_rope_dynamic": "the RoPE of layer 0, rope_type dynamic",
    "llama_rope_yarn_keys": "the RoPE of layer 0, rope_type yarn",
    "qwen2_window": "the sliding window of layer 2: 6",
    "qwen3_window": "the sliding window of layer 1: 6",
    "gemma2_caps": "the attention scale of layer 0: 0.242536",
    "gemma2_mqa": "attn_logit_softcapping = None",
    "gemma3_text": "the attention scale of layer 0: 0.242536",
    "gemma3_text_mqa": "the attention scale of layer 0: 0.0625",
    "phi_gqa": "hidden_act = gelu",
    "gpt2_scaled": "hidden_act = gelu",
    "gpt_neox_sequential": "attention_bias = False",
    "mpt_clip": "the attention scale of layer 0: 0.3",
    "smollm3_window": "the sliding window of layer 1: 5",
    "qwen2_moe_dense_layer": "which layers have experts (layer 1)",
    "qwen2_moe_window": "qkv_bias = False",
    "qwen3_moe_window": "the sliding window of layer 0: 5",
    "deepseek_normalized": "which layers have experts (layer 3)",
    "deepseek_v2_groups": "the RoPE of layer 0, rope_type yarn",
}
# Keys with the values that llama.cpp assumes if they are absent, or that its converter derives differently.
OPTIONAL = re.compile(
    r"vocab_size|rope\.(dimension_count|freq_base)|attention\.(key|value)_length|attention\.head_count_kv"
    r"|rope\.scaling\.(yarn_beta_(fast|slow)|original_context_length|type)|feed_forward_length"
    r"|attention\.sliding_window(_pattern)?|expert_(shared_)?feed_forward_length"
)


@pytest.mark.parametrize("name", MODELS)
def test_every_family(name: str, golden_folder: Folders, tmp_path: Path) -> None:
    golden, path = load_golden(name), tmp_path / "model.gguf"
    if name in REFUSED:
        with pytest.raises(et.InputError, match=re.escape(f"cannot represent {REFUSED[name]}") + "$"):
            et.convert(golden_folder(name), path, "F32")
        assert list(tmp_path.iterdir()) == []
        return
    assert et.convert(golden_folder(name), path, "F32") == path
    model = et.load(golden_folder(name))
    expected = model.logits(golden.tokens)
    found = et.load(path)
    atol = 2e-6 * np.abs(expected).max()
    np.testing.assert_allclose(found.logits(golden.tokens), expected, rtol=0, atol=atol)

    reference = GGUFFile(write_model_gguf(tmp_path / "reference.gguf", golden.config, golden.weights))
    own = GGUFFile(path)
    head = {"output.weight"} if name == "gemma_untied" else set[str]()  # the converter drops it
    assert set(own.names()) - head == set(reference.names())
    for tensor in reference.names():
        assert own.info(tensor).dtype == reference.info(tensor).dtype
        np.testing.assert_allclose(own.read(tensor), reference.read(tensor), rtol=1e-6, err_msg=tensor)
    architecture = reference.metadata["general.architecture"]
    assert own.metadata["general.architecture"] == architecture
    differing = {
        key.removeprefix(f"{architecture}.")
        for key in own.metadata.keys() | reference.metadata.keys()
        if key.startswith(architecture) and own.metadata.get(key) != reference.metadata.get(key)
    }
    assert [key for key in differing if not OPTIONAL.fullmatch(key)] == []


@pytest.mark.parametrize("name", ["gemma3_text", "gemma2_caps"])
def test_gemma_with_the_scale_of_the_head_size(name: str, tmp_path: Path) -> None:
    golden = load_golden(name)
    config = golden.config | {"query_pre_attn_scalar": golden.config["head_dim"]}
    folder = write_folder(tmp_path / "folder", config, golden.weights)
    found = et.load(et.convert(folder, tmp_path / "model.gguf", "F32"))
    expected = et.load(folder).logits(golden.tokens)
    np.testing.assert_array_equal(found.logits(golden.tokens), expected)
    own = GGUFFile(tmp_path / "model.gguf").metadata
    reference = GGUFFile(write_model_gguf(tmp_path / "b.gguf", config, golden.weights)).metadata
    for key, value in reference.items():
        if key.startswith("gemma"):
            assert own[key] == value


@pytest.mark.parametrize("kind", FILE_TYPES)
def test_types(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Matrices are quantized as by the gguf package; rows that are no whole blocks are F16, with a note."""
    sizes = {"vocab_size": 640, "intermediate_size": 40, "head_dim": 8, "hidden_size": 32}
    folder, weights = write_tiny(tmp_path / "folder", **sizes)
    path = et.convert(folder, tmp_path / "model.gguf", kind)
    file = GGUFFile(path)
    assert file.metadata["general.file_type"] == FILE_TYPES[kind]
    blocks = kind in ("Q8_0", "Q4_0", "Q4_1")
    expected = {
        "token_embd.weight": "Q8_0" if blocks else kind,
        "output.weight": "Q8_0" if blocks else kind,
        "blk.0.ffn_down.weight": "F16" if blocks else kind,
        "blk.0.ffn_up.weight": kind,
        "blk.0.attn_norm.weight": "F32",
    }
    assert {name: file.info(name).dtype for name in expected} == expected
    assert ("F16 instead of" in caplog.text) == blocks
    for name, tensor in (("ffn_up", "mlp.up_proj"), ("ffn_down", "mlp.down_proj")):
        code = gguf.GGMLQuantizationType[expected[f"blk.0.{name}.weight"]]
        original = weights[f"model.layers.0.{tensor}.weight"]
        values = dequantize(quantize(original, code), code).reshape(original.shape)
        np.testing.assert_array_equal(file.read(f"blk.0.{name}.weight"), values)
        np.testing.assert_array_equal(
            et.load(path).named_parameters()[f"model.layers.0.{tensor}.weight"], values
        )


def test_a_gguf_file_keeps_its_tokenizer_and_description(tmp_path: Path) -> None:
    tokens = ["a", "b", "ab", *(f"t{i}" for i in range(58))]
    keys: dict[str, Any] = {
        "general.name": "A model",
        "general.license": "apache-2.0",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "an-unknown-one",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.token_type": [1] * 61,
    }
    config = hf_config()
    source = write_gguf(tmp_path / "a.gguf", config, random_weights(config), **keys)
    before = GGUFFile(source)
    after = GGUFFile(et.convert(source, tmp_path / "b.gguf", "F32"))
    for key in keys:
        assert after.metadata[key] == before.metadata[key]
    for name in before.names():
        np.testing.assert_array_equal(after.read(name), before.read(name))
    with pytest.raises(et.InputError, match="is the file of the model"):
        et.convert(source, source)


def test_models_in_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = et.load("fast_lora", max_layers=1)
    found = et.load(et.convert(model, tmp_path / "a.gguf", "F32"))
    np.testing.assert_array_equal(found.logits(IDS), model.logits(IDS))
    assert "no tokenizer, so programs that load the file accept token ids only" in caplog.text
    small = et.quantize(model, "W8A16")
    values = et.load(et.convert(small, tmp_path / "b.gguf", "F32")).named_parameters()
    for name, array in small.named_parameters().items():
        np.testing.assert_array_equal(values[name], array)
    assert "the file does not contain the scheme W8A16" in caplog.text
    small.save(tmp_path / "small")
    again = et.load(et.convert(tmp_path / "small", tmp_path / "c.gguf", "F32")).named_parameters()
    for name, array in values.items():
        np.testing.assert_array_equal(again[name], array)


def test_weights_that_a_type_cannot_represent(tmp_path: Path) -> None:
    folder, weights = write_tiny(tmp_path / "folder", hidden_size=32)
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name][3, 4] = 1e5
    config = json.loads((folder / "config.json").read_text())
    write_folder(tmp_path / "large", config, weights)
    for kind in ("F16", "Q8_0"):
        with pytest.raises(et.InputError, match=r"blk\.1\.ffn_up\.weight.* beyond the range of float16"):
            et.convert(tmp_path / "large", tmp_path / "a.gguf", kind)
    et.convert(tmp_path / "large", tmp_path / "b.gguf", "BF16")
    weights[name][3, 4] = np.nan
    write_folder(tmp_path / "nan", config, weights)
    with pytest.raises(et.InputError, match=r"blk\.1\.ffn_up\.weight.* contains nan or inf"):
        et.convert(tmp_path / "nan", tmp_path / "a.gguf", "F32")
    assert not list(tmp_path.glob("*a.gguf*"))


def test_wrong_arguments(tmp_path: Path) -> None:
    folder, _ = write_tiny(tmp_path / "folder")
    for output, kind, message in (
        (tmp_path / "no" / "a.gguf", "F32", "does not exist"),
        (tmp_path, "F32", "a folder; give the name of the file"),
        (tmp_path / "a.gguf", "Q4_K", "`outtype` is 'Q4_K': expected F32, F16, BF16, Q8_0, Q4_0, Q4_1"),
    ):
        with pytest.raises(et.InputError, match=message):
            et.convert(folder, output, kind)
    adapted = et.with_lora(et.load(folder), et.LoRAConfig(r=2))
    with pytest.raises(et.InputError, match="has an adapter: merge it first"):
        et.convert(adapted, tmp_path / "a.gguf")


def test_what_llama_cpp_ignores_is_noted(
    golden_folder: Folders, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    et.convert(golden_folder("mistral_window"), tmp_path / "a.gguf", "F32")
    assert "what llama.cpp ignores for llama: the sliding window of 7 tokens" in caplog.text
    config = hf_config(head_dim=64, rope_scaling={"type": "yarn", "factor": 4.0, "beta_fast": 8.0})
    folder = write_folder(tmp_path / "yarn", config, random_weights(config))
    et.convert(folder, tmp_path / "c.gguf", "F32")
    assert "ignores for llama: beta_fast and beta_slow of yarn" in caplog.text
    caplog.clear()
    et.convert(golden_folder("llama_gqa"), tmp_path / "b.gguf", "F32")
    assert "ignores" not in caplog.text
