"""The training loop: the loss falls, micro-batches add up, and steps that are not finite are skipped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import einsum_transformer as et
from einsum_transformer.engine import Recorder, blas
from einsum_transformer.errors import InputError
from einsum_transformer.models.adapters import with_lora
from einsum_transformer.models.lora_config import LoRAConfig
from einsum_transformer.models.parameters import trainable
from einsum_transformer.training.data import Batch, RandomTokens
from einsum_transformer.training.loop import (
    Trainer,
    TrainingFailed,
    TrainingSettings,
    _sliced,
    batch_gradients,
)
from einsum_transformer.training.optimizers import SGD, AdamW
from einsum_transformer.training.schedule import Schedule
from tiny_models import write_tiny

FIXED = RandomTokens(61, 4, 12, seed=42, fixed=True)


@pytest.fixture
def tiny(tmp_path: Path) -> et.Model:
    folder, _ = write_tiny(tmp_path / "in")
    return et.load(folder)


def settings(lr: float = 0.5, **others: Any) -> TrainingSettings:
    return TrainingSettings(Schedule(lr, 1000), **others)


@pytest.mark.parametrize(("optimizer", "lr"), [(SGD(), 0.5), (SGD(0.9, nesterov=True), 0.1), (AdamW(), 0.01)])
def test_the_loss_of_a_fixed_batch_falls(tiny: et.Model, optimizer: Any, lr: float) -> None:
    trainer = Trainer(tiny, FIXED, settings(lr, optimizer=optimizer, clip_norm=5.0))
    reports = list(trainer.run(40))
    assert reports[-1].loss < 0.5 * reports[0].loss
    assert [report.step for report in reports] == list(range(40))
    assert reports[0].targets == 48
    tokens, targets = FIXED.batch(0)[0]
    assert trainer.model.loss_and_gradients(tokens, targets)[0] < reports[-1].loss + 0.1


def test_adapters_learn_and_the_base_stays(tiny: et.Model) -> None:
    before = {name: array.copy() for name, array in tiny.named_parameters().items()}
    model = with_lora(tiny, LoRAConfig(r=4, target_modules="all-linear", lora_dropout=0.1))
    reports = list(Trainer(model, FIXED, settings(0.02, optimizer=AdamW())).run(60))
    assert reports[-1].loss < 0.7 * reports[0].loss
    for name, array in tiny.named_parameters().items():
        np.testing.assert_array_equal(array, before[name])


class Ragged:
    """The same eight rows in `parts` micro-batches; rows have 1 to 8 targets."""

    def __init__(self, parts: int) -> None:
        rng = np.random.default_rng(3)
        tokens, targets = rng.integers(0, 61, (2, 8, 12))
        targets[np.arange(12) > np.arange(8)[:, None]] = -100
        self.parts = list(zip(np.split(tokens, parts), np.split(targets, parts)))

    def batch(self, step: int) -> list[Batch]:
        return self.parts


@pytest.mark.parametrize("parts", [2, 8])
@pytest.mark.parametrize("recompute", [False, True])
def test_parts_of_a_batch_add_up(tiny: et.Model, parts: int, recompute: bool, tmp_path: Path) -> None:
    """Micro-batches have different numbers of targets; the loss is the mean over all targets."""
    folder, _ = write_tiny(tmp_path / "same")
    whole = Trainer(et.load(folder), Ragged(1), settings())
    split = Trainer(et.load(folder), Ragged(parts), settings(recompute=recompute))
    for one, other in zip(whole.run(3), split.run(3)):
        assert other.loss == pytest.approx(one.loss, rel=1e-6)
        assert other.norm == pytest.approx(one.norm, rel=1e-5)
    for name, array in whole.weights.items():
        np.testing.assert_allclose(split.weights[name], array, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("recompute", [False, True])
def test_rows_on_threads_give_the_gradients_of_the_batch(
    tmp_path: Path, threads: int, recompute: bool
) -> None:
    """In float64 and with dropout; rows have different numbers of targets, threads of rows."""
    folder, _ = write_tiny(tmp_path / "in")
    base = et.load(folder, dtype="float64")
    model = with_lora(base, LoRAConfig(r=3, lora_dropout=0.4, target_modules="all-linear"))
    rng = np.random.default_rng(8)
    for name, array in trainable(model.decoder).items():
        if name.endswith("lora_B"):
            array[...] = rng.standard_normal(array.shape) * 0.1
    # Enough rows for the threads to be used.
    tokens, targets = rng.integers(0, 61, (2, 100, 12))
    targets[np.arange(12) > (np.arange(100) % 12)[:, None]] = -100
    found, before = [], blas.get_threads()
    for count in (1, threads):
        blas.set_threads(count)
        try:
            with Recorder() as recorder:
                parts = [(5, tokens[:70], targets[:70]), (75, tokens[70:], targets[70:])]
                found.append(
                    batch_gradients(model.decoder, parts, 600, (3, 1), settings(recompute=recompute))
                )
            spans = [span for span in recorder.spans if span.path == ("forward",)]
            # One span for each micro-batch; the threads share it.
            assert len(spans) == 2
        finally:
            blas.set_threads(before)
    (loss, gradients), (other_loss, others) = found
    assert other_loss == pytest.approx(loss, rel=1e-12)
    assert list(others) == list(gradients)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(others[name], gradient, rtol=1e-10, atol=1e-13)


def test_threads_take_rows_where_their_gradients_are_small(tiny: et.Model) -> None:
    """All weights: from 1,000 tokens on; a small adapter: from the first token on."""
    adapted = with_lora(tiny, LoRAConfig(r=1, target_modules=["q_proj"]))

    def slices(model: et.Model, rows: int) -> int:
        tokens = np.zeros((rows, 10), int)
        return len(_sliced(model.decoder, (0, tokens, tokens), tokens.size, (0, 0), False))

    before = blas.get_threads()
    try:
        blas.set_threads(2)
        assert slices(tiny, 99) == 1
        assert slices(tiny, 100) == 2
        assert slices(adapted, 2) == 2
        blas.set_threads(1)
        assert slices(tiny, 100) == 1
    finally:
        blas.set_threads(before)


def test_clipping_bounds_the_step(tiny: et.Model) -> None:
    """The norm of an SGD update is lr * clip_norm."""
    trainer = Trainer(tiny, FIXED, settings(0.1, clip_norm=0.01))
    before = {name: array.copy() for name, array in trainer.weights.items()}
    assert trainer.step().norm > 0.01
    moved = np.sqrt(sum(np.sum((array - before[name]) ** 2.0) for name, array in trainer.weights.items()))
    assert moved == pytest.approx(0.1 * 0.01, rel=1e-3)


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize(
    ("path", "module"),
    [
        ("layers.1.mlp.up_proj", "layers.1.mlp"),
        ("layers.0.self_attn.o_proj", "layers.0.self_attn"),
        ("embed_tokens.weight", "embed_tokens"),
    ],
)
def test_steps_that_are_not_finite_change_nothing(
    tiny: et.Model, path: str, module: str, watched: bool
) -> None:
    trainer = Trainer(tiny, FIXED, settings(optimizer=AdamW(), max_bad_steps=2))
    trainer.step()
    weight = trainer.weights[path]
    original, weight[...] = weight.copy(), np.inf
    frozen = {name: array.copy() for name, array in trainer.weights.items()}
    moments = {name: array.copy() for name, array in trainer.compute.moments()["m"].items()}
    if watched:
        with Recorder():
            report = trainer.step()
    else:
        report = trainer.step()
    assert report.fault == f"{module} has a value that is not finite"
    for name, array in trainer.weights.items():
        np.testing.assert_array_equal(array, frozen[name])
        np.testing.assert_array_equal(trainer.compute.moments()["m"][name], moments[name])
    weight[...] = original
    assert trainer.step().fault is None
    weight[...] = np.nan
    with pytest.raises(TrainingFailed, match=f"step 6: {module}"):
        list(trainer.run(10))
    assert trainer.bad_steps == 4


def test_a_read_only_file_is_trained_in_a_copy(tmp_path: Path) -> None:
    """The mapped file and the loaded model do not change."""
    folder, _ = write_tiny(tmp_path / "in")
    model = et.load(folder)
    assert any(not array.flags.writeable for array in trainable(model.decoder).values())
    trainer = Trainer(model, FIXED, settings())
    assert all(array.flags.writeable for array in trainer.weights.values())
    trainer.step()
    again = et.load(folder).named_parameters()
    assert any((array != again[name]).any() for name, array in trainer.model.named_parameters().items())


def test_random_batches_are_a_function_of_the_step() -> None:
    batches = replace(FIXED, fixed=False, accumulation=3)
    tokens, targets = batches.batch(7)[1]
    np.testing.assert_array_equal(tokens[:, 1:], targets[:, :-1])
    np.testing.assert_array_equal(tokens, batches.batch(7)[1][0])
    assert (batches.batch(8)[1][0] != tokens).any()
    assert sum(len(part) for part, _ in batches.batch(0)) == 4
    np.testing.assert_array_equal(FIXED.batch(0)[0][0], FIXED.batch(9)[0][0])
    for bad in ({"batch_size": 0}, {"length": 0}, {"accumulation": 5}, {"seed": -1}):
        with pytest.raises(InputError, match=next(iter(bad)).split("_")[0]):
            replace(FIXED, **bad)
