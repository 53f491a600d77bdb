"""The plan counts what a run does; closed forms and public figures agree with it."""

from __future__ import annotations

import gc
import json
import math
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import einsum_transformer as et
from einsum_transformer.analysis.devices import devices
from einsum_transformer.analysis.plan import Plan, PlanPhase
from einsum_transformer.engine import Recorder, ShapeArray, phase
from einsum_transformer.engine.shapes import Observer
from einsum_transformer.generation.rows import prefill
from einsum_transformer.models.config import Keys, ModelConfig
from einsum_transformer.models.families import family_of
from einsum_transformer.models.model import EMBEDDING
from einsum_transformer.tree import named_leaves
from golden_files import MODELS, Models

TOKENS = 23


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A measurement of this machine in the user's cache is not read."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def config_of(**keys: Any) -> ModelConfig:
    return family_of(keys["model_type"], "here").read_config(Keys(keys, "here"))


def executed(events: list[Any], name: str) -> Counter[tuple[tuple[str, ...], str]]:
    """FLOPs by phases and equation of the events of a run."""
    found: Counter[tuple[tuple[str, ...], str]] = Counter()
    for event in events:
        path = event.path if event.path[0] in ("forward", "loss", "backward") else (name, *event.path[1:])
        found[path, event.equation] += event.flops
    return found


def planned(found: PlanPhase) -> Counter[tuple[tuple[str, ...], str]]:
    counts: Counter[tuple[tuple[str, ...], str]] = Counter()
    for step in found.steps:
        counts[step.path, step.equation] += step.times * step.flops
    return counts


@pytest.mark.parametrize("name", MODELS)
def test_flops_and_bytes_are_those_of_a_run(name: str, golden_model: Models) -> None:
    model = golden_model(name)
    tokens = np.arange(2 * TOKENS).reshape(2, -1) % model.config.vocab_size
    found = et.plan(model, 2, TOKENS)
    cache = model.cache(TOKENS + 1, horizon=TOKENS + 1)
    with Recorder(spans=False, events=True) as recorder:
        with phase("prefill"):
            prefill(model, tokens, cache)
        first, kv_bytes = list(recorder.events), held(cache, TOKENS)
        recorder.events.clear()
        with phase("decode"):
            model.decoder.forward(tokens[:, :1], cache)
        second = list(recorder.events)
        recorder.events.clear()
        model.decoder.loss_and_gradient(tokens, tokens)
    for kind, events in (("prefill", first), ("decode", second), ("training", recorder.events)):
        assert planned(found.phase(kind)) == executed(events, kind)
    assert found.kv_bytes == kv_bytes
    weights = [leaf for _, leaf in named_leaves(model.decoder)]
    assert found.weight_bytes == sum(leaf.nbytes for leaf in weights)
    assert found.parameters == sum(leaf.size for leaf in weights)


def held(cache: Any, tokens: int) -> int:
    """Bytes of the slots of a cache that contain tokens."""
    found = 0
    for layer in cache.layers:
        used = min(tokens, getattr(layer, "window", tokens))
        found += sum(part[..., :used].nbytes for parts in layer._stored for part in parts)
    return found


@pytest.mark.parametrize("types", ["float16", "int8", "int4"])
def test_bytes_of_a_quantized_cache(types: str) -> None:
    model = replace(
        et.load("fast_lora", max_layers=2, cache_type_k=types, cache_type_v=types), run_config=None
    )
    cache = model.cache(TOKENS)
    prefill(model, np.arange(TOKENS)[None], cache)
    found = et.plan(model.config, 1, TOKENS, cache_type_k=types, cache_type_v=types)
    assert found.kv_bytes == held(cache, TOKENS)
    assert found.kv_cache == (types, types)


@pytest.mark.parametrize(
    "scheme", ["W8A8", "W8A16,asymmetric", "W4A16g64", "W3A8g32,asymmetric", "W2A16,tensor"]
)
def test_bytes_of_quantized_weights(scheme: str) -> None:
    model = et.load("fast_lora", max_layers=1, quantization=scheme)
    found = et.plan(model.config, 1, 8, quantization=scheme)
    assert found.weight_bytes == sum(leaf.nbytes for _, leaf in named_leaves(model.decoder))
    read = sum(
        leaf.nbytes for path, leaf in named_leaves(model.decoder) if leaf.ndim > 1 and path != EMBEDDING
    )
    assert found.phase("decode").total("weight_bytes") == pytest.approx(
        read, abs=4 * model.config.hidden_size
    )
    types = {step.dtype for step in found.phase("decode").steps if step.role == "up_proj"}
    assert types == {"int8" if "A8" in scheme else "float32"}


def test_bytes_of_bfloat16() -> None:
    model = et.load("fast_lora", max_layers=1, dtype="bfloat16")
    found = et.plan(model.config, 1, 8, dtype="bfloat16")
    assert found.weight_bytes == sum(leaf.nbytes for _, leaf in named_leaves(model.decoder))


def test_closed_forms() -> None:
    """2 N and 6 N per token for the matrices, 4 d per pair of a query and a key."""
    config = et.RunConfig("llama", n_layers=3).model_config()
    config = replace(config, tie_word_embeddings=False)
    rows, tokens = 2, 200
    found = et.plan(config, rows, tokens)
    d, v, heads = config.hidden_size, config.vocab_size, config.num_attention_heads
    matrices = sum(
        math.prod(weight.shape)
        for path, weight in named_leaves(et.load(et.RunConfig("llama", n_layers=3)).decoder)
        if len(weight.shape) > 1 and "layers" in path
    )
    count, pairs = rows * tokens, rows * heads * tokens * (tokens + 1) // 2
    roles = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}

    def of_matrices(name: str) -> int:
        steps = found.phase(name).steps
        return sum(
            step.times * step.flops
            for step in steps
            if step.role.removeprefix("d") in roles or step.role == "down_proj"
        )

    assert of_matrices("prefill") == 2 * count * matrices + 2 * rows * d * v
    assert of_matrices("decode") == 2 * rows * (matrices + d * v)
    assert of_matrices("training") == 6 * count * (matrices + d * v)
    scores = [step for step in found.phase("prefill").steps if step.equation in SCORES]
    assert len(scores) == 2
    assert sum(step.times * step.flops_causal for step in scores) == 3 * 4 * pairs * config.head_dim
    dense = rows * heads * tokens * tokens
    assert sum(step.times * step.flops_dense for step in scores) == 3 * 4 * dense * config.head_dim
    assert found.kv_bytes == rows * tokens * 3 * 2 * config.num_key_value_heads * config.head_dim * 4


SCORES = ("btkgh,bskh->bkgts", "bkgts,bskh->btkgh")


def test_pairs_inside_a_window() -> None:
    config = replace(et.RunConfig("mistral", n_layers=2).model_config(), sliding_window=50)
    found = et.plan(config, 1, 300).phase("prefill")
    pairs = sum(min(q + 1, 50) for q in range(300)) * config.num_attention_heads
    scores = [step for step in found.steps if step.equation in SCORES]
    assert sum(step.times * step.flops_causal for step in scores) == 2 * 4 * pairs * config.head_dim
    decode = et.plan(config, 1, 300).phase("decode")
    scores = [step for step in decode.steps if step.equation in SCORES]
    assert (
        sum(step.times * step.flops_causal for step in scores)
        == 2 * 4 * 50 * config.num_attention_heads * config.head_dim
    )


LLAMA = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "rope_theta": 5e5}
PUBLIC: dict[str, tuple[dict[str, Any], int, int, int]] = {
    # Parameters as in the files on the hub (the model cards round them), active parameters, elements of the
    # KV cache per token.
    "Llama-3.1-8B": (
        LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                 "num_attention_heads": 32},
        8_030_261_248, 8_030_261_248, 32 * 2 * 1024,
    ),
    "Llama-3.1-405B": (
        LLAMA | {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126,
                 "num_attention_heads": 128},
        405_853_388_800, 405_853_388_800, 126 * 2 * 1024,
    ),
    "Qwen2.5-7B": (
        {"model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
         "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4},
        7_615_616_512, 7_615_616_512, 28 * 2 * 512,
    ),
    "Mixtral-8x7B": (
        {"model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
         "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
         "num_local_experts": 8},
        46_702_792_704, 12_879_925_248, 32 * 2 * 1024,
    ),
    # The paper reports 34.6 k elements for its large model with latent attention.
    "DeepSeek-V2": (
        {"model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 5120, "intermediate_size": 12288,
         "moe_intermediate_size": 1536, "num_hidden_layers": 60, "num_attention_heads": 128,
         "num_key_value_heads": 128, "n_routed_experts": 160, "n_shared_experts": 2,
         "num_experts_per_tok": 6, "first_k_dense_replace": 1, "kv_lora_rank": 512, "q_lora_rank": 1536,
         "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "topk_method": "greedy"},
        235_741_434_880, 21_375_800_320, 34_560,
    ),
    "gpt2": ({"model_type": "gpt2"}, 124_439_808, 124_439_808, 12 * 2 * 768),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLIC)
def test_public_figures(name: str) -> None:
    keys, parameters, active, cached = PUBLIC[name]
    found = et.plan(config_of(**keys), 1, 16)
    assert (found.parameters, found.active_parameters) == (parameters, active)
    assert found.kv_bytes_per_token == 4 * cached


CHINCHILLA = [
    # Layers, d_model, ffw_size, heads: Table A4 of Hoffmann et al. (2022).
    (10, 640, 2560, 10), (20, 1024, 4096, 16), (24, 1280, 5120, 10),
    (26, 1792, 7168, 14), (28, 2048, 8192, 16), (40, 3584, 14336, 28),
]  # fmt: skip


@pytest.mark.parametrize(("layers", "width", "inner", "heads"), CHINCHILLA)
def test_flops_of_the_paper_of_chinchilla(layers: int, width: int, inner: int, heads: int) -> None:
    """Appendix F of Hoffmann et al. (2022), without its two terms that are no products here: the embedding as
    a product with one-hot rows, and the softmax. As there, the backward pass costs twice the forward pass."""
    length, vocabulary = 1024, 32000
    keys = {"model_type": "mpt", "d_model": width, "n_heads": heads, "n_layers": layers}
    more = {"expansion_ratio": inner // width, "vocab_size": vocabulary, "max_seq_len": length}
    found = et.plan(config_of(**keys, **more), 1, length).phase("training")
    attention = 2 * 3 * length * width * width + 2 * 2 * length * length * width + 2 * length * width * width
    dense = 2 * length * 2 * width * inner
    logits = 2 * length * width * vocabulary
    forward = layers * (attention + dense) + logits
    counts = {"forward": 0, "backward": 0}
    for step in found.steps:
        is_product = {"h", "s"} <= set(step.sizes) or (len(step.sizes) > 3 and "d" in step.sizes)
        if is_product and step.path[0] in counts:
            counts[step.path[0]] += step.times * step.flops_dense
    assert counts["forward"] == forward
    # The backward pass computes the scores again instead of saving them.
    assert counts["backward"] == 2 * forward + layers * 2 * length * length * width


def test_flops_of_published_trainings() -> None:
    """The paper of Llama 3 (2024) reports 3.8e25 FLOPs for 15.6e12 tokens: six times parameters and tokens.

    Products of matrices are 0.5 % fewer, because the embedding is a look-up. Causal attention over 8,192
    tokens, which the estimate leaves out, adds 4 %. The paper of GPT-3 reports 2.25e20 FLOPs for 300e9 tokens
    of its smallest model, with 125e6 for 124.4e6 parameters.
    """
    found = et.plan(config_of(**PUBLIC["Llama-3.1-405B"][0]), 1, 128).phase("training")
    matrices = sum(
        step.times * step.flops
        for step in found.steps
        if step.path[0] == "forward" and not {"s"} & set(step.sizes)
    )
    trained = 3 * matrices / 128 * 15.6e12
    assert trained == pytest.approx(3.8e25, rel=0.01)
    parameters = 405_853_388_800
    assert 3 * matrices / 128 == pytest.approx(6 * (parameters - 128256 * 16384), rel=1e-3)
    attention = 3 * 126 * 2 * 2 * 16384 * 8192 / 2
    assert attention / (3 * matrices / 128) == pytest.approx(0.042, abs=0.002)
    small = et.plan(config_of(model_type="gpt2"), 1, 128).phase("training")
    matrices = sum(
        step.times * step.flops
        for step in small.steps
        if step.path[0] == "forward" and not {"s"} & set(step.sizes)
    )
    assert 3 * matrices / 128 * 300e9 == pytest.approx(2.25e20 * 124.4 / 125, rel=0.01)


def test_peak_memory_of_a_run() -> None:
    """The peak of all arrays that NumPy allocates, within 10 %."""
    model = et.load("fast_lora", max_layers=4)
    tokens = np.arange(1024).reshape(4, 256)
    adapted = et.with_lora(model, et.LoRAConfig(r=8))
    found = et.plan(model.config, 4, 256)

    def peak(run: Any) -> int:
        run()
        gc.collect()
        tracemalloc.start()
        run()
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    full, lora, _ = found.training
    for each, ledger in ((model, full), (adapted, lora)):
        expected = ledger.peak - ledger.weights - ledger.optimizer
        assert peak(lambda each=each: each.decoder.loss_and_gradient(tokens, tokens)) == pytest.approx(
            expected, rel=0.1
        )
    cache = model.cache(258)
    model.decoder.forward(tokens[:, :1], cache)
    measured = peak(lambda: (cache.truncate(0), prefill(model, tokens, cache)))
    assert measured == pytest.approx(found.phase("prefill").peak_bytes, rel=0.15)


def test_bfloat16_replaces_the_quantization_of_a_config(caplog: pytest.LogCaptureFixture) -> None:
    config = et.RunConfig("llama", quantization="W8A16")
    plan = et.plan(config, 1, 8, dtype="bfloat16")
    assert plan.quantization == "bfloat16"
    assert "the quantization W8A16 is not used with `dtype` bfloat16" in caplog.text
    with pytest.raises(et.InputError, match="excludes"):
        et.plan(config, 1, 8, dtype="bfloat16", quantization="W8A16")


def test_recomputed_blocks_save_less() -> None:
    config = et.RunConfig("llama").model_config()
    kept, recomputed = (et.plan(config, 4, 256, recompute=each).training[0] for each in (False, True))
    assert recomputed.saved < kept.saved / 5
    assert recomputed.peak < kept.peak
    assert et.plan(config, 1, 8, optimizer="sgd").training[0].optimizer == 0


def test_a_large_model_and_other_machines() -> None:
    found = et.plan(config_of(**PUBLIC["Llama-3.1-405B"][0]), 1, 128, dtype="bfloat16")
    estimates = found.estimates()
    assert [each.device for each in estimates if each.holds] == []
    small = et.plan(config_of(**PUBLIC["Llama-3.1-8B"][0]), 1, 128, dtype="bfloat16")
    holds = [each.device for each in small.estimates() if each.holds]
    assert holds[0] == "NVIDIA GeForce RTX 4090"
    assert "yes, the smallest" in str(small)
    card = next(each for each in small.estimates() if each.device == "NVIDIA H100 SXM")
    # A decoded token reads all weights but the embedding once.
    assert card.seconds["decode"] == pytest.approx(2 * (8_030_261_248 - 128256 * 4096) / 3.35e12, rel=0.02)
    assert card.compute_bound["decode"] < 0.01
    assert all(each.source for each in devices())
    assert json.loads(json.dumps(found.to_dict()))["devices"][0]["source"]


def test_tables() -> None:
    config = et.RunConfig("mixtral", n_layers=2)
    found = et.plan(config, 1, 32)
    assert isinstance(found, Plan)
    text = str(found)
    assert "active per token" in text
    for part in (
        "experts",
        "router",
        "attention: scores + softmax",
        "backward: output head",
        "cross-entropy",
    ):
        assert part in text
    assert et.plan("mixtral", 1, 8).model == "mixtral"
    assert et.plan("fast_lora").tokens == 128


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": 0}, "`tokens` is 0: expected 1 to"),
        ({"batch": 1 << 20}, "`batch` is 1048576: expected 1 to"),
        ({"quantization": "W5A8"}, "quantization 'W5A8'"),
        ({"quantization": "W8A8", "dtype": "bfloat16"}, "`dtype` bfloat16 excludes `quantization`"),
        ({"cache_type_k": "int3"}, "`cache_type_k` is 'int3'"),
    ],
)
def test_what_is_rejected(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(et.InputError, match=message):
        et.plan("fast_lora", **settings)
    config = config_of(model_type="gpt2")
    with pytest.raises(et.InputError, match="expected at most 1023, one less than the learned positions"):
        et.plan(config, tokens=1024)


def test_an_array_counts_until_its_last_view_is_deleted() -> None:
    seen: list[tuple[str, int]] = []
    with Observer(lambda name, elements, dtype: seen.append((name, elements))) as observer:
        a = ShapeArray((10, 20))
        assert observer.live == 800
        view = a.reshape(200)[5:9]
        del a
        assert (observer.live, observer.peak()) == (800, 800)
        b = view + view
        assert observer.live == 816
        b += 1
        c = np.moveaxis(b[None], 0, -1)
        del view, b
        assert observer.live == 16
        assert c.sum().size == 1
        with pytest.raises(RuntimeError, match="another Observer"):
            Observer().__enter__()
        ShapeArray.unallocated((1 << 40,))
        assert observer.peak() == 816
    assert seen == [("add", 4), ("add", 4), ("add.reduce", 4)]
    ShapeArray((5,))
