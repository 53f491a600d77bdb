"""What a checkpoint holds is told as it lies there, and what keeps it from loading as a problem."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import einsum_transformer as et
from einsum_transformer.cli.app import main
from gguf_files import write_model_gguf
from golden_files import Folders, load_golden, write_folder


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    """The exit code and the JSON object of `etx inspect`."""
    with pytest.raises(SystemExit) as left:
        main(["inspect", *arguments, "--json"])
    return int(str(left.value.code)), json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", ["gpt2_plain", "mixtral_mqa", "deepseek_v2_direct"])
def test_a_folder(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every tensor is some weight of the model, and all numbers are counted once."""
    golden = load_golden(name)
    folder = write_folder(tmp_path, golden.config | {"colour": "blue"}, golden.weights)
    code, found = told(capsys, str(folder))
    assert (code, found["problems"], found["missing"]) == (0, [], [])
    assert {each["name"]: tuple(each["shape"]) for each in found["tensors"]} == {
        key: w.shape for key, w in golden.weights.items()
    }
    parameters = et.load(folder).named_parameters()
    assert found["parameters"] == sum(w.size for w in parameters.values())
    assert found["bytes_by_dtype"] == {"F32": 4 * found["parameters"]}
    weights = [weight for each in found["tensors"] for weight in each["weights"]]
    assert len(weights) == len(set(weights)) == len(et.load(folder).weights)
    assert found["ignored"].count("colour") == 1
    assert "colour" not in found["used"]
    assert found["used"]["model_type"] == golden.config["model_type"]
    assert not set(found["used"]) & set(found["defaulted"])


def test_a_gguf_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    golden = load_golden("qwen3_tied")
    path = write_model_gguf(tmp_path / "m.gguf", golden.config, golden.weights)
    code, found = told(capsys, str(path))
    assert (code, found["model_type"], found["problems"]) == (0, "qwen3", [])
    assert found["used"]["qwen3.block_count"] == golden.config["num_hidden_layers"]
    assert all(each["weights"] for each in found["tensors"])


def test_what_does_not_load_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    golden = load_golden("gpt2_plain")
    weights = {name.replace("c_fc", "c_fd"): w for name, w in golden.weights.items()}
    weights["transformer.ln_f.weight"] = np.ones(3, np.float32)
    code, found = told(capsys, str(write_folder(tmp_path / "a", golden.config, weights)))
    assert code == 1
    assert found["missing"][0] == "transformer.h.0.mlp.c_fc.weight"
    assert any(
        problem.startswith("transformer.ln_f.weight is [3] in the file") for problem in found["problems"]
    )
    assert [each["weights"] for each in found["tensors"] if "c_fd" in each["name"]] == [[]] * 6
    code, found = told(
        capsys, str(write_folder(tmp_path / "b", golden.config | {"n_head": "5"}, golden.weights))
    )
    assert (code, found["config"]) == (1, None)
    assert "key 'n_head' is '5', expected int" in found["problems"][0]
    assert len(found["tensors"]) == len(golden.weights)


@pytest.mark.parametrize(
    ("file", "text", "problem"),
    [
        ("tokenizer.json", '{"a": 1}', "not a usable tokenizer"),
        ("generation_config.json", "[]", "is not a JSON object"),
        ("config.json", "{", "is not valid JSON"),
    ],
)
def test_files_beside_the_weights(
    file: str, text: str, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    golden = load_golden("mistral_window")
    folder = write_folder(tmp_path, golden.config, golden.weights)
    (folder / file).write_text(text)
    if file == "config.json":
        with pytest.raises(SystemExit) as left:
            main(["inspect", str(folder)])
        assert left.value.code == 2
        assert problem in capsys.readouterr().err
        return
    code, found = told(capsys, str(folder))
    assert code == 1
    assert problem in found["problems"][0]


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"]
)
def test_pointers_beside_the_weights_are_named_as_load_names_them(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    golden = load_golden("mistral_window")
    folder = write_folder(tmp_path, golden.config, golden.weights)
    (folder / name).write_text(LFS)
    problems = refused_by_both(folder, capsys)
    assert problems == [
        f"{folder / name}: a Git LFS pointer, not the file itself: run `git lfs pull` in its folder"
    ]


@pytest.mark.parametrize(
    ("weights", "config"),
    [
        ("adapter_model.safetensors", {"peft_type": "LORA", "base_model_name_or_path": "o/b"}),
        ("adapter_model.bin", {"peft_type": "LORA"}),
        ("adapters.safetensors", {"fine_tune_type": "lora", "model": "o/b"}),
        ("adapters.safetensors", None),
    ],
)
def test_an_adapter_is_one_problem(
    weights: str, config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / weights).write_bytes(b"x")
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    problems = refused_by_both(tmp_path, capsys)
    assert len(problems) == 1
    assert "an adapter" in problems[0]
    assert "--adapter-path" in problems[0]


def test_a_tensor_that_no_weight_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    golden = load_golden("mistral_window")
    weights = golden.weights | {"foo.baz": np.zeros(0, np.float32)}
    code, found = told(capsys, str(write_folder(tmp_path, golden.config, weights)))
    assert (code, found["problems"]) == (1, ["in the file but not in the model: foo.baz"])


def test_the_listing(golden_folder: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    folder = golden_folder("gpt2_plain")
    for flags, line in (([], "transformer.h.*.ln_1.bias"), (["--all"], "transformer.h.2.ln_1.bias")):
        with pytest.raises(SystemExit):
            main(["inspect", str(folder), *flags])
        assert line in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        main(["inspect", "configs/fast_lora.json"])
    assert left.value.code == 0
    assert 'arch = "llama"' in capsys.readouterr().out


def refused_by_both(folder: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The problems that inspect sees in what load refuses."""
    with pytest.raises(et.InputError) as caught:
        et.load(folder)
    code, found = told(capsys, str(folder))
    assert code == 1
    assert any(problem in str(caught.value) for problem in found["problems"])
    return found["problems"]


@pytest.mark.parametrize("kind", [np.int8, np.int64, np.bool_])
def test_integer_weights(kind: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    golden = load_golden("llama_mha_tied")
    name = "model.layers.0.self_attn.q_proj.weight"
    weights = golden.weights | {name: np.ones_like(golden.weights[name]).astype(kind)}
    assert name in refused_by_both(write_folder(tmp_path, golden.config, weights), capsys)[0]


@pytest.mark.parametrize("head", [np.zeros(0, np.float32), np.float32(3), None])
def test_a_tied_head_that_differs(head: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    golden = load_golden("llama_mha_tied")
    embedding = golden.weights["model.embed_tokens.weight"]
    head = embedding + 1 if head is None else np.asarray(head)
    folder = write_folder(tmp_path, golden.config, golden.weights | {"lm_head.weight": head})
    assert "tie_word_embeddings is true, but lm_head.weight differs" in refused_by_both(folder, capsys)[0]
    same = write_folder(tmp_path, golden.config, golden.weights | {"lm_head.weight": embedding})
    assert told(capsys, str(same))[0] == 0


@pytest.mark.parametrize(
    "keys",
    [{"num_local_experts": 65536}, {"num_hidden_layers": 4096}, {"num_hidden_layers": 1 << 32}],
    ids=str,
)
def test_absurd_configs_make_no_names(
    keys: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    golden = load_golden("mixtral_mqa")
    folder = write_folder(tmp_path, golden.config | keys, golden.weights)
    for module in ("loading.checks", "analysis.inspect"):
        monkeypatch.delattr(f"einsum_transformer.{module}.weights_of")
    code, found = told(capsys, str(folder))
    assert (code, found["parameters"], len(found["problems"])) == (1, None, 1)
    assert len(found["tensors"]) == len(golden.weights)


def test_a_base_model_and_split_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    golden = load_golden("qwen3_tied")
    bare = {name.removeprefix("model."): w for name, w in golden.weights.items()}
    code, found = told(capsys, str(write_folder(tmp_path / "base", golden.config, bare)))
    assert (code, found["problems"]) == (0, [])
    (tmp_path / "split").mkdir()
    write_model_gguf(tmp_path / "split" / "m.gguf", golden.config, golden.weights, tensors_each=9)
    code, found = told(capsys, str(tmp_path / "split"))
    assert (code, found["problems"]) == (0, [])
    assert len({each["file"] for each in found["tensors"]}) == len(list((tmp_path / "split").iterdir()))
    assert all(each["weights"] for each in found["tensors"])


def test_links_need_permission(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    golden = load_golden("llama_gqa")
    folder = write_folder(tmp_path / "model", golden.config, golden.weights)
    (folder / "model.safetensors").rename(tmp_path / "weights")
    (folder / "model.safetensors").symlink_to(tmp_path / "weights")
    assert "`allow_links`" in refused_by_both(folder, capsys)[0]
    assert told(capsys, str(folder), "--allow-links")[0] == 0
