"""`train`: a loss that falls, a table that adds up, and one line for what makes no sense."""

from __future__ import annotations

import json
import re
import sys
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
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)  # where runs/ is written
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
    for name, parts in found["tables"].items():
        stage = sum(
            s["seconds"]
            for s in found["stages"]
            if s["name"] == name or (name == "optimizer" and s["name"] in ("clipping", "update"))
        )
        assert sum(part["seconds"] for part in parts) == pytest.approx(stage)
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


TEXT = "the cat sat on the mat and the dog sat on the log\n" * 40


@pytest.fixture
def text(config: str, tmp_path: Path) -> list[str]:
    """Flags for training on a text with a tokenizer that is trained first."""
    (tmp_path / "a.txt").write_text(TEXT)
    flags = ["--config", config, "--set", "vocab_size=280", "--data", "a.txt", "--seq-len", "8"]
    return [*flags, "--optimizer", "adamw", "--valid-share", "0.2", "-o", "out"]


def metrics(folder: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def test_a_text_is_learnt_and_the_model_kept(text: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, *text, "--steps", "40", "--lr", "0.02", "--eval-every", "20", "--plot", "loss.png")
    assert found["validation"].keys() == {"0", "20", "40"}
    assert found["validation"]["40"] < 0.5 * found["validation"]["0"]
    assert Path("loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [line["step"] for line in metrics("out") if "loss" in line] == list(range(1, 41))
    assert "step 40/40" in Path("out/train.log").read_text()
    with pytest.raises(SystemExit):
        main(["run", "out/step-00000040", "-p", "the cat sat on", "-n", "4", "--temp", "0", "--quiet"])
    assert " the" in capsys.readouterr().out


@pytest.mark.parametrize(
    "adapters", [[], ["--lora", "--lora-targets", "all-linear", "--lora-dropout", "0.2"]]
)
def test_resumed_is_uninterrupted(
    text: list[str], adapters: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*text, *adapters, "--grad-accumulation-steps", "3", "--schedule", "cosine"]
    whole = told(capsys, *flags, "--steps", "6", "--save-every", "2", "--keep-last", "9")
    cut = Path("out")
    assert sorted(path.name for path in cut.glob("step-*")) == [f"step-0000000{n}" for n in (2, 4, 6)]
    last = {path.name: path.read_bytes() for path in Path("out/step-00000006").iterdir()}
    for name in ("step-00000004", "step-00000006"):
        for path in Path("out", name).iterdir():
            path.unlink()
        Path("out", name).rmdir()
    again = told(capsys, *flags, "--steps", "6", "--resume")
    assert again["losses"] == whole["losses"][2:]
    assert [line["step"] for line in metrics("out") if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert {path.name: path.read_bytes() for path in Path("out/step-00000006").iterdir()} == last


def test_a_folder_holds_one_training(text: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    told(capsys, *text, "--steps", "2")
    for flags, message in (
        ([], "out: holds a training already; --resume goes on with it"),
        (["--resume", "--steps", "2"], "all 2 steps are done already"),
        (["--resume", "--seed", "1", "--steps", "3"], "is of another training: .*seed is 0 there and 1 here"),
        (["--resume", "--lr", "0.5", "--steps", "3"], "schedule.lr is 0.01 there and 0.5 here"),
    ):
        assert etx(*text, *flags, "--quiet") == 2
        captured = capsys.readouterr()
        assert re.search(message, captured.err), captured.err
        assert captured.err.count("\n") == 1
    damage = Path("out/step-00000002/model.safetensors")
    damage.write_bytes(damage.read_bytes()[:-1] + b"x")
    assert etx(*text, "--resume", "--steps", "3", "--quiet") == 2
    assert "the checkpoint is damaged" in capsys.readouterr().err


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
        (["--resume"], "--resume and --save-every need --output"),
        (["--data", "none.txt"], "none.txt: cannot be read: No such file"),
        (["--valid", "a.txt"], "--valid needs --data"),
        (["--long", "cut"], "--long 'cut': choose split or refuse"),
        (["--lora-rank", "4"], "without --lora"),
        (["--adapter-path", "."], ".: holds no adapter_config.json"),
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


def test_a_picture_that_cannot_be_drawn_is_told_before_the_training(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in ("missing/loss.png", "."):
        assert etx("--config", config, "--plot", path) == 2
        assert f"--plot {path}: a file in a folder" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert etx("--config", config, "--plot", "loss.png") == 2
    assert 'pip install "einsum-transformer[plot]"' in capsys.readouterr().err
    assert not Path("runs").exists()


def test_merged_at_the_end(text: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert etx(*text, "--lora", "--merge", "--steps", "3", "--quiet") == 0
    assert Path("out/merged/model.safetensors").exists()
    assert etx(*text, "--merge", "--quiet", "-o", "full", "--steps", "1") == 2
    assert "there is no adapter to merge" in capsys.readouterr().err
