"""Keys of config.json: read, neutral, refused, or named in one note; and ids that no vocabulary has."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import einsum_transformer as et
from einsum_transformer.models.config import Keys
from einsum_transformer.models.families import FAMILIES
from einsum_transformer.models.families.config_keys import (
    LOSS_WEIGHTS,
    NEUTRAL,
    REFUSED,
    TRAINING,
    check_unread,
)
from einsum_transformer.training.data import RandomTokens
from einsum_transformer.training.loop import Settings, Trainer
from einsum_transformer.training.schedule import Schedule
from golden_files import FOLDER, load_golden, write_folder

REFERENCE: dict[str, dict[str, Any]] = json.loads((FOLDER / "config_keys.json").read_text(encoding="utf-8"))
TABLES = NEUTRAL | REFUSED.keys() | TRAINING.keys() | LOSS_WEIGHTS.keys()
NEEDED = {"deepseek_v2": {"num_experts_per_tok": 2}, "gemma3": {"text_config": {}}}
"""What has no default in the reference, or is no plain value."""


def folder(tmp_path: Path, **changes: Any) -> Path:
    golden = load_golden("llama_gqa")
    return write_folder(tmp_path / "folder", golden.config | changes, golden.weights)


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage().partition("config.json: ")[2] for record in caplog.records]


def test_the_reference_has_every_family() -> None:
    """But the one whose code transformers does not have."""
    assert REFERENCE.keys() == FAMILIES.keys() - {"deepseek"}


@pytest.mark.parametrize("model_type", REFERENCE)
def test_every_key_of_the_reference_is_known(model_type: str, caplog: pytest.LogCaptureFixture) -> None:
    """Each key that transformers' config of this family has is read, or a table says what it is."""
    raw = REFERENCE[model_type] | NEEDED.get(model_type, {})
    keys = Keys(raw, "config.json")
    FAMILIES[model_type].read_config(keys)
    unknown = [key for key in raw if key not in keys.seen and key not in TABLES]
    assert not unknown
    assert not any("dropout" not in each and "pdrop" not in each for each in check_unread(keys))
    assert not caplog.records


def test_unknown_keys_are_named_in_one_note(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also keys of objects, and those of generation, which transformers 5 does not read here either."""
    golden = load_golden("llama_gqa")
    rope = golden.config["rope_parameters"] | {"alpha": 2.0}
    model = et.load(folder(tmp_path, rope_parameters=rope, hidden_sizes=3, temperature=0.5, absent=None))
    assert messages(caplog) == [
        "keys that are not used: hidden_sizes, temperature, rope_parameters.alpha",
    ]
    np.testing.assert_allclose(model.logits(golden.tokens), golden.logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("key", "value"),
    [("is_encoder_decoder", True), ("add_cross_attention", True), ("pruned_heads", {"0": [1]})],
)
def test_keys_that_make_another_model_are_refused(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(et.ConfigError, match=f"config.json: {key} = .* is not supported"):
        et.load(folder(tmp_path, **{key: value}))


def test_settings_of_training_are_kept_to_be_named_there(tmp_path: Path) -> None:
    model = et.load(folder(tmp_path, attention_dropout=0.1, output_router_logits=True, aux_loss_alpha=0.001))
    assert model.config.unapplied == (
        "attention_dropout = 0.1",
        "aux_loss_alpha = 0.001",
        "output_router_logits = True",
    )
    assert et.load(folder(tmp_path, attention_dropout=0.0)).config.unapplied == ()


def test_what_training_does_not_apply_is_said_when_it_starts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers adds the load-balancing loss and dropout; the loss here is without both."""
    golden = load_golden("mixtral_window")
    changes = {"output_router_logits": True, "router_aux_loss_coef": 0.5, "attention_dropout": 0.1}
    model = et.load(write_folder(tmp_path / "folder", golden.config | changes, golden.weights))
    assert not caplog.records
    for _ in range(2):
        assert model.loss_and_gradients(golden.tokens, golden.targets)[0] == pytest.approx(
            golden.loss, abs=1e-5
        )
    Trainer(model, RandomTokens(61, 2, 5), Settings(Schedule(0.1, 1)))
    assert [record.getMessage().partition("folder: ")[2] for record in caplog.records] == [
        "the loss is without the load-balancing loss of output_router_logits = True",
        "training does not apply attention_dropout = 0.1, output_router_logits = True",
    ]


@pytest.mark.parametrize("pad", [97, 4294967295, 1 << 40, -7])
def test_ids_outside_the_vocabulary_are_named_and_left_out(
    pad: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="einsum_transformer"):
        model = et.load(folder(tmp_path, pad_token_id=pad, bos_token_id=pad, eos_token_id=[2, pad]))
    assert (model.config.pad_token_id, model.config.bos_token_id) == (None, None)
    assert model.config.eos_token_id == (2,)
    assert messages(caplog) == [
        "outside the vocabulary of 97 and not used: "
        f"bos_token_id {pad}, pad_token_id {pad}, eos_token_id {pad}"
    ]
    model.save(tmp_path / "saved")
    assert et.load(tmp_path / "saved").config == model.config


def test_minus_one_stands_for_no_token(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    et.load(folder(tmp_path, pad_token_id=-1, bos_token_id=-1, eos_token_id=-1))
    assert not caplog.records
