"""Models against activations of transformers: the same, or the first step that is not is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import einsum_transformer as et
from einsum_transformer.analysis.parity import open_reference, parity
from einsum_transformer.cli.app import main
from einsum_transformer.errors import InputError
from golden_files import FOLDER, load_golden, write_folder

REFERENCES = ("gpt2_plain", "gemma2_caps", "qwen2_moe_dense_layer", "deepseek_v2_direct")


def reference(name: str) -> Path:
    return FOLDER / f"reference_{name}.npz"


def model_of(name: str, folder: Path, **changed: float) -> Path:
    """The golden model, its tensors of these names (dots as double underscores) times a number."""
    golden = load_golden(name)
    factors = {key.replace("__", "."): factor for key, factor in changed.items()}
    assert set(factors) <= set(golden.weights)
    weights = {key: np.float32(factors.get(key, 1)) * w for key, w in golden.weights.items()}
    return write_folder(folder, golden.config, weights)


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_step_equals_transformers(name: str, dtype: str, tmp_path: Path) -> None:
    found = parity(et.load(model_of(name, tmp_path), dtype), open_reference(reference(name)))
    assert found.passed, found.first_diverging
    assert found.same_choice == 1
    # The gate of experts, and the product that absorbed attention never makes, are all that is not compared.
    assert all(step.endswith((".gate", "kv_b_proj")) for step in found.not_in_reference)
    assert all(step.endswith(".experts") for step in found.not_compared)
    assert len(found.steps) >= 27
    assert max(step.relative_error for step in found.steps) < 2e-5


@pytest.mark.parametrize(
    ("name", "tensor", "step"),
    [
        ("gpt2_plain", "transformer.wpe.weight", "transformer.wpe"),
        ("gpt2_plain", "transformer.h.1.attn.c_attn.bias", "transformer.h.1.attn.c_attn"),
        ("gpt2_plain", "transformer.h.2.ln_2.weight", "transformer.h.2.ln_2"),
        ("gpt2_plain", "transformer.h.0.mlp.c_proj.weight", "transformer.h.0.mlp.c_proj"),
        ("gemma2_caps", "model.layers.1.self_attn.k_proj.weight", "model.layers.1.self_attn.k_proj"),
        (
            "gemma2_caps",
            "model.layers.0.pre_feedforward_layernorm.weight",
            "model.layers.0.pre_feedforward_layernorm",
        ),
        ("gemma2_caps", "model.norm.weight", "model.norm"),
        (
            "qwen2_moe_dense_layer",
            "model.layers.0.mlp.experts.3.up_proj.weight",
            "model.layers.0.mlp",
        ),
        (
            "qwen2_moe_dense_layer",
            "model.layers.0.mlp.shared_expert.down_proj.weight",
            "model.layers.0.mlp.shared_expert.down_proj",
        ),
        (
            "deepseek_v2_direct",
            "model.layers.1.self_attn.kv_a_layernorm.weight",
            "model.layers.1.self_attn.kv_a_layernorm",
        ),
        (
            "deepseek_v2_direct",
            "model.layers.2.self_attn.kv_b_proj.weight",
            "model.layers.2.self_attn.o_proj",
        ),
        ("deepseek_v2_direct", "lm_head.weight", "logits"),
    ],
)
def test_the_first_wrong_step_is_named(name: str, tensor: str, step: str, tmp_path: Path) -> None:
    folder = model_of(name, tmp_path, **{tensor.replace(".", "__"): 1.01})
    found = parity(et.load(folder), open_reference(reference(name)))
    assert found.first_diverging is not None
    assert found.first_diverging.name == step
    before = [each for each in found.steps if each.passed]
    assert found.steps[: len(before)] == tuple(before) or step != found.steps[len(before)].name


def test_what_is_not_a_number_diverges(tmp_path: Path) -> None:
    folder = model_of("gpt2_plain", tmp_path, **{"transformer__h__1__mlp__c_fc__weight": float("nan")})
    found = parity(et.load(folder), open_reference(reference("gpt2_plain")))
    assert found.first_diverging is not None
    assert found.first_diverging.name == "transformer.h.1.mlp.c_fc"


def test_watching_a_gguf_or_lazy_model_changes_nothing(tmp_path: Path) -> None:
    """Weights that stay in their file are watched as those in memory are."""
    folder = model_of("gemma2_caps", tmp_path)
    dump = open_reference(reference("gemma2_caps"))
    lazy = parity(et.load(folder, weight_budget=1000), dump)
    assert lazy.passed
    assert len(lazy.steps) == len(parity(et.load(folder), dump).steps)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = model_of("gpt2_plain", tmp_path / "model")
    (tmp_path / "dump").mkdir()
    with np.load(reference("gpt2_plain")) as file:
        arrays = {name: np.ascontiguousarray(file[name]) for name in file}
    save_file(arrays, tmp_path / "dump" / "reference.safetensors")
    arguments = ["parity", str(folder), "--reference", str(tmp_path / "dump")]
    with pytest.raises(SystemExit) as left:
        main([*arguments, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert left.value.code == 0
    assert found["passed"]
    assert found["first_diverging"] is None
    assert [step["name"] for step in found["steps"]][0::29] == ["transformer.wte", "transformer.ln_f"]
    with pytest.raises(SystemExit) as left:
        main([*arguments, "--tolerance", "0"])
    assert left.value.code == 1
    assert "diverges first" in capsys.readouterr().out


def test_mistakes_are_told(tmp_path: Path) -> None:
    model = et.load(model_of("gpt2_plain", tmp_path / "model"))
    dump = open_reference(reference("gpt2_plain"))
    np.savez(tmp_path / "other.npz", tokens=[[1, 2]], x=np.zeros(3))
    with pytest.raises(
        InputError, match=r"other\.npz: does not contain any step of the model \(transformer\.wte"
    ):
        parity(model, open_reference(tmp_path / "other.npz"))
    with pytest.raises(
        InputError, match=r"transformer\.wte has shape \[2, 5, \d+\], but the model's has \[1, 3"
    ):
        parity(model, dump, tokens=[[1, 2, 3]])
    with pytest.raises(InputError, match="`tolerance` is nan"):
        parity(model, dump, float("nan"))
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match=r"contains 0 \.npz and \.safetensors files"):
        open_reference(tmp_path / "none")
    with pytest.raises(InputError, match=r"a \.npz or \.safetensors file, or a folder"):
        open_reference(tmp_path / "reference.json")
    np.savez(tmp_path / "bare.npz", **{"transformer.wte": np.zeros((1, 2, 4), np.float32)})
    with pytest.raises(InputError, match=r"has no array 'tokens'; give the token ids with --tokens"):
        parity(model, open_reference(tmp_path / "bare.npz"))
    cut = replace(model, decoder=replace(model.decoder, layers=model.decoder.layers[:1]))
    cut = replace(cut, config=model.config.truncated(1))
    found = parity(cut, dump)
    assert found.passed
    assert {"transformer.h.1", "transformer.ln_f", "logits"} <= set(found.not_compared)
    assert found.steps[-1].name == "transformer.h.0"
