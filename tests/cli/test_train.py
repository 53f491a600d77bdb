"""`train`: a loss that falls, a table that adds up, and one line for what makes no sense."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from einsum_transformer.cli.app import main

CONFIG = {
    "arch": "llama",
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "d_ff": 48,
    "vocab_size": 97,
    "batch_size": 4,
    "seq_len": 16,
    "learning_rate": 0.01,
}


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


def etx(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["train", *arguments])
    assert isinstance(stop.value.code, int)
    return stop.value.code


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert etx("--json", *arguments) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return json.loads(captured.out)


def test_a_fixed_batch_is_learnt(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--config", config, "--steps", "30", "--fix-batch", "--seed", "42", "--optimizer", "adamw"]
    found = told(capsys, *flags)
    assert found["losses"][-1] < 0.5 * found["losses"][0]
    assert found["loss_trend"] < 0
    assert (found["steps"], found["skipped"]) == (30, 0)
    assert found["trainable"] == found["parameters"]
    assert found["gradient_bytes"] == 4 * found["parameters"]
    assert found["optimizer_bytes"] == 8 * found["parameters"]
    stages = sum(stage["seconds"] for stage in found["stages"])
    assert stages + found["outside_seconds"] == pytest.approx(found["seconds"])
    assert told(capsys, *flags)["losses"] == found["losses"]


def test_adapters(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Rank 8 on q_proj (32 -> 32) and v_proj (32 -> 16) of two layers, and nothing else."""
    found = told(capsys, "--config", config, "--set", "use_lora=true", "--steps", "2")
    assert found["trainable"] == 2 * 8 * (32 + 32 + 32 + 16)
    assert found["gradient_bytes"] == 4 * found["trainable"]
    assert found["optimizer_bytes"] == 0


def test_what_people_see(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A line for every step and a table on stderr; parts and checkpoints change no loss."""
    flags = ["--config", config, "--steps", "3", "--optimizer", "adamw", "--clip-norm", "1"]
    assert etx(*flags) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    losses = re.findall(r"step \d/3  loss (\S+)  norm", captured.err)
    assert len(losses) == 3
    for stage in ("batch", "forward", "loss", "backward", "clipping", "update"):
        assert re.search(rf"^ +{stage} +[\d.]+", captured.err, re.MULTILINE)
    assert etx(*flags, "--grad-accumulation-steps", "4", "--grad-checkpoint") == 0
    again = re.findall(r"step \d/3  loss (\S+)  norm", capsys.readouterr().err)
    assert [float(loss) for loss in again] == pytest.approx([float(loss) for loss in losses], abs=2e-4)
    assert etx(*flags, "--quiet") == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--optimizer", "lion"], "--optimizer 'lion': choose sgd or adamw"),
        (["--optimizer", "adamw", "--momentum", "0.9"], "belong to sgd"),
        (["--nesterov"], "nesterov needs a momentum"),
        (["--schedule", "step"], "schedule 'step': choose constant, linear, cosine"),
        (["--warmup-steps", "11"], "warmup_steps is 11 of 10"),
        (["--clip-norm", "0"], "clip_norm is 0"),
        (["--seq-len", "100000"], "--seq-len 100000: the context is 2048"),
        (["--grad-accumulation-steps", "5"], "accumulation splits a batch of 4 into 5"),
        (["--lr", "1e30", "--set", "n_layers=1"], "not finite"),
        (["--set", "use_lora=true", "--set", 'lora_target_modules=["w"]'], "name no matrix"),
    ],
)
def test_one_line_for_a_mistake(
    flags: list[str], message: str, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert etx("--config", config, "--quiet", *flags) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
