"""Decode steps that are replayed have the logits and the cache of the program, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import einsum_transformer as et
from einsum_transformer.components import mixing
from einsum_transformer.components.cache_types import cache_type
from einsum_transformer.components.kv_cache import KVCache
from einsum_transformer.engine import Recorder, phase, replay
from einsum_transformer.leaves.frozen import Frozen
from einsum_transformer.leaves.watched import watched
from einsum_transformer.models.adapters import with_lora
from einsum_transformer.models.lora_config import LoRAConfig
from einsum_transformer.tree import map_named
from golden_files import MODELS, Folders, Models

PROMPT = 5
ALL_PATHS = [
    ("decode",),
    ("decode", "layer"),
    ("decode", "layer", "attention"),
    ("decode", "layer", "attention", "scores"),
]
MIXTURES = ("mixtral", "moe", "deepseek")
"""In these names: the router's values decide which experts compute."""
ALIBI = ("mpt_alibi", "mpt_clip")
"""Their biases are computed from the positions, outside of the recorded calls."""


@pytest.fixture(autouse=True)
def no_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "WARM_UP", 0)
    monkeypatch.setattr(replay, "LEAST", 4)


def tokens_of(model: et.Model, rows: int, most: int = 60) -> np.ndarray:
    count = min(most, model.config.max_position_embeddings)
    return np.random.default_rng(1).integers(0, model.config.vocab_size, (rows, count))


def as_program() -> Recorder:
    """A recorder under which steps are not replayed: it could replace values."""
    return Recorder(spans=False).on_value(lambda *_: None, "no value has this name")


def check(model: et.Model, tokens: np.ndarray, caches: list[KVCache] | None = None) -> int:
    """Decode with and without replays; returns how many steps were replayed."""
    cache, plain = caches or [model.cache(tokens.shape[1]) for _ in range(2)]
    start = cache.length
    for each in (cache, plain):
        model.decoder.forward(tokens[:, start : start + PROMPT], each, "last")
    repeated = 0
    for i in range(start + PROMPT, tokens.shape[1]):
        before = cache.steps.repeated
        logits, _ = model.decoder.forward(tokens[:, i : i + 1], cache, "last")
        repeated += cache.steps.repeated - before
        with as_program():
            expected, _ = model.decoder.forward(tokens[:, i : i + 1], plain, "last")
        np.testing.assert_array_equal(logits, expected)
    assert plain.steps.repeated == 0
    assert cache.length == plain.length == tokens.shape[1]
    return repeated


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_every_family(name: str, rows: int, golden_model: Models) -> None:
    model = golden_model(name)
    tokens = tokens_of(model, rows)
    repeated = check(model, tokens)
    if name in ALIBI or any(part in name for part in MIXTURES):
        assert repeated == 0
    elif model.config.windows == (None,) * len(model.config.windows):
        assert repeated == tokens.shape[1] - PROMPT - 3
    else:
        assert repeated >= 20  # the memory of a window is written from its beginning again and again


@pytest.mark.parametrize("name", ["llama_bias", "gemma2_caps", "phi_gqa"])
def test_float64(name: str, golden_model: Models) -> None:
    model = golden_model(name, "float64")
    assert check(model, tokens_of(model, 2)) > 20


def test_a_cache_that_grows(golden_model: Models) -> None:
    """It starts with 256 slots, and is copied to twice as many twice."""
    model = golden_model("llama_rope_yarn")
    model = replace(model, config=replace(model.config, max_position_embeddings=600))
    tokens = tokens_of(model, 1, 600)
    assert check(model, tokens, [model.cache() for _ in range(2)]) > 570


@pytest.mark.parametrize("slack", [0, 4])
def test_a_window_after_many_rounds(slack: int, golden_model: Models) -> None:
    model = golden_model("mistral_window")
    model = replace(model, config=replace(model.config, max_position_embeddings=200))
    tokens = tokens_of(model, 1, 200)
    assert check(model, tokens, [model.cache(slack=slack) for _ in range(2)]) > 80


def test_text_after_a_replay_and_a_shorter_cache(golden_model: Models) -> None:
    """Chunks between the steps, as in a chat and in speculative decoding."""
    model = golden_model("qwen3_tied")
    tokens = tokens_of(model, 1)
    caches = [model.cache(80) for _ in range(2)]
    repeated = check(model, tokens[:, :25], caches)
    repeated += check(model, tokens[:, :40], caches)
    for cache in caches:
        cache.truncate(17)
    assert repeated + check(model, tokens[:, :50], caches) == 17 + 10 + 28


@pytest.mark.parametrize("name", ["llama_rope_yarn", "mistral_window", "olmo3_two_ropes"])
def test_memory_that_moves_and_comes_back(name: str, golden_model: Models) -> None:
    """Long drafts are taken back, after the cache was copied to other slots for them."""
    model = golden_model(name)
    model = replace(model, config=replace(model.config, max_position_embeddings=600))
    tokens = tokens_of(model, 1, 600)
    caches = [model.cache(slack=300) for _ in range(2)]
    repeated = 0
    for length, draft in ((20, 3), (30, 280), (45, 4), (240, 60), (255, 100), (400, 150)):
        repeated += check(model, tokens[:, :length], caches)
        for cache in caches:
            model.decoder.forward(tokens[:, length : length + draft], cache)
            cache.truncate(length)
    assert repeated > 200


def recorded(model: et.Model, tokens: np.ndarray, recorder: Recorder) -> tuple[list[Any], int]:
    """Decode; return the records in their order without their times, and the number of replayed steps."""
    records: list[Any] = []
    recorder.on_span(lambda span: records.append(replace(span, start=0, seconds=0)))
    recorder.on_event(lambda event: records.append(replace(event, start=0, seconds=0)))
    cache = model.cache(tokens.shape[1])
    with recorder:
        for i in range(tokens.shape[1]):
            with phase("decode"):
                model.decoder.forward(tokens[:, i : i + 1], cache, "last")
    return records, cache.steps.repeated


@pytest.mark.parametrize("scheme", [None, "W8A8", "W4A16"])
@pytest.mark.parametrize(
    "name", ["llama_gqa", "gemma2_caps", "gpt2_plain", "mistral_window", "deepseek_plain"]
)
def test_replays_have_the_records_of_the_program(name: str, scheme: str | None, golden_model: Models) -> None:
    model = golden_model(name)
    model = model if scheme is None else et.quantize(model, scheme)
    tokens = tokens_of(model, 2)
    found, repeated = recorded(model, tokens, Recorder(spans=False))
    expected, none = recorded(model, tokens, as_program())
    assert found == expected
    assert none == 0
    assert repeated > 10 or model.config.moe is not None


def test_times_of_replays_are_inside_of_their_phases(golden_model: Models) -> None:
    model, recorder = golden_model("llama_gqa"), Recorder(events=True)
    _, repeated = recorded(model, tokens_of(model, 1), recorder)
    assert repeated > 20
    spans = {path: [span for span in recorder.spans if span.path == path] for path in ALL_PATHS}
    for path in ALL_PATHS[1:]:
        for span in spans[path]:
            outer = [
                each
                for each in spans[path[:-1]]
                if each.start <= span.start and span.start + span.seconds <= each.start + each.seconds + 1e-9
            ]
            assert len(outer) == 1
    for event in recorder.events:
        assert event.seconds >= 0
        around = [
            span
            for span in recorder.spans
            if span.path == event.path
            and span.start <= event.start
            and event.start + event.seconds <= span.start + span.seconds + 1e-9
        ]
        assert len(around) == 1


def test_another_recorder_gets_records(golden_model: Models) -> None:
    """A cache outlives a recording, as in a chat."""
    model = golden_model("llama_gqa")
    tokens, cache = tokens_of(model, 1), model.cache(80)
    for start in (0, 20, 40):
        recorder = Recorder(events=start > 0)
        with recorder:
            for i in range(start, start + 20):
                model.decoder.forward(tokens[:, i : i + 1], cache, "last")
        assert len([span for span in recorder.spans if span.path == ("head",)]) == 20
        heads = [event for event in recorder.events if event.path == ("head",) and event.weight]
        assert len(heads) == (20 if start else 0)
    assert cache.steps.repeated > 40


def test_rows_that_are_dropped(golden_model: Models) -> None:
    model = golden_model("llama_gqa")
    tokens = tokens_of(model, 3)
    caches = [model.cache(80) for _ in range(2)]
    check(model, tokens[:, :25], caches)
    for cache in caches:
        cache.select([2, 0])
    assert check(model, tokens[[2, 0]], caches) > 20


def test_rows_with_padding_run_as_a_program(golden_model: Models) -> None:
    model = golden_model("llama_gqa")
    caches = [model.cache(80, pads=np.array([0, 2])) for _ in range(2)]
    assert check(model, tokens_of(model, 2), caches) == 0
    assert "computed outside" in caches[0].steps.reason


def test_the_weights_of_another_decoder(golden_model: Models) -> None:
    """Two decoders of equal shapes with one cache."""
    model = golden_model("llama_gqa")
    other = replace(model, decoder=map_named(lambda _, weight: weight * 2, model.decoder))
    tokens, cache = tokens_of(model, 1), model.cache(80)
    plain = model.cache(80)
    for i in range(40):
        current = model if i // 10 % 2 else other
        logits, _ = current.decoder.forward(tokens[:, i : i + 1], cache)
        with as_program():
            expected, _ = current.decoder.forward(tokens[:, i : i + 1], plain)
        np.testing.assert_array_equal(logits, expected)


def test_leaves_in_memory(golden_model: Models) -> None:
    model = golden_model("llama_gqa")
    tokens = tokens_of(model, 1)
    adapted = with_lora(model, LoRAConfig(2, 3.0, "all-linear"), seed=1)
    frozen = replace(model, decoder=map_named(lambda _, weight: Frozen(weight), model.decoder))
    seen = replace(model, decoder=watched(model.decoder))
    expected = tokens.shape[1] - PROMPT - 3
    assert [check(each, tokens) for each in (adapted, frozen, seen)] == [expected] * 3


@pytest.mark.parametrize("scheme", ["W8A8", "W8A16", "W4A16", "W4A8,asymmetric", "W8A8g32", "W8A8,tensor"])
@pytest.mark.parametrize("rows", [1, 3, 12])
def test_quantized_weights(rows: int, scheme: str, golden_model: Models) -> None:
    model = et.quantize(golden_model("llama_gqa"), scheme)
    tokens = tokens_of(model, rows)
    assert check(model, tokens) == tokens.shape[1] - PROMPT - 3


@pytest.mark.parametrize("name", ["llama_gqa", "mistral_window"])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_quantized_caches(bits: int, name: str, golden_model: Models) -> None:
    model = replace(golden_model(name), cache_types=(cache_type(bits), cache_type(bits)))
    assert check(model, tokens_of(model, 2)) > 20


def test_leaves_in_a_file_run_as_a_program(golden_folder: Folders) -> None:
    """A replay would hold all of them in memory."""
    lazy = et.load(golden_folder("llama_gqa"), weight_budget=20_000)
    frozen = replace(lazy, decoder=map_named(lambda _, weight: Frozen(weight), lazy.decoder))
    tokens = tokens_of(lazy, 1)
    for model in (lazy, frozen):
        caches = [model.cache(60) for _ in range(2)]
        assert check(model, tokens, caches) == 0
        assert caches[0].steps.reason == "a weight is not in memory"


def test_sums_of_exponentials_out_of_range_run_as_a_program(
    golden_model: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sums of some tokens are declared inaccurate, and their scores are shifted by their maximum."""
    accurate = mixing._accurate
    monkeypatch.setattr(
        mixing, "_accurate", lambda total: accurate(total) and float(total.ravel()[0]) * 1000 % 4 < 3.9
    )
    model = golden_model("llama_gqa")
    tokens = tokens_of(model, 1)
    repeated = check(model, tokens)
    assert 10 < repeated < tokens.shape[1] - PROMPT - 3
