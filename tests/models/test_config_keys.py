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
    IGNORED,
    LOSS_WEIGHTS,
    SWITCHED_OFF,
    TRAINING,
    UNSUPPORTED,
    check_unread,
    unapplied_settings,
)
from einsum_transformer.training.data import RandomTokens
from einsum_transformer.training.loop import Trainer, TrainingSettings
from einsum_transformer.training.schedule import Schedule
from golden_files import FOLDER, load_golden, write_folder

REFERENCE: dict[str, dict[str, Any]] = json.loads((FOLDER / "config_keys.json").read_text(encoding="utf-8"))
TABLES = IGNORED | UNSUPPORTED.keys() | TRAINING.keys() | LOSS_WEIGHTS.keys() | SWITCHED_OFF.keys()
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
    check_unread(keys)
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


def test_settings_of_training_are_kept_and_saved(tmp_path: Path) -> None:
    own = {"attention_dropout": 0.1, "output_router_logits": True, "router_aux_loss_coef": 0.5}
    model = et.load(folder(tmp_path, **own))
    assert own.items() <= dict(model.config.training).items()
    assert unapplied_settings(model.config) == ["attention_dropout = 0.1", "output_router_logits = True"]
    model.save(tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "config.json").read_text(encoding="utf-8"))
    assert own.items() <= written.items()
    off = {"attention_dropout": 0.0, "output_router_logits": True, "router_aux_loss_coef": 0}
    assert unapplied_settings(et.load(folder(tmp_path, **off)).config) == []
    golden = load_golden("mpt_alibi")
    inner = golden.config["attn_config"] | {"attn_pdrop": 0.3}
    mpt = et.load(write_folder(tmp_path / "mpt", golden.config | {"attn_config": inner}, golden.weights))
    assert unapplied_settings(mpt.config) == ["attn_config.attn_pdrop = 0.3"]


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
    Trainer(model, RandomTokens(61, 2, 5), TrainingSettings(Schedule(0.1, 1)))
    assert [record.getMessage().partition("folder: ")[2] for record in caplog.records] == [
        "the loss excludes the load-balancing loss of output_router_logits = True",
        "training does not apply attention_dropout = 0.1, output_router_logits = True",
    ]


WINDOWED = ("gemma2_caps", "gemma3_text", "olmo3_yarn", "smollm3_window", "qwen2_moe_window", "qwen2_window")


@pytest.mark.parametrize("kind", ["chunked_attention", "slide_attention", 1, None])
@pytest.mark.parametrize("name", WINDOWED)
def test_a_layer_type_that_is_not_known_is_refused(name: str, kind: Any, tmp_path: Path) -> None:
    golden = load_golden(name)
    changed = golden.config | {"layer_types": [kind] * golden.config["num_hidden_layers"]}
    with pytest.raises(et.ConfigError, match=r"layer_types has .* which is not supported"):
        et.load(write_folder(tmp_path / "folder", changed, golden.weights))


@pytest.mark.parametrize("more", [-1, 3])
@pytest.mark.parametrize("name", WINDOWED)
def test_layer_types_are_as_many_as_layers(name: str, more: int, tmp_path: Path) -> None:
    golden = load_golden(name)
    changed = golden.config | {
        "layer_types": ["full_attention"] * (golden.config["num_hidden_layers"] + more)
    }
    with pytest.raises(et.ConfigError, match=r"layer_types has \d+ entries, but num_hidden_layers is"):
        et.load(write_folder(tmp_path / "folder", changed, golden.weights))


def test_windows_that_smollm3_does_not_use(tmp_path: Path) -> None:
    """layer_types alone make no window, as in the reference."""
    golden = load_golden("smollm3_nope")
    kinds = ["sliding_attention"] * golden.config["num_hidden_layers"]
    changed = golden.config | {"layer_types": kinds, "use_sliding_window": False, "sliding_window": None}
    model = et.load(write_folder(tmp_path / "folder", changed, golden.weights))
    np.testing.assert_allclose(model.logits(golden.tokens), golden.logits, rtol=0, atol=1e-4)


def test_gemma3_has_no_cap_of_scores(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """transformers keeps the key and does not use it."""
    golden = load_golden("gemma3_text")
    changed = golden.config | {"attn_logit_softcapping": 0.5}
    model = et.load(write_folder(tmp_path / "folder", changed, golden.weights))
    np.testing.assert_allclose(model.logits(golden.tokens), golden.logits, rtol=0, atol=1e-4)
    assert messages(caplog) == ["keys that are not used: attn_logit_softcapping"]


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
