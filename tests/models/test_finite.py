"""Scores that are not finite end in one line that names the first step and the weight; nothing is sampled."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import einsum_transformer as et
from einsum_transformer.engine import Recorder
from einsum_transformer.generation.decode import Generation, decode_batch
from einsum_transformer.generation.rows import Settings
from einsum_transformer.generation.sampling import Sampling
from einsum_transformer.models.adapters import with_lora
from einsum_transformer.models.builder import build
from einsum_transformer.models.lora_config import LoRAConfig
from einsum_transformer.tree import named_leaves
from golden_files import MODELS, Models, load_golden, write_folder
from tiny_models import config_of

EMBEDDING = "model.embed_tokens.weight"
# One weight of each kind: (golden model, tensor, the step that is named).
PLACES = [
    ("llama_gqa", "model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj"),
    ("llama_gqa", "model.layers.2.mlp.down_proj.weight", "model.layers.2.mlp.down_proj"),
    ("llama_gqa", "model.layers.1.input_layernorm.weight", "model.layers.1.input_layernorm"),
    ("llama_gqa", "model.norm.weight", "model.norm"),
    ("llama_gqa", "lm_head.weight", "the output head"),
    ("llama_bias", "model.layers.1.self_attn.v_proj.bias", "model.layers.1.self_attn.v_proj"),
    ("llama_bias", "model.layers.1.mlp.up_proj.bias", "model.layers.1.mlp.up_proj"),
    ("gemma3_text", "model.layers.0.self_attn.k_norm.weight", "model.layers.0.self_attn.k_norm"),
    ("gpt2_plain", "transformer.h.1.attn.c_attn.weight", "transformer.h.1.attn.c_attn"),
    (
        "mixtral_window",
        "model.layers.1.block_sparse_moe.experts.2.w1.weight",
        "model.layers.1.block_sparse_moe",
    ),
    ("qwen2_moe_window", "model.layers.1.mlp.shared_expert.up_proj.weight", "shared_expert"),
    ("deepseek_v2_groups", "model.layers.1.self_attn.kv_b_proj.weight", "model.layers.1.self_attn.kv_b_proj"),
]


def spoilt(tmp_path: Path, name: str, tensor: str, value: float = np.nan) -> et.Model:
    """A golden model with one tensor full of a value."""
    golden = load_golden(name)
    weights = {key: array.copy() for key, array in golden.weights.items()}
    weights[tensor][...] = value
    return et.load(write_folder(tmp_path / "folder", golden.config, weights))


def error_of(call: Any) -> str:
    with pytest.raises(et.InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("name", "tensor", "step"), PLACES)
def test_the_first_step_and_the_weight_are_named(name: str, tensor: str, step: str, tmp_path: Path) -> None:
    model = spoilt(tmp_path, name, tensor)
    error = error_of(lambda: model.logits(load_golden(name).tokens))
    assert re.search(rf"nan appears first in (model\.)?{re.escape(step)}", error) or step == "shared_expert"
    assert f"the weight {tensor} contains nan or inf" in error


@pytest.mark.parametrize("name", MODELS)
def test_an_embedding_of_every_family(name: str, tmp_path: Path) -> None:
    golden = load_golden(name)
    tensor = next(
        key for key in golden.weights if any(each in key for each in ("embed_tokens", "wte", "embed_in"))
    )
    error = error_of(lambda: spoilt(tmp_path, name, tensor, np.inf).logits(golden.tokens))
    assert f"the weight {tensor} contains nan or inf" in error


def test_a_row_that_the_text_does_not_use_is_no_fault(tmp_path: Path) -> None:
    """Of an embedding that is not the head."""
    golden = load_golden("llama_gqa")
    unused = np.setdiff1d(np.arange(97), golden.tokens)[:3]
    weights = golden.weights | {EMBEDDING: golden.weights[EMBEDDING].copy()}
    weights[EMBEDDING][unused] = np.nan
    model = et.load(write_folder(tmp_path / "folder", golden.config, weights))
    np.testing.assert_allclose(model.logits(golden.tokens), golden.logits, rtol=0, atol=1e-4)


def test_numbers_that_grow_too_large(tmp_path: Path) -> None:
    """In float32 the product of large finite weights is inf; in float64 it is not."""
    golden = load_golden("llama_gqa")
    weights = {key: array.copy() for key, array in golden.weights.items()}
    weights["model.layers.1.mlp.up_proj.weight"] *= np.float32(1e38)
    folder = write_folder(tmp_path / "folder", golden.config, weights)
    error = error_of(lambda: et.load(folder).logits(golden.tokens))
    assert "inf appears first in model.layers.1.mlp.up_proj: its weights are finite" in error
    assert "`dtype` float64" in error
    assert np.isfinite(et.load(folder, dtype="float64").logits(golden.tokens)).all()


def test_a_sink_that_is_not_finite_is_named() -> None:
    config = replace(config_of(), sinks=True)
    rng = np.random.default_rng(0)
    model = et.Model(config, build(config, lambda spec: rng.standard_normal(spec.shape) * 0.1))
    model.decoder.layers[1].self_attn.sinks[0, 1] = np.nan
    error = error_of(lambda: model.logits([[1, 2, 3]]))
    assert "the weight model.layers.1.self_attn.sinks contains nan or inf" in error


def test_a_reader_that_makes_nan_is_named(golden_model: Models) -> None:
    with Recorder().on_value(lambda name, value: np.full_like(value, np.nan), "layers.0.self_attn"):
        error = error_of(lambda: golden_model("llama_gqa").logits([[1, 2, 3]]))
    assert "finite when they are recomputed" in error


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0, "seed": 0},
    {"temperature": 1.0, "top_k": 5, "top_p": 0.9, "seed": 0},
    {"temperature": 0, "prompt_lookup": 2},
    {"temperature": 1.0, "draft_layers": 1, "seed": 0},
    {"temperature": 0, "prefill_step_size": 3},
]


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_nothing_samples_from_it(settings: dict[str, Any], batch: bool, tmp_path: Path) -> None:
    if batch and {"prompt_lookup", "draft_layers"} & settings.keys():
        settings = {key: value for key, value in settings.items() if key in ("temperature", "seed")}
    model = spoilt(tmp_path, "llama_gqa", "model.layers.1.self_attn.o_proj.weight")
    prompt = [[1, 2, 3, 1, 2], [4, 5, 6]] if batch else [1, 2, 3, 1, 2]
    error = error_of(lambda: et.generate(model, prompt, max_new_tokens=4, **settings))
    assert "nan appears first in model.layers.1.self_attn.o_proj" in error


def test_it_may_appear_later_than_the_prompt(golden_model: Models, tmp_path: Path) -> None:
    """The row of a token that only the answer has; under a recorder, as `run` has one."""
    golden, clean = load_golden("llama_gqa"), golden_model("llama_gqa")
    prompt = [1, 2, 3]
    answer = et.generate(clean, prompt, max_new_tokens=6, temperature=0, ignore_eos=True).tokens
    later = next(token for token in answer if token not in prompt)
    weights = golden.weights | {EMBEDDING: golden.weights[EMBEDDING].copy()}
    weights[EMBEDDING][later] = np.nan
    model = et.load(write_folder(tmp_path / "folder", golden.config, weights))
    result = [Generation(prompt)]
    with Recorder() as recorder:
        error = error_of(lambda: list(decode_batch(model, result, Sampling(), Settings(6, ignore_eos=True))))
    assert "nan appears first in model.embed_tokens: the weight model.embed_tokens.weight" in error
    assert recorder.spans
    assert result[0].tokens == answer[: answer.index(later) + 1]


def test_a_draft_model_is_named(golden_model: Models, tmp_path: Path) -> None:
    model = golden_model("llama_gqa")
    draft = spoilt(tmp_path, "llama_gqa", "lm_head.weight")
    error = error_of(
        lambda: et.generate(model, [1, 2, 3], draft_model=draft, max_new_tokens=8, ignore_eos=True)
    )
    assert error.startswith(f"{draft.source}: nan appears first in the output head")


def test_adapters_are_weights_too(golden_model: Models) -> None:
    golden = load_golden("llama_gqa")
    adapted = with_lora(golden_model("llama_gqa"), LoRAConfig(target_modules=("up_proj",)))
    pair = dict(named_leaves(adapted.decoder))["layers.1.mlp.up_proj"]
    pair.b[...] = np.inf
    error = error_of(lambda: adapted.logits(golden.tokens))
    assert "the weight model.layers.1.mlp.up_proj.weight contains nan or inf" in error


def test_remove_invalid_values_repairs_as_transformers_does(tmp_path: Path) -> None:
    """nan becomes 0, so that the first token wins; the caller asked for it."""
    model = spoilt(tmp_path, "llama_gqa", "lm_head.weight")
    model = replace(model, generation_config={"remove_invalid_values": True})
    assert et.generate(model, [1, 2, 3], max_new_tokens=2, ignore_eos=True, temperature=0).tokens == [0, 0]
