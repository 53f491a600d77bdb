"""Every golden model with every kind of leaf: forward, backward, merge, save, gradcheck.

A family joins by its goldens (`MODELS`), a kind of leaf by a line of `LEAVES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from inspect import isabstract
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize

import einsum_transformer as et
from einsum_transformer.analysis import gradcheck as checks
from einsum_transformer.engine import Leaf, is_trained
from einsum_transformer.formats.encodings import Blocks
from einsum_transformer.formats.safetensors import float32_to_bf16
from einsum_transformer.leaves.calibrated import Calibrated
from einsum_transformer.leaves.encoded import EncodedWeight
from einsum_transformer.leaves.frozen import Frozen
from einsum_transformer.leaves.lora import LoRA
from einsum_transformer.leaves.watched import watched
from einsum_transformer.models.adapters import merged, with_lora
from einsum_transformer.models.lora_config import LoRAConfig
from einsum_transformer.models.model import EMBEDDING, HEAD
from einsum_transformer.models.peft_names import named_pairs
from einsum_transformer.models.quantization import Bfloat16
from einsum_transformer.tree import map_named, named_leaves
from golden_files import MODELS, Folders, Models, load_golden, write_folder

Array = np.ndarray

BUDGET = 20_000
"""Bytes: less than the matrices of any golden model."""
KINKED = ("mpt_clip",)
"""Its clipped projections have kinks, which the differences of gradcheck cross."""


def filled(model: et.Model, targets: str | tuple[str, ...]) -> et.Model:
    """The model with adapters on `targets`, A and B random."""
    model = with_lora(model, LoRAConfig(2, 3.0, targets), seed=1)
    rng = np.random.default_rng(2)
    for _, leaf in named_leaves(model.decoder):
        if isinstance(leaf, LoRA):
            leaf.b[...] = 0.1 * rng.standard_normal(leaf.b.shape)
    return model


def ends(model: et.Model) -> tuple[str, ...]:
    """The names of the embedding and the output head."""
    return tuple(model.module(path).split(".")[-1] for path in (EMBEDDING, HEAD))


def frozen(folder: Path, dtype: str) -> et.Model:
    model = et.load(folder, dtype=dtype)
    return replace(model, decoder=map_named(lambda _, weight: Frozen(weight), model.decoder))


def calibrating(folder: Path, dtype: str) -> et.Model:
    model = et.load(folder, dtype=dtype)
    specs = model.weights

    def leaf(path: str, weight: Any) -> Any:
        return Calibrated(weight, specs[path].out_axes) if weight.ndim > 1 else weight

    return replace(model, decoder=map_named(leaf, model.decoder))


def in_bfloat16(folder: Path, dtype: str) -> et.Model:
    model = et.load(folder, dtype=dtype)
    specs = model.weights
    storage = Bfloat16(list(specs.values()))
    return replace(model, decoder=map_named(lambda path, w: storage.leaf(specs[path], w), model.decoder))


def encoded(folder: Path, dtype: str) -> et.Model:
    """Matrices whose rows are whole blocks, as Q8_0 of a GGUF file."""
    model = et.load(folder, dtype=dtype)
    specs = model.weights

    def leaf(path: str, weight: Any) -> Any:
        spec = specs[path]
        if len(spec.stored) < 2 or spec.stored[1] % 32:
            return weight
        values = np.asarray(weight, np.float32).reshape(spec.stored)
        stored = quantize(values, GGMLQuantizationType.Q8_0)
        return EncodedWeight({"stored": stored}, Blocks("Q8_0", 32, 34), spec.shape, dtype, spec.out_axes)

    return replace(model, decoder=map_named(leaf, model.decoder))


def all_watched(folder: Path, dtype: str) -> et.Model:
    model = et.load(folder, dtype=dtype)
    return replace(model, decoder=watched(model.decoder))


def on_ends(folder: Path, dtype: str, **options: Any) -> et.Model:
    model = et.load(folder, dtype=dtype, **options)
    return filled(model, ends(model))


def quantized(folder: Path, dtype: str, mode: str) -> et.Model:
    """Weights of 8 bits; activations are not rounded, so that a plain array computes the same."""
    model = et.load(folder, dtype=dtype, quantization="W8A16", quantization_mode=mode)
    for leaf in leaves_of(model):
        if isinstance(leaf, Leaf):
            vars(leaf)["activation_bits"] = 32
    return model


LEAVES: dict[str, Callable[[Path, str], et.Model]] = {
    "resident": lambda folder, dtype: et.load(folder, dtype=dtype),
    "frozen": frozen,
    "watched": all_watched,
    "lazy": lambda folder, dtype: et.load(folder, dtype=dtype, weight_budget=BUDGET),
    "quantized": lambda folder, dtype: quantized(folder, dtype, "real"),
    "quantized, simulated": lambda folder, dtype: quantized(folder, dtype, "simulated"),
    "calibrated": calibrating,
    "bfloat16": in_bfloat16,
    "encoded": encoded,
    "LoRA on quantized": lambda folder, dtype: filled(quantized(folder, dtype, "real"), "all-linear"),
    "LoRA": lambda folder, dtype: filled(et.load(folder, dtype=dtype), "all-linear"),
    "LoRA on embedding and head": on_ends,
    "LoRA on lazy": lambda folder, dtype: filled(
        et.load(folder, dtype=dtype, weight_budget=BUDGET), "all-linear"
    ),
    "LoRA on lazy embedding and head": lambda folder, dtype: on_ends(folder, dtype, weight_budget=BUDGET),
}
"""A model of a folder whose weights are of this kind."""


def dense(model: et.Model) -> et.Model:
    """A model of plain arrays that computes the same function."""
    decoder = map_named(lambda _, w: np.array(w.array()) if isinstance(w, Leaf) else w, model.decoder)
    tied = model.config.tie_word_embeddings and decoder.lm_head is None
    return replace(model, decoder=decoder, config=replace(model.config, tie_word_embeddings=tied), lora=None)


def chained(model: et.Model, gradients: dict[str, Array]) -> dict[str, Array]:
    """What the gradients of a merged model say of adapters: dA = scaling B^T dW, dB = scaling dW A^T."""
    pairs = {}
    for path, leaf in model.adapters.items():
        dw = gradients[model.family.checkpoint_name(path)]
        dw = dw.T if model.family.is_transposed(path) else dw
        a, b = leaf.a.reshape(leaf.rank, -1), leaf.b.reshape(-1, leaf.rank)
        pairs[path] = leaf.scaling * (b.T @ dw), leaf.scaling * (dw @ a.T)
    return named_pairs(model.family, model.adapters, pairs)


def expected_gradients(model: et.Model, gradients: dict[str, Array]) -> dict[str, Array]:
    """Those of weights that are trained as a whole, and what they say of adapters."""
    if model.lora is not None:
        return chained(model, gradients)
    trained = {path for path, leaf in named_leaves(model.decoder) if is_trained(leaf)}
    return {name: gradients[name] for name in map(model.family.checkpoint_name, trained)}


def test_every_kind_of_leaf_is_here(golden_folder: Folders) -> None:
    """A new subclass of Leaf fails this test until a line of LEAVES has it."""
    folder = golden_folder("llama_mha_tied")  # rows of 32 elements, a block of Q8_0
    kinds = {type(leaf) for make in LEAVES.values() for leaf in leaves_of(make(folder, "float32"))}
    missing = {
        kind
        for kind in subclasses(Leaf)
        if kind.__module__.startswith("einsum_transformer.leaves.") and not isabstract(kind)
    } - kinds
    assert not missing


def subclasses(kind: type) -> set[type]:
    return {kind, *(each for sub in kind.__subclasses__() for each in subclasses(sub))} - {Leaf}


def leaves_of(model: et.Model) -> list[Any]:
    return [leaf for _, leaf in named_leaves(model.decoder)]


@pytest.mark.parametrize("kind", LEAVES)
@pytest.mark.parametrize("name", MODELS)
def test_forward_and_backward_are_those_of_plain_arrays(name: str, kind: str, golden_folder: Folders) -> None:
    """In float64, where a formula that is right differs by rounding alone."""
    golden, model = load_golden(name), LEAVES[kind](golden_folder(name), "float64")
    plain = dense(model)
    np.testing.assert_allclose(model.logits(golden.tokens), plain.logits(golden.tokens), rtol=0, atol=1e-11)
    loss, gradients = model.loss_and_gradients(golden.tokens, golden.targets)
    plain_loss, plain_gradients = plain.loss_and_gradients(golden.tokens, golden.targets)
    assert loss == pytest.approx(plain_loss, abs=1e-12)
    expected = expected_gradients(model, plain_gradients)
    assert gradients.keys() == expected.keys()
    for each, gradient in gradients.items():
        scale = np.abs(expected[each]).max()
        np.testing.assert_allclose(gradient, expected[each], rtol=0, atol=1e-11 * max(scale, 1), err_msg=each)


@pytest.mark.parametrize("name", MODELS)
def test_float64_is_the_reference_too(name: str, golden_model: Models) -> None:
    """The golden logits and gradients, from weights that are computed with in float64."""
    golden, model = load_golden(name), golden_model(name, "float64")
    logits = model.logits(golden.tokens)
    assert logits.dtype == np.float64
    np.testing.assert_allclose(logits, golden.logits, rtol=0, atol=1e-4)
    loss, gradients = model.loss_and_gradients(golden.tokens, golden.targets)
    assert loss == pytest.approx(golden.loss, abs=1e-5)
    assert {gradient.dtype for gradient in gradients.values()} == {np.dtype(np.float64)}


@pytest.mark.parametrize("kind", LEAVES)
@pytest.mark.parametrize("name", MODELS)
def test_float32_stays_float32(name: str, kind: str, golden_folder: Folders) -> None:
    """No leaf widens what is computed, and none is far from float64."""
    golden, model = load_golden(name), LEAVES[kind](golden_folder(name), "float32")
    logits = model.logits(golden.tokens)
    assert logits.dtype == np.float32
    exact = LEAVES[kind](golden_folder(name), "float64").logits(golden.tokens)
    np.testing.assert_allclose(logits, exact, rtol=0, atol=1e-4)
    _, gradients = model.loss_and_gradients(golden.tokens, golden.targets)
    assert {gradient.dtype for gradient in gradients.values()} <= {np.dtype(np.float32)}


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_saved_and_loaded(name: str, golden_model: Models, tmp_path: Path) -> None:
    """Resident and lazy: the model of the rounded weights, with an adapter on them as well."""
    golden = load_golden(name)
    golden_model(name).save(tmp_path / "bf16", dtype="bfloat16")
    rounded = {each: float32_to_bf16(w).astype(np.float32) for each, w in golden.weights.items()}
    reference = et.load(write_folder(tmp_path / "f32", golden.config, rounded))
    expected, parameters = reference.logits(golden.tokens), reference.named_parameters()
    for budget in (None, BUDGET):
        model = et.load(tmp_path / "bf16", weight_budget=budget)
        for each, array in model.named_parameters().items():
            np.testing.assert_array_equal(array, parameters[each])
        # Not bit for bit: the folder in float32 is mapped, so its weights do not lie side by side.
        np.testing.assert_allclose(model.logits(golden.tokens), expected, rtol=1e-5, atol=2e-6)
        adapted = filled(model, "all-linear")
        whole = merged(adapted)[0].logits(golden.tokens)
        np.testing.assert_allclose(adapted.logits(golden.tokens), whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", [kind for kind in LEAVES if "LoRA" in kind and "quantized" not in kind])
@pytest.mark.parametrize("name", MODELS)
def test_merged_saved_and_loaded(name: str, kind: str, golden_folder: Folders, tmp_path: Path) -> None:
    golden, model = load_golden(name), LEAVES[kind](golden_folder(name), "float32")
    merged(model)[0].save(tmp_path / "merged")
    again = et.load(tmp_path / "merged").logits(golden.tokens)
    np.testing.assert_allclose(again, model.logits(golden.tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["LoRA", "LoRA on embedding and head"])
@pytest.mark.parametrize("name", [name for name in MODELS if name not in KINKED])
def test_gradcheck_passes(
    name: str, kind: str, golden_folder: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command's own check: all adapters at once, and those of the first layer one by one."""
    golden, model = load_golden(name), LEAVES[kind](golden_folder(name), "float64")
    monkeypatch.setattr(checks, "_directions", lambda g, rng: [("direction", rng.standard_normal(g.shape))])
    tokens, targets = golden.tokens[:, :7], golden.targets[:, :7]
    found = checks.gradcheck(model, tokens, targets, parameters=r"layers\.0\.|embed|head")
    assert found.passed, [row for row in (found.whole, *found.rows) if row.error > found.tolerance]
