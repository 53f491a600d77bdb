"""explain(): the dry run records what a real run does, and costs what the letters say."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import einsum_transformer as et
from einsum_transformer.analysis.dry_run import distinct
from einsum_transformer.analysis.explain import _layer_names
from einsum_transformer.engine import Recorder, ShapeArray, blas
from einsum_transformer.formats.files import read_json
from einsum_transformer.models.adapters import with_lora
from einsum_transformer.models.builder import build, weights_of
from einsum_transformer.models.config import Keys
from einsum_transformer.models.families import family_of
from einsum_transformer.models.lora_config import LoRAConfig
from einsum_transformer.models.parameters import trainable
from einsum_transformer.models.run_config import override, parse_run_config
from golden_files import MODELS, Models, load_golden
from tiny_models import config_of, tiny_model

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.json"))
HUGE = {
    "vocab_size": 128256,
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
ATTENTION = {"scores", "mix"}


@pytest.mark.parametrize("name", MODELS)
def test_every_family_has_a_program(name: str, golden_model: Models) -> None:
    """Also backward, which costs at least half as much more than forward."""
    program = et.explain(golden_model(name), tokens=6, backward=True)
    forward, backward = (program.totals(direction)["flops"] for direction in ("forward", "backward"))
    assert backward > 1.5 * forward > 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tokens": 10**20}, "tokens` is 1000.*: expected 1 to 262,144"),
        ({"batch": 0}, "batch` is 0: expected 1 to"),
        ({"tokens": 41}, "tokens` is 41: expected at most the 40 learned positions of this gpt2"),
    ],
)
def test_programs_that_are_refused(changed: dict[str, int], message: str, golden_model: Models) -> None:
    with pytest.raises(et.InputError, match=message):
        et.explain(golden_model("gpt2_plain"), **changed)


def test_projections_cost_two_flops_a_parameter_and_token() -> None:
    config = config_of()
    program = et.explain(config, batch=3, tokens=7)
    matrices = [weight for weight in weights_of(config) if len(weight.stored) == 2]
    used = sum(prod(weight.stored) for weight in matrices if weight.path != "embed_tokens.weight")
    named = {weight.path.removesuffix(".weight").rpartition(".")[2] for weight in matrices}
    projections = [step for step in program.steps if step.role in named]
    assert sum(step.times * step.flops for step in projections) == 2 * 3 * 7 * used
    assert program.parameters == sum(prod(weight.stored) for weight in weights_of(config))


def test_attention_costs_the_scores_it_computes() -> None:
    """One block of queries sees all keys; a second one halves what the first needs no more."""
    config = replace(config_of(), attention_block=16)
    per_score = 4 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    for tokens, scores in ((16, 16 * 16), (32, 16 * 16 + 16 * 32)):
        program = et.explain(config, tokens=tokens)
        products = [step for step in program.steps if step.role in ATTENTION and step.equation.count("h") > 1]
        assert sum(step.times * step.flops for step in products) == per_score * scores


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    "changes", [{}, {"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": True}]
)
def test_the_dry_run_is_the_run(changes: dict[str, Any], backward: bool) -> None:
    """Every equation of a real pass, as often, with the same FLOPs and bytes."""
    model = tiny_model(**changes)
    tokens = np.arange(24).reshape(2, 12)
    with Recorder(events=True) as recorder:
        logits, saved = model.decoder.forward(tokens, keep=backward)
        if backward:
            model.decoder.backward(logits, saved)
    real, dry = Counter(), Counter()
    for event in recorder.events:
        real[event.equation] += np.array([1, event.flops, event.bytes])
    program = et.explain(model, batch=2, tokens=12, backward=backward)
    for step in program.steps:
        dry[step.equation] += step.times * np.array(
            [step.calls, step.flops, step.bytes_read + step.bytes_written]
        )
    assert {equation: tuple(cost) for equation, cost in real.items()} == {
        equation: tuple(cost) for equation, cost in dry.items()
    }


ADAPTED: dict[str, Any] = {
    "llama_gqa": ("q_proj", "down_proj"),
    "llama_mha_tied": ("embed_tokens", "lm_head", "q_proj"),
    "llama_bias": "all-linear",
    "gemma2_caps": "all-linear",
    "gpt2_plain": ("c_attn", "c_fc", "wte"),
    "phi3_window": ("qkv_proj",),
    "olmo2_gqa": r".*layers\.1\..*",
    "mixtral_window": "all-linear",
    "qwen2_moe_dense_layer": "all-linear",
    "deepseek_plain": "all-linear",
    "deepseek_v2_direct": "all-linear",
}
"""Golden model -> targets of the adapter on it."""


@pytest.mark.parametrize("name", ADAPTED)
def test_adapters_cost_what_a_recorder_counts(name: str, golden_model: Models) -> None:
    """Forward and backward, of a model whose weights are frozen but for the adapters."""
    model = with_lora(golden_model(name), LoRAConfig(3, 4.0, ADAPTED[name]))
    tokens = load_golden(name).tokens
    with Recorder(events=True) as recorder:
        logits, saved = model.decoder.forward(tokens, keep=True)
        forward = sum(event.flops for event in recorder.events)
        model.decoder.backward(logits, saved)
    program = et.explain(model, *tokens.shape, backward=True)
    assert program.totals("forward")["flops"] == forward
    assert program.flops == sum(event.flops for event in recorder.events)
    assert program.adapters == sum(w.size for w in trainable(model.decoder).values())
    assert "LoRA adapters of" in str(program)


def test_a_config_that_trains_adapters_has_their_program() -> None:
    """The figures are a recorder's, of one row of 128 tokens; without use_lora all weights have gradients."""
    path = Path(__file__).parents[2] / "configs" / "lora_test.json"
    config = parse_run_config(read_json(path), str(path))
    program = et.explain(config, tokens=128, backward=True)
    assert program.totals("forward")["flops"] == 8_893_169_664
    assert program.totals("backward")["flops"] == 9_354_608_640
    program = et.explain(override(config, ["use_lora=false"]), tokens=128, backward=True)
    assert program.totals("backward")["flops"] == 17_858_691_072


def test_backward_of_the_projections_costs_twice_their_forward() -> None:
    program = et.explain(config_of(), tokens=9, backward=True)
    names = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}
    forward, through, weights = (
        sum(
            step.times * step.flops
            for step in program.steps
            if step.path[0] == direction and step.role in roles
        )
        for direction, roles in (
            ("forward", names),
            ("backward", names),
            ("backward", {f"d{name}" for name in names}),
        )
    )
    assert forward == through == weights


def test_405_billion_parameters_without_a_weight() -> None:
    program = et.explain(config_of(**HUGE), backward=True)
    assert round(program.parameters / 1e9) == 406
    assert {step.layers for step in program.steps} == {(), tuple(range(126))}
    forward = program.totals("forward")["flops"]
    assert forward == pytest.approx(2 * 128 * (program.parameters - 128256 * 16384), rel=5e-3)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_ready_configs(path: Path) -> None:
    billions = {"llama": 3.213, "mistral": 7.242, "qwen": 7.616, "fast_lora": 0.0357, "lora_test": 0.0357}
    billions |= {"phi": 2.780, "gemma": 2.506, "mixtral": 46.70, "qwen2_moe": 14.316}
    program = et.explain(parse_run_config(read_json(path), str(path)), tokens=4)
    assert program.parameters / 1e9 == pytest.approx(billions[path.stem], rel=2e-3)


def test_there_are_ready_configs() -> None:
    families = {"llama", "mistral", "qwen", "phi", "gemma", "mixtral", "qwen2_moe"}
    assert {path.stem for path in CONFIGS} >= families | {"fast_lora", "lora_test"}


def test_print_and_json_agree() -> None:
    program = et.explain(config_of(), batch=2, tokens=300, backward=True)
    printed = str(program)
    assert max(map(len, printed.splitlines())) <= 100
    told = json.loads(json.dumps(program.to_dict()))
    for step in told["steps"]:
        assert f" {step['equation']} " in printed
        assert step["role"] in printed
    assert told["totals"]["forward"] == program.totals("forward")
    assert sum(told["totals"][name]["flops"] for name in ("forward", "backward")) == program.flops
    assert set(told["letters"]) == set("".join(step["equation"] for step in told["steps"])) - set(",->")


def test_layers_that_differ_are_told_apart() -> None:
    decoder = build(config_of(num_hidden_layers=5), lambda weight: ShapeArray(weight.shape))
    attention = decoder.layers[1].self_attn
    windowed = replace(attention, mixing=replace(attention.mixing, window=4))
    odd = replace(decoder.layers[1], self_attn=windowed)
    layers = tuple(odd if i % 2 else block for i, block in enumerate(decoder.layers))
    blocks, members = distinct(replace(decoder, layers=layers))
    assert [block.self_attn.mixing.window for block in blocks] == [None, 4]
    assert members == [(0, 2, 4), (1, 3)]
    names = [_layer_names(found) for found in ((7,), (0, 1, 2), (0, 2, 4))]
    assert names == ["layer 7", "layers 0-2, each of 3", "layers 0, 2, ... 4, each of 3"]


def test_tiles_that_would_go_to_threads_know_their_phases() -> None:
    before = blas.get_threads()
    blas.set_threads(2)
    try:
        program = et.explain(config_of(), batch=4, tokens=2048)
        assert blas.get_threads() == 2
    finally:
        blas.set_threads(before)
    roles = {step.role for step in program.steps if step.path[:3] == ("forward", "layer", "attention")}
    assert roles == {"q_proj", "k_proj", "v_proj", "scores", "mix", "o_proj"}


@pytest.mark.parametrize("settings", [{"batch": 0}, {"tokens": -1}])
def test_sizes_below_one_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(et.InputError, match=next(iter(settings))):
        et.explain(config_of(), **settings)


def test_what_is_not_a_source() -> None:
    with pytest.raises(et.InputError, match=r"explain\(\): `source` is 3 \(int\), expected Model, str, Path"):
        et.explain(3)  # type: ignore[arg-type]
    with pytest.raises(et.InputError, match=r"config\.json: no such file"):
        et.explain("config.json")


def test_a_dry_array_passes_checks_and_never_becomes_numbers() -> None:
    x = ShapeArray((2, 3))
    assert x.min() >= 5
    with pytest.raises(ValueError, match="ambiguous"):
        bool(x > 0)
    with pytest.raises(TypeError, match=r"\(2, 3\) in a dry run has no data"):
        np.asarray(x)


def test_experts_keep_their_names_behind_dense_layers() -> None:
    """The dry run has one layer of each kind, so its numbers of layers are not those of the model."""
    raw = {"model_type": "qwen3_moe", "num_hidden_layers": 5, "mlp_only_layers": [0, 1, 2], "num_experts": 4}
    raw |= {"num_experts_per_tok": 2, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    raw |= {"head_dim": 8, "intermediate_size": 40, "moe_intermediate_size": 16, "vocab_size": 61}
    config = family_of("qwen3_moe", "here").read_config(Keys(raw, "here"))
    steps = et.explain(config, tokens=8, backward=True).steps
    roles = {step.role for step in steps if step.layers == (3, 4)}
    assert {"gate", "gate_proj", "up_proj", "down_proj", "dgate_proj", "dup_proj"} <= roles
    assert all(step.role not in ("router", "experts") for step in steps if "fd" in step.equation)
