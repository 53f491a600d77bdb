"""Model: what it takes, and what it leaves behind when saving fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import einsum_transformer as et
from tiny_models import tiny_model

MODEL = tiny_model()
WRONG: dict[str, Any] = {
    "rows of two lengths": [[1, 2], [1]],
    "one axis": [1, 2],
    "three axes": [[[1]]],
    "nothing": np.zeros((1, 0), int),
    "no rows": np.zeros((0, 3), int),
    "floats": [[1.0, 2.0]],
    "bools": [[True, False]],
    "text": [["a"]],
    "none": None,
    "objects": np.array([[1, None]], dtype=object),
    "negative": [[-1]],
    "beyond the vocabulary": [[61]],
    "beyond int64": np.array([[2**63]], np.uint64),
    "beyond every integer": [[2**70]],
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_tokens(name: str) -> None:
    with pytest.raises(et.InputError, match="tokens") as caught:
        MODEL.logits(WRONG[name])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [*WRONG, "another shape", "ignored by another number"])
def test_wrong_targets(name: str) -> None:
    """-100 alone is ignored."""
    others = {"another shape": [[1, 2, 3]], "ignored by another number": [[1, -1]]}
    with pytest.raises(et.InputError, match="targets") as caught:
        MODEL.loss_and_gradients([[1, 2]], {**WRONG, **others}[name])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int32, np.uint64, ">i4"])
def test_tokens_of_any_integer_type(kind: Any) -> None:
    ids = np.array([[1, 2, 60]])
    np.testing.assert_array_equal(MODEL.logits(ids.astype(kind)), MODEL.logits(ids))
    loss, gradients = MODEL.loss_and_gradients(ids.astype(kind), ids)
    expected_loss, expected = MODEL.loss_and_gradients(ids, ids)
    assert loss == expected_loss
    for name, gradient in gradients.items():
        np.testing.assert_array_equal(gradient, expected[name])


def test_tokens_are_not_changed() -> None:
    ids, targets = np.array([[1, 2, 3]]), np.array([[2, -100, 4]])
    MODEL.loss_and_gradients(ids, targets)
    np.testing.assert_array_equal(ids, [[1, 2, 3]])
    np.testing.assert_array_equal(targets, [[2, -100, 4]])


def test_parameters_are_the_weights_in_use() -> None:
    """Changing one changes the scores, also of a matrix that the equations view as heads."""
    model, ids = tiny_model(attention_bias=True), [[1, 2, 3]]
    for name, parameter in model.named_parameters().items():
        before = model.logits(ids)
        # Any weight that these tokens use; a bias on all keys alone would change nothing.
        parameter += np.linspace(0.1, 0.3, parameter.size).reshape(parameter.shape)
        assert (model.logits(ids) != before).any(), name


def test_a_failed_save_does_not_mix_two_models(tmp_path: Path) -> None:
    """Where the new weights cannot be written, the old config stays with the old weights."""
    MODEL.save(tmp_path, max_shard_bytes=5000)
    ids = [[1, 2, 3]]
    before = et.load(tmp_path).logits(ids)
    (tmp_path / "model.safetensors").mkdir()  # in the way of the new file
    with pytest.raises((OSError, et.InputError)):
        tiny_model(rms_norm_eps=0.5).save(tmp_path)
    np.testing.assert_array_equal(et.load(tmp_path).logits(ids), before)


@pytest.mark.parametrize("limit", [None, 0])
@pytest.mark.parametrize("shard", [5000, 1 << 30])
def test_saving_over_the_folder_it_was_loaded_from(limit: int | None, shard: int, tmp_path: Path) -> None:
    """The mapped file is replaced, not overwritten: the model goes on, and so does the folder."""
    MODEL.save(tmp_path)
    ids = [[1, 2, 3]]
    model = et.load(tmp_path, weight_budget=limit)
    before = model.logits(ids)
    model.save(tmp_path, max_shard_bytes=shard)
    np.testing.assert_array_equal(model.logits(ids), before)
    np.testing.assert_array_equal(et.load(tmp_path).logits(ids), before)
