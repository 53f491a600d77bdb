"""gradcheck: right gradients pass, wrong ones are found and named, weights come back bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from einsum_transformer.analysis.gradcheck import by_component, gradcheck
from einsum_transformer.cli.app import main
from einsum_transformer.components.gated_mlp import GatedMLP
from einsum_transformer.errors import InputError
from einsum_transformer.models.adapters import with_lora
from einsum_transformer.models.blocks import Block
from einsum_transformer.models.lora_config import LoRAConfig
from einsum_transformer.models.parameters import trainable
from tiny_models import tiny_model

RNG = np.random.default_rng(0)
IDS = RNG.integers(0, 61, (2, 7))
TARGETS = np.where(RNG.random((2, 7)) < 0.2, -100, np.roll(IDS, -1, 1))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_bias": True, "mlp_bias": True},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 1},
    ],
)
def test_right_gradients_pass(changes: dict[str, Any], recompute: bool) -> None:
    model = tiny_model("float64", **changes)
    before = {name: w.copy() for name, w in trainable(model.decoder).items()}
    found = gradcheck(model, IDS, TARGETS, recompute=recompute)
    assert found.passed, max(found.rows, key=lambda row: row.error)
    assert {row.name for row in found.rows} == set(before)
    for name, w in trainable(model.decoder).items():
        np.testing.assert_array_equal(w, before[name])


def test_adapters_are_filled_and_emptied_again() -> None:
    base = tiny_model("float64", tie_word_embeddings=True)
    model = with_lora(
        base, LoRAConfig(r=2, target_modules=("q_proj", "down_proj", "embed_tokens", "lm_head"))
    )
    found = gradcheck(model, IDS, TARGETS)
    assert found.passed
    assert found.filled
    assert all(not w.any() for name, w in trainable(model.decoder).items() if name.endswith("lora_B"))


def test_a_residual_through_the_norm_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: Block, dy: Any, saved: Any, context: Any) -> Any:
        saved_norm, saved_attn, saved_post, saved_mlp, *_ = saved
        dnormed, dmlp = self.mlp.backward(dy, saved_mlp)
        dx, dpost = self.post_attention_layernorm.backward(dnormed + dy, saved_post)
        dnormed, dattn = self.self_attn.backward(dx, saved_attn, context)
        dinput, dnorm = self.input_layernorm.backward(dnormed, saved_norm)
        return dinput + dx, Block(dnorm, dattn, dpost, dmlp)

    monkeypatch.setattr(Block, "backward", wrong)
    found = gradcheck(tiny_model("float64"), IDS, TARGETS)
    wrongs = {name for name, _, worst in by_component(found) if worst.error > found.tolerance}
    assert {"self_attn.q_proj", "embed_tokens", "input_layernorm"} <= wrongs
    assert "lm_head" not in wrongs
    assert found.whole.error > 1e-3


@pytest.mark.parametrize("kind", ["clipped", "off by 1e-4"])
def test_a_small_mistake_is_named(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = GatedMLP.backward

    def wrong(self: GatedMLP, dy: Any, saved: Any) -> Any:
        dx, d = right(self, dy, saved)
        top = 0.5 * abs(d.up_proj).max()
        changed = np.clip(d.up_proj, -top, top) if kind == "clipped" else d.up_proj * (1 + 1e-4)
        return dx, replace(d, up_proj=changed)

    monkeypatch.setattr(GatedMLP, "backward", wrong)
    found = gradcheck(tiny_model("float64"), IDS, TARGETS)
    assert {name for name, _, worst in by_component(found) if worst.error > found.tolerance} == {
        "mlp.up_proj"
    }


def test_what_makes_no_sense_is_said() -> None:
    model = tiny_model("float64")
    for arguments, message in (
        ({"tolerance": 0.0}, "tolerance is 0.0"),
        ({"parameters": "w1"}, "'w1' matches no parameter"),
        ({"parameters": "("}, "is not a regular expression"),
    ):
        with pytest.raises(InputError, match=message):
            gradcheck(model, IDS, TARGETS, **arguments)
    with pytest.raises(InputError, match="checked in float64"):
        gradcheck(tiny_model(), IDS, TARGETS)


def test_the_command(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    path = tmp_path / "tiny.json"
    sizes = {"d_model": 24, "n_layers": 2, "n_heads": 2, "d_ff": 40, "vocab_size": 50}
    path.write_text(json.dumps({"arch": "llama", **sizes}))
    for flags, code in ((["--json"], 0), (["--set", "use_lora=true", "--json"], 0), ([], 0)):
        with pytest.raises(SystemExit) as stop:
            main(["gradcheck", str(path), *flags])
        captured = capsys.readouterr()
        assert stop.value.code == code, captured
        if flags:
            assert json.loads(captured.out)["passed"]
        else:
            assert "gradients equal central differences to 1e-06" in captured.err
    right = GatedMLP.backward
    monkeypatch.setattr(GatedMLP, "backward", lambda *given: (right(*given)[0] * 1.001, right(*given)[1]))
    with pytest.raises(SystemExit) as stop:
        main(["gradcheck", str(path), "--grad-checkpoint"])
    assert stop.value.code == 1
    assert "WRONG" in capsys.readouterr().err
