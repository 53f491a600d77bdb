"""SGD and AdamW compared with torch.optim at every step, for all memory layouts, pieces and threads."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from einsum_transformer.errors import InputError
from einsum_transformer.models.parameters import trainable
from einsum_transformer.training import optimizers
from einsum_transformer.training.optimizers import SGD, AdamW, global_norm, start
from einsum_transformer.training.schedule import Schedule
from golden_files import MODELS, Models

GOLDEN = Path(__file__).parent.parent / "golden/optimizers.npz"
SETTINGS = {
    "sgd": SGD(),
    "sgd_decay": SGD(weight_decay=0.1),
    "sgd_momentum": SGD(momentum=0.9, weight_decay=0.01),
    "sgd_nesterov": SGD(momentum=0.8, nesterov=True),
    "adamw": AdamW(weight_decay=0.0),
    "adamw_decay": AdamW(beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.1),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("layouts", ["CC", "FF", "CF", "FC"])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_steps_are_those_of_torch(
    name: str, layouts: Any, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizers, "_PIECE", 4)
    monkeypatch.setattr(optimizers, "_TASK", 7)
    golden, optimizer = np.load(GOLDEN), SETTINGS[name]
    weights = {"w": np.array(golden["start"], order=layouts[0])}
    state = start(optimizer, weights)
    w = weights["w"]
    for step, (gradient, rate) in enumerate(zip(golden["gradients"], golden["rates"])):
        g = np.array(gradient / scale, order=layouts[1])
        before = g.copy()
        optimizer.update(weights, {"w": g}, state, float(rate), step, scale)
        np.testing.assert_allclose(weights["w"], golden[name][step], rtol=1e-13, atol=1e-15)
        np.testing.assert_array_equal(g, before)
    assert weights["w"] is w


@pytest.mark.parametrize("plain", [SGD(weight_decay=0.1), AdamW(weight_decay=0.1)])
def test_decay_of_matrices_only(plain: SGD | AdamW) -> None:
    """Equal to two parameter groups of torch.optim, with weight_decay 0 for norms and biases."""
    rng = np.random.default_rng(2)
    names = ["layers.0.self_attn.q_proj", "layers.0.input_layernorm.weight", "layers.0.self_attn.q_bias"]
    weights = {name: rng.standard_normal((4, 3)) for name in names}
    gradients = {name: rng.standard_normal((4, 3)) for name in names}

    def stepped(optimizer: SGD | AdamW) -> dict[str, np.ndarray]:
        changed = {name: w.copy() for name, w in weights.items()}
        optimizer.update(changed, gradients, start(optimizer, changed), 0.1, 0)
        return changed

    found = stepped(dataclasses.replace(plain, decay_matrices_only=True))
    decayed, none = stepped(plain), stepped(dataclasses.replace(plain, weight_decay=0.0))
    for name, expected in zip(names, (decayed, none, none)):
        np.testing.assert_array_equal(found[name], expected[name])
        assert (decayed[name] != none[name]).all()


@pytest.mark.parametrize("name", MODELS)
def test_what_is_a_matrix_in_every_family(name: str, golden_model: Models) -> None:
    """What transformers' Trainer excludes from weight decay are the vectors of these checkpoints."""
    model = golden_model(name)
    for path, w in trainable(model.decoder).items():
        stored = model.weights[path].stored if path in model.weights else w.shape
        assert optimizers.is_matrix(path) == (len(stored) > 1), path


def test_many_weights_of_all_shapes_on_threads() -> None:
    """The update of a weight does not depend on the other weights or on the division over threads."""
    rng = np.random.default_rng(0)
    shapes = [(), (3,), (1, 7), (300, 5000), (4, 1, 6), (700, 900)]
    weights = {f"w{i}": rng.standard_normal(shape).astype(np.float32) for i, shape in enumerate(shapes)}
    weights["w5"] = np.asfortranarray(weights["w5"])
    gradients = {name: rng.standard_normal(w.shape).astype(np.float32) for name, w in weights.items()}
    for optimizer in SETTINGS.values():
        together = {name: w.copy(order="K") for name, w in weights.items()}
        state = start(optimizer, together)
        for step in range(2):
            optimizer.update(together, gradients, state, 0.1, step)
        for name, w in weights.items():
            alone, own = {name: w.copy()}, start(optimizer, {name: w})
            for step in range(2):
                optimizer.update(alone, gradients, own, 0.1, step)
            np.testing.assert_array_equal(alone[name], together[name])
            assert together[name].strides == w.strides


@pytest.mark.parametrize("optimizer", [SGD(momentum=0.9), AdamW(weight_decay=0.1)])
@pytest.mark.parametrize("piece", [1 << 15, 64])
def test_weights_that_lie_side_by_side(
    optimizer: SGD | AdamW, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Views with gaps, the rows of one input-major matrix, change as arrays of their own do."""
    monkeypatch.setattr(optimizers, "_PIECE", piece)
    monkeypatch.setattr(optimizers, "_TASK", 4 * piece)
    rng = np.random.default_rng(0)
    whole = rng.standard_normal((20, 33)).T
    views = {"q": whole[:16].reshape(2, 8, 20), "k": whole[16:32], "one": whole[32:]}
    assert not any(view.flags.forc for view in views.values() if len(view) > 1)
    own = {name: view.copy(order="C") for name, view in views.items()}
    moments = [start(optimizer, weights) for weights in (views, own)]
    for step in range(3):
        gradients = {name: rng.standard_normal(w.shape) for name, w in own.items()}
        # The layout of weight_grad: that of the weight, without gaps.
        dense = {name: np.copy(g.T, order="C").T if g.ndim == 2 else g for name, g in gradients.items()}
        optimizer.update(views, dense, moments[0], 0.1, step)
        optimizer.update(own, gradients, moments[1], 0.1, step)
    for name, view in views.items():
        np.testing.assert_allclose(view, own[name], rtol=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e-25, 1e-15, 1.0, 1e15, 1e25])
def test_the_norm_of_small_and_large_gradients(scale: float) -> None:
    """Squares of float32 values underflow below 1e-19 and overflow above 1e19; the norm must not."""
    rng = np.random.default_rng(6)
    gradient = (rng.standard_normal((37, 1023)) * scale).astype(np.float32)
    expected = np.sqrt(np.sum(gradient.astype(np.float64) ** 2))
    assert global_norm({"a": gradient}) == pytest.approx(expected, rel=1e-6)
    assert global_norm({"a": gradient, "b": np.asfortranarray(gradient)}) == pytest.approx(
        2**0.5 * expected, rel=1e-6
    )


def test_global_norm() -> None:
    rng = np.random.default_rng(0)
    gradients = {"a": rng.standard_normal((1200, 1000)), "b": rng.standard_normal(7).astype(np.float32)}
    expected = np.sqrt(sum(float(np.sum(np.asarray(g, np.float64) ** 2)) for g in gradients.values()))
    assert global_norm(gradients) == pytest.approx(expected, rel=1e-12)
    assert global_norm({}) == 0
    assert global_norm({"a": np.full(3, 1e30, np.float32)}) == pytest.approx(3**0.5 * 1e30, rel=1e-6)
    for bad in (np.nan, np.inf, -np.inf):
        gradients["b"][3] = bad
        assert not np.isfinite(global_norm(gradients))


@pytest.mark.parametrize(
    "bad", [{"momentum": 1.0}, {"momentum": -0.1}, {"weight_decay": -1.0}, {"nesterov": True}]
)
def test_settings_of_sgd(bad: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(bad))):
        SGD(**bad)


@pytest.mark.parametrize(
    "bad", [{"beta1": 1.0}, {"beta2": -0.1}, {"eps": -1.0}, {"weight_decay": float("nan")}]
)
def test_settings_of_adamw(bad: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(bad))):
        AdamW(**bad)


def test_schedules() -> None:
    constant = Schedule(0.5, 10, warmup_steps=4)
    assert [constant(step) for step in range(6)] == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]
    linear = Schedule(1.0, 10, "linear", warmup_steps=2, final_lr=0.2)
    assert [round(linear(step), 12) for step in (0, 1, 2, 6, 10)] == [0.5, 1.0, 1.0, 0.6, 0.2]
    cosine = Schedule(1.0, 8, "cosine", final_lr=0.5)
    assert [round(cosine(step), 12) for step in (0, 4, 8)] == [1.0, 0.75, 0.5]
    for bad in ({"shape": "step"}, {"lr": -1.0}, {"lr": float("nan")}, {"warmup_steps": 11}, {"steps": 0}):
        with pytest.raises(InputError):
            Schedule(**{"lr": 1.0, "steps": 10, **bad})
