"""`merge`: in, out, once; exact where it can be and told where it is not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import einsum_transformer as et
from einsum_transformer.cli.app import main
from einsum_transformer.models.adapters import with_lora
from einsum_transformer.models.lora_config import LoRAConfig
from einsum_transformer.models.parameters import trainable
from einsum_transformer.models.peft import write_adapter
from golden_files import load_expert_adapter, load_golden, write_adapter_folder, write_folder
from tiny_models import write_tiny

IDS = np.random.default_rng(0).integers(0, 61, (2, 9))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path / "base", tie_word_embeddings=True)
    model = with_lora(et.load("base"), LoRAConfig(r=2, target_modules=("q_proj", "down_proj", "lm_head")))
    rng = np.random.default_rng(1)
    for array in trainable(model.decoder).values():
        array[...] = rng.standard_normal(array.shape) * 0.1
    write_adapter(model, "adapter")
    return tmp_path


def etx(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["merge", *arguments])
    assert isinstance(stop.value.code, int)
    return stop.value.code


def test_in_and_out_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert etx("base", "--adapter-path", "adapter", "-o", "whole", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["tensors"]) == 5
    assert all(row["change"] > 0 and row["error"] < 1e-6 * row["change"] for row in told["tensors"])
    with_adapter, merged = et.load("base", adapter="adapter"), et.load("whole")
    np.testing.assert_allclose(merged.logits(IDS), with_adapter.logits(IDS), rtol=0, atol=2e-5)
    assert not merged.config.tie_word_embeddings
    assert abs(merged.logits(IDS) - et.load("base").logits(IDS)).max() > 0.1
    assert etx("whole", "--adapter-path", "adapter", "-o", "again", "--unmerge", "--quiet") == 0
    base = et.load("base").named_parameters()
    for name, array in et.load("again").named_parameters().items():
        kept = base.get(name, base["model.embed_tokens.weight"])
        np.testing.assert_allclose(array, kept, rtol=0, atol=1e-6, err_msg=name)
    assert not Path("again/merged_adapters.json").exists()


def test_bf16_says_what_it_loses(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert etx("base", "--adapter-path", "adapter", "-o", "half", "--save-dtype", "bf16") == 0
    err = capsys.readouterr().err
    assert "largest rounding error" in err
    assert "model.layers.0.self_attn.q_proj.weight" in err
    assert json.loads(Path("half/config.json").read_text())["dtype"] == "bfloat16"
    difference = abs(et.load("half").logits(IDS) - et.load("base", adapter="adapter").logits(IDS)).max()
    assert 0 < difference < 2


def test_mistakes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert etx("base", "--adapter-path", "adapter", "-o", "whole", "--quiet") == 0
    for arguments, message in (
        (["whole", "--adapter-path", "adapter", "-o", "x"], "is merged into it already"),
        (["base", "--adapter-path", "adapter", "-o", "x", "--unmerge"], "was not merged into it"),
        (["base", "--adapter-path", "adapter", "-o", "base"], "error: --output base: is the model itself"),
        (["base", "--adapter-path", "adapter"], "--adapter-path and --output are needed"),
        (["base", "--adapter-path", "base", "-o", "x"], "does not contain adapter_config.json"),
        (
            ["base", "--adapter-path", "adapter", "-o", "x", "--save-dtype", "f16"],
            "float32 or bfloat16",
        ),
        (
            ["base", "--adapter-path", "adapter", "-o", "x", "--dtype", "bf16"],
            "is now --save-dtype",
        ),
    ):
        assert etx(*arguments) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
    write_tiny(folder / "other", hidden_size=48)
    assert etx("other", "--adapter-path", "adapter", "-o", "x") == 2
    assert "is it for another base model?" in capsys.readouterr().err


def test_adapters_on_stacked_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Merged expert by expert, and taken out again."""
    monkeypatch.chdir(tmp_path)
    golden, adapter = load_golden("mixtral_window"), load_expert_adapter("mixtral all-linear")
    write_folder(tmp_path / "base", golden.config, golden.weights)
    write_adapter_folder(tmp_path / "adapter", adapter.config, adapter.tensors)
    assert etx("base", "--adapter-path", "adapter", "-o", "whole", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["tensors"]) == 3 * (4 + 1 + 3 * 7)
    np.testing.assert_allclose(et.load("whole").logits(golden.tokens), adapter.logits, rtol=0, atol=1e-4)
    assert etx("whole", "--adapter-path", "adapter", "-o", "again", "--unmerge", "--quiet") == 0
    np.testing.assert_allclose(et.load("again").logits(golden.tokens), golden.logits, rtol=0, atol=1e-4)
