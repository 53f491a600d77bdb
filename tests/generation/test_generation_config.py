"""generation_config.json means what it means in transformers: its keys, their order and their defaults."""

from __future__ import annotations

import json
import logging
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import einsum_transformer as et
from einsum_transformer.errors import InputError
from einsum_transformer.generation import keys
from einsum_transformer.generation.decode import Generation, decode_batch, options
from einsum_transformer.generation.options import GenerationOptions
from einsum_transformer.generation.rows import Settings
from einsum_transformer.generation.sampling import Sampling
from golden_files import FOLDER, load_golden, write_folder
from tiny_models import successor_model, tiny_model

REFERENCE = json.loads((FOLDER / "generation_keys.json").read_text(encoding="utf-8"))
with np.load(FOLDER / "generation.npz") as file:
    GOLDEN = dict(file)
CASES = json.loads(str(GOLDEN["cases"]))
GENERATIONS = json.loads(str(GOLDEN["generations"]))
PLACES = len(GOLDEN["scores"]) // len(CASES)
ENDS = (3, 17)
COUNTER = successor_model(20, max_position_embeddings=512)
MODEL = tiny_model(eos_token_id=None)


def with_file(model: et.Model, **stated: Any) -> et.Model:
    return replace(model, generation_config=stated)


def test_every_key_of_the_reference_is_in_one_table() -> None:
    """The reference's names are those that GenerationConfig of this transformers stores or reads."""
    tables = (keys.OBEYED, keys.NEUTRAL, keys.UNSUPPORTED)
    for name in REFERENCE["keys"]:
        assert sum(name in table for table in tables) == 1, name
    older = {"return_legacy_cache", "forced_decoder_ids", "force_bos_token_to_be_generated"}
    known = {name for table in tables for name in table}
    assert known - set(REFERENCE["keys"]) == older | {"_original_object_hash"}


def test_the_tables_belong_to_the_dataclasses() -> None:
    assert {each.name for each in fields(Sampling)} == set(keys.SAMPLING)
    stored = {each.name for each in fields(Settings)}
    assert stored == (set(keys.SETTINGS) | set(keys.OWN)) - {"stop_strings"}
    known = {**keys.OBEYED, **keys.NEUTRAL, **keys.UNSUPPORTED}
    drafting = {"draft_model", "draft_layers", "prompt_lookup", "num_draft_tokens"}
    assert set(get_type_hints(GenerationOptions)) - drafting <= set(known | keys.OWN)
    assert set(keys.OBEYED) | set(keys.OWN) | drafting <= set(get_type_hints(GenerationOptions))


def test_the_reference_defaults_of_sampling() -> None:
    """top_k is 50 where `do_sample` is true; every other default is off."""
    found = Sampling.of(keys.merged({"do_sample": True}, {}))
    off = {"forced_eos_token_id": (), "exponential_decay_length_penalty": None, "bad_words_ids": ()}
    for name, value in REFERENCE["defaults"].items():
        if name in keys.SAMPLING:
            assert getattr(found, name) == (
                off.get(name, () if "suppress" in name else None) if value is None else value
            )


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: f"{i}-{'-'.join(CASES[i])}"[:80])
def test_scores_and_probabilities_of_the_reference(case: int, caplog: pytest.LogCaptureFixture) -> None:
    """Each processor, each filter and their combinations, on random scores and texts."""
    stated = {name: value for name, value in CASES[case].items() if name != "eos_token_id"}
    values = keys.merged(stated, {})
    sampling, settings = Sampling.of(values), Settings.of(values)
    for i in range(case * PLACES, (case + 1) * PLACES):
        prompt, length, *text = GOLDEN["texts"][i].tolist()
        sampler = sampling.sampler(text[:prompt], ENDS, prompt + settings.budget(prompt))
        given, expected = GOLDEN["scores"][i], GOLDEN["expected"][i]
        if stated["do_sample"]:
            found = sampler.probabilities(given, text[:length])
            np.testing.assert_array_equal(found > 0, expected > 0)
            np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-6)
            continue
        found = sampler.scores(given, text[:length])
        if stated.get("renormalize_logits"):
            found = found - np.log(np.exp(found.astype(np.float64)).sum())
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        assert sampler.choose(given, text[:length], np.random.default_rng(0)) == np.argmax(expected)
    assert not caplog.records


@pytest.mark.parametrize("case", GENERATIONS, ids=lambda case: f"{case['model']} {case['settings']}"[:80])
@pytest.mark.parametrize("way", ["file", "keywords", "speculation", "batch"])
def test_greedy_texts_of_the_reference(case: dict[str, Any], way: str, tmp_path: Path) -> None:
    """Lengths, forced ends and texts beyond max_position_embeddings, however they are asked for."""
    golden = load_golden(case["model"])
    model = et.load(write_folder(tmp_path, golden.config | case["changes"], golden.weights))
    prompt, settings, due = case["prompt"], case["settings"], case["tokens"]
    ends = model.config.eos_token_id
    due = due[: next((i for i, token in enumerate(due) if token in ends), len(due))]
    if way == "file":
        assert et.generate(with_file(model, **settings), prompt).tokens == due
    elif way == "keywords":
        assert et.generate(model, prompt, **settings).tokens == due
    elif way == "batch":
        # A neighbour of another length changes nothing.
        assert et.generate(model, [[5] * 9, prompt], **settings)[1].tokens == due
    else:
        for drafts in (1, 3, 8):
            result = et.generate(model, prompt, **settings, draft_model=model, num_draft_tokens=drafts)
            assert result.tokens == due
            looked = et.generate(model, prompt, **settings, prompt_lookup=True, num_draft_tokens=drafts)
            assert looked.tokens == due


class TestLengths:
    def test_max_length_counts_the_prompt(self) -> None:
        assert et.generate(with_file(COUNTER, max_length=5), [1, 2]).tokens == [3, 4, 5]
        assert et.generate(COUNTER, [1, 2], max_length=5).tokens == [3, 4, 5]
        assert [len(row.tokens) for row in et.generate(COUNTER, [[1], [1, 2]], max_length=5)] == [4, 3]

    def test_max_new_tokens_wins_over_max_length(self) -> None:
        model = with_file(COUNTER, max_length=4, max_new_tokens=3)
        assert len(et.generate(model, [1, 2, 3, 4, 5]).tokens) == 3

    def test_what_the_caller_says_wins_over_the_file(self) -> None:
        assert len(et.generate(with_file(COUNTER, max_new_tokens=9), [1], max_length=3).tokens) == 2
        assert len(et.generate(with_file(COUNTER, max_length=9), [1], max_new_tokens=3).tokens) == 3
        model = with_file(COUNTER, min_new_tokens=9, eos_token_id=4)
        assert et.generate(model, [1], max_new_tokens=9, min_length=2).tokens == [2, 3]

    def test_a_prompt_as_long_as_max_length(self) -> None:
        for length in (3, 4):
            with pytest.raises(InputError, match=r"has 4 tokens and max_length is .*max_new_tokens"):
                et.generate(with_file(COUNTER, max_length=length), [1, 2, 3, 4])

    def test_min_new_tokens_keeps_every_end_away(self) -> None:
        model = with_file(COUNTER, eos_token_id=[4, 5])
        assert et.generate(model, [1], max_new_tokens=9).tokens == [2, 3]
        result = et.generate(model, [1], max_new_tokens=9, min_new_tokens=4)
        assert len(result.tokens) >= 4
        assert not {4, 5} & set(result.tokens)

    def test_ends_outside_the_vocabulary_are_no_ends(self) -> None:
        model = with_file(COUNTER, eos_token_id=[1000, 4])
        assert et.generate(model, [1], max_new_tokens=9).tokens == [2, 3]
        assert len(et.generate(model, [1], min_new_tokens=3, max_new_tokens=5).tokens) >= 3
        decay = et.generate(model, [1], exponential_decay_length_penalty=(0, 2.0), max_new_tokens=5)
        assert decay.tokens == [2, 3]

    def test_eos_token_id_of_the_caller_replaces_the_model_s(self) -> None:
        model = with_file(COUNTER, eos_token_id=4)
        assert et.generate(model, [1], eos_token_id=7, max_new_tokens=20).tokens == [2, 3, 4, 5, 6]

    def test_max_time_ends_the_text(self) -> None:
        result = et.generate(COUNTER, [1], max_new_tokens=10**6, max_time=0)
        assert (len(result.tokens), result.finish_reason) == (1, "length")

    def test_the_forced_end_is_the_last_token_of_the_context(self) -> None:
        tokens = et.generate(COUNTER, [1], forced_eos_token_id=9, max_new_tokens=50, ctx_size=5).tokens
        assert tokens == [2, 3, 4, 5, 9]


class TestSampledOrGreedy:
    def test_do_sample_of_the_file_brings_top_k(self) -> None:
        assert options(with_file(MODEL, do_sample=True), {})[0].top_k == 50
        assert options(with_file(MODEL, do_sample=True, top_k=None), {})[0].top_k == 50
        assert options(with_file(MODEL, do_sample=True, top_k=0), {})[0].top_k == 0
        assert options(with_file(MODEL, do_sample=True), {"top_k": 7})[0].top_k == 7
        assert options(MODEL, {"do_sample": True})[0] == Sampling(1.0, 50)

    def test_a_temperature_of_the_caller_samples(self) -> None:
        """As in mlx-lm and llama.cpp; without a `do_sample` there is no top_k of its own."""
        for stated in ({}, {"do_sample": False}):
            assert options(with_file(MODEL, **stated), {"temperature": 0.7})[0] == Sampling(0.7)
        assert (
            options(with_file(MODEL, do_sample=True, temperature=0.3), {"temperature": 0.0})[0] == Sampling()
        )

    def test_do_sample_false_of_the_caller_is_greedy(self, caplog: pytest.LogCaptureFixture) -> None:
        model = with_file(MODEL, do_sample=True, temperature=0.6)
        assert options(model, {"do_sample": False})[0] == Sampling()
        assert not caplog.records
        assert options(model, {"do_sample": False, "temperature": 0.7})[0] == Sampling()
        assert "temperature has no effect" in caplog.text

    def test_temperature_zero_with_do_sample_is_greedy_and_noted(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert options(with_file(MODEL, do_sample=True, temperature=0.0), {})[0] == Sampling()
        assert "the text is greedy" in caplog.text

    def test_filters_without_a_temperature_are_noted(self, caplog: pytest.LogCaptureFixture) -> None:
        options(MODEL, {"top_p": 0.9, "top_k": 0, "min_p": 0.1, "typical_p": 1.0})
        assert [record.message for record in caplog.records] == [
            "top_p, min_p: no effect on greedy text; give a temperature above 0 to sample"
        ]
        caplog.clear()
        options(with_file(MODEL, top_p=0.9, top_k=3), {})
        options(MODEL, {"top_p": 0.9, "temperature": 0.5})
        assert not caplog.records


class TestWhatIsNotObeyed:
    def test_one_note_names_it(self, caplog: pytest.LogCaptureFixture) -> None:
        stated = {"num_beams": 4, "num_beam_groups": 1, "penalty_alpha": 0.6, "guidance_scale": 1.5}
        stated |= {"magic": 3, "use_cache": False, "cache_implementation": "hybrid", "pad_token_id": 0}
        result = et.generate(with_file(COUNTER, **stated), [1], max_new_tokens=2)
        assert result.tokens == [2, 3]
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        for words in ("num_beams = 4", "penalty_alpha = 0.6", "guidance_scale = 1.5", "not known: 'magic'"):
            assert words in caplog.text
        assert "num_beam_groups" not in caplog.text

    @pytest.mark.parametrize("name", sorted(keys.UNSUPPORTED))
    def test_each_is_noted_in_a_file_and_refused_as_a_keyword(
        self, name: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        value = {"watermarking_config": {"bias": 2.0}, "dola_layers": "low"}.get(name, 2)
        et.generate(with_file(COUNTER, **{name: value}), [1], max_new_tokens=1)
        assert name in caplog.text
        caplog.clear()
        with pytest.raises(InputError, match=f"^`{name}` is .* not supported"):
            et.generate(COUNTER, [1], **{name: value})
        for off in keys.UNSUPPORTED[name]:
            et.generate(with_file(COUNTER, **{name: off}), [1], max_new_tokens=1, **{name: off})
        assert not caplog.records

    @pytest.mark.parametrize("name", sorted(keys.NEUTRAL))
    def test_neutral_keys_are_taken_without_a_word(self, name: str, caplog: pytest.LogCaptureFixture) -> None:
        given: dict[str, Any] = {name: 1}
        assert et.generate(with_file(COUNTER, **given), [1], max_new_tokens=2).tokens == [2, 3]
        if name != "prompt_lookup_num_tokens":
            assert et.generate(COUNTER, [1], max_new_tokens=2, **given).tokens == [2, 3]
        assert not caplog.records

    @pytest.mark.parametrize(
        ("name", "hint"), [("top_kk", "top_k"), ("max_new_token", "max_new_tokens"), ("assistant_model", "")]
    )
    def test_a_misspelt_keyword(self, name: str, hint: str) -> None:
        with pytest.raises(InputError, match=f"no option '{name}'.*{hint}"):
            et.generate(COUNTER, [1], **{name: 3})

    def test_stop_and_stop_strings(self) -> None:
        with pytest.raises(InputError, match="give one of them"):
            et.generate(COUNTER, [1], stop="a", stop_strings="b")


MISTYPED: dict[str, list[Any]] = {
    "do_sample": ["yes", 1],
    "max_length": ["x", 0, 2.5],
    "max_time": ["x", -1],
    "min_new_tokens": ["x", -1, True],
    "min_length": [[1]],
    "stop_strings": [5, [5], [""], ""],
    "typical_p": [0, 1.5, "x"],
    "top_h": [0, 2, "x"],
    "epsilon_cutoff": [-1, 2],
    "eta_cutoff": ["x"],
    "no_repeat_ngram_size": [-1, 1.5],
    "encoder_no_repeat_ngram_size": ["x"],
    "encoder_repetition_penalty": [0, "x"],
    "bad_words_ids": [5, [5], [[]], [["a"]], [[-1]], "x"],
    "sequence_bias": [5, [[5, 1.0]], [[[5], "x"]], [[[5]]], {"5": 1.0}, [[[], 1.0]]],
    "suppress_tokens": ["x", [1.5], [True], {"a": 1}],
    "begin_suppress_tokens": [["x"]],
    "forced_bos_token_id": ["x", -1, [1]],
    "forced_eos_token_id": ["x", [None]],
    "exponential_decay_length_penalty": [3, [1], [1.5, 2.0], [1, "x"], [1, 0]],
    "remove_invalid_values": ["x", 1],
    "eos_token_id": ["x", [1.5]],
}


def test_every_obeyed_key_has_wrong_values() -> None:
    tested = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens"}
    assert set(MISTYPED) | tested == set(keys.OBEYED)


@pytest.mark.parametrize("name", MISTYPED)
def test_wrong_values_end_in_one_line(name: str) -> None:
    for value in MISTYPED[name]:
        for stated, keywords in (({name: value}, {}), ({}, {name: value})):
            with pytest.raises(InputError, match=name) as caught:
                et.generate(with_file(COUNTER, **stated), [1], **keywords)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        {"bad_words_ids": [[20]]},
        {"sequence_bias": [[[1, 99], 1.0]]},
        {"forced_eos_token_id": 20},
        {"forced_bos_token_id": 20},
    ],
    ids=str,
)
def test_tokens_outside_the_vocabulary(given: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(given))):
        et.generate(COUNTER, [1], max_new_tokens=1, **given)
    assert et.generate(COUNTER, [1], max_new_tokens=1, suppress_tokens=[-1, 99, 10**40]).tokens == [2]


def test_numbers_of_numpy_and_biases_of_minus_infinity() -> None:
    options_ = {"max_new_tokens": np.int64(2), "top_k": np.int32(1), "temperature": np.float32(0.5)}
    assert et.generate(COUNTER, [1], **options_).tokens == [2, 3]
    never = et.generate(COUNTER, [1], sequence_bias={(2,): -float("inf")}, max_new_tokens=1)
    assert never.tokens != [2]


def test_nothing_left_to_choose() -> None:
    for temperature in (0.0, 1.0):
        with pytest.raises(InputError, match="suppress every token"):
            et.generate(COUNTER, [1], suppress_tokens=list(range(20)), temperature=temperature)


def test_biases_of_python_and_of_json() -> None:
    pairs = Sampling(sequence_bias=[[[1, 2], 3.0], [[4], 1.0]])  # type: ignore[list-item]
    assert pairs == Sampling(sequence_bias={(1, 2): 3, (4,): 1.0})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.8},
        {"encoder_repetition_penalty": 0.5},
        {"no_repeat_ngram_size": 1},
        {"encoder_no_repeat_ngram_size": 2},
        {"max_length": 12},
    ],
    ids=str,
)
@pytest.mark.parametrize("drafts", [0, 3])
def test_a_continued_cache_is_part_of_the_text(settings: dict[str, Any], drafts: int) -> None:
    """In a chat the earlier turns count, as they do in transformers, where the input is the whole chat."""
    from einsum_transformer.generation.speculative import PromptLookup, Speculation

    turns = [5, 6, 7, 5, 6]
    whole = et.generate(MODEL, [*turns, 8], **{"max_new_tokens": 10} | settings).tokens
    cache = MODEL.cache(slack=drafts + 1)
    MODEL.decoder.forward(np.array([turns]), cache, "none")
    result = Generation([8])
    how = Speculation(PromptLookup(), drafts) if drafts else None
    budget = {} if "max_length" in settings else {"max_new_tokens": 10}
    list(decode_batch(MODEL, [result], *options(MODEL, budget | settings), cache, how))
    assert result.tokens == whole[: len(result.tokens)]
    assert len(result.tokens) == (6 if "max_length" in settings else 10)


SMALL = tiny_model(vocab_size=11, eos_token_id=3)
NUMBERS = st.sampled_from([0, 1, 2, 3, -1, 10, 10**40, 0.5, 1.5, -0.5, 1e300, float("nan"), -float("inf")])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.sampled_from(["", "x"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "3"]), inner, max_size=1)
    ),
    max_leaves=5,
)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    stated=st.dictionaries(st.sampled_from(sorted({**keys.OBEYED, **keys.UNSUPPORTED})), VALUES, max_size=3),
    given_=st.dictionaries(st.sampled_from(sorted(keys.OBEYED)), VALUES, max_size=2),
    sampled=st.booleans(),
)
def test_any_values_give_a_text_or_one_line(
    stated: dict[str, Any], given_: dict[str, Any], sampled: bool
) -> None:
    """The file comes from outside: no value of it ends in a traceback."""
    model = replace(SMALL, generation_config={"do_sample": sampled} | stated)
    said = ""
    try:
        result = et.generate(model, [1, 2, 3, 1, 2], ctx_size=14, seed=0, **given_)
        assert len(result.tokens) <= 10
    except InputError as error:
        said = str(error)
    assert "\n" not in said
