"""Quantized models: schemes, values, memory, gradients of activations, and refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import einsum_transformer as et
from einsum_transformer.engine import Leaf
from einsum_transformer.leaves.quantized import PackedWeight, SimulatedWeight
from einsum_transformer.models.model import EMBEDDING
from einsum_transformer.models.scheme import Quantization, Scheme
from einsum_transformer.numerics.uniform import dequantize, quantize
from einsum_transformer.tree import map_named, named_leaves
from golden_files import MODELS, Models, load_golden

Array = np.ndarray


def quantized_leaves(model: et.Model) -> dict[str, PackedWeight | SimulatedWeight]:
    return {
        path: leaf
        for path, leaf in named_leaves(model.decoder)
        if isinstance(leaf, PackedWeight | SimulatedWeight)
    }


class TestSchemes:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("W8A16", Scheme(8, 16)),
            ("w4a8", Scheme(4, 8, granularity="group", group_size=64)),
            ("W4A16KV8g128", Scheme(4, 16, 8, "group", 128)),
            ("W8A8g32", Scheme(8, 8, granularity="group", group_size=32)),
            ("W2A16,channel,asymmetric", Scheme(2, 16, granularity="channel", symmetric=False)),
            ("W8A4,tensor", Scheme(8, 4, granularity="tensor")),
            ("none", None),
        ],
    )
    def test_notation(self, text: str, expected: Scheme | None) -> None:
        assert Scheme.parse(text) == expected
        if expected is not None:
            assert Scheme.parse(str(expected)) == expected

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("W5A16", r"expected none or W\{2,3,4,8\}A.*nearest valid one is W"),
            ("W4", "the nearest valid one is W4A"),
            ("W4A16g48", "nearest valid one is W4A16g"),
            ("int8", "expected none or"),
            ("", "expected none or"),
            ("W4A16,fast", "unknown option 'fast'"),
            ("W4A16g64,tensor", "only one of g{N}, tensor or channel"),
            ("W4A16,symmetric,asymmetric", "only one of symmetric or asymmetric"),
            ("W4A16KV2", "nearest valid one is W4A16KV"),
        ],
    )
    def test_mistakes(self, text: str, message: str) -> None:
        with pytest.raises(et.InputError, match=message):
            Quantization.of(text)
        with pytest.raises(et.InputError, match=message):
            et.load("fast_lora", quantization=text)


@pytest.mark.parametrize("scheme", ["W8A8", "W4A16g32", "W4A8,asymmetric", "W3A16", "W2A16,tensor"])
@pytest.mark.parametrize("name", MODELS)
def test_every_family_has_the_logits_of_its_simulation(
    name: str, scheme: str, golden_model: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are multiplied in blocks of few rows, so that every product has several."""
    monkeypatch.setattr("einsum_transformer.leaves.blockwise._BLOCK", 100)
    golden, model = load_golden(name), golden_model(name, "float64")
    real, simulated = et.quantize(model, scheme), et.quantize(model, scheme, mode="simulated")
    assert quantized_leaves(real).keys() == quantized_leaves(simulated).keys()
    for path, leaf in quantized_leaves(real).items():
        np.testing.assert_array_equal(leaf.array(), quantized_leaves(simulated)[path].array(), err_msg=path)
    # Routing can change if a score is rounded differently, so mixtures are compared with plain activations.
    np.testing.assert_allclose(real.logits(golden.tokens), simulated.logits(golden.tokens), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_what_is_not_quantized(
    name: str, golden_model: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without rounding of activations, they are those of a model of the rounded weights."""
    monkeypatch.setattr("einsum_transformer.leaves.blockwise._BLOCK", 100)
    monkeypatch.setattr("einsum_transformer.leaves.quantized.rounded", lambda x, bits, axes: x)
    golden, model = load_golden(name), golden_model(name, "float64")
    real = et.quantize(model, "W4A16")
    plain = replace(
        real,
        decoder=map_named(lambda _, w: w.array() if isinstance(w, Leaf) else w, real.decoder),
        quantization=None,
    )
    loss, gradients = real.loss_and_gradients(golden.tokens, golden.targets)
    plain_loss, expected = plain.loss_and_gradients(golden.tokens, golden.targets)
    assert loss == pytest.approx(plain_loss, abs=1e-12)
    assert gradients.keys() < expected.keys()
    for each, gradient in gradients.items():
        np.testing.assert_allclose(gradient, expected[each], rtol=0, atol=1e-10, err_msg=each)


@pytest.mark.parametrize("scheme", ["W8A8", "W4A16", "W4A16,asymmetric"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_adapters_are_those_of_the_simulation(
    name: str, scheme: str, golden_model: Models
) -> None:
    """Through a frozen base, in float64."""
    golden, model = load_golden(name), golden_model(name, "float64")
    found = []
    for mode in ("real", "simulated"):
        quantized = et.quantize(model, scheme, mode=mode)
        adapted = et.with_lora(quantized, et.LoRAConfig(r=2, target_modules="all-linear"), seed=1)
        rng = np.random.default_rng(2)
        arrays = adapted.adapter_parameters()
        filled = {each: 0.1 * rng.standard_normal(array.shape) for each, array in arrays.items()}
        adapted.set_adapter_parameters(filled)
        found.append(adapted.loss_and_gradients(golden.tokens, golden.targets))
    (loss, gradients), (expected_loss, expected) = found
    assert loss == pytest.approx(expected_loss, abs=1e-9)
    assert gradients.keys() == expected.keys() != set()
    for each, gradient in gradients.items():
        np.testing.assert_allclose(gradient, expected[each], rtol=0, atol=1e-8, err_msg=each)


def test_values_and_held_bytes(golden_model: Models) -> None:
    model = golden_model("llama_gqa")
    for scheme, bits, group in (("W8A16", 8, None), ("W4A16g32", 4, 32), ("W2A16,channel", 2, None)):
        real = et.quantize(model, scheme)
        for path, leaf in quantized_leaves(real).items():
            spec, original = model.weights[path], dict(named_leaves(model.decoder))[path]
            ends = path == EMBEDDING or "lm_head" in path
            own_bits, own_group = (8, None) if ends else (bits, group)
            matrix = original.reshape(spec.stored)
            expected = dequantize(quantize(matrix, own_bits, own_group or matrix.shape[1]))
            np.testing.assert_array_equal(leaf.array(), expected.reshape(spec.shape))
            groups = -(-matrix.shape[1] // (own_group or matrix.shape[1]))
            codes = matrix.size if own_bits == 8 else len(matrix) * -(-matrix.shape[1] // 2)
            assert leaf.nbytes == codes + (4 if groups == 1 else 2) * len(matrix) * groups


@pytest.mark.parametrize("mode", ["real", "simulated"])
def test_schemes_by_name(mode: str, golden_model: Models) -> None:
    """Each matrix is that of the model in its scheme, and the first name that matches applies."""
    golden, model = load_golden("llama_gqa"), golden_model("llama_gqa")
    by_name = {r".*\.1\.mlp\.down_proj": "W3A8,asymmetric", "down_proj": "W8A8", "k_proj": "W2A8g32"}
    mixed = et.quantize(model, "W4A8g32", mode=mode, by_name=by_name)
    own = {scheme: quantized_leaves(et.quantize(model, scheme, mode=mode)) for scheme in by_name.values()}
    base, leaves = quantized_leaves(et.quantize(model, "W4A8g32", mode=mode)), quantized_leaves(mixed)
    used = set()
    for path, leaf in leaves.items():
        layer, last = path.split(".")[:2], path.split(".")[-1]
        scheme = {"down_proj": "W8A8", "k_proj": "W2A8g32"}.get(last, "W4A8g32")
        scheme = "W3A8,asymmetric" if last == "down_proj" and layer[1] == "1" else scheme
        used.add(scheme)
        expected = own.get(scheme, base)[path]
        assert leaf.bits == expected.bits
        np.testing.assert_array_equal(leaf.array(), expected.array(), err_msg=path)
    assert used == {"W4A8g32", *by_name.values()}
    assert np.isfinite(mixed.logits(golden.tokens)).all()
    assert str(mixed.quantization) == (
        f"W4A8g32 mixed with W3A8g64,asymmetric, W8A8,channel, W2A8g32 ({mode})"
    )


@pytest.mark.parametrize(
    ("by_name", "message"),
    [
        ({"down_proj": "W8A16"}, "other bits of activations or of the cache than W4A8g32"),
        ({"down_proj": "W8A8KV8"}, "other bits of activations or of the cache than W4A8g32"),
        ({"down_proj": "none"}, "'down_proj' is none: exclude it"),
        ({"down": "W8A8"}, "`quantization_by_name` 'down': no matrix has this name"),
        ({"(": "W8A8"}, "not a regular expression"),
        ({"down_proj": "W9A8"}, "expected none or W"),
    ],
)
def test_wrong_schemes_by_name(by_name: dict[str, str], message: str, golden_model: Models) -> None:
    with pytest.raises(et.InputError, match=message):
        et.quantize(golden_model("llama_gqa"), "W4A8g32", by_name=by_name)
    with pytest.raises(et.InputError, match="`quantization_by_name` needs `quantization`"):
        et.load("fast_lora", quantization_by_name=by_name)


def test_rows_of_an_embedding(golden_model: Models) -> None:
    model = et.quantize(golden_model("llama_gqa"), "W8A16")
    weight = model.decoder.embed_tokens.weight
    assert isinstance(weight, PackedWeight)
    ids = np.array([[3, 0], [96, 3]])
    np.testing.assert_allclose(weight.rows(ids), weight.array()[ids], rtol=1e-3)


def test_what_is_not_quantized(golden_model: Models) -> None:
    model = et.quantize(golden_model("mixtral_mqa"), "W4A16", exclude=["w2", r".*layers\.0\.self_attn.*"])
    kept = {
        model.module(path)
        for path, w in named_leaves(model.decoder)
        if not isinstance(w, Leaf) and w.ndim > 1
    }
    assert any(name.endswith("gate") for name in kept)
    assert any("layers.0.self_attn.q_proj" in name for name in kept)
    assert not any("layers.1.self_attn" in name for name in kept)
    with pytest.raises(et.InputError, match=r"'\(': not a regular expression"):
        et.quantize(model, "W4A16", exclude=["("])


def test_the_note(golden_model: Models, caplog: pytest.LogCaptureFixture) -> None:
    et.quantize(golden_model("llama_gqa"), "W4A16g32")
    first, second = (record.message for record in caplog.records)
    assert "are not a multiple of 32 elements: the last group of each row is shorter" in first
    assert "quantized to W4A16g32 (real)" in second
    assert "matrices: 21 at 4 bits, 2 at 8 bits" in second
    assert "norms and biases stay float32" in second


@pytest.mark.parametrize("mode", ["real", "simulated"])
def test_loading_quantizes_one_by_one(mode: str, golden_folder: Any, golden_model: Models) -> None:
    """From a folder and from random weights, with the values that `quantize` gives."""
    loaded = et.load(golden_folder("qwen2_tied"), quantization="W8A8", quantization_mode=mode)
    expected = et.quantize(golden_model("qwen2_tied"), "W8A8", mode=mode)
    tokens = load_golden("qwen2_tied").tokens
    np.testing.assert_array_equal(loaded.logits(tokens), expected.logits(tokens))
    assert str(loaded.quantization) == f"W8A8,channel ({mode})"
    random = et.load("fast_lora", quantization="W4A16", quantization_mode=mode)
    expected = et.quantize(et.load("fast_lora"), "W4A16", mode=mode)
    tokens = np.array([[1, 2, 3, 4]])
    np.testing.assert_array_equal(random.logits(tokens), expected.logits(tokens))


def test_the_key_of_a_config(tmp_path: Path) -> None:
    config = et.enable_quantization(et.read_run_config("fast_lora"), "W8A16")
    assert str(et.load(config).quantization) == "W8A16,channel (real)"
    assert et.load(config, quantization="none").quantization is None
    assert str(et.load(config, quantization="W4A16").quantization) == "W4A16g64 (real)"
    with pytest.raises(et.InputError, match="quantization 'W9A9'"):
        et.load(et.enable_quantization(et.read_run_config("fast_lora"), "W9A9"))


def test_adapters_train_on_quantized_weights(golden_model: Models) -> None:
    model = et.with_lora(et.quantize(golden_model("llama_gqa"), "W8A16"), et.LoRAConfig(r=2))
    settings = et.TrainingSettings(et.Schedule(0.5, 3, "constant"))
    trainer = et.Trainer(model, et.RandomTokens(97, 2, 8, fixed=True), settings)
    losses = [report.loss for report in trainer.run(3)]
    assert losses[2] < losses[0]


def test_refusals(golden_model: Models) -> None:
    model = golden_model("llama_gqa")
    real = et.quantize(model, "W8A16")
    settings = et.TrainingSettings(et.Schedule(0.5, 1, "constant"))
    with pytest.raises(et.InputError, match="have no gradient: train adapters"):
        et.Trainer(real, et.RandomTokens(97, 2, 8), settings)
    with pytest.raises(et.InputError, match="already quantized to W8A16"):
        et.quantize(real, "W4A16")
    with pytest.raises(et.InputError, match="has an adapter"):
        et.quantize(et.with_lora(model, et.LoRAConfig(r=2)), "W4A16")
    with pytest.raises(et.InputError, match=r"'o_prj': no matrix has this name.* are embed_tokens, q_proj"):
        et.quantize(model, "W8A16", exclude=["o_prj"])
    with pytest.raises(et.InputError, match="excludes all matrices"):
        et.quantize(model, "W8A16", exclude=[".*"])
    with pytest.raises(et.InputError, match="`dtype` bfloat16 excludes `quantization`"):
        et.load("fast_lora", dtype="bfloat16", quantization="W8A8", max_layers=1)
    with pytest.raises(et.InputError, match="expected real or simulated"):
        et.quantize(model, "W4A16", mode="fake")
    with pytest.raises(et.InputError, match="scheme such as W8A16"):
        et.quantize(model, "none")
    broken = map_named(lambda path, w: w * np.nan if "layers.1.mlp.up" in path else w, model.decoder)
    with pytest.raises(et.InputError, match=r"layers\.1\.mlp\.up_proj contains nan or inf"):
        et.quantize(replace(model, decoder=broken), "W8A16")
    with pytest.raises(et.InputError, match="`weight_budget` excludes `quantization`"):
        et.load("fast_lora", quantization="W8A16", weight_budget=1000)


def test_costs_and_gradient_checks(golden_model: Models, caplog: pytest.LogCaptureFixture) -> None:
    model = golden_model("llama_gqa", "float64")
    real = et.quantize(model, "W8A16")
    assert et.explain(real, tokens=8).flops == et.explain(model, tokens=8).flops
    assert "costs are those of the weights without quantization" in caplog.records[-1].message
    with pytest.raises(et.InputError, match=r"rounded activations \(W8A16,channel \(real\)\) have no"):
        et.gradcheck(real, seq_len=4)


def test_generation_with_a_simulation_repeats_its_steps(golden_model: Models) -> None:
    model = et.quantize(golden_model("llama_gqa"), "W4A16", mode="simulated")
    assert all(isinstance(leaf, SimulatedWeight) for leaf in quantized_leaves(model).values())
    real = et.quantize(golden_model("llama_gqa"), "W4A16")
    options: dict[str, Any] = {"max_new_tokens": 20, "temperature": 0.0, "ignore_eos": True}
    assert et.generate(model, [3, 4], **options).tokens == et.generate(real, [3, 4], **options).tokens


@pytest.mark.parametrize("name", ["llama_gqa", "llama_mha_tied", "gpt2_plain"])
def test_adapters_are_merged_into_dequantized_weights(
    name: str, golden_model: Models, tmp_path: Path
) -> None:
    """The merged model computes with the values of the codes plus the adapters, and without rounding."""
    golden = load_golden(name)
    base = et.quantize(golden_model(name), "W4A16")
    for leaf in quantized_leaves(base).values():
        leaf.activation_bits = 32
    quantized = et.with_lora(base, et.LoRAConfig(r=2, target_modules="all-linear"))
    rng = np.random.default_rng(0)
    for adapter in quantized.adapters.values():
        adapter.b[...] = 0.1 * rng.standard_normal(adapter.b.shape)
    with pytest.raises(et.InputError, match=r"load the model without quantization, or merge.*`dequantize`"):
        et.merge(quantized)
    found = et.merge(quantized, dequantize=True, output=tmp_path)
    assert found.model.quantization is None
    assert not any(isinstance(leaf, Leaf) for _, leaf in named_leaves(found.model.decoder))
    assert found.worst.relative < 1e-5
    expected = quantized.logits(golden.tokens)
    np.testing.assert_allclose(found.model.logits(golden.tokens), expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(et.load(tmp_path).logits(golden.tokens), expected, rtol=0, atol=1e-4)


def test_training_adapters_does_not_dequantize_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting parameters reads no weights."""
    model = et.load("fast_lora", max_layers=1, quantization="W4A16g64")

    def refuse(self: et.Model) -> Any:
        raise AssertionError("all weights are dequantized")

    monkeypatch.setattr(et.Model, "named_parameters", refuse)
    found = et.train(model, lora=et.LoRAConfig(r=2), steps=2, batch_size=1, seq_len=16)
    assert found.to_dict()["parameters"] == et.plan(model, 1, 16).parameters
