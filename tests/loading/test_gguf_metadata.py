"""Metadata of GGUF files: obeyed as llama.cpp obeys it, neutral, refused, or named in a note."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf.constants
import numpy as np
import pytest

import einsum_transformer as et
from einsum_transformer.formats.gguf import GGUFFile
from einsum_transformer.loading.gguf import gguf_config
from einsum_transformer.models.families import FAMILIES
from einsum_transformer.models.families.gguf_keys import DESCRIPTIVE, SIZES, UNSUPPORTED
from gguf_files import CONVERSIONS, write_model_gguf
from golden_files import FOLDER, MODELS, load_golden, write_folder

pytestmark = pytest.mark.usefixtures("every_load_is_inspected")
ARCH = "{arch}."
with np.load(FOLDER / "gguf_metadata.npz") as file:
    REFERENCE = dict(file)
CASES: dict[str, tuple[str, dict[str, Any]]] = json.loads(str(REFERENCE["cases"]))
HALF_GELU = 2e-2
"""llama.cpp's GELU is a table in half precision."""


def keys_of(group: Any) -> list[str]:
    found = [value for name, value in vars(group).items() if isinstance(value, str) and name[0] != "_"]
    found += [key for value in vars(group).values() if isinstance(value, type) for key in keys_of(value)]
    return found


KEYS = sorted(
    key.removeprefix(ARCH)
    for key in keys_of(gguf.constants.Keys)
    if key.startswith(ARCH) and "{" not in key.removeprefix(ARCH)
)
"""Every key below the architecture that the format's own library knows."""
ONE_OF_EACH = {load_golden(name).config["model_type"]: name for name in reversed(MODELS)}
ONE_OF_EACH |= {"olmo3": "olmo3_two_ropes", "qwen2_moe": "qwen2_moe_window"}
DENSE = re.compile(r".*\.mlp\.(gate|up|down)_proj\.weight")
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
WINDOW = "attention.sliding_window"


def write(path: Path, name: str, keys: dict[str, Any]) -> Path:
    golden = load_golden(name)
    vocabulary = {f"{ARCH}vocab_size": golden.config["vocab_size"]}
    weights = dict(golden.weights)
    if name == "qwen2_moe_window":
        # Its layers without experts, which the format does not know, get those of the others.
        weights = {key: value for key, value in weights.items() if not DENSE.fullmatch(key)}
        moe = {key: value for key, value in weights.items() if ".mlp." in key}
        for layer in range(golden.config["num_hidden_layers"]):
            weights |= {re.sub(r"layers\.\d+", f"layers.{layer}", key): moe[key] for key in moe}
    return write_model_gguf(path, golden.config, weights, **(vocabulary | keys))


@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_llama_cpp(case: str, tmp_path: Path) -> None:
    """Of the last four of fifteen tokens; see tools/golden_gguf.py."""
    name, keys = CASES[case]
    model = et.load(write(tmp_path / "m.gguf", name, keys))
    expected = REFERENCE[case]
    logits = model.logits(load_golden(name).tokens[:1, :15])[0, -4:]
    atol = HALF_GELU if name.startswith("gemma") else 2e-4
    np.testing.assert_allclose(logits, expected, rtol=0, atol=atol)
    plain = REFERENCE["plain"]
    if name == "llama_gqa" and case not in ("plain", "a factor of type none"):
        assert np.abs(expected - plain).max() > 100 * atol


def test_yarn_factors_have_the_meaning_of_transformers(tmp_path: Path) -> None:
    """llama.cpp's converter copies them from config.json; most of its own architectures leave them unread."""
    golden = load_golden("llama_gqa")
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    own = scaling | {"beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 1.3}
    keys = {
        f"{ARCH}rope.scaling.{name}": value
        for name, value in {
            "type": "yarn",
            "factor": 4.0,
            "original_context_length": 16,
            "yarn_beta_fast": 8.0,
            "yarn_beta_slow": 2.0,
            "yarn_attn_factor": 1.3,
        }.items()
    }
    config = golden.config | {"rope_parameters": own | {"rope_theta": 10000.0}}
    folder = et.load(write_folder(tmp_path / "folder", config, golden.weights))
    file = et.load(write(tmp_path / "m.gguf", "llama_gqa", keys))
    np.testing.assert_allclose(file.logits(golden.tokens), folder.logits(golden.tokens), rtol=0, atol=1e-5)


def reader(path: Path) -> Callable[..., Any]:
    """Reads the config of a file again and again, with a key of its metadata changed."""
    file = GGUFFile(path)
    held, arch = dict(file.metadata), file.metadata["general.architecture"]

    def read(**keys: Any) -> Any:
        file.metadata = held | {f"{arch}.{key}": value for key, value in keys.items()}
        return gguf_config(file)

    return read


def changed(key: str, model_type: str) -> Any:
    """A value of the key's type with which no model here computes the same."""
    if key == "rope.scaling.type":
        return "none" if model_type == "deepseek_v2" else "yarn"
    if key == "block_count":
        return 1
    if key == "use_parallel_residual":
        return model_type not in ("phi", "gpt_neox")
    if key == "expert_weights_norm":
        return model_type not in ("qwen3_moe", "mixtral")
    if key == "attention.causal":
        return False
    if key in ("swin_norm", "ssm.dt_b_c_rms", "rope.scaling.finetuned"):
        return True
    if key == "tensor_data_layout":
        return "another"
    floats = "eps scale factor base cap alpha bias clamp beta sparsity multiplier"
    return 3.25 if any(word in key for word in floats.split()) else 3


@pytest.mark.parametrize("model_type", [kind for kind in FAMILIES if kind in CONVERSIONS])
def test_no_key_is_left_unread(model_type: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each key of the format, changed: the config changes, the file is refused, a table or a note has it."""
    read = reader(write(tmp_path / "plain.gguf", ONE_OF_EACH[model_type], {}))
    plain, silent = read(), []
    assert not caplog.records
    for key in KEYS:
        caplog.clear()
        around = YARN if key.startswith(("rope.scaling.yarn_", "rope.scaling.factor")) else {}
        plain = read(**around)
        try:
            config = read(**(around | {key: changed(key, model_type)}))
        except et.ConfigError:
            continue
        noted = any(key in record.getMessage() for record in caplog.records)
        unused = plain.rope is None and key.startswith("rope.")
        if config == plain and not (noted or unused or key in DESCRIPTIVE | SIZES):
            silent.append(key)
    # Without windows there is no pattern of them, without experts no weights; latents are one head of keys.
    allowed = {"attention.sliding_window_pattern"} if plain.sliding_window is None else set()
    allowed |= {"expert_weights_norm"} if plain.moe is None else set()
    allowed |= {"attention.head_count_kv"} if plain.latent is not None else set()
    assert set(silent) <= allowed, silent


@pytest.mark.parametrize("model_type", [kind for kind in FAMILIES if kind in CONVERSIONS])
def test_neutral_values_are_accepted(model_type: str, tmp_path: Path) -> None:
    """Each key of the table that the family does not read, with the values that change nothing."""
    read = reader(write(tmp_path / "plain.gguf", ONE_OF_EACH[model_type], {}))
    plain = read()
    for key, values in UNSUPPORTED.items():
        for value in filter(lambda value: value != "", values):
            try:
                config = read(**{key: value})
            except et.ConfigError as error:
                refused = str(error)
                assert "changes the arithmetic" not in refused, refused
                continue
            unread = any(each.endswith(f".{key}") for each in config.ignored)
            assert config == plain or not unread, (key, value)


def test_unknown_keys_are_named_in_one_note(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = {f"{ARCH}brand_new": 1, f"{ARCH}attention.brand_new": 2.5}
    with caplog.at_level(logging.WARNING, logger="einsum_transformer"):
        et.load(write(tmp_path / "m.gguf", "llama_gqa", keys))
    assert [record.getMessage().split(": ", 1)[1] for record in caplog.records] == [
        "metadata that is not used: llama.attention.brand_new, llama.brand_new"
    ]


def test_lists_of_equal_values_by_layer(tmp_path: Path) -> None:
    golden = load_golden("llama_gqa")
    layers, heads = golden.config["num_hidden_layers"], golden.config["num_key_value_heads"]
    path = write(tmp_path / "m.gguf", "llama_gqa", {f"{ARCH}attention.head_count_kv": [heads] * layers})
    np.testing.assert_allclose(et.load(path).logits(golden.tokens), golden.logits, rtol=0, atol=1e-4)
    path = write(tmp_path / "m.gguf", "llama_gqa", {f"{ARCH}attention.head_count_kv": [1, *[heads] * 2]})
    with pytest.raises(et.ConfigError, match=r"attention\.head_count_kv differs between layers"):
        et.load(path)


def write_experts_apart(path: Path, stacked: Path, without: str = "") -> Path:
    """The file with a tensor for each expert, as Mixtral's were before experts were stacked."""
    reader = gguf.GGUFReader(stacked)
    writer = gguf.GGUFWriter(path, "llama")
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")):
            kind = field.types[0]
            writer.add_key_value(field.name, field.contents(), kind, *field.types[1:2])
    for tensor in reader.tensors:
        shape = tuple(tensor.shape[::-1].tolist())
        tensors = {tensor.name: np.asarray(tensor.data).reshape(shape)}
        if "_exps" in tensor.name:
            plain = tensor.name.replace("_exps", "")
            experts = enumerate(tensors[tensor.name])
            tensors = {plain.replace(".weight", f".{i}.weight"): expert for i, expert in experts}
        for name, values in tensors.items():
            if name != without:
                writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_tensor_for_each_expert(tmp_path: Path) -> None:
    golden = load_golden("mixtral_window")
    stacked = write(tmp_path / "stacked.gguf", "mixtral_window", {f"{ARCH}{WINDOW}": 7})
    path = write_experts_apart(tmp_path / "alone.gguf", stacked)
    for budget in (None, 5000):
        alone = et.load(path, weight_budget=budget)
        expected = et.load(stacked, weight_budget=budget).logits(golden.tokens)
        np.testing.assert_array_equal(alone.logits(golden.tokens), expected)


@pytest.mark.parametrize("name", ["blk.1.ffn_up.0.weight", "blk.0.ffn_down.2.weight"])
def test_an_expert_that_is_missing_is_named_by_its_own_tensor(name: str, tmp_path: Path) -> None:
    stacked = write(tmp_path / "stacked.gguf", "mixtral_window", {f"{ARCH}{WINDOW}": 7})
    path = write_experts_apart(tmp_path / "alone.gguf", stacked, without=name)
    with pytest.raises(et.FormatError, match=rf"missing from the file: {re.escape(name)}$"):
        et.load(path)


def test_olmo3_is_not_olmo2(tmp_path: Path) -> None:
    """One architecture name, two models: windows tell them apart."""
    golden = load_golden("olmo3_yarn")
    model = et.load(write(tmp_path / "m.gguf", "olmo3_yarn", {}))
    assert model.config.model_type == "olmo3"
    np.testing.assert_allclose(model.logits(golden.tokens), golden.logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("absent", [None, 0.0])
def test_factors_of_granite_that_are_not_stated(absent: float | None, tmp_path: Path) -> None:
    """As in llama.cpp, 0 or no key means no factor, and 1 / sqrt(head_dim) for scores."""
    names = ("embedding_scale", "residual_scale", "attention.scale")
    path = write(tmp_path / "m.gguf", "granite_gqa", {f"{ARCH}{name}": absent for name in names})
    config = et.load(path).config
    assert (config.embedding_scale, config.residual_multiplier, config.attention_scale) == (1, 1, 0.5)
    assert config.logit_scale == 1 / 1.75


@pytest.mark.parametrize(
    ("value", "words"),
    [(None, "'logit_scale' is missing"), (0.0, "'logit_scale' is 0.0: expected a number from 1e-9")],
)
def test_granite_needs_the_scale_of_its_logits(value: float | None, words: str, tmp_path: Path) -> None:
    with pytest.raises(et.ConfigError, match=words):
        et.load(write(tmp_path / "m.gguf", "granite_gqa", {f"{ARCH}logit_scale": value}))


def test_granite_without_positions(tmp_path: Path) -> None:
    """llama.cpp turns RoPE off where its scaling is said not to be finetuned; a config.json cannot say it."""
    golden = load_golden("granite_gqa")
    off = et.load(write(tmp_path / "m.gguf", "granite_gqa", {f"{ARCH}rope.scaling.finetuned": False}))
    on = et.load(write(tmp_path / "n.gguf", "granite_gqa", {f"{ARCH}rope.scaling.finetuned": True}))
    np.testing.assert_allclose(on.logits(golden.tokens), golden.logits, rtol=0, atol=1e-4)
    assert off.config.rope is None
    assert np.abs(off.logits(golden.tokens) - golden.logits).max() > 0.1
    with pytest.raises(et.InputError, match="cannot represent rope = None"):
        off.save(tmp_path / "saved")


def test_sampling_settings_are_those_of_a_generation_config(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    general = "general.sampling."
    stated = {f"{general}temp": 0.5, f"{general}top_k": 7, f"{general}penalty_repeat": 1.25}
    unused = {f"{general}mirostat": 0, f"{general}mirostat_tau": 5.0, f"{general}xtc_probability": 0.0}
    model = et.load(write(tmp_path / "m.gguf", "llama_gqa", stated | unused))
    assert model.generation_config == {
        "temperature": 0.5,
        "top_k": 7,
        "repetition_penalty": 1.25,
        "do_sample": True,
    }
    assert not caplog.records
    assert et.load(write(tmp_path / "m.gguf", "llama_gqa", {})).generation_config is None
    et.load(write(tmp_path / "m.gguf", "llama_gqa", {f"{general}xtc_probability": 0.5}))
    assert [record.getMessage().split(": ", 1)[1] for record in caplog.records] == [
        "sampling settings that are not used: general.sampling.xtc_probability"
    ]


@pytest.mark.parametrize("kind", ["none", "no_vocab", "bert", "rwkv", "plamo2"])
def test_a_tokenizer_of_another_kind_leaves_token_ids(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """llama.cpp runs a file without a vocabulary too."""
    golden = load_golden("llama_gqa")
    keys: dict[str, Any] = {"tokenizer.ggml.model": kind}
    if kind not in ("none", "no_vocab"):
        keys["tokenizer.ggml.tokens"] = [f"t{i}" for i in range(97)]
    model = et.load(write(tmp_path / "m.gguf", "llama_gqa", keys))
    np.testing.assert_allclose(model.logits(golden.tokens), golden.logits, rtol=0, atol=1e-4)
    noted = [record.getMessage() for record in caplog.records]
    assert [f"tokenizer.ggml.model {kind!r} is not supported" in text for text in noted] == [True] * (
        kind not in ("none", "no_vocab")
    )
    with pytest.raises(et.InputError, match="has no tokenizer; give token ids"):
        et.generate(model, "text")


def test_every_general_key_is_known() -> None:
    """Those of the group Sampling are read; all others describe the file, or say what kind of file it is."""
    general = [key.removeprefix("general.") for key in keys_of(gguf.constants.Keys.General)]
    sampling = {key.removeprefix("sampling.") for key in general if key.startswith("sampling.")}
    known = {"temp", "top_k", "top_p", "min_p", "penalty_repeat", "penalty_last_n", "sequence"}
    assert sampling == known | {
        "xtc_probability",
        "xtc_threshold",
        "mirostat",
        "mirostat_tau",
        "mirostat_eta",
    }
