"""All main features in seconds: build a model from a config, generate, train, save and load it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import einsum_transformer as et
from tiny_models import write_config

CONFIG = {
    "// note": "a model for a test",
    "arch": "llama",
    "d_model": 48,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "d_ff": 96,
    "vocab_size": 128,
    "max_seq_len": 64,
}


def test_smoke(tmp_path: Path) -> None:
    model = et.load(write_config(tmp_path / "tiny.json", CONFIG), seed=0)
    ids = np.random.default_rng(0).integers(0, 128, (4, 17))
    assert model.logits(ids).shape == (4, 17, 128)

    result = et.generate(model, list(ids[0]), max_new_tokens=8, temperature=0.8, top_k=20, seed=1)
    assert len(result.tokens) == 8
    assert result.finish_reason == "length"

    losses = []
    for _ in range(4):
        loss, gradients = model.loss_and_gradients(ids[:, :-1], ids[:, 1:])
        losses.append(loss)
        for name, parameter in model.named_parameters().items():
            parameter -= 0.5 * gradients[name]
    assert losses[0] > losses[1] > losses[2] > losses[3]
    assert abs(losses[0] - np.log(128)) < 0.1  # untrained weights predict an almost uniform distribution

    model.save(tmp_path / "saved")
    again = et.load(tmp_path / "saved")
    np.testing.assert_array_equal(again.logits(ids), model.logits(ids))
    assert et.generate(again, [1, 2], max_new_tokens=5) == et.generate(model, [1, 2], max_new_tokens=5)


def test_public_names() -> None:
    """Public names on which users' scripts depend."""
    for name in ("load", "generate", "einsum", "explain"):
        assert callable(getattr(et, name))
    assert set(et.__all__) <= set(dir(et))
    np.testing.assert_array_equal(et.einsum("ij,jk->ik", np.eye(2), np.ones((2, 3))), np.ones((2, 3)))
