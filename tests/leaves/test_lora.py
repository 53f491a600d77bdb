"""Adapters and frozen weights: the products of W + scaling B A, gradients of A and B alone, and nothing
else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import einsum_transformer as et
from einsum_transformer.engine import EquationError, weight_grad
from einsum_transformer.errors import InputError
from einsum_transformer.leaves.frozen import Frozen
from einsum_transformer.leaves.lora import Dropout, LoRA
from einsum_transformer.models.adapters import with_lora
from einsum_transformer.models.lora_config import LoRAConfig
from einsum_transformer.models.parameters import gradients_by_name, trainable, with_dropout
from einsum_transformer.tree import map_named, named_leaves
from tiny_models import write_tiny

Array = np.ndarray
IDS = np.random.default_rng(0).integers(0, 61, (2, 9))
TARGETS = np.where(np.random.default_rng(1).random((2, 9)) < 0.3, -100, np.roll(IDS, -1, 1))
MODULES = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "embed_tokens",
    "lm_head",
]


@pytest.fixture
def tiny(tmp_path: Any) -> et.Model:
    folder, _ = write_tiny(tmp_path / "in", attention_bias=True)
    return et.load(folder, dtype="float64")


def filled(model: et.Model, seed: int = 0) -> et.Model:
    """The same model with adapters whose B is not zero."""
    rng = np.random.default_rng(seed)
    for name, array in trainable(model.decoder).items():
        if name.endswith("lora_B"):
            array[...] = rng.standard_normal(array.shape) * 0.1
    return model


def dense(model: et.Model) -> et.Model:
    """The same function without leaves."""
    arrays = map_named(lambda _, w: w.array() if isinstance(w, (LoRA, Frozen)) else w, model.decoder)
    return replace(model, decoder=arrays)


@pytest.mark.parametrize("target", [*MODULES, "all-linear", r".*layers\.1\..*(q|down)_proj"])
def test_gradients_are_those_of_differences(tiny: et.Model, target: str) -> None:
    """Every entry of A and B, through the whole model, in float64; and the loss of the merged weights."""
    named = (target,) if target in MODULES else target
    model = filled(with_lora(tiny, LoRAConfig(r=2, target_modules=named)))
    loss, gradient = model.decoder.loss_and_gradient(IDS, TARGETS)
    assert loss == pytest.approx(dense(model).loss_and_gradients(IDS, TARGETS)[0], rel=1e-12)
    weights, gradients = trainable(model.decoder), gradients_by_name(model.decoder, gradient)
    assert list(weights) == list(gradients)
    rng = np.random.default_rng(5)
    for name, w in weights.items():
        v = rng.standard_normal(w.shape)
        w += 1e-6 * v
        up = model.decoder.loss_and_gradient(IDS, TARGETS)[0]
        w -= 2e-6 * v
        down = model.decoder.loss_and_gradient(IDS, TARGETS)[0]
        w += 1e-6 * v
        assert float(np.sum(gradients[name] * v)) == pytest.approx((up - down) / 2e-6, rel=2e-6, abs=1e-9), (
            name
        )


def test_step_0_is_the_base_bit_for_bit(tiny: et.Model) -> None:
    model = with_lora(tiny, LoRAConfig(target_modules="all-linear"))
    np.testing.assert_array_equal(model.logits(IDS), tiny.logits(IDS))


def test_frozen_weights_have_no_gradient(tiny: et.Model) -> None:
    """Neither matrices nor norms nor biases nor the embedding: the gradient holds the two adapters and no
    more."""
    model = filled(with_lora(tiny, LoRAConfig(r=2, target_modules=("layers.0.self_attn.q_proj",))))
    gradient = model.decoder.loss_and_gradient(IDS, TARGETS)[1]
    assert [path for path, _ in named_leaves(gradient)] == ["layers.0.self_attn.q_proj"]


def test_other_gradients_are_not_changed_by_freezing(tiny: et.Model) -> None:
    """What is left trainable has the gradient it has in full training."""
    _, full = tiny.decoder.loss_and_gradient(IDS, TARGETS)
    kept = "layers.1.mlp.down_proj"
    partly = map_named(lambda path, w: w if path == kept else Frozen(w), tiny.decoder)
    _, some = partly.loss_and_gradient(IDS, TARGETS)
    found = gradients_by_name(partly, some)
    assert list(found) == [kept]
    np.testing.assert_array_equal(found[kept], gradients_by_name(tiny.decoder, full)[kept])


@pytest.mark.parametrize("recompute", [False, True])
def test_dropout_is_drawn_again_for_the_same_key(tiny: et.Model, recompute: bool) -> None:
    """With a key the gradient is that of the masked function, also if blocks run again; another key, other
    zeroes; no key, none."""
    model = filled(with_lora(tiny, LoRAConfig(r=2, lora_dropout=0.5, target_modules="all-linear")))
    plain = model.decoder.loss_and_gradient(IDS, TARGETS)[0]
    decoder = with_dropout(model.decoder, (7, 0), 0)
    loss, gradient = decoder.loss_and_gradient(IDS, TARGETS, recompute=recompute)
    assert loss != plain
    name = "layers.0.mlp.up_proj.lora_A"
    w, g = trainable(decoder)[name], gradients_by_name(decoder, gradient)[name]
    v, before = np.random.default_rng(3).standard_normal(w.shape), w.copy()
    w[...] = before + 1e-6 * v
    up = decoder.loss_and_gradient(IDS, TARGETS)[0]
    w[...] = before - 1e-6 * v
    down = decoder.loss_and_gradient(IDS, TARGETS)[0]
    w[...] = before
    assert float(np.sum(g * v)) == pytest.approx((up - down) / 2e-6, rel=1e-5)
    other = with_dropout(model.decoder, (7, 1), 0)
    assert other.loss_and_gradient(IDS, TARGETS)[0] not in (loss, plain)
    assert model.decoder.loss_and_gradient(IDS, TARGETS)[0] == plain


def test_dropout_keeps_the_mean_and_the_layout_changes_nothing() -> None:
    dropout = Dropout(0.25, (1, 2))
    x = np.ones((2, 300, 100), np.float32)
    y = dropout.applied(x, "a")
    assert y.mean() == pytest.approx(1, abs=0.01)
    assert (y == 0).mean() == pytest.approx(0.25, abs=0.01)
    np.testing.assert_array_equal(y, dropout.applied(np.asfortranarray(x), "a"))
    assert (y != dropout.applied(x, "b")).any()


def test_ranks_and_alphas_by_pattern() -> None:
    config = LoRAConfig(
        r=8, lora_alpha=16, rank_pattern={r"layers\.1\..*q_proj": 4}, alpha_pattern={"v_proj": 8.0}
    )
    assert config.rank_and_scaling("model.layers.0.self_attn.q_proj") == (8, 2.0)
    assert config.rank_and_scaling("model.layers.1.self_attn.q_proj") == (4, 4.0)
    assert config.rank_and_scaling("model.layers.1.self_attn.v_proj") == (8, 1.0)
    assert replace(config, use_rslora=True).rank_and_scaling("x.k_proj") == (8, 16 / 8**0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ("w1",)}, "'w1' match no matrix .* it has down_proj, embed_tokens"),
        ({"r": 0}, "r is 0"),
        ({"lora_alpha": 0.0}, "lora_alpha is 0.0"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ({"target_modules": "("}, "is not a valid RE2 regular expression"),
    ],
)
def test_what_makes_no_sense_is_said(tiny: et.Model, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        with_lora(tiny, LoRAConfig(**settings))


def test_an_adapter_on_an_adapter_is_refused(tiny: et.Model) -> None:
    model = with_lora(tiny, LoRAConfig())
    with pytest.raises(InputError, match="merge it first"):
        with_lora(model, LoRAConfig())


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("kind", ["array", "frozen", "LoRA"])
def test_order_means_the_same_for_every_operand(kind: str, order: Any) -> None:
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((6, 5)), rng.standard_normal((2, 3, 5))
    weight: Any = w
    if kind == "frozen":
        weight = Frozen(w)
    if kind == "LoRA":
        weight = LoRA("w", w, rng.standard_normal((2, 5)), rng.standard_normal((6, 2)), 0.5, 1)
    y = et.einsum("btd,fd->btf", x, weight, order=order)
    assert y.flags.c_contiguous if order == "C" else y.flags.f_contiguous
    np.testing.assert_allclose(y, np.einsum("btd,fd->btf", x, np.asarray(weight)), rtol=1e-12)


def test_operands_of_a_gradient_that_is_not_wanted_are_not_looked_at() -> None:
    for weight in (None, Frozen(np.ones((3, 2)))):
        assert weight_grad(weight, "btf,btd->fd", None, None) is None


def test_the_letter_of_the_rank_is_taken() -> None:
    weight = LoRA("w", np.ones((3, 2)), np.ones((1, 2)), np.ones((3, 1)), 1.0, 1)
    with pytest.raises(EquationError, match="letter r"):
        et.einsum("rd,fd->rf", np.ones((4, 2)), weight)


def test_nothing_is_written_into_a_leaf_or_through_it() -> None:
    held = np.ones((3, 2))
    weight: Any = Frozen(held)
    with pytest.raises(TypeError):
        weight += 1
    with pytest.raises(TypeError):
        np.add(held, 1, out=weight)
    np.array(weight)[...] = 5
    assert (held == 1).all()
    np.testing.assert_array_equal(np.asarray(weight[1:]), held[1:])
