"""Checkpoints: resuming is exact bit for bit; damaged or unrelated checkpoints give a one-line error."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import einsum_transformer as et
from einsum_transformer.errors import InputError
from einsum_transformer.models.adapters import with_lora
from einsum_transformer.models.lora_config import LoRAConfig
from einsum_transformer.models.run_config import parse_run_config
from einsum_transformer.training import state
from einsum_transformer.training.data import RandomTokens
from einsum_transformer.training.loop import Trainer, TrainingSettings
from einsum_transformer.training.optimizers import SGD, AdamW
from einsum_transformer.training.schedule import Schedule
from tiny_models import tiny_model, write_tiny

DATA = RandomTokens(61, 3, 6, seed=5, accumulation=2)
STEPS = 5


def full() -> et.Model:
    return tiny_model()


def tied() -> et.Model:
    return tiny_model(tie_word_embeddings=True)


def lora() -> et.Model:
    targets = ("embed_tokens", "lm_head", "q_proj", "down_proj")
    return with_lora(tied(), LoRAConfig(r=2, lora_dropout=0.3, target_modules=targets))


def experts() -> et.Model:
    """Adapters on stacked experts, whose gate and up matrices share A."""
    sizes = {"d_model": 24, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 6, "vocab_size": 61}
    mixture = {"num_experts": 4, "top_k": 2, "moe_d_ff": 10, "d_ff": 30}
    config = parse_run_config({"arch": "qwen3_moe"} | sizes | mixture, "config")
    return with_lora(et.load(config, seed=1), LoRAConfig(r=2, lora_dropout=0.3, target_modules="all-linear"))


def trainer(make: Callable[[], et.Model], optimizer: Any = AdamW(), **changes: Any) -> Trainer:  # noqa: B008
    settings = TrainingSettings(Schedule(1e-2, STEPS, "cosine", 1), optimizer, clip_norm=1.0, seed=3)
    return Trainer(make(), DATA, replace(settings, **changes))


def numbers(of: Trainer) -> dict[str, np.ndarray]:
    moments = {f"{m}.{name}": a for m, arrays in of.compute.moments().items() for name, a in arrays.items()}
    return {name: array.copy() for name, array in (of.weights | moments).items()}


@pytest.mark.parametrize("optimizer", [SGD(), SGD(0.9, True, 0.1), AdamW()], ids=["sgd", "nesterov", "adamw"])
@pytest.mark.parametrize("make", [full, tied, lora, experts])
def test_resuming_at_every_step_changes_nothing(make: Any, optimizer: Any, tmp_path: Path) -> None:
    whole = trainer(make, optimizer)
    losses = []
    for report in whole.run(STEPS):
        losses.append(report.loss)
        if whole.steps_done < STEPS:
            state.save(whole, tmp_path)
    for folder in state.checkpoints(tmp_path):
        again = trainer(make, optimizer)
        assert state.restore(again, folder) == []
        assert [report.loss for report in again.run(STEPS)] == losses[int(folder.name[5:]) :]
        here, there = numbers(again), numbers(whole)
        assert here.keys() == there.keys()
        for name, array in here.items():
            np.testing.assert_array_equal(array, there[name], err_msg=name)
    assert len(state.checkpoints(tmp_path)) == STEPS - 1


def test_a_checkpoint_from_before_a_field_of_configs_was_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing field means its default; another value of the field is another training."""
    training, now = trainer(full), state.description

    def before(of: Trainer) -> dict[str, Any]:
        found = now(of)
        for field in ("sinks", "residual_multiplier", "logit_scale"):
            del found["model"][field]
        return found

    with monkeypatch.context() as patch:
        patch.setattr(state, "description", before)
        folder = state.save(training, tmp_path)
    assert state.restore(trainer(full), folder) == []
    other = trainer(full)
    other.model = replace(other.model, config=replace(other.model.config, residual_multiplier=0.5))
    with pytest.raises(InputError, match=r"model.residual_multiplier is 1.0 in the checkpoint and 0.5 now"):
        state.restore(other, folder)


def test_a_checkpoint_is_a_model_or_an_adapter(tmp_path: Path) -> None:
    ids = np.arange(12).reshape(2, 6)
    one = trainer(full)
    one.step()
    np.testing.assert_array_equal(
        et.load(state.save(one, tmp_path / "full")).logits(ids), one.model.logits(ids)
    )
    base, _ = write_tiny(tmp_path / "base", tie_word_embeddings=True)
    two = Trainer(with_lora(et.load(base), LoRAConfig(r=2)), DATA, one.settings)
    two.step()
    folder = state.save(two, tmp_path / "lora")
    np.testing.assert_array_equal(et.load(base, adapter=folder).logits(ids), two.model.logits(ids))


def test_the_newest_are_kept(tmp_path: Path) -> None:
    training = trainer(lora)
    for _ in training.run(STEPS):
        state.save(training, tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000005"]


def test_leftovers_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".step-00000003.0123456789ab.tmp").mkdir()
    (tmp_path / ".step-00000003.0123456789ab.tmp" / "state.json").write_text("{")
    (tmp_path / "mine.tmp").write_text("stays")
    state.clean(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.tmp"]


def test_a_full_disk_leaves_the_last_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = trainer(full)
    training.step()
    good = state.save(training, tmp_path)
    training.step()
    real = os.fsync
    calls = []

    def full_disk(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        state.save(training, tmp_path)
    assert list(tmp_path.iterdir()) == [good]
    monkeypatch.undo()
    state.restore(trainer(full), good)


def damaged(folder: Path, name: str) -> None:
    raw = bytearray((folder / name).read_bytes())
    raw[-2] ^= 1
    (folder / name).write_bytes(raw)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "config.json"])
def test_one_flipped_bit_is_found(name: str, tmp_path: Path) -> None:
    training = trainer(full)
    training.step()
    folder = state.save(training, tmp_path)
    damaged(folder, name)
    with pytest.raises(
        InputError, match=f"{name}: size or sha256 differs from manifest.json; the checkpoint is damaged"
    ):
        state.restore(trainer(full), folder)


def test_a_manifest_cannot_name_other_places(tmp_path: Path) -> None:
    training = trainer(lora)
    folder = state.save(training, tmp_path)
    for name in ("../x", "/etc/passwd", "missing.json"):
        (folder / "manifest.json").write_text(json.dumps({"files": {name: {}}}))
        with pytest.raises(InputError, match=r"plain name|missing"):
            state.restore(trainer(lora), folder)
    with pytest.raises(InputError, match=r"does not contain manifest\.json"):
        state.restore(trainer(lora), tmp_path)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: trainer(full), "lora is .* in the checkpoint and None now"),
        (lambda: trainer(lora, SGD()), "optimizer.name is 'AdamW' in the checkpoint and 'SGD' now"),
        (lambda: trainer(lora, seed=4), "seed is 3 in the checkpoint and 4 now"),
        (
            lambda: trainer(lora, schedule=Schedule(1e-2, 9, "cosine", 1)),
            "schedule.steps is 5 in the checkpoint and 9 now",
        ),
        (
            lambda: trainer(lambda: with_lora(tiny_model(tie_word_embeddings=True, seed=1), lora().lora)),
            "frozen",
        ),  # type: ignore[arg-type]
    ],
)
def test_another_training_is_rejected(other: Any, message: str, tmp_path: Path) -> None:
    folder = state.save(trainer(lora), tmp_path)
    with pytest.raises(InputError, match=f"checkpoint of another training: .*{message}"):
        state.restore(other(), folder)


def test_a_constant_rate_may_train_longer(tmp_path: Path) -> None:
    folder = state.save(trainer(lora, schedule=Schedule(1e-2, 5)), tmp_path)
    state.restore(trainer(lora, schedule=Schedule(1e-2, 50)), folder)
