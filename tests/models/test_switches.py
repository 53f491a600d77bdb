"""Any dense config turned into its variants, with random weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import einsum_transformer as et
from einsum_transformer.analysis import gradcheck as checks
from einsum_transformer.components.moe import MoE
from einsum_transformer.models.families import FAMILIES
from tiny_models import write_config

FAST = Path(__file__).parents[2] / "configs" / "fast_lora.json"
SMALL: dict[str, Any] = {
    "d_model": 24,
    "n_layers": 3,
    "n_heads": 4,
    "use_gqa": False,
    "d_ff": 20,
    "vocab_size": 31,
    "max_seq_len": 64,
}
NEEDS: dict[str, dict[str, Any]] = {
    "deepseek": {"num_experts": 4, "top_k": 2, "moe_d_ff": 12},
    "deepseek_v2": {
        "num_experts": 4,
        "top_k": 2,
        "moe_d_ff": 12,
        "arch_keys": {
            "kv_lora_rank": 8,
            "q_lora_rank": None,
            "qk_nope_head_dim": 6,
            "qk_rope_head_dim": 4,
            "v_head_dim": 5,
            "n_shared_experts": 1,
        },
    },
    "qwen2_moe": {"num_experts": 4, "top_k": 2, "moe_d_ff": 12, "shared_d_ff": 10},
    "qwen3_moe": {"num_experts": 4, "top_k": 2, "moe_d_ff": 12},
    "mixtral": {"num_experts": 4, "top_k": 2},
    "phi": {"head_dim": 8},
    "gpt_neox": {"d_model": 32},
    "gemma3": {},
}
ARCHS = [arch for arch in FAMILIES if arch != "gemma3"]
TOKENS = np.random.default_rng(0).integers(0, 31, (2, 9))


@pytest.fixture(autouse=True)
def along_one_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through all parameters at once: a switch changes no derivative, but it may connect them wrongly."""
    monkeypatch.setattr(checks, "_directions", lambda gradient, rng: [])


def config(arch: str, path: Path) -> Any:
    settings = {"arch": arch} | SMALL | NEEDS.get(arch, {})
    return et.read_run_config(write_config(path / "run.json", settings))


def trains(run: Any) -> et.Model:
    """The model of a config, whose gradients are right along one direction through all parameters."""
    model = et.load(run, dtype="float64")
    for leaf in model.named_parameters().values():
        leaf *= 5 if leaf.ndim > 1 else 1  # initial weights are so small that all tokens look alike
    found = checks.gradcheck(model, TOKENS, TOKENS[:, ::-1])
    assert found.passed, found.whole
    return model


@pytest.mark.parametrize("arch", ARCHS)
def test_every_architecture_from_a_config(arch: str, tmp_path: Path) -> None:
    """With random weights, in its plain form."""
    model = trains(config(arch, tmp_path))
    assert model.config.num_key_value_heads == 4


@pytest.mark.parametrize("arch", [arch for arch in ARCHS if arch != "deepseek_v2"])
def test_shared_key_value_heads(arch: str, tmp_path: Path) -> None:
    run = config(arch, tmp_path)
    assert trains(et.enable_gqa(run, 2)).config.num_key_value_heads == 2
    assert trains(et.enable_mqa(run)).config.num_key_value_heads == 1


@pytest.mark.parametrize("arch", ARCHS)
def test_experts(arch: str, tmp_path: Path) -> None:
    """Of a dense architecture, in every layer; of one that has experts, as many as are asked for."""
    model = trains(et.enable_moe(config(arch, tmp_path), 6, 2, moe_d_ff=8, shared_d_ff=7))
    moe = model.config.moe
    assert moe is not None
    assert (moe.num_experts, moe.num_experts_per_tok) == (6, 2)
    layers = [block.mlp for block in model.decoder.layers]
    assert all(isinstance(mlp, MoE) and len(mlp.experts) == 6 for mlp in layers)


def test_a_variant_that_no_config_file_can_say_is_not_saved(tmp_path: Path) -> None:
    model = et.load(et.enable_moe(config("llama", tmp_path), 4, 2))
    with pytest.raises(et.InputError, match="cannot represent moe"):
        model.save(tmp_path / "out")


def test_wrong_switches(tmp_path: Path) -> None:
    run = config("llama", tmp_path)
    for change in (lambda: et.enable_gqa(run, 3), lambda: et.enable_moe(run, 4, 5)):
        with pytest.raises(et.ConfigError):
            et.load(change())


def test_other_switches(tmp_path: Path) -> None:
    run = config("llama", tmp_path)
    assert et.enable_quantization(run, "W8A8").quantization == "W8A8"
    assert et.enable_prefill_decode_split(run).prefill_only
    drafting = et.enable_speculative_decoding(run, 2)
    assert (drafting.speculative, drafting.draft_layers) == (True, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: et.enable_gqa(c, 3), "3"),
        (lambda c: et.enable_gqa(c, 2.0), "`kv_heads` is 2.0 .*expected int"),
        (lambda c: et.enable_moe(c, 2, 3), "3"),
        (lambda c: et.enable_moe(c, 4, 2.5), "`top_k` is 2.5 .*expected int"),
        (lambda c: et.enable_speculative_decoding(c, 8), "draft_layers is 8: expected 1 to 7"),
    ],
)
def test_contradictions_are_refused_at_once(change: Any, message: str) -> None:
    config = et.read_run_config(FAST)
    with pytest.raises(et.InputError, match=message):
        change(config)


def test_experts_keep_the_sizes_of_their_config() -> None:
    config = replace(et.read_run_config(FAST), moe_d_ff=96, shared_d_ff=32)
    moe = et.enable_moe(config, 4, 2).model_config().moe
    assert moe is not None
    assert (moe.moe_intermediate_size, moe.shared_intermediate_size) == (96, 32)
    moe = et.enable_moe(config, 4, 2, moe_d_ff=48).model_config().moe
    assert moe is not None
    assert moe.moe_intermediate_size == 48
