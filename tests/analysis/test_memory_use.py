"""The memory of a run by owner: weights, cache, gradients and saved activations are those of the arrays."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import einsum_transformer as et
from einsum_transformer.analysis.memory_use import OWNERS, MemoryUse
from einsum_transformer.tree import named_leaves


def weights_of(model: et.Model) -> int:
    return sum(leaf.nbytes for _, leaf in named_leaves(model.decoder))


def memory_of(found: et.Profile | et.Training) -> MemoryUse:
    assert found.memory is not None
    return found.memory


def test_generation() -> None:
    model = et.load("fast_lora", max_layers=3)
    found = et.profile(model, [list(range(200))] * 2, max_new_tokens=5, memory=True, ignore_eos=True)
    memory = memory_of(found)
    assert {sample.weights for sample in memory.samples} == {weights_of(model)}
    assert memory.samples[-1].cache == found.report.kv_cache_bytes
    assert {sample.gradients + sample.saved + sample.optimizer for sample in memory.samples} == {0}
    layers = [sample.layer for sample in memory.samples if sample.phase == "prefill/layer"]
    assert layers == [0, 1, 2]
    assert len([sample for sample in memory.samples if sample.phase == "decode"]) == 4
    assert memory.predicted is not None
    assert memory.peak == pytest.approx(memory.predicted, rel=0.1)
    seconds = [sample.seconds for sample in memory.samples]
    assert seconds == sorted(seconds)
    assert all(sample.total == sum(getattr(sample, name) for name in OWNERS) for sample in memory.samples)
    assert found.to_dict()["memory"]["peak"] == memory.peak
    json.dumps(found.to_dict())
    assert "interpreter and libraries" in str(found)
    assert et.profile(model, [[5]], max_new_tokens=1).memory is None


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_training(optimizer: str, checkpoint: bool) -> None:
    model = et.load("fast_lora", max_layers=3)
    trained = sum(array.nbytes for array in model.named_parameters().values())
    found = et.train(
        model,
        steps=2,
        batch_size=1,
        seq_len=512,
        optimizer=optimizer,  # type: ignore[arg-type]
        grad_checkpoint=checkpoint,
        lora=False,
        memory=True,
    )
    memory = memory_of(found)
    assert memory.samples[-1].optimizer == (2 * trained if optimizer == "adamw" else 0)
    held = [sample for sample in memory.samples if sample.phase == "backward/layer"]
    assert [sample.layer for sample in held] == [2, 1, 0] * 2
    gradients = [sample.gradients for sample in held[:3]]
    assert gradients == sorted(gradients)
    last = [sample for sample in memory.samples if sample.phase == "backward/embedding"]
    assert {sample.gradients for sample in last} == {trained}
    saved = [sample.saved for sample in memory.samples if sample.phase == "forward/layer"][:3]
    steps = np.diff(saved)
    assert steps[0] == pytest.approx(steps[1], rel=0.01)
    if checkpoint:
        assert steps[0] == pytest.approx(512 * 512 * 4, rel=0.01)  # the input of each block
    assert memory.predicted is not None
    assert memory.peak == pytest.approx(memory.predicted, rel=0.1)


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = et.profile(et.load("fast_lora", max_layers=1), [[5, 6]], max_new_tokens=3, memory=True)
    memory_of(found).plot(tmp_path / "memory.png")
    assert (tmp_path / "memory.png").stat().st_size > 1000


def test_workers_are_not_measured() -> None:
    with pytest.raises(et.InputError, match="without `workers`"):
        et.train("fast_lora", workers=2, memory=True)


def test_equations_of_a_training() -> None:
    model = et.load("fast_lora", max_layers=2)
    found = et.train(model, steps=3, batch_size=1, seq_len=32, equations=True, lora=False)
    rows = {(row.stage, row.role, row.equation): row for row in found.equations}
    assert rows["backward", "dup_proj", "btf,btd->fd"].calls == 2 * 3
    assert {stage.stage: stage.calls for stage in found.stages}["backward"] == 3
    assert rows["backward", "norm", ""].elements
    assert found.to_dict()["equations"]
    assert "dup_proj" in str(found)
