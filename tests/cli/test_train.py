"""`train`: a loss that falls, a table that adds up, and one line for what makes no sense."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from einsum_transformer.cli.app import main
from einsum_transformer.text.tokenizer import Tokenizer

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


def test_a_changed_training_of_adapters_names_the_way_out(
    text: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    told(capsys, *text, "--lora", "--steps", "2")
    assert etx(*text, "--lora", "--lr", "0.5", "--resume", "--steps", "3", "--quiet") == 2
    assert "--adapter-path out/step-00000002 and another output folder (-o), without --resume" in (
        capsys.readouterr().err
    )


def test_a_folder_holds_one_training(text: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("b.txt").write_text(TEXT.replace("cat", "dog"))
    told(capsys, *text, "--steps", "2")
    for flags, message in (
        ([], "out: already contains a training; continue it with --resume"),
        (["--resume", "--steps", "2"], "all 2 steps are done already"),
        (
            ["--resume", "--seed", "1", "--steps", "3"],
            "checkpoint of another training: .*seed is 0 in the checkpoint and 1 now",
        ),
        (["--resume", "--lr", "0.5", "--steps", "3"], "schedule.lr is 0.01 in the checkpoint and 0.5 now"),
        (
            ["--resume", "--lr", "0.5", "--steps", "3"],
            "pass out/step-00000002 as the model and another output",
        ),
        (["--resume", "--data", "b.txt", "--steps", "3"], "the data or their token ids differ"),
        (
            ["--resume", "--valid-share", "0.3", "--steps", "3"],
            "the data or their token ids differ",
        ),
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
        (["--optimizer", "lion"], "--optimizer is 'lion': expected sgd or adamw"),
        (["--optimizer", "adamw", "--momentum", "0.9"], "are settings of sgd"),
        (["--nesterov"], "nesterov requires a momentum"),
        (["--beta2", "0.95"], "--beta2 is a setting of adamw; sgd has --momentum"),
        (["--optimizer", "adamw", "--beta2", "1"], "--beta2 is 1.0: expected a number from 0 to below 1"),
        (["--min-lr", "1e-5"], "--min-lr is the end of a linear or cosine --schedule"),
        (
            ["--min-lr", "1", "--schedule", "cosine"],
            "--min-lr is 1.0: expected at most the learning rate, 0.01",
        ),
        (
            ["--decay-matrices-only"],
            "--decay-matrices-only restricts --weight-decay, but that is 0",
        ),
        (["--schedule", "step"], "--schedule is 'step', expected 'constant', 'linear' or 'cosine'"),
        (["--warmup-steps", "11"], "--warmup-steps is 11: expected at most the number of steps, 10"),
        (["--clip-norm", "0"], "--clip-norm is 0"),
        (["--seq-len", "100000"], "--seq-len 100000: the maximum is 2048"),
        (["--grad-accumulation-steps", "5"], "accumulation is 5: at most the batch size, 4,"),
        (["--lr", "1e30", "--set", "n_layers=1"], "not finite"),
        (["--resume"], "--resume and --save-every need --output"),
        (["--data", "none.txt"], "none.txt: cannot be read: No such file"),
        (["--valid", "a.txt"], "--valid needs --data"),
        (["--long", "cut"], "--long is 'cut', expected 'split' or 'refuse'"),
        (["--lora-rank", "4"], "without --lora"),
        (["--adapter-path", "."], ".: does not contain adapter_config.json"),
        (["--set", "use_lora=true", "--set", 'lora_target_modules=["w"]'], "match no matrix"),
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


def test_the_recipe_of_nanogpt(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A rate that ends at a tenth of itself, beta2 0.95, and a decay of matrices only."""
    flags = "--optimizer adamw --beta1 0.8 --beta2 0.95 --eps 1e-7 --weight-decay 0.1 --decay-matrices-only"
    schedule = "--lr 0.01 --schedule cosine --min-lr 0.001 --warmup-steps 2 --clip-norm 1"
    told(capsys, "--config", config, "--steps", "6", *flags.split(), *schedule.split(), "-o", "out")
    about = json.loads(Path("out/run.json").read_text())
    assert about["optimizer"] == {
        "name": "AdamW",
        "beta1": 0.8,
        "beta2": 0.95,
        "eps": 1e-7,
        "weight_decay": 0.1,
        "decay_matrices_only": True,
    }
    # min_lr + (lr - min_lr) (1 + cos(pi p)) / 2 with p = 0, 1/4, 1/2, 3/4 after the warm-up
    rates = [0.005, 0.01, 0.01, 0.00868198, 0.0055, 0.00231802]
    assert [line["lr"] for line in metrics("out")] == pytest.approx(rates, rel=1e-5)


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
    assert "the model has no adapter" in capsys.readouterr().err


TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def chats(text: list[str], tmp_path: Path) -> str:
    """A model folder with a tokenizer and a chat template; and chats.jsonl of four short conversations."""
    assert etx(*text, "--steps", "1", "--quiet", "-o", "base") == 0
    folder = Path("base/step-00000001")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    conversation = [
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": " sat on the mat"},
    ]
    Path("chats.jsonl").write_text(4 * (json.dumps({"messages": conversation}) + "\n"))
    Path("one.jsonl").write_text(json.dumps({"messages": conversation}) + "\n")
    return str(folder)


MASKED = ["--pad", "--mask-prompt", "--lora", "--steps", "2"]


def test_four_examples_are_enough(chats: str, capsys: pytest.CaptureFixture[str]) -> None:
    """All of them are a batch, so nothing is held out; fewer are a smaller batch."""
    assert etx(chats, "--data", "chats.jsonl", *MASKED) == 0
    err = capsys.readouterr().err
    assert "note: chats.jsonl: too short for a batch and validation data, so no data is held out" in err
    assert "a batch has" not in err
    assert "validation loss" not in err
    assert etx(chats, "--data", "chats.jsonl", *MASKED, "--valid-share", "0.25") == 0
    err = capsys.readouterr().err
    assert "note: chats.jsonl: gives 3 rows of 128 tokens, so a batch has 3, not 4" in err
    assert "validation loss" in err
    assert etx(chats, "--data", "chats.jsonl", *MASKED, "-b", "3") == 0
    err = capsys.readouterr().err
    assert "nothing is held out" not in err
    assert "validation loss" in err


def test_one_conversation_is_learnt_to_its_end(chats: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert etx(chats, "--data", "one.jsonl", *MASKED, "-b", "1") == 0
    err = capsys.readouterr().err
    assert "note: one.jsonl: line 1: the only example, so nothing is held out" in err
    last = max(Path("runs").iterdir(), key=lambda path: path.stat().st_mtime)
    tokenizer = Tokenizer.from_folder(Path(chats))
    answer = tokenizer.encode(" sat on the mat<|endoftext|>")
    assert [line["targets"] for line in metrics(str(last))] == [len(answer)] * 2


def test_examples_longer_than_a_row_are_noted(chats: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert etx(chats, "--data", "chats.jsonl", *MASKED, "--seq-len", "8") == 0
    assert (
        "4 of 4 examples are longer than a row of 8 tokens and are split over several rows; the longest fits "
        in (capsys.readouterr().err)
    )


def test_a_folder_as_mlx_lm_has_it(chats: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("data").mkdir()
    Path("data/train.jsonl").write_bytes(Path("chats.jsonl").read_bytes())
    assert etx(chats, "--data", "data", *MASKED) == 0
    assert "validation loss" not in capsys.readouterr().err
    Path("data/valid.jsonl").write_bytes(Path("one.jsonl").read_bytes())
    assert etx(chats, "--data", "data", *MASKED) == 0
    err = capsys.readouterr().err
    assert "validation loss" in err
    assert "note" not in err
    assert etx(chats, "--data", "chats.jsonl", "--valid", "a.txt", "--steps", "1") == 0
    assert "note: a.txt: one of --valid and --data is text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--data", "chats.jsonl", "--valid-share", "1"],
            "--valid-share is 1.0: expected a number from 0 to below 1",
        ),
        (
            ["--data", "chats.jsonl", "--valid-share", "-0.5"],
            "--valid-share is -0.5: expected a number from 0",
        ),
        (["--data", "chats.jsonl", "--valid-share", "nan"], "--valid-share is nan: expected a number from 0"),
        (
            ["--data", "chats.jsonl", "--valid", "a.txt", "--valid-share", "0.1"],
            "but --valid gives the validation data",
        ),
        (["--data", "chats.jsonl", "--valid", "x.parquet"], "x.parquet: a Parquet file"),
        (["--data", "empty.txt"], "empty.txt: contains no text: the file is empty"),
        (["--data", "chats.jsonl", "--valid", "empty.txt"], "empty.txt: contains no text: the file is empty"),
        (["--data", "."], ".: a folder without train.jsonl; pass the file itself"),
        (["--pad"], "--pad needs --data"),
        (["--valid-share", "0.1"], "--valid-share needs --data"),
        (["--ray-workers", "5"], "the data yields 4 rows, too few for 5 Ray workers"),
        (["--ray-workers", "3", "--grad-accumulation-steps", "2"], "2 rows cannot be divided over 3"),
        (
            ["--data", "chats.jsonl", "--pad", "-b", "9", "--ray-workers", "5"],
            "the data yields 4 rows, too few for 5",
        ),
    ],
)
def test_one_line_for_a_mistake_with_data(
    flags: list[str], message: str, chats: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty.txt").write_bytes(b"")
    Path("x.parquet").write_bytes(b"PAR1" + bytes(40))
    assert etx(chats, "--quiet", *flags) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora", "--lora-alpha", "0"], "lora_alpha is 0"),
        (["--lora-alpha", "0"], "flags of LoRA are given without --lora"),
        (["--lora-dropout", "0"], "flags of LoRA are given without --lora"),
        (["--lora-targets", ""], "flags of LoRA are given without --lora"),
        (["--lora", "--lora-targets", ""], "LoRA targets '': names"),
        (["--merge", "-o", "new"], "--merge: the model has no adapter"),
    ],
)
def test_a_zero_is_no_missing_flag(
    flags: list[str], message: str, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert etx("--config", config, "--steps", "1", *flags) == 2
    assert message in capsys.readouterr().err
    assert not Path("new").exists()


def test_resumed_without_its_adapters(text: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert etx(*text, "--lora", "--steps", "1", "--quiet") == 0
    assert etx(*text, "--steps", "2", "--resume", "--quiet") == 2
    told = capsys.readouterr().err
    assert "lora is of rank 8 in the checkpoint and None now" in told
    assert "--adapter-path out/step-00000001 and another output folder (-o), without --resume and" in told
    assert "{" not in told
    assert "frozen" not in told


def test_resumed_with_new_adapters(text: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert etx(*text, "--steps", "1", "--quiet") == 0
    assert etx(*text, "--lora", "--steps", "2", "--resume", "--quiet") == 2
    told = capsys.readouterr().err
    assert "lora is None in the checkpoint and of rank 8 now; to start" in told
    assert "pass out/step-00000001 as the model and another output folder" in told
    assert "{" not in told


def test_parts_of_a_small_batch(text: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("short.txt").write_text("to be or not to be " * 4, encoding="utf-8")
    flags = ["--data", "short.txt", "--valid-share", "0", "--grad-accumulation-steps", "4"]
    assert etx(*text, *flags, "--steps", "1", "--seq-len", "30", "-b", "4") == 0
    told = capsys.readouterr().err
    assert re.search(r"yields ([1-3]) rows? of 30 tokens, so the batch size is \1 instead of 4", told)
    assert re.search("steps 4: the batch is computed in [1-3] part", told)


def test_a_plot_is_a_png(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert etx("--config", config, "--plot", "loss.txt") == 2
    assert "--plot loss.txt: expected a file name that ends in .png" in capsys.readouterr().err
    assert not Path("loss.txt").exists()


def test_an_eps_of_zero_is_noted(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    etx("--config", config, "--optimizer", "adamw", "--eps", "0", "--steps", "1")
    assert "note: --eps is 0: a weight whose gradients are all 0" in capsys.readouterr().err


def test_a_large_file_is_announced(
    text: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("einsum_transformer.training.batches._LARGE", 10)
    assert etx(*text, "--steps", "1") == 0
    assert "a.txt: encoding 0.0 million characters" in capsys.readouterr().err
