"""Precision: errors against float64 by step, and the first step at which two ways to compute differ."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import einsum_transformer as et
from einsum_transformer.analysis import precision as analysis
from einsum_transformer.components.rmsnorm import RMSNorm
from einsum_transformer.engine import Leaf
from einsum_transformer.tree import map_named
from golden_files import MODELS, Models
from tiny_models import tiny_model

Array = np.ndarray


@pytest.mark.parametrize("name", MODELS)
def test_errors_of_every_family(name: str, golden_model: Models) -> None:
    """The errors of the logits are those of the models that `load` makes, and float32 is precise."""
    model = golden_model(name)
    found = et.precision(model, schemes=["W8A16", "W2A16g32"], ctx_size=16)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, 16))
    expected = golden_model(name, "float64").logits(tokens)

    def error(other: et.Model) -> float:
        return float(np.linalg.norm(other.logits(tokens) - expected) / np.linalg.norm(expected))

    assert found.variants == ("float32", "bfloat16", "W8A16,channel", "W2A16g32")
    for variant, other in (("W8A16,channel", "W8A16"), ("W2A16g32", "W2A16g32")):
        assert found.logits[variant] == pytest.approx(error(et.quantize(model, other)), rel=1e-3)
    assert 0 < found.logits["float32"] < 1e-5
    # The weights of some golden models are exact in bfloat16.
    assert found.logits["float32"] / 2 < found.logits["bfloat16"] < found.logits["W2A16g32"]
    names = [step.name for step in found.steps]
    assert len(set(names)) == len(names)
    assert (names[0], names[-1]) == ("embed_tokens", "logits")
    assert {step.layer for step in found.steps} == {None, *range(model.config.num_hidden_layers)}
    assert all(error < 1e-4 for step in found.steps for error in [step.errors["float32"]])


def test_an_error_begins_at_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix of layer 1 that is wrong in bfloat16 only: the steps before it are exact."""
    model = tiny_model()
    path = "layers.1.self_attn.o_proj"

    def changed(model: et.Model) -> et.Model:
        def change(at: str, weight: Any) -> Any:
            return weight * np.float32(1.01) if at == path else weight

        return replace(model, decoder=map_named(change, model.decoder))

    monkeypatch.setattr(analysis, "_bfloat16", changed)
    found = et.precision(model, schemes=[], ctx_size=16)
    names = [step.name for step in found.steps]
    first = names.index(path)
    for step in found.steps[:first]:
        assert step.errors["bfloat16"] == step.errors["float32"] < 1e-6
    assert found.steps[first].errors["bfloat16"] == pytest.approx(0.01, rel=1e-4)
    assert all(step.errors["bfloat16"] > 1e-4 for step in found.steps[first:])
    assert path.removeprefix("layers.1.") in str(replace_errors(found))


def replace_errors(found: et.Precision) -> et.Precision:
    """The result with the errors of bfloat16 as those of float32, which the table shows."""
    steps = tuple(
        replace(step, errors=dict.fromkeys(found.variants, step.errors["bfloat16"])) for step in found.steps
    )
    return replace(found, steps=steps)


def test_drift_begins_at_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm before the feed-forward of layer 1 is changed for passes of fewer than 16 tokens."""
    model = tiny_model()
    marked = id(model.decoder.layers[1].post_attention_layernorm.weight)
    forward = RMSNorm.forward

    def depends_on_the_length(self: RMSNorm, x: Array) -> Any:
        y, saved = forward(self, x)
        return (y * np.float32(1.25) if id(self.weight) == marked and x.shape[1] < 16 else y), saved

    before = {each.run: each for each in et.precision(model, schemes=[], ctx_size=32).drift}
    monkeypatch.setattr(RMSNorm, "forward", depends_on_the_length)
    drift = {each.run: each for each in et.precision(model, schemes=[], ctx_size=32).drift}
    assert list(drift) == [
        *("in a batch of 4", "through the KV cache", "in chunks of 16"),
        *("one token at a time", "one token at a time, replayed"),
    ]
    for run in ("in a batch of 4", "through the KV cache", "in chunks of 16"):
        assert drift[run] == before[run]
    decode = drift["one token at a time"]
    assert decode.logits_error > 1e-3 > before["one token at a time"].logits_error
    assert decode.first is not None
    if before["one token at a time"].first is None:
        assert decode.first == "layers.1.post_attention_layernorm"
        assert decode.first_difference == pytest.approx(0.25, abs=0.1)
    assert drift["one token at a time, replayed"].logits_error < 1e-5


def test_compared() -> None:
    a = {"x": np.array([[[1.0, 2.0]]]), "y": np.array([[[4.0, -8.0]]]), "logits": np.array([[[3.0, 4.0]]])}
    same = analysis._compared("a", "b", a, {name: each.copy() for name, each in a.items()})
    assert (same.first, same.first_difference, same.logits_error, same.steps) == (None, 0, 0, 3)
    b = a | {"y": np.array([[[4.0, -10.0]]]), "logits": np.array([[[3.0, 3.0]]])}
    found = analysis._compared("b", "a", b, a)
    assert (found.first, found.first_difference) == ("y", 0.25)
    assert (found.logits_difference, found.logits_error) == (1.0, 0.2)
    assert analysis._compared("b", "a", {"logits": b["logits"]}, a).first == "logits"


def test_weights_in_other_types() -> None:
    """A float64 model and one with leaves: the variants are made from the values of the weights."""
    found = et.precision(tiny_model("float64"), schemes=["W8A16"], ctx_size=16)
    single = et.precision(tiny_model(), schemes=["W8A16"], ctx_size=16)
    assert found.logits["W8A16,channel"] == pytest.approx(single.logits["W8A16,channel"], rel=1e-3)
    stored = analysis._bfloat16(tiny_model())
    assert isinstance(stored.decoder.layers[0].self_attn.q_proj, Leaf)
    exact = et.precision(stored, schemes=[], ctx_size=16)
    assert exact.logits["bfloat16"] < 1e-5 < found.logits["bfloat16"]


def test_what_is_rejected(golden_model: Models) -> None:
    model = golden_model("llama_gqa")
    for arguments, words in (
        ({"ctx_size": 1}, "`ctx_size` is 1: expected 2 to the positions"),
        ({"ctx_size": 10**6}, "`ctx_size` is 1000000"),
        ({"seed": -1}, "`seed` is -1"),
        ({"schemes": ["none"]}, "`schemes` contains 'none'"),
        ({"text": "abc"}, "no tokenizer"),
    ):
        with pytest.raises(et.InputError, match=words):
            et.precision(model, **arguments)
    with pytest.raises(et.InputError, match="already quantized"):
        et.precision(et.quantize(model, "W8A8"))
