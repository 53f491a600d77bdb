"""Packaged configs: part of the package, used by name wherever a model is named, unless a file has that
name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import einsum_transformer as et
from einsum_transformer.cli.app import main
from einsum_transformer.loading import hub
from einsum_transformer.loading.sources import Folder, Options, find
from tiny_models import write_config, write_tiny

ROOT = Path(__file__).parents[2]
NAMES = ("fast_lora", "gemma", "llama", "lora_test", "mistral", "mixtral", "phi", "qwen", "qwen2_moe")
LISTED = f"packaged configs: {', '.join(NAMES)}"


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def etx(*arguments: str) -> int:
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert isinstance(error.value.code, int)
    return error.value.code


def explained(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert etx("explain", *arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_names() -> None:
    assert et.available_configs() == NAMES


def test_the_folder_of_a_clone_has_the_same_files() -> None:
    assert tuple(sorted(path.stem for path in (ROOT / "configs").glob("*.json"))) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_ready_config_is_explained(name: str) -> None:
    config = et.read_run_config(name)
    assert config.source == name
    assert replace(config, source="") == replace(
        et.read_run_config(ROOT / "configs" / f"{name}.json"), source=""
    )
    assert et.explain(config, tokens=4).flops > 0


def test_explain_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    by_path = explained(capsys, str(ROOT / "configs" / "llama.json"))
    assert explained(capsys, "llama") == by_path
    assert explained(capsys, "--config", "llama") == explained(capsys, "--model", "llama") == by_path
    assert round(by_path["parameters"] / 1e9, 3) == 3.213


def test_set_works_on_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert explained(capsys, "llama", "--set", "n_layers=2")["parameters"] < 1e9
    assert etx("explain", "llama", "--set", "n_layer=2") == 2
    assert "llama: unknown key 'n_layer'; did you mean 'n_layers'?" in capsys.readouterr().err


def test_diff_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert etx("diff", "llama", "gemma", "--json") == 0
    assert json.loads(capsys.readouterr().out)["names"] == ["llama", "gemma"]


def test_run_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["d_model=32", "n_layers=1", "d_ff=48", "vocab_size=64", "n_heads=4"]
    sets = [word for each in small for word in ("--set", each)]
    assert etx("run", "fast_lora", *sets, "-n", "2", "--json") == 0
    assert json.loads(capsys.readouterr().out)["model"] == "fast_lora (random weights, seed 0)"


def test_load_by_name() -> None:
    model = et.load("fast_lora", max_layers=1, seed=3)
    assert model.config.hidden_size == 512
    assert model.source == "fast_lora (random weights, seed 3)"
    quantized = et.load("lora_test", max_layers=1, quantization="W8A16")
    assert str(quantized.quantization) == "W8A16,channel (real)"


def test_a_folder_of_that_name_comes_first(empty_folder: Path) -> None:
    write_tiny(empty_folder / "llama")
    assert find("llama", Options()) == Folder(Path("llama"))
    assert et.load("llama").config.hidden_size == 32


def test_a_file_of_that_name_comes_first(empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(empty_folder / "phi", {"arch": "llama", "n_layers": 3})
    assert et.read_run_config("phi").n_layers == 3
    assert len(explained(capsys, "phi", "--set", "n_layers=5")["steps"][2]["layers"]) == 5


def test_a_link_of_that_name_that_leads_nowhere(empty_folder: Path) -> None:
    (empty_folder / "llama").symlink_to("nowhere")
    with pytest.raises(et.InputError, match=r"^llama: "):
        et.load("llama")


@pytest.mark.parametrize("named", ["./llama", "llama.json", "configs/llama.json", "llama/"])
def test_a_path_is_no_name(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(et.InputError) as error:
        et.load(named)
    assert "packaged configs" not in str(error.value)


def test_hub_ids_stay_hub_ids(monkeypatch: pytest.MonkeyPatch, empty_folder: Path) -> None:
    asked: list[str] = []

    def download(repository: str, *_: Any) -> Path:
        asked.append(repository)
        return empty_folder

    monkeypatch.setattr(hub, "download", download)
    for name in ("owner/llama", "llama/llama", "owner/llama:Q8_0"):
        find(name, Options())
    assert asked == ["owner/llama", "llama/llama", "owner/llama:Q8_0"]


@pytest.mark.parametrize("name", ["lama", "Llama", "nowhere"])
def test_an_unknown_name_lists_the_ready_configs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("explain", "run", "inspect"):
        assert etx(command, name) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {name!r}: no such file or folder")
        assert error.rstrip().endswith(LISTED)
    with pytest.raises(et.InputError, match=f"^{name!r}: no such file; {LISTED}$"):
        et.read_run_config(name)
