"""Adapter folders and merging: exact round trips, every refusal in one line, and what merging costs."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import einsum_transformer as et
from einsum_transformer.errors import FormatError, InputError
from einsum_transformer.models.adapter_text import with_adapter_tokenizer
from einsum_transformer.models.adapters import Merged, merged, with_lora
from einsum_transformer.models.lora_config import LoRAConfig
from einsum_transformer.models.peft import (
    adapter_digest,
    config_dict,
    read_config,
    save_adapter,
    with_adapter,
)
from einsum_transformer.models.peft_config import APPLIED, IGNORED, NOTED, UNSUPPORTED
from einsum_transformer.text.tokenizer import Tokenizer
from golden_files import Folders, load_golden, peft_fields, write_adapter_folder, write_folder
from tiny_models import tiny_model

Array = np.ndarray
Tensors = dict[str, Array]
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 9))
PREFIX = "base_model.model."
Q = f"{PREFIX}model.layers.0.self_attn.q_proj"
EMBED = f"{PREFIX}model.embed_tokens"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
TARGETS: dict[str, Any] = {
    "names": ("q_proj", "v_proj"),
    "all": "all-linear",
    "regex": r".*layers\.1\..*(q|down)_proj",
    "embedding": ("embed_tokens", "o_proj"),
    "head": ("lm_head",),
    "both": ("embed_tokens", "lm_head"),
}


def random_pairs(model: et.Model, seed: int = 0) -> et.Model:
    """The model with random A and B in its adapters."""
    rng = np.random.default_rng(seed)
    for array in model.adapter_parameters().values():
        array[...] = 0.06 * rng.standard_normal(array.shape)
    return model


def adapted(dtype: str = "float32", tied: bool = False, **settings: Any) -> et.Model:
    model = tiny_model(dtype, tie_word_embeddings=tied)
    return random_pairs(with_lora(model, LoRAConfig(**{"r": 2, **settings})))


def tensors_of(model: et.Model) -> Tensors:
    return {f"{PREFIX}{name}": array for name, array in model.adapter_parameters().items()}


def q_tensors(rank: int = 2, outputs: int = 48, inputs: int = 32) -> Tensors:
    """An adapter on one matrix of the tiny model."""
    a, b = np.full((rank, inputs), 0.5, np.float32), np.full((outputs, rank), 0.25, np.float32)
    return {f"{Q}.lora_A.weight": a, f"{Q}.lora_B.weight": b}


def refusal(folder: Path, model: et.Model | None = None) -> str:
    """The one line with which the adapter is refused; it names the folder."""
    with pytest.raises(InputError) as caught:
        with_adapter(model or tiny_model(), folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_round_trip(targets: Any, tied: bool, dtype: str, tmp_path: Path) -> None:
    """Matrices, settings and logits are bit for bit what was written; writing again gives the same files."""
    model = adapted(dtype, tied, target_modules=targets, use_rslora=True, lora_alpha=3.0)
    save_adapter(model, tmp_path / "a")
    again = with_adapter(tiny_model(dtype, tie_word_embeddings=tied), tmp_path / "a")
    ours, theirs = model.adapter_parameters(), again.adapter_parameters()
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert array.dtype == theirs[name].dtype == dtype
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)
    np.testing.assert_array_equal(model.logits(TOKENS), again.logits(TOKENS))
    save_adapter(again, tmp_path / "b")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_settings_round_trip(tmp_path: Path) -> None:
    """Patterns, dropout and numbers that JSON writes as integers."""
    patterns = {"rank_pattern": {r"layers\.1\..*q_proj": 3}, "alpha_pattern": {"v_proj": 7.0}}
    model = adapted(lora_alpha=5, lora_dropout=0.25, **patterns)
    save_adapter(model, tmp_path)
    assert read_config(tmp_path) == model.lora
    np.testing.assert_array_equal(with_adapter(tiny_model(), tmp_path).logits(TOKENS), model.logits(TOKENS))


@pytest.mark.timeout(10)
@pytest.mark.parametrize("pattern", ["(.*)*!", "(?:m|m|o|d|.)*(?:.?.?){99}!", "(a|a)" * 60])
def test_patterns_that_stop_other_matchers(pattern: str, tmp_path: Path) -> None:
    """Take time in proportion to the name, whoever wrote the file."""
    config = CONFIG | {"rank_pattern": {pattern: 1}, "alpha_pattern": {pattern: 1.0}}
    model = with_adapter(tiny_model(), write_adapter_folder(tmp_path, config, q_tensors()))
    assert model.lora is not None
    assert model.lora.rank_and_scaling("model.layers.0.self_attn.q_proj") == (2, 2.0)


def test_targets_need_not_be_understood(tmp_path: Path) -> None:
    """Where the tensors say what the adapter is on: RE2 has no lookaround."""
    config = CONFIG | {"target_modules": r"^(?!.*vision).*q_proj$"}
    model = with_adapter(tiny_model(), write_adapter_folder(tmp_path, config, q_tensors()))
    assert len(tensors_of(model)) == 2
    save_adapter(model, tmp_path / "again")
    assert read_config(tmp_path / "again").target_modules == ("model.layers.0.self_attn.q_proj",)


def test_written_names_are_those_the_adapter_is_on(tmp_path: Path) -> None:
    """Of short names that mean more modules than there are adapters, the whole names are written."""
    config = CONFIG | {"layers_to_transform": [0]}
    model = with_adapter(tiny_model(), write_adapter_folder(tmp_path, config, q_tensors()))
    assert config_dict(model)["target_modules"] == ["model.layers.0.self_attn.q_proj"]
    assert config_dict(adapted())["target_modules"] == ["q_proj", "v_proj"]


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_types_of_floats(kind: Any, tmp_path: Path) -> None:
    """Are read exactly where the model's type has their numbers."""
    narrow = {name: array.astype(kind) for name, array in q_tensors().items()}
    model = with_adapter(tiny_model(), write_adapter_folder(tmp_path, CONFIG, narrow))
    for name, array in tensors_of(model).items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, q_tensors()[name])


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("tied", [False, True])
def test_b_of_zeros_gives_the_base_bit_for_bit(targets: Any, tied: bool, tmp_path: Path) -> None:
    base = tiny_model(tie_word_embeddings=tied)
    fresh = with_lora(base, LoRAConfig(target_modules=targets))
    np.testing.assert_array_equal(fresh.logits(TOKENS), base.logits(TOKENS))
    save_adapter(fresh, tmp_path)
    np.testing.assert_array_equal(with_adapter(base, tmp_path).logits(TOKENS), base.logits(TOKENS))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3': only LORA"),
        ({"peft_type": None}, "peft_type is None"),
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"bias": "all"}, "bias = 'all' is not supported"),
        ({"bias": "lora_only"}, "bias = 'lora_only' is not supported"),
        ({"lora_bias": True}, "lora_bias = True"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\]"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"target_parameters": "x"}, "target_parameters is 'x': expected names"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"use_qalora": True}, "use_qalora"),
        ({"arrow_config": {"top_k": 1}}, "arrow_config"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights = 'olora'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = 'pissa_niter_4'"),
        ({"target_modules": None}, "target_modules is None"),
        ({"target_modules": [1]}, r"target_modules is \[1\]"),
        ({"r": 0}, "rank r is 0"),
        ({"r": "8"}, "r"),
        ({"r": True}, "r"),
        ({"r": 1 << 40}, "rank r is"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"alpha_pattern": {"q_proj": float("inf")}}, "lora_alpha is inf"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"lora_dropout": 1.5}, "lora_dropout is 1.5"),
        ({"use_rslora": 1}, "use_rslora"),
        ({"rank_pattern": {"q_proj": 2.0}}, "rank_pattern must map patterns to numbers"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern must map patterns to numbers"),
        ({"rank_pattern": {"(": 2}}, "not a valid RE2 regular expression"),
        ({"rank_pattern": {"(?:a{1000}){1000}": 2}}, "not a valid RE2 regular expression.*repetition size"),
        ({"rank_pattern": {"(?:a|b){0,1000}" * 50: 2}}, "not a valid RE2 regular expression.*too large"),
        ({"rank_pattern": {"(?!k)q_proj": 2}}, "not a valid RE2 regular expression"),
        ({"rank_pattern": {str(n): 2 for n in range(5000)}}, "5,000 patterns"),
        ({"alpha_pattern": {"q_proj": "4"}}, "alpha_pattern must map patterns to numbers"),
        ({"alpha_pattern": {"q_proj": 10**400}}, "alpha_pattern"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_settings_that_mean_something_else_are_refused(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    write_adapter_folder(tmp_path, CONFIG | changes, q_tensors())
    message = refusal(tmp_path)
    assert "adapter_config.json" in message
    with pytest.raises(InputError, match=words):
        with_adapter(tiny_model(), tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": False, "modules_to_save": None, "layers_to_transform": None, "megatron_config": None},
        {"init_lora_weights": True, "lora_bias": False, "rank_pattern": {}, "alpha_pattern": None},
        {"init_lora_weights": "gaussian", "inference_mode": True, "peft_version": "0.21.2"},
    ],
)
def test_settings_that_say_nothing_are_passed_by(changes: dict[str, Any], tmp_path: Path) -> None:
    write_adapter_folder(tmp_path, CONFIG | changes, q_tensors())
    assert with_adapter(tiny_model(), tmp_path).lora == LoRAConfig(2, 4.0, ("q_proj",))


def without(tensors: Tensors) -> Tensors:
    return {name: array for name, array in tensors.items() if "lora_B" not in name}


def renamed(new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(Q, new): array for name, array in tensors.items()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without, "has only one of lora_A and lora_B"),
        (lambda _: q_tensors(outputs=40), r"\[40, 2\].*\[48, 2\].*another base model"),
        (lambda _: q_tensors(inputs=64), r"\[2, 64\].*\[2, 32\].*another base model"),
        (lambda _: q_tensors(rank=3), r"\[3, 32\].*\[2, 32\]"),
        (lambda t: {name: array.T for name, array in t.items()}, r"\[32, 2\]"),
        (lambda t: {name: array[None] for name, array in t.items()}, "has 3 axes, expected a matrix"),
        (
            lambda t: {name: array.astype(np.int32) for name, array in t.items()},
            "has dtype I32, expected a float",
        ),
        (renamed(f"{PREFIX}model.layers.7.self_attn.q_proj"), "layers.7.*match no matrix"),
        (renamed(f"{PREFIX}model.norm"), "model.norm.*match no matrix"),
        (lambda t: t | {f"{PREFIX}model.norm.weight": np.ones(32, np.float32)}, "part of a supported LoRA"),
        (lambda t: t | {f"{Q}.lora_magnitude_vector": np.ones(48, np.float32)}, "part of a supported LoRA"),
        (lambda t: t | {f"{Q}.lora_B.bias": np.ones(48, np.float32)}, "part of a supported LoRA"),
        (lambda t: t | {f"{Q}.lora_A": t[f"{Q}.lora_A.weight"]}, "twice, under two names"),
        (
            lambda t: t | {f"{Q.removeprefix(PREFIX)}.lora_A.weight": t[f"{Q}.lora_A.weight"]},
            "twice, under two names",
        ),
        (renamed(EMBED), "part of a supported LoRA"),
        (
            lambda t: {n.replace("lora_", "lora_embedding_"): a for n, a in t.items()},
            "part of a supported LoRA",
        ),
        (lambda _: {}, "does not contain LoRA matrices"),
    ],
    ids=range(17),
)
def test_tensors_that_do_not_fit_are_refused(
    change: Callable[[Tensors], Tensors], words: str, tmp_path: Path
) -> None:
    write_adapter_folder(tmp_path, CONFIG, change(q_tensors()))
    refusal(tmp_path)
    with pytest.raises(InputError, match=words):
        with_adapter(tiny_model(), tmp_path)


def test_missing_and_damaged_files_are_refused(tmp_path: Path) -> None:
    """By name; of a pickle it is said that it is not read."""
    assert "does not contain adapter_config.json" in refusal(tmp_path)
    config, tensors = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    write_adapter_folder(tmp_path, CONFIG, q_tensors())
    whole = tensors.read_bytes()
    for damaged in (whole[:-1], whole[:20], b"", b"\xff" * 8 + whole[8:], whole + b"\0"):
        tensors.write_bytes(damaged)
        assert tensors.name in refusal(tmp_path)
    tensors.unlink()
    assert "does not contain adapter_model.safetensors" in refusal(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x02}")
    assert "adapter_model.bin, a pickle, is not read" in refusal(tmp_path)
    for damaged in (b"{", b"[]", b"\xff", b'{"r": 1, "r": 2}', b"[" * 10**5):
        config.write_bytes(damaged)
        with pytest.raises(FormatError, match=r"adapter_config\.json"):
            with_adapter(tiny_model(), tmp_path)


def embedding_tensors() -> Tensors:
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, 61)), rng.standard_normal((32, 2))
    return {f"{EMBED}.lora_embedding_A": a, f"{EMBED}.lora_embedding_B": b}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["weight", "base_layer.weight"])
def test_a_copy_of_the_embedding_must_be_the_models(name: str, tied: bool, tmp_path: Path) -> None:
    """It is passed by if it is equal, and refused if it differs in one number or in shape."""
    model = tiny_model(tie_word_embeddings=tied)
    weight = model.named_parameters()["model.embed_tokens.weight"]
    config = CONFIG | {"target_modules": ["embed_tokens"]}
    copy = weight.copy()
    write_adapter_folder(tmp_path, config, embedding_tensors() | {f"{EMBED}.{name}": copy})
    assert len(with_adapter(model, tmp_path).adapter_parameters()) == 2
    copy[3, 4] += 1e-3
    write_adapter_folder(tmp_path, config, embedding_tensors() | {f"{EMBED}.{name}": copy})
    assert "differs from the base model's; merge the adapter with PEFT" in refusal(tmp_path, model)
    write_adapter_folder(tmp_path, config, embedding_tensors() | {f"{EMBED}.{name}": copy[:-1].copy()})
    assert "has shape [60, 32], the base model's [61, 32]: the vocabulary was resized" in refusal(
        tmp_path, model
    )


def test_models_without_or_with_an_adapter_are_refused(tmp_path: Path) -> None:
    """There is nothing to write or merge, there is one already, and a whole model is no place for one."""
    with pytest.raises(InputError, match="has no adapter to write"):
        save_adapter(tiny_model(), tmp_path)
    with pytest.raises(InputError, match="no adapter to merge"):
        merged(tiny_model())
    write_adapter_folder(tmp_path, CONFIG, q_tensors())
    assert "already has an adapter" in refusal(tmp_path, adapted())
    with pytest.raises(InputError, match="merge it first"):
        adapted().save(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_merging_and_taking_out_again(targets: Any, tied: bool, tmp_path: Path) -> None:
    """Merged logits are the unmerged ones; unmerged weights the base's; the merged folder is a model."""
    base = tiny_model(tie_word_embeddings=tied)
    # Logits of a trained model's size, of which float32 has the sixth decimal.
    base.named_parameters()["model.norm.weight"][...] *= 0.25
    model = random_pairs(with_lora(base, LoRAConfig(r=2, target_modules=targets)))
    whole, report = merged(model)
    assert whole.lora is None
    assert np.abs(model.logits(TOKENS) - base.logits(TOKENS)).max() > 1e-2
    np.testing.assert_allclose(whole.logits(TOKENS), model.logits(TOKENS), rtol=0, atol=1e-5)
    assert len(report) == len(model.adapter_parameters()) / 2
    assert all(0 < one.relative < 1e-5 for one in report)
    save_adapter(model, tmp_path / "adapter")
    whole.save(tmp_path / "merged")
    again = et.load(tmp_path / "merged")
    np.testing.assert_array_equal(again.logits(TOKENS), whole.logits(TOKENS))
    back, _ = merged(with_adapter(again, tmp_path / "adapter"), sign=-1)
    weights, embedding = base.named_parameters(), base.named_parameters()["model.embed_tokens.weight"]
    for name, array in back.named_parameters().items():
        np.testing.assert_allclose(array, weights.get(name, embedding), rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_merging_is_exact_in_float64(targets: Any) -> None:
    """W + scaling B A is what the unmerged products compute."""
    model = adapted("float64", target_modules=targets)
    whole, report = merged(model, "float64")
    np.testing.assert_allclose(whole.logits(TOKENS), model.logits(TOKENS), rtol=0, atol=1e-12)
    assert all(one.error == 0 for one in report)


def test_merging_leaves_the_base_and_the_adapter_as_they_were() -> None:
    model = adapted(target_modules="all-linear")
    before = {name: array.copy() for name, array in model.named_parameters().items()}
    merged(model)
    for name, array in model.named_parameters().items():
        np.testing.assert_array_equal(array, before[name], err_msg=name)


def test_merging_into_sixteen_bits_says_what_is_lost() -> None:
    """Numbers of bfloat16 alone; the report's sizes are those of float64 arithmetic."""
    model = adapted(target_modules=("q_proj",))
    base = tiny_model().named_parameters()
    parameters = model.adapter_parameters()
    whole, report = merged(model, "bfloat16")
    assert [one.name for one in report] == [f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)]
    for one in report:
        stored, module = whole.named_parameters()[one.name], one.name.removesuffix(".weight")
        a, b = (parameters[f"{module}.lora_{part}.weight"].astype(np.float64) for part in "AB")
        delta = 8 * b @ a
        exact = base[one.name] + delta
        np.testing.assert_array_equal(stored, exact.astype(ml_dtypes.bfloat16).astype(np.float32))
        assert one.change == pytest.approx(np.sqrt(np.mean(delta**2)), rel=1e-5)
        assert one.error == pytest.approx(np.sqrt(np.mean((stored - exact) ** 2)), rel=1e-3)
        assert 1e-4 < one.relative < 1e-2
    assert Merged("w", 0.0, 0.0).relative == 0.0


@pytest.mark.parametrize("role", ["embed_tokens", "lm_head"])
def test_an_adapter_on_one_role_of_a_tied_matrix(role: str, tmp_path: Path) -> None:
    """The other role keeps the matrix; merging makes two of it, and says so in the config."""
    base = tiny_model(tie_word_embeddings=True)
    model = adapted(tied=True, target_modules=(role,))
    whole, _ = merged(model)
    assert not whole.config.tie_word_embeddings
    weights, shared = whole.named_parameters(), base.named_parameters()["model.embed_tokens.weight"]
    other = {"embed_tokens": "lm_head", "lm_head": "model.embed_tokens"}[role]
    np.testing.assert_array_equal(weights[f"{other}.weight"], shared)
    whole.save(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    assert merged(adapted(tied=True, target_modules=("q_proj",)))[0].config.tie_word_embeddings


def test_every_field_of_peft_is_obeyed_neutral_refused_or_noted() -> None:
    """The names are those of LoraConfig's fields in peft 0.21.2."""
    tables = [set(APPLIED), set(IGNORED), set(UNSUPPORTED), set(NOTED)]
    known = set().union(*tables)
    assert sum(map(len, tables)) == len(known)
    assert set(peft_fields()) <= known


@pytest.mark.parametrize("field", sorted(IGNORED))
def test_neutral_fields_change_nothing(field: str, tmp_path: Path) -> None:
    plain = with_adapter(tiny_model(), write_adapter_folder(tmp_path / "a", CONFIG, q_tensors()))
    for value in (True, "text", 3, [0], {"a": 1}):
        write_adapter_folder(tmp_path / "b", CONFIG | {field: value}, q_tensors())
        logits = with_adapter(tiny_model(), tmp_path / "b").logits(TOKENS)
        np.testing.assert_array_equal(logits, plain.logits(TOKENS))


@pytest.mark.parametrize("field", sorted(UNSUPPORTED))
def test_refused_fields_are_named(field: str, tmp_path: Path) -> None:
    write_adapter_folder(tmp_path, CONFIG | {field: {"a": 1}}, q_tensors())
    assert f"{field} = {{'a': 1}} is not supported" in refusal(tmp_path)


def test_keys_of_a_newer_peft(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What may switch a variant on is refused, what is null or false passed by, the rest noted."""
    for value in (True, {"beta": 1.0}, [1]):
        write_adapter_folder(tmp_path, CONFIG | {"use_new": value}, q_tensors())
        assert "use_new" in refusal(tmp_path)
    write_adapter_folder(tmp_path, CONFIG | {"new": 16, "other": None, "third": False}, q_tensors())
    with_adapter(tiny_model(), tmp_path)
    assert [record.message for record in caplog.records] == [
        f"{tmp_path}/adapter_config.json: new = 16: unknown key, ignored"
    ]


def test_another_base_is_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for base in ("owner/random weights", "/elsewhere/Random Weights/", None, ""):
        write_adapter_folder(tmp_path, CONFIG | {"base_model_name_or_path": base}, q_tensors())
        with_adapter(tiny_model(), tmp_path)
    assert not caplog.records
    write_adapter_folder(tmp_path, CONFIG | {"base_model_name_or_path": "owner/Other-7B"}, q_tensors())
    with_adapter(tiny_model(), tmp_path)
    assert "trained on 'owner/Other-7B', the model is random weights" in caplog.records[0].message


@pytest.mark.parametrize("rank", [33, 200])
def test_ranks_above_the_smaller_side(rank: int, tmp_path: Path) -> None:
    """Are as good as any: adapters are put on, written, read and merged."""
    model = adapted("float64", r=rank, target_modules="all-linear")
    whole, _ = merged(model, "float64")
    np.testing.assert_allclose(whole.logits(TOKENS), model.logits(TOKENS), rtol=0, atol=1e-10)
    save_adapter(model, tmp_path)
    again = with_adapter(tiny_model("float64"), tmp_path)
    np.testing.assert_array_equal(again.logits(TOKENS), model.logits(TOKENS))


@pytest.mark.parametrize("prefix", ["", "model."])
def test_adapters_of_a_model_without_a_head(prefix: str, tmp_path: Path) -> None:
    """AutoModel's modules have no `model.` in their names; peft writes what they are called."""
    plain = with_adapter(tiny_model(), write_adapter_folder(tmp_path / "a", CONFIG, q_tensors()))
    renamed = {name.replace(".model.layers", f".{prefix}layers"): w for name, w in q_tensors().items()}
    config = CONFIG | {"rank_pattern": {rf"^{prefix}layers\.0\..*": 2}, "r": 5, "lora_alpha": 4}
    other = with_adapter(tiny_model(), write_adapter_folder(tmp_path / "b", config, renamed))
    np.testing.assert_array_equal(other.logits(TOKENS), plain.logits(TOKENS))
    save_adapter(other, tmp_path / "c")
    again = with_adapter(tiny_model(), tmp_path / "c")
    np.testing.assert_array_equal(again.logits(TOKENS), plain.logits(TOKENS))


PREFIXES = ["model.", "model.language_model.", "language_model.model.", "language_model.", ""]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_adapters_of_multimodal_models(prefix: str, golden_folder: Folders, tmp_path: Path) -> None:
    """On the text model: names begin in all the ways in which the base's tensors may."""
    golden, base = load_golden("gemma3_text"), golden_folder("gemma3_text")
    model = random_pairs(
        with_lora(et.load(base), LoRAConfig(2, 3.0, ("q_proj", "down_proj", "embed_tokens")))
    )
    save_adapter(model, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    tensors = {
        name.replace(f"{PREFIX}model.", f"{PREFIX}{prefix}"): array
        for name, array in tensors_of(model).items()
    }
    again = et.load(base, adapter=write_adapter_folder(tmp_path / "b", config, tensors))
    np.testing.assert_array_equal(again.logits(golden.tokens), model.logits(golden.tokens))


VISION = "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("outer", ["model.", ""])
def test_matrices_on_the_vision_part_are_left_aside(
    outer: str, golden_folder: Folders, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With one note, by whichever program they were written; an adapter with no others is none for text."""
    golden, base = load_golden("gemma3_text"), golden_folder("gemma3_text")
    model = random_pairs(with_lora(et.load(base), LoRAConfig(2, 40.0, ("q_proj",))))
    text = {name.removesuffix(".weight"): array for name, array in model.adapter_parameters().items()}
    a, b = np.ones((2, 9), np.float32), np.ones((7, 2), np.float32)
    other = {f"{outer}{VISION}.lora_A": a, f"{outer}multi_modal_projector.linear.lora_B": b}
    caplog.clear()
    peft = {f"{PREFIX}{name}.weight": array for name, array in (text | other).items()}
    write_adapter_folder(tmp_path / "peft", CONFIG | {"lora_alpha": 40}, peft)
    mlx = {
        name.replace("lora_A", "lora_a").replace("lora_B", "lora_b"): np.ascontiguousarray(array.T)
        for name, array in (text | other).items()
    }
    mlx_folder(tmp_path / "mlx", MLX, mlx)
    for folder in ("peft", "mlx"):
        caplog.clear()
        again = with_adapter(et.load(base), tmp_path / folder)
        np.testing.assert_array_equal(again.logits(golden.tokens), model.logits(golden.tokens))
        (said,) = (record.message for record in caplog.records)
        assert "ignored 2 tensors, such as" in said
        assert said.endswith(", of parts of the model that are not supported")
    write_adapter_folder(
        tmp_path / "none", CONFIG, {f"{PREFIX}{name}.weight": w for name, w in other.items()}
    )
    assert "does not contain LoRA matrices" in refusal(tmp_path / "none", et.load(base))


@pytest.mark.parametrize("part", ["lora_A.weight", "lora_B.weight", "base_layer.weight"])
def test_empty_tensors_are_those_of_zero_3(part: str, tmp_path: Path) -> None:
    """DeepSpeed leaves tensors of shape [0] where the weights were not gathered."""
    tensors = q_tensors() | {f"{Q}.{part}": np.zeros(0, np.float32)}
    message = refusal(write_adapter_folder(tmp_path / "peft", CONFIG, tensors))
    assert "1 tensors, such as" in message
    assert "saved by DeepSpeed ZeRO-3 without gathering the weights; save the adapter with" in message


@pytest.mark.parametrize("alpha", [0, -3.0])
@pytest.mark.parametrize("changes", ["lora_alpha", "alpha_pattern", "mlx"])
def test_scalings_of_zero_and_below_are_read(alpha: float, changes: str, tmp_path: Path) -> None:
    """peft and mlx-lm take any number; W + scaling B A by arithmetic. A new adapter does not begin so."""
    tensors, scaling = q_tensors(), alpha / 2
    if changes == "mlx":
        config = MLX | {"lora_parameters": {"rank": 2, "scale": scaling, "dropout": 0.0}}
        module = Q.removeprefix(PREFIX)
        pair = {
            f"{module}.lora_a": tensors[f"{Q}.lora_A.weight"].T,
            f"{module}.lora_b": tensors[f"{Q}.lora_B.weight"].T,
        }
        mlx_folder(tmp_path / "a", config, pair)
    else:
        own = {"lora_alpha": alpha} if changes == "lora_alpha" else {"alpha_pattern": {"q_proj": alpha}}
        write_adapter_folder(tmp_path / "a", CONFIG | own, tensors)
    base = tiny_model()
    model = with_adapter(base, tmp_path / "a")
    name = f"{Q.removeprefix(PREFIX)}.weight"
    delta = tensors[f"{Q}.lora_B.weight"] @ tensors[f"{Q}.lora_A.weight"]
    expected = base.named_parameters()[name] + scaling * delta
    np.testing.assert_allclose(merged(model)[0].named_parameters()[name], expected, rtol=0, atol=1e-6)
    save_adapter(model, tmp_path / "b")
    again = with_adapter(tiny_model(), tmp_path / "b")
    np.testing.assert_array_equal(again.logits(TOKENS), model.logits(TOKENS))
    assert model.lora is not None
    with pytest.raises(InputError, match="expected a number above 0"):
        with_lora(base, LoRAConfig(lora_alpha=alpha))


def mlx_folder(folder: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    write_adapter_folder(folder, config, tensors)
    (folder / "adapter_model.safetensors").rename(folder / "adapters.safetensors")
    return folder


MLX = {
    "fine_tune_type": "lora",
    "num_layers": 1,
    "lora_parameters": {"rank": 2, "scale": 20.0, "dropout": 0.0},
}


def mlx_tensors() -> Tensors:
    rng = np.random.default_rng(3)
    module = Q.removeprefix(PREFIX)
    a, b = rng.standard_normal((32, 2)), 0.1 * rng.standard_normal((2, 48))
    return {f"{module}.lora_a": a.astype(np.float32), f"{module}.lora_b": b.astype(np.float32)}


def test_adapters_of_mlx_lm(tmp_path: Path) -> None:
    """y = W x + scale (x lora_a) lora_b, by arithmetic on the weight itself."""
    tensors, base = mlx_tensors(), tiny_model()
    model = with_adapter(base, mlx_folder(tmp_path / "mlx", MLX, tensors))
    a, b = tensors.values()
    name = "model.layers.0.self_attn.q_proj.weight"
    expected = base.named_parameters()[name] + 20 * (a @ b).T
    np.testing.assert_allclose(merged(model)[0].named_parameters()[name], expected, rtol=0, atol=1e-5)
    save_adapter(model, tmp_path / "peft")
    again = with_adapter(tiny_model(), tmp_path / "peft")
    np.testing.assert_array_equal(again.logits(TOKENS), model.logits(TOKENS))


def test_adapters_of_old_versions_of_mlx_lm(tmp_path: Path) -> None:
    """They have lora_layers for num_layers, and no fine_tune_type; the tensors are as today's."""
    new = with_adapter(tiny_model(), mlx_folder(tmp_path / "new", MLX, mlx_tensors()))
    config = {"lora_layers": 1, "use_dora": False, "lora_parameters": MLX["lora_parameters"]}
    old = with_adapter(tiny_model(), mlx_folder(tmp_path / "old", config, mlx_tensors()))
    np.testing.assert_array_equal(old.logits(TOKENS), new.logits(TOKENS))
    for without in ({"lora_layers": 16, "rank": 2}, {"num_layers": 16}):
        mlx_folder(tmp_path / "none", without, mlx_tensors())
        assert "key 'lora_parameters' is missing (old version of mlx-lm)" in refusal(tmp_path / "none")
    mlx_folder(tmp_path / "dora", config | {"use_dora": True}, mlx_tensors())
    assert "use_dora = True: only mlx-lm's lora is supported" in refusal(tmp_path / "dora")


def test_an_embedding_of_mlx_lm(tmp_path: Path) -> None:
    """lora_a has a row for each token: W + scale lora_a lora_b."""
    rng = np.random.default_rng(4)
    a, b = (
        (0.1 * rng.standard_normal((61, 2))).astype(np.float32),
        rng.standard_normal((2, 32)).astype(np.float32),
    )
    names = {"model.embed_tokens.lora_a": a, "model.embed_tokens.lora_b": b}
    model = with_adapter(tiny_model(), mlx_folder(tmp_path, MLX, names))
    found = merged(model)[0].named_parameters()["model.embed_tokens.weight"]
    expected = tiny_model().named_parameters()["model.embed_tokens.weight"] + 20 * a @ b
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"fine_tune_type": "dora"}, "fine_tune_type is 'dora'"),
        ({"fine_tune_type": "full"}, "fine_tune_type is 'full'"),
        ({"lora_parameters": {"rank": 2, "scale": 2.0, "alpha": 4}}, "lora_parameters.alpha"),
        ({"lora_parameters": {"rank": 3, "scale": 2.0}}, r"\[2, 32\].*\[3, 32\]"),
        ({"lora_parameters": {"rank": 2}}, "scale"),
    ],
)
def test_adapters_of_mlx_lm_that_are_refused(config: dict[str, Any], words: str, tmp_path: Path) -> None:
    mlx_folder(tmp_path, MLX | config, mlx_tensors())
    assert re.search(words, refusal(tmp_path))


def test_what_is_no_adapter_is_named(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        write_adapter_folder(tmp_path / name, CONFIG, q_tensors())
        (tmp_path / name / name).write_bytes(pointer)
        assert "is a Git LFS pointer" in refusal(tmp_path / name)
    assert "no such folder" in refusal(tmp_path / "missing")
    with pytest.raises(
        InputError, match=r"owner/name: no such folder; adapters are not downloaded from the hub"
    ):
        with_adapter(tiny_model(), "owner/name")
    (tmp_path / "lora.gguf").write_bytes(b"GGUF")
    assert "is a file; an adapter is a folder" in refusal(tmp_path / "lora.gguf")
    golden = load_golden("llama_gqa")
    write_folder(tmp_path / "model", golden.config, golden.weights)
    assert "it is a whole model: give it as the model" in refusal(tmp_path / "model")


def tokenizer_of(text: str, template: str | None) -> Tokenizer:
    found = Tokenizer.train([text] * 4, 300)
    return replace(found, chat_templates={} if template is None else {"default": template})


@pytest.mark.parametrize(
    ("base", "own", "expected", "noted"),
    [
        (None, ("a b", "T"), ("a b", "T"), ""),
        (("a b", None), ("a b", "T"), ("a b", "T"), "whose chat template differs"),
        (("a b", "T"), ("a b", None), ("a b", "T"), ""),
        (("a b", "T"), ("a b", "T"), ("a b", "T"), ""),
        (("a b", "T"), ("c d e", "U"), ("c d e", "U"), "whose vocabulary and chat template differs"),
        (("a b", "T"), None, ("a b", "T"), ""),
    ],
)
def test_the_tokenizer_in_an_adapters_folder_is_used(
    base: Any, own: Any, expected: Any, noted: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is the one that was trained with; a note says where it is not the base's."""
    model = with_adapter(tiny_model(vocab_size=300), write_adapter_folder(tmp_path, CONFIG, q_tensors()))
    if own is not None:
        tokenizer_of(*own).save(tmp_path)
    model = replace(model, tokenizer=None if base is None else tokenizer_of(*base))
    found = with_adapter_tokenizer(model, tmp_path).tokenizer
    assert found is not None
    assert found.backend.get_vocab() == tokenizer_of(*expected).backend.get_vocab()
    assert found.chat_template == expected[1]
    assert [noted in record.message for record in caplog.records] == [True] * bool(noted)


def test_a_chat_template_alone_or_a_tokenizer_that_is_too_large(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = with_adapter(tiny_model(vocab_size=300), write_adapter_folder(tmp_path, CONFIG, q_tensors()))
    (tmp_path / "chat_template.jinja").write_text("T", encoding="utf-8")
    found = with_adapter_tokenizer(replace(model, tokenizer=tokenizer_of("a b", None)), tmp_path).tokenizer
    assert found is not None
    assert found.chat_template == "T"
    tokenizer_of("a b", "T").save(tmp_path)
    small = with_adapter(tiny_model(vocab_size=61), tmp_path)
    assert with_adapter_tokenizer(small, tmp_path).tokenizer is None
    assert re.search(r"its tokenizer is ignored: .* the model 61$", caplog.records[-1].message)


def test_load_takes_the_adapters_tokenizer(tmp_path: Path) -> None:
    tiny_model(vocab_size=300).save(tmp_path / "base")
    write_adapter_folder(tmp_path / "adapter", CONFIG, q_tensors())
    tokenizer_of("a b", "T").save(tmp_path / "adapter")
    model = et.load(tmp_path / "base", adapter=tmp_path / "adapter")
    assert model.tokenizer is not None
    assert model.tokenizer.chat_template == "T"


BAD = "{% if %}"


@pytest.mark.parametrize("tokenizer", [False, True])
@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("chat_template.jinja", "%s"),
        ("tokenizer_config.json", '{"chat_template": "%s"}'),
        ("tokenizer_config.json", '{"chat_template": [{"name": "default", "template": "%s"}]}'),
        ("chat_template.json", '{"chat_template": "%s"}'),
    ],
)
def test_chat_templates_in_any_file_of_the_folder(
    file: str, text: str, tokenizer: bool, tmp_path: Path
) -> None:
    """With or without a tokenizer beside them; the error for a wrong one names its file."""
    model = with_adapter(tiny_model(vocab_size=300), write_adapter_folder(tmp_path, CONFIG, q_tensors()))
    model = replace(model, tokenizer=tokenizer_of("a b", None if tokenizer else "T"))
    if tokenizer:
        tokenizer_of("a b", None).save(tmp_path)
    path = tmp_path / file
    path.write_text(text % "U", encoding="utf-8")
    found = with_adapter_tokenizer(model, tmp_path).tokenizer
    assert found is not None
    assert found.chat_template == "U"
    wrong: list[bytes] = [(text % BAD).encode(), b"\xff"]
    if file.endswith(".json"):
        wrong += [b"{", b"[]", b'{"chat_template": 3}']
    for content in wrong:
        path.write_bytes(content)
        with pytest.raises(InputError, match=re.escape(str(path))):
            with_adapter_tokenizer(model, tmp_path)


def test_an_empty_path_is_named() -> None:
    """It is not the folder at hand."""
    for function in (lambda: with_adapter(tiny_model(), ""), lambda: adapter_digest("")):
        with pytest.raises(InputError, match=r"`adapter` is an empty path"):
            function()
