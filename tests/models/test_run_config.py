"""The project's own config files: comments, unknown keys, wrong values, and what they make."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import einsum_transformer as et
from einsum_transformer.models.run_config import RunConfig, override, parse_run_config
from tiny_models import hf_config, write_config, write_tiny

CONFIG: dict[str, Any] = {
    "arch": "llama",
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 8,
    "n_kv_heads": 2,
    "head_dim": 6,
    "d_ff": 40,
    "vocab_size": 61,
    "max_seq_len": 512,
}
pytestmark = pytest.mark.usefixtures("every_load_is_inspected")
KEYS = [field.name for field in dataclasses.fields(RunConfig) if field.name != "source"]
NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 1.5, "x", "", [], {}, [1], ["q_proj"], {"a": 1}, 1 << 31, 10**30, 10**400,
    math.nan, math.inf, -math.inf, 1e-320, 1e308,
]  # fmt: skip


def refusal(path: Path) -> str:
    with pytest.raises(et.InputError) as caught:
        et.load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_random_weights(tmp_path: Path) -> None:
    """The model the keys describe; a seed makes it, and another another."""
    path = write_config(tmp_path / "run.json", CONFIG)
    model = et.load(path, seed=1)
    assert {name: p.shape for name, p in model.named_parameters().items()} == {
        name: p.shape for name, p in et.load(write_tiny(tmp_path / "hf")[0]).named_parameters().items()
    }
    again, other = et.load(path, seed=1), et.load(path, seed=2)
    ids = [[1, 2, 3]]
    np.testing.assert_array_equal(model.logits(ids), again.logits(ids))
    assert (model.logits(ids) != other.logits(ids)).all()
    every = np.concatenate([p.ravel() for name, p in model.named_parameters().items() if "norm" not in name])
    assert len(np.unique(every)) > 0.99 * len(every)  # no two tensors of the same numbers


@pytest.mark.parametrize(
    ("heads", "expected"),
    [
        ({}, 2),
        ({"n_kv_heads": None}, 8),
        ({"use_gqa": False}, 8),
        ({"use_mqa": True, "n_kv_heads": None}, 1),
    ],
)
def test_key_value_heads(heads: dict[str, Any], expected: int, tmp_path: Path) -> None:
    model = et.load(write_config(tmp_path / "run.json", CONFIG | heads))
    assert model.config.num_key_value_heads == expected


def test_comments(tmp_path: Path) -> None:
    """Keys that begin with // say nothing, whatever their value."""
    notes = {"// note": "x", "//": [1, {"d_model": 5}], "// d_model": 3}
    path = write_config(tmp_path / "run.json", notes | CONFIG)
    assert et.load(path).config.hidden_size == 32


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("d_modle", "d_model"),
        ("n_layer", "n_layers"),
        ("rope_bse", "rope_base"),
        ("usegqa", "use_gqa"),
        ("D_FF", ""),
    ],
)
def test_unknown_keys(key: str, near: str, tmp_path: Path) -> None:
    message = refusal(write_config(tmp_path / "run.json", CONFIG | {key: 1}))
    assert f"'{key}'" in message
    assert near == "" or f"'{near}'" in message


def test_source_is_no_key(tmp_path: Path) -> None:
    assert "'source'" in refusal(write_config(tmp_path / "run.json", CONFIG | {"source": "elsewhere"}))


def test_a_key_that_stands_twice(tmp_path: Path) -> None:
    """One of the two is a mistake, and which is not for the program to say."""
    text = json.dumps(CONFIG)[:-1] + ', "d_model": 64}'
    assert "d_model" in refusal(write_config(tmp_path / "run.json", text))


WRONG: dict[str, dict[str, Any]] = {
    "text": {"d_model": "32"},
    "whole number": {"d_model": 32.0},
    "no bool": {"n_layers": True},
    "bool": {"use_gqa": 1},
    "names": {"lora_target_modules": "q_proj"},
    "names of numbers": {"lora_target_modules": [1]},
    "null": {"d_model": None},
    "zero": {"n_layers": 0},
    "negative": {"d_ff": -1},
    "head_dim 0": {"head_dim": 0},
    "kv heads 0": {"n_kv_heads": 0},
    "huge": {"vocab_size": 10**12},
    "indivisible": {"n_kv_heads": 3},
    "arch": {"arch": "lama"},
    "experts of none": {"num_experts": 4},
    "experts per token": {"use_moe": True, "num_experts": 4, "top_k": 5},
    "arch_keys": {"arch_keys": {"query_pre_attn_scalar": 4}},
    "arch_keys text": {"arch_keys": "x"},
    "dtype": {"weight_dtype": "int3"},
    "rope": {"rope_scaling": {"type": "nope"}},
    "rope_base": {"rope_base": -1},
    "strict_load": {"strict_load": False},
    "temperature": {"temperature": -1},
    "temperature nan": {"temperature": math.nan},
    "learning_rate": {"learning_rate": -0.1},
    "lora_alpha": {"use_lora": True, "lora_alpha": math.nan},
    "top_k_sample": {"top_k_sample": -1},
    "draft_layers": {"speculative": True, "draft_layers": -1},
    "two answers": {"use_mqa": True, "n_kv_heads": 2},
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values(name: str, tmp_path: Path) -> None:
    """Refused when the file is read, in one line with the file and the key."""
    message = refusal(write_config(tmp_path / "run.json", CONFIG | WRONG[name]))
    ours: dict[str, str] = {
        "n_kv_heads": "num_key_value_heads",
        "d_ff": "intermediate_size",
        "rope_base": "rope_theta",
    }
    assert any(key in message or ours.get(key, key) in message for key in WRONG[name])


@pytest.mark.parametrize("key", [key for key in KEYS if key not in ("hf_repo_id", "weight_file")])
def test_any_value(key: str, tmp_path: Path) -> None:
    """Loads and computes numbers, or is refused."""
    problems = {}
    for value in NASTY:
        path = write_config(tmp_path / "run.json", CONFIG | {key: value})
        try:
            model = et.load(path)
            if not np.isfinite(model.logits([[0] * 20])).all():
                problems[repr(value)[:20]] = "logits are not finite"
        except et.InputError as error:
            if "\n" in str(error) or str(path) not in str(error):
                problems[repr(value)[:20]] = str(error)[:80]
        except Exception as error:
            problems[repr(value)[:20]] = f"{type(error).__name__}: {error}"[:80]
    assert problems == {}


@pytest.mark.parametrize(
    "file", ["model", "model/model.safetensors", "model/config.json", "none.gguf", "run.json", "../x"]
)
def test_weight_file(file: str, tmp_path: Path) -> None:
    """A folder of the same model is loaded; a lone weight file, a missing one and the config itself are
    refused."""
    _, weights = write_tiny(tmp_path / "model")
    path = write_config(tmp_path / "run.json", CONFIG | {"weight_file": file})
    if file == "model":
        parameters = et.load(path).named_parameters()
        for name, array in weights.items():
            np.testing.assert_array_equal(parameters[name], array)
    elif file == "model/config.json":
        with pytest.raises(et.InputError):
            et.load(path)
    else:
        with pytest.raises(et.InputError) as caught:
            et.load(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "stated",
    [
        {"d_model": 64},
        {"n_layers": 3},
        {"n_kv_heads": 4},
        {"rope_base": 5e5},
        {"norm_eps": 0.1},
        {"sliding_window": 3},
    ],
    ids=str,
)
def test_a_key_that_contradicts_the_weights(stated: dict[str, Any], tmp_path: Path) -> None:
    """What the config states and the checkpoint denies is an error, whether or not it changes a shape."""
    write_tiny(tmp_path / "model")
    path = write_config(tmp_path / "run.json", CONFIG | {"weight_file": "model"} | stated)
    assert "contradicts" in refusal(path)


def test_block_size_is_that_of_the_run(tmp_path: Path) -> None:
    """It belongs to the run and not to the checkpoint."""
    write_tiny(tmp_path / "model")
    stated = CONFIG | {"weight_file": "model", "block_size": 16}
    model = et.load(write_config(tmp_path / "run.json", stated))
    assert {layer.self_attn.mixing.query_block for layer in model.decoder.layers} == {16}


def test_override(tmp_path: Path) -> None:
    config = parse_run_config(CONFIG, "run.json")
    changed = override(config, ["d_model=64", "quantization=W4A8", "rope_scaling=null", "arch=mistral"])
    assert (changed.d_model, changed.quantization, changed.rope_scaling, changed.arch) == (
        64,
        "W4A8",
        None,
        "mistral",
    )
    assert override(config, []) == config
    for assignment, words in [
        ("d_model", "key=value"),
        ("d_modl=3", "d_model"),
        ("d_model=x", "d_model"),
        ("=3", "''"),
    ]:
        with pytest.raises(et.InputError, match=words):
            override(config, [assignment])


def test_every_config_of_the_repository_is_read() -> None:
    paths = sorted((Path(__file__).parents[2] / "configs").glob("*.json"))
    assert paths
    for path in paths:
        config = parse_run_config(json.loads(path.read_text(encoding="utf-8")), str(path)).model_config()
        assert config.hidden_size >= 512


SAVED: dict[str, dict[str, Any]] = {
    "window": {"arch": "mistral", "sliding_window": 3},
    "window of a llama": {"sliding_window": 3},
    "biases of a mistral": {"arch": "mistral", "attention_bias": True},
    "biases of a qwen2": {"arch": "qwen2", "attention_bias": True},
    "window in qwen2": {"arch": "qwen2", "sliding_window": 3},
    "linear": {"rope_scaling": {"type": "linear", "factor": 3.0}},
    "tied": {"tie_embeddings": True},
    "eps and base": {"norm_eps": 0.5, "rope_base": 77.0},
}


@pytest.mark.parametrize("name", SAVED)
def test_saved_and_loaded_again(name: str, tmp_path: Path) -> None:
    """Every key that changes the arithmetic survives; what the arch cannot say is refused from the start."""
    ids = np.arange(20)[None]
    try:
        model = et.load(write_config(tmp_path / "run.json", CONFIG | SAVED[name]), seed=3)
    except et.InputError:
        assert "of a" in name
        return
    for parameter in model.named_parameters().values():
        parameter += 0.1 * np.sin(np.arange(parameter.size)).reshape(parameter.shape)
    model.save(tmp_path / "saved")
    np.testing.assert_array_equal(et.load(tmp_path / "saved").logits(ids), model.logits(ids))


def test_a_hugging_face_config_is_told_from_ours(tmp_path: Path) -> None:
    model = et.load(write_config(tmp_path / "config.json", hf_config()))
    assert model.config.hidden_size == 32
    with pytest.raises(et.InputError, match="hidden_size"):
        et.load(write_config(tmp_path / "config.json", {"arch": "llama", "hidden_size": 32}))
