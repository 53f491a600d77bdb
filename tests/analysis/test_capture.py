"""Captured values are those of transformers and TransformerLens; replaced values are used; gradients are
those of differences."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import einsum_transformer as et
from einsum_transformer.analysis.values import Values
from einsum_transformer.components.attention import Attention, FusedAttention
from einsum_transformer.engine import Recorder
from einsum_transformer.models.blocks import ParallelBlock
from golden_files import FOLDER, MODELS, Models, load_golden

Array = np.ndarray
TOLERANCE = 1e-5


def activations(name: str) -> dict[str, Array]:
    with np.load(FOLDER / "activations" / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def close(ours: Array, theirs: Array) -> None:
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= TOLERANCE * max(1.0, float(np.abs(theirs).max()))


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_and_attentions_of_transformers(name: str, golden_model: Models) -> None:
    model, expected = golden_model(name), activations(name)
    layers = model.config.num_hidden_layers
    names = [f"blocks.{i}.{each}" for i in range(layers) for each in ("hook_resid_pre", "attn.hook_pattern")]
    found = et.capture(model, load_golden(name).tokens, [*names, f"layers.{layers - 1}", "norm"])
    for i in range(layers):
        close(found[f"blocks.{i}.hook_resid_pre"], expected["hidden_states"][i])
        close(found[f"blocks.{i}.attn.hook_pattern"], expected["attentions"][i])
    close(found[f"layers.{layers - 1}"], expected["last_layer"])
    close(found["norm"], expected["hidden_states"][-1])


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_names_and_shapes_of_transformer_lens(kind: str) -> None:
    reference = json.loads((FOLDER / "transformer_lens_names.json").read_text())
    config = reference["models"][kind]["config"]
    sizes = {"d_model": config["d_model"], "n_layers": config["n_layers"], "n_heads": config["n_heads"]}
    kv_heads = config.get("n_key_value_heads") or config["n_heads"]
    more = {"n_kv_heads": kv_heads, "d_ff": config["d_mlp"], "vocab_size": config["d_vocab"]}
    model = et.load(et.RunConfig(kind, **sizes, **more), seed=1)
    tokens = np.arange(reference["batch"] * reference["positions"]).reshape(reference["batch"], -1) % 60
    shapes = reference["models"][kind]["runs"]["default"]["shapes"]
    found = et.capture(model, tokens, list(shapes))
    assert {name: list(array.shape) for name, array in found.values.items()} == shapes
    results = [f"blocks.{i}.attn.hook_result" for i in range(config["n_layers"])]
    result = et.capture(model, tokens, [*results, "blocks.0.attn.hook_z", "blocks.0.hook_attn_out"])
    attention: Any = model.decoder.layers[0].self_attn
    bias = 0 if attention.o_bias is None else attention.o_bias
    total = result[results[0]].sum(axis=2) + bias
    np.testing.assert_allclose(total, result["blocks.0.hook_attn_out"], atol=1e-5)


def recomputed(model: et.Model, found: et.Capture, i: int) -> None:
    """The values of a block follow from each other."""
    block, own = model.decoder.layers[i], f"layers.{i}"
    pre, attn, mlp = (found[f"{own}.{name}"] for name in ("resid_pre", "attn_out", "mlp_out"))
    close(found[own], pre + attn + mlp)
    if not isinstance(block, ParallelBlock):
        close(found[f"{own}.resid_mid"], pre + attn)
    pattern = found[f"{own}.self_attn.pattern"]
    scores = found[f"{own}.self_attn.scores"].astype(np.float64)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    close(pattern, p / p.sum(axis=-1, keepdims=True))
    z = found[f"{own}.self_attn.z"]
    if isinstance(block.self_attn, (Attention, FusedAttention)):
        v = found[f"{own}.self_attn.v"]
        if block.self_attn.rope is not None:
            q, k = found[f"{own}.self_attn.rot_q"], found[f"{own}.self_attn.rot_k"]
            scale, cap = block.self_attn.mixing.scale, block.self_attn.mixing.softcap
            expected = np.einsum("btkgh,bskh->bkgts", q * scale, k)
            expected = expected if cap is None else cap * np.tanh(expected / cap)
            visible = np.isfinite(scores)
            close(np.where(visible, expected, 0), np.where(visible, scores, 0))
        close(z, np.einsum("bkgts,bskh->btkgh", pattern, v))
        y = np.einsum("btkgh,dkgh->btd", z, block.self_attn.o_proj)
        y = y if block.self_attn.o_bias is None else y + block.self_attn.o_bias
        close(found[f"{own}.self_attn"], y)


@pytest.mark.parametrize("name", MODELS)
def test_all_values_of_all_families(name: str, golden_model: Models) -> None:
    """Every name is a value with its letters, and capturing all of them changes no bit of the result."""
    model, tokens = golden_model(name), load_golden(name).tokens
    values = Values(model)
    found = et.capture(model, tokens, list(values.by_name))
    assert set(found.values) == set(values.by_name)
    for each, array in found.values.items():
        letters = found.letters[each]
        assert not letters or len(letters) == array.ndim, each
    with Recorder(spans=False, values=["*", "*resid_mid", "*.q", "*.scores", "*.hidden"]) as recorder:
        model.decoder.forward(tokens)
    own = {value.own for value in values.by_name.values() if not value.output_of_matrix}
    assert {each for each in recorder.values if ".experts." not in each} <= own
    for i in range(model.config.num_hidden_layers):
        recomputed(model, found, i)


@pytest.mark.parametrize("name", MODELS)
def test_a_value_replaced_by_itself_changes_no_bit(name: str, golden_model: Models) -> None:
    model, tokens = golden_model(name), load_golden(name).tokens
    values = Values(model).by_name.values()
    patches = {
        value.name: lambda array: array + 0
        for value in values
        if not (value.is_computed or value.output_of_matrix)
    }
    logits, _ = model.decoder.forward(tokens)
    changed = et.patch(model, tokens, patches)
    np.testing.assert_array_equal(changed.logits, logits[:, -1])


def test_replaced_values_are_used(golden_model: Models) -> None:
    model = golden_model("llama_gqa")
    tokens = load_golden("llama_gqa").tokens
    plain = et.capture(model, tokens, ["layers.0", "layers.1.*", "logits"])
    zero = et.patch(model, tokens, {"blocks.1.attn.hook_z": 0}, ["layers.1.*"])
    assert not zero["layers.1.self_attn"].any()
    np.testing.assert_array_equal(zero["layers.1.resid_mid"], plain["layers.1.resid_pre"])
    assert np.abs(zero.logits - plain.logits).max() > 1e-3
    last = model.config.num_hidden_layers - 1
    uniform = np.full(plain["layers.1.self_attn.pattern"].shape, 1 / tokens.shape[1], np.float32)
    found = et.patch(model, tokens, {"layers.1.self_attn.pattern": uniform}, "layers.1.self_attn.z")
    mean = plain["layers.1.self_attn.v"].mean(axis=1)[:, None, :, None]
    close(found["layers.1.self_attn.z"], np.broadcast_to(mean, found["layers.1.self_attn.z"].shape))
    scores = np.zeros_like(uniform)
    same = et.patch(model, tokens, {"layers.1.self_attn.scores": scores}, "layers.1.self_attn.z")
    close(same["layers.1.self_attn.z"], found["layers.1.self_attn.z"])
    final = et.patch(model, tokens, {f"layers.{last}": lambda x: x * 0}, "norm")
    assert not final["norm"].any()
    heads = et.patch(
        model, tokens, {"model.layers.0.self_attn.q_proj": lambda q: q * 2}, "layers.0.self_attn.q"
    )
    doubled = 2 * et.capture(model, tokens, "layers.0.self_attn.q")["layers.0.self_attn.q"]
    np.testing.assert_array_equal(heads["layers.0.self_attn.q"], doubled)
    with pytest.raises(et.InputError, match=r"hook_z: axis 2 `kg` has size 6, but 4 in the given array"):
        et.patch(model, tokens, {"blocks.1.attn.hook_z": np.zeros((*zero.tokens.shape, 4, 3))})


SMALL = (
    "llama_gqa",
    "gpt2_plain",
    "gemma2_caps",
    "gpt_neox_parallel",
    "olmo2_gqa",
    "qwen3_tied",
    "mpt_alibi",
)
GRADIENTS = {
    *("resid_pre", "resid_mid", "attn_out", "mlp_out", "", "self_attn", "mlp", "self_attn.z", "mlp.hidden"),
    *("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.pattern", "self_attn.scores", "mlp.up"),
    *("mlp.gate", "self_attn.rot_q", "self_attn.rot_k", "input_layernorm", "post_attention_layernorm"),
    *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
}


@pytest.mark.parametrize("name", SMALL)
def test_gradients_are_those_of_differences(name: str, golden_model: Models) -> None:
    model = golden_model(name, "float64")
    tokens = load_golden(name).tokens[:1, :6]
    known = Values(model).by_name
    names = [f"layers.1.{each}" if each else "layers.1" for each in sorted(GRADIENTS)]
    names = [each for each in names if each in known] + ["embed_tokens", "norm"]
    found = et.capture(model, tokens, names, gradient_of=(5, 9))
    assert set(found.gradients) == set(names)
    rng = np.random.default_rng(0)

    def scalar(patches: dict[str, Any]) -> float:
        logits = et.patch(model, tokens, patches, "logits")["logits"]
        return float(logits[0, -1, 5] - logits[0, -1, 9])

    assert found.scalar == pytest.approx(scalar({}), rel=1e-9)
    for each in names:
        value, gradient = found[each], found.gradients[each]
        direction = rng.standard_normal(value.shape)
        direction[~np.isfinite(value)] = 0
        eps = 1e-5
        ends = [scalar({each: value + sign * eps * direction}) for sign in (1, -1)]
        slope = (ends[0] - ends[1]) / (2 * eps)
        inner = float((gradient * direction).sum())
        size = float(np.abs(gradient * direction).sum())
        assert slope == pytest.approx(inner, rel=1e-6, abs=1e-6 * max(1.0, size)), each


def test_gradients_of_other_scalars(golden_model: Models) -> None:
    model, tokens = golden_model("llama_gqa"), load_golden("llama_gqa").tokens
    one = et.capture(model, tokens, "layers.0", gradient_of=3)

    def of_token(logits: Array) -> Array:
        found = np.zeros_like(logits)
        found[:, -1, 3] = 1
        return found

    other = et.capture(model, tokens, "layers.0", gradient_of=of_token)
    np.testing.assert_array_equal(one.gradients["layers.0"], other.gradients["layers.0"])
    assert other.scalar is None
    lens = et.capture(model, tokens, ["blocks.0.attn.hook_pattern", "blocks.0.ln1.hook_scale"], gradient_of=3)
    assert list(lens.gradients) == ["blocks.0.attn.hook_pattern"]
    assert lens.gradients["blocks.0.attn.hook_pattern"].shape == lens["blocks.0.attn.hook_pattern"].shape
    assert "gradient" in str(lens)
    for wrong in (np.zeros((2, 3)), (1, 2, 3), 10**6, 1.5):
        with pytest.raises(et.InputError):
            et.capture(model, tokens, "layers.0", gradient_of=wrong)
    with pytest.raises(et.InputError, match="excludes"):
        et.capture(model, tokens, "layers.0", gradient_of=3, max_new_tokens=2)


def test_generation(golden_model: Models) -> None:
    model, tokens = golden_model("llama_gqa"), load_golden("llama_gqa").tokens[:1]
    found = et.capture(model, tokens, ["layers.1", "blocks.0.attn.hook_pattern"], max_new_tokens=4)
    expected = et.generate(model, tokens.tolist(), max_new_tokens=4, temperature=0, ignore_eos=True)[0].tokens
    assert [int(step.tokens[0, 0]) for step in found.steps] == expected
    whole = np.concatenate([tokens, np.array([expected])], axis=1)
    plain = et.capture(model, whole, ["layers.1", "blocks.0.attn.hook_pattern"])
    for i, step in enumerate(found.steps):
        close(step["layers.1"][:, 0], plain["layers.1"][:, tokens.shape[1] + i])
        length = tokens.shape[1] + i + 1
        close(
            step["blocks.0.attn.hook_pattern"][:, :, 0],
            plain["blocks.0.attn.hook_pattern"][:, :, length - 1, :length],
        )
    changed = et.patch(model, tokens, {"layers.1": lambda x: -x}, max_new_tokens=4)
    assert [int(step.tokens[0, 0]) for step in changed.steps] != expected


def test_quantized_and_adapted_models(golden_model: Models) -> None:
    model, tokens = golden_model("llama_gqa"), load_golden("llama_gqa").tokens
    quantized = et.quantize(model, "W8A8")
    found = et.capture(
        quantized, tokens, ["layers.1", "layers.0.self_attn.q_proj", "blocks.0.attn.hook_result"]
    )
    expected = et.capture(model, tokens, "layers.1")["layers.1"]
    assert 0 < np.abs(found["layers.1"] - expected).max() < 0.2 * np.abs(expected).max()
    np.testing.assert_array_equal(found.logits, quantized.logits(tokens)[:, -1])
    adapted = et.with_lora(model, et.LoRAConfig(r=2), seed=1)
    np.testing.assert_array_equal(et.capture(adapted, tokens, "layers.1")["layers.1"], expected)
    gradient = et.capture(adapted, tokens, "layers.1", gradient_of=3).gradients["layers.1"]
    close(gradient, et.capture(model, tokens, "layers.1", gradient_of=3).gradients["layers.1"])
    found = et.capture(quantized, tokens, "layers.1", gradient_of=3)
    assert np.isfinite(found.gradients["layers.1"]).all()


def test_unknown_names_list_the_nearest(golden_model: Models) -> None:
    model = golden_model("llama_gqa")
    with pytest.raises(et.InputError, match=r"did you mean 'blocks\.1\.attn\.hook_pattern'"):
        et.capture(model, [[1, 2]], "blocks.1.attn.hook_patern")
    with pytest.raises(et.InputError, match=r"computed from layers\.1\.resid_pre"):
        et.patch(model, [[1, 2]], {"blocks.1.ln1.hook_scale": 1})
    with pytest.raises(et.InputError, match="expected one length"):
        et.capture(model, [[1, 2], [3]], "layers.0")
    with pytest.raises(et.InputError, match=r"was not captured, only layers\.0"):
        et.capture(model, [[1, 2]], "layers.0")["layers.1"]
    with pytest.raises(et.InputError, match="no tokenizer"):
        et.capture(model, [[1, 2]], "layers.0", gradient_of=" Paris")


def test_one_layer_costs_the_memory_of_one_array() -> None:
    model = et.load("fast_lora", max_layers=6)
    tokens = np.arange(512)[None]

    def peak(names: list[str]) -> int:
        et.capture(model, tokens, names)
        tracemalloc.start()
        kept = et.capture(model, tokens, names)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        del kept
        return most

    array = 512 * 512 * 4
    assert peak(["layers.2"]) - peak([]) < 1.1 * array + 200_000


def test_results_are_readable(golden_model: Models) -> None:
    model = golden_model("gpt2_plain")
    found = et.capture(model, [[1, 2, 3]], ["embed_*", "blocks.0.attn.hook_attn_scores"])
    assert list(found) == ["embed_tokens", "embed_positions", "blocks.0.attn.hook_attn_scores"]
    assert len(found) == 3
    assert found.letters["blocks.0.attn.hook_attn_scores"] == ("b", "kg", "t", "s")
    assert "b kg t s" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["values"]["embed_tokens"]["letters"] == ["b", "t", "d"]
    assert replace(found, values={}).to_dict()["values"] == {}
