"""Speculative decoding changes the time alone: greedily the same text, sampled the same distribution."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import einsum_transformer as et
from einsum_transformer.components.kv_cache import layer_cache
from einsum_transformer.errors import InputError
from einsum_transformer.generation import speculative
from einsum_transformer.generation.decode import decode_batch
from einsum_transformer.generation.rows import Generation, Settings
from einsum_transformer.generation.sampling import Sampling
from einsum_transformer.generation.speculative import (
    Draft,
    Drafter,
    ModelDrafter,
    PromptLookup,
    Speculation,
    first_layers,
)
from tiny_models import make_tokenizer, tiny_model

Array = np.ndarray
VOCAB, NEW, PROMPTS = 23, 64, 200
SIZES = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 4}
# In float64 no two scores are so near each other that the rounding of one pass or another decides.
MODELS = {
    "plain": tiny_model("float64", num_hidden_layers=3, eos_token_id=None, **SIZES),
    "window": tiny_model(
        "float64", model_type="mistral", sliding_window=9, num_hidden_layers=2, eos_token_id=None, **SIZES
    ),
}
RANDOM = tiny_model("float64", seed=5, num_hidden_layers=1, **SIZES)
GREEDY = Sampling()
TEXTS = np.random.default_rng(0).integers(0, VOCAB, (PROMPTS, 12))
LENGTHS = np.random.default_rng(1).integers(1, 13, PROMPTS)


class AlwaysWrong(Drafter):
    """Drafts what the model will not say: its likeliest token plus one."""

    def __init__(self, model: et.Model) -> None:
        self.model = model

    def propose(self, history: Any, count: int, sampling: Sampling, rng: np.random.Generator) -> Draft:
        text, tokens = list(history), []
        for _ in range(count):
            right = int(self.model.logits([text])[0, -1].argmax())
            text.append((right + 1) % VOCAB)
            tokens.append(text[-1])
        return Draft(tokens, [None] * count)

    def settle(self, kept: int) -> None:
        pass


def drafters(model: et.Model, k: int) -> dict[str, Drafter]:
    """Good, random, always wrong, and the model itself."""
    return {
        "good": ModelDrafter(first_layers(model, model.config.num_hidden_layers - 1), k + 1),
        "random": ModelDrafter(RANDOM, k + 1),
        "always wrong": AlwaysWrong(model),
        "itself": ModelDrafter(model, k + 1),
        "look-up": PromptLookup(),
    }


def plain_text(model: et.Model, prompt: list[int], **settings: Any) -> list[int]:
    return et.generate(model, prompt, temperature=0, ignore_eos=True, **settings).tokens


EXPECTED: dict[tuple[str, int], list[int]] = {}


def expected(name: str, i: int) -> list[int]:
    if (name, i) not in EXPECTED:
        EXPECTED[name, i] = plain_text(MODELS[name], prompt_of(i), max_new_tokens=NEW)
    return EXPECTED[name, i]


def prompt_of(i: int) -> list[int]:
    return TEXTS[i, : LENGTHS[i]].tolist()


def speculated(model: et.Model, prompt: list[int], drafter: Drafter, k: int, new: int = NEW) -> Generation:
    """The greedy text, with the lengths of both caches checked after every round."""
    result, cache = Generation(prompt), model.cache(slack=k + 1)
    how = Speculation(drafter, k)
    for _ in decode_batch(model, [result], GREEDY, Settings(new, ignore_eos=True), cache, how):
        # The last token of the text is in no cache yet.
        assert cache.length == len(prompt) + len(result.tokens) - 1
        assert {layer.length for layer in cache.layers} == {cache.length}
        assert cache.tokens[0].tolist() == [*prompt, *result.tokens][:-1]
        if isinstance(drafter, ModelDrafter):
            assert drafter.cache.length <= cache.length
            assert drafter.cache.tokens.ravel().tolist() == [*prompt, *result.tokens][: drafter.cache.length]
    return result


KINDS = ("good", "random", "always wrong", "itself", "look-up")


@pytest.mark.parametrize("k", range(1, 7))
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_the_same(kind: str, k: int) -> None:
    """Some of the prompts with every kind of draft and every length of it; slow: all of them with all."""
    start = KINDS.index(kind) * 6 + k - 1
    for i in range(start, PROMPTS, 60):
        model = MODELS["plain"]
        assert speculated(model, prompt_of(i), drafters(model, k)[kind], k).tokens == expected("plain", i)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("k", range(1, 7))
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_of_all_prompts_is_the_same(kind: str, k: int) -> None:
    model = MODELS["plain"]
    for i in range(PROMPTS):
        assert speculated(model, prompt_of(i), drafters(model, k)[kind], k).tokens == expected("plain", i)


@pytest.mark.parametrize("k", [1, 4, 6, 11])
@pytest.mark.parametrize("kind", KINDS)
def test_with_a_window(kind: str, k: int) -> None:
    """Drafts are taken back across its edge, also ones that are longer than the window."""
    model = MODELS["window"]
    for i in range(3):
        assert speculated(model, prompt_of(i), drafters(model, k)[kind], k).tokens == expected("window", i)


def test_kept_drafts_of_each_kind() -> None:
    """The model agrees with itself, never with what it would not say; statistics say so."""
    model, k = MODELS["plain"], 4
    found = {}
    for kind in KINDS:
        result = speculated(model, prompt_of(3), drafters(model, k)[kind], k)
        found[kind] = result.speculation
    assert set(found["itself"]["acceptance"]) == {1.0}
    assert set(found["always wrong"]["acceptance"]) == {0.0}
    assert found["always wrong"]["tokens_per_round"] == 1
    assert found["itself"]["rounds"] == -(-(NEW - 2) // (k + 1))
    for numbers in found.values():
        assert numbers["new_tokens"] == sum(numbers["accepted"]) + numbers["rounds"]
        assert numbers["speed_up"] > 0


@pytest.mark.parametrize("new", range(1, 9))
def test_never_a_token_too_many(new: int) -> None:
    """The budget ends in the middle of a draft."""
    model = MODELS["plain"]
    result = speculated(model, prompt_of(0), ModelDrafter(model, 6), 5, new)
    assert result.tokens == expected("plain", 0)[:new]
    assert result.finish_reason == "length"


@pytest.mark.parametrize("context", range(13, 22))
def test_the_context_ends(context: int) -> None:
    model = MODELS["plain"]
    prompt = TEXTS[0].tolist()
    settings: dict[str, Any] = {"max_new_tokens": NEW, "ctx_size": context, "ignore_eos": True}
    plain = et.generate(model, prompt, temperature=0, **settings)
    fast = et.generate(model, prompt, temperature=0, draft_model=model, num_draft_tokens=6, **settings)
    assert (fast.tokens, fast.finish_reason) == (plain.tokens, plain.finish_reason)


def test_an_end_token_in_the_middle_of_a_draft() -> None:
    """The text ends there, and the cache holds what it would hold without drafts."""
    text = expected("plain", 1)
    for end in dict.fromkeys(text[:20]):
        model = replace(MODELS["plain"], config=replace(MODELS["plain"].config, eos_token_id=(end,)))
        lengths = []
        for how in (None, Speculation(ModelDrafter(model, 6), 5)):
            result, cache = Generation(prompt_of(1)), model.cache(slack=6)
            list(decode_batch(model, [result], GREEDY, Settings(NEW), cache, how))
            assert result.finish_reason == "stop"
            assert result.tokens == text[: text.index(end)]
            lengths.append(cache.length)
        assert lengths[0] == lengths[1]


def test_look_up_takes_what_followed_the_longest_ending() -> None:
    rng, look = np.random.default_rng(0), PromptLookup(3)
    cases: list[tuple[list[int], int, list[int]]] = [
        ([1, 2, 3, 4, 1, 2], 3, [3, 4, 1]),
        ([5, 1, 2, 7, 6, 1, 2, 9, 1, 2], 2, [9, 1]),
        ([8, 1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3], 1, [4]),
        ([1, 2, 3], 3, []),
        ([4], 3, []),
        ([4, 4], 3, [4]),
        ([1, 2, 1, 2, 1, 2], 3, [1, 2]),
        ([7, 7, 7, 7, 7, 7], 2, [7, 7]),
    ]
    for history, count, following in cases:
        assert look.propose(history, count, GREEDY, rng).tokens == following


SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 3},
    {"temperature": 1.3, "top_p": 0.8, "repetition_penalty": 1.5},
    {
        "temperature": 1.5,
        "sequence_bias": (((2,), 0.7), ((1, 0), -1.0), ((0, 3), 1.0)),
        "encoder_repetition_penalty": 1.4,
        "no_repeat_ngram_size": 3,
        "bad_words_ids": ((3, 3), (0, 2)),
        "begin_suppress_tokens": (1,),
        "typical_p": 0.95,
        "eta_cutoff": 0.05,
    },
    {"temperature": 1.0, "encoder_no_repeat_ngram_size": 2, "forced_eos_token_id": (2, 3), "min_p": 0.05},
]


def distribution(model: et.Model, prompt: list[int], sampling: Sampling, length: int) -> Array:
    """The probability of every text of this length, by going through all of them."""
    vocab = model.config.vocab_size
    p = np.zeros((vocab,) * length)
    sampler = sampling.sampler(prompt, (), len(prompt) + length)
    for text in itertools.product(range(vocab), repeat=length - 1):
        history, weight = list(prompt), 1.0
        for token in text:
            weight *= sampler.probabilities(model.logits([history])[0, -1], history)[token]
            history.append(token)
        if weight:
            p[text] = weight * sampler.probabilities(model.logits([history])[0, -1], history)
    return p


def chi_square(model: et.Model, drafter: Any, sampling: Sampling, draws: int = 1500) -> float:
    """How many standard deviations the counts of the first three tokens lie from what they should be."""
    prompt = [1, 0]
    p = distribution(model, prompt, sampling, 3).ravel()
    counts = np.zeros(p.size)
    for seed in range(draws):
        how = Speculation(drafter(), 2)
        how.statistics.step_seconds = 1.0  # no ordinary step before the first draft
        result = Generation(list(prompt))
        settings = Settings(3, seed=seed, ignore_eos=True)
        list(decode_batch(model, [result], sampling, settings, speculation=how))
        counts[np.ravel_multi_index(result.tokens, (model.config.vocab_size,) * 3)] += 1
    assert not counts[p == 0].any()
    likely = p * draws >= 5
    seen, due = counts[likely], p[likely] * draws
    rest, due_rest = counts[~likely].sum(), p[~likely].sum() * draws
    statistic = ((seen - due) ** 2 / due).sum() + ((rest - due_rest) ** 2 / due_rest if due_rest > 1 else 0)
    freedom = likely.sum() - (due_rest <= 1)
    return float((statistic - freedom) / np.sqrt(2 * freedom))


FEW = {"vocab_size": 4, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
SMALL = tiny_model("float64", seed=3, num_hidden_layers=2, num_key_value_heads=1, **FEW)
OTHER = tiny_model("float64", seed=4, num_hidden_layers=1, num_key_value_heads=1, **FEW)
PADDED, CUT = (
    tiny_model("float64", seed=4, num_hidden_layers=1, num_key_value_heads=1, **FEW | {"vocab_size": size})
    for size in (7, 3)
)
SAMPLED = {
    "model": lambda: ModelDrafter(OTHER, 3),
    "itself": lambda: ModelDrafter(SMALL, 3),
    "look-up": lambda: PromptLookup(2),
    "padded": lambda: ModelDrafter(PADDED, 3, 4),
    "cut": lambda: ModelDrafter(CUT, 3, 4),
}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        *(("model", each) for each in SETTINGS),
        ("itself", SETTINGS[3]),
        ("look-up", SETTINGS[1]),
        ("look-up", SETTINGS[4]),
        ("padded", SETTINGS[3]),
        ("cut", SETTINGS[0]),
    ],
    ids=str,
)
def test_sampled_distribution_is_unchanged(kind: str, settings: dict[str, Any]) -> None:
    """Of the first three tokens together; 4 standard deviations have a probability below 1 in 1,000."""
    assert abs(chi_square(SMALL, SAMPLED[kind], Sampling(**settings))) < 4


def always_kept(row: Any, draft: Draft, place: int, logits: Array) -> int:
    return (
        draft.tokens[place]
        if place < len(draft.tokens)
        else row.sampling.choose(logits, row.history, row.rng)
    )


def replaced_from_p(row: Any, draft: Draft, place: int, logits: Array) -> int:
    p = row.sampling.probabilities(logits, row.history)
    if place < len(draft.tokens):
        token, q = draft.tokens[place], draft.probabilities[place]
        if row.rng.random() * (1 if q is None else q[token]) < p[token]:
            return token
    return speculative.draw(p, row.rng)


@pytest.mark.parametrize("wrong", [always_kept, replaced_from_p])
def test_a_wrong_rule_changes_the_distribution(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail."""
    monkeypatch.setattr(speculative, "judged", wrong)
    assert chi_square(SMALL, SAMPLED["model"], Sampling(temperature=1.0), 2500) > 6


PROCESSED: list[dict[str, Any]] = [
    {"repetition_penalty": 1.6, "no_repeat_ngram_size": 2},
    {"min_new_tokens": 11, "exponential_decay_length_penalty": (3, 1.3)},
    {"exponential_decay_length_penalty": (3, 1.3), "encoder_no_repeat_ngram_size": 1},
    {"bad_words_ids": [[4], [2, 7], [1, 2, 3]], "suppress_tokens": [5], "begin_suppress_tokens": [6]},
    {"forced_eos_token_id": 9, "max_length": 20, "sequence_bias": [[[3], 2.0], [[3, 3], -9.0]]},
]


@pytest.mark.parametrize("settings", PROCESSED, ids=str)
def test_greedy_text_with_processors_is_the_same(settings: dict[str, Any]) -> None:
    """They see the right text and length at every place of a draft, also where an end token is drafted."""
    model = replace(MODELS["plain"], generation_config={"eos_token_id": [0, 8]})
    for i in range(4):
        plain = et.generate(model, prompt_of(i), **{"max_new_tokens": 30} | settings)
        for how in ({"draft_model": model}, {"draft_model": RANDOM}, {"prompt_lookup": 2}):
            for k in (1, 3, 6):
                options: dict[str, Any] = {"max_new_tokens": 30, "num_draft_tokens": k} | settings | how
                fast = et.generate(model, prompt_of(i), **options)
                assert (fast.tokens, fast.finish_reason) == (plain.tokens, plain.finish_reason)


@pytest.mark.parametrize("kind", ["dynamic", "linear", "yarn"])
def test_beyond_the_length_of_the_model(kind: str) -> None:
    """dynamic changes its rotation with every token there, so nothing is drafted; the others go on."""
    rope = {"rope_type": kind, "factor": 2.0}
    model = tiny_model("float64", max_position_embeddings=14, rope_scaling=rope, eos_token_id=None, **SIZES)
    plain = plain_text(model, prompt_of(0), max_new_tokens=40)
    for k in (1, 4, 20):
        fast = et.generate(model, prompt_of(0), draft_model=model, num_draft_tokens=k, max_new_tokens=40)
        assert fast.tokens == plain
        assert fast.speculation is not None
        rounds = fast.speculation["rounds"]
        assert rounds >= 39 // (k + 1) if kind != "dynamic" else rounds <= 14 - len(prompt_of(0))


LETTERS = list("abcdefghijklmnopqrs")


def spelling(folder: Path, size: int, tokens: list[str] | None = None, seed: int = 0) -> et.Model:
    """A random model of that vocabulary, whose tokenizer has 19 tokens."""
    sizes = SIZES | {"vocab_size": size, "num_hidden_layers": 1, "eos_token_id": None}
    (folder / str(size)).mkdir(exist_ok=True)
    tokenizer = make_tokenizer(folder / str(size), LETTERS if tokens is None else tokens)
    return replace(tiny_model("float64", seed=seed, **sizes), tokenizer=tokenizer)


@pytest.mark.parametrize("size", [19, 21, 29])
def test_vocabularies_that_are_padded_differently(tmp_path: Path, size: int) -> None:
    """Qwen2.5 has 151,936 scores or 152,064 for one tokenizer. The text may have ids of the padding."""
    model, drafting = spelling(tmp_path, 23), spelling(tmp_path, size, seed=1)
    for prompt in ([1, 2, 3], [1, 22, 3, 21], [18]):
        plain = plain_text(model, prompt, max_new_tokens=40)
        fast = et.generate(model, prompt, draft_model=drafting, max_new_tokens=40)
        assert fast.tokens == plain
    same = et.generate(model, "abc", draft_model=replace(model), temperature=1.0, seed=1, max_new_tokens=20)
    assert same.speculation is not None
    assert set(same.speculation["acceptance"]) == {1.0}


def test_tokenizers_that_differ_are_refused(tmp_path: Path) -> None:
    """Of equal size too; one that has more tokens at the end agrees."""
    model = spelling(tmp_path, 23)
    for tokens in (LETTERS[::-1], ["z", *LETTERS[1:]], [*LETTERS[:-2], "s", "r"], [*LETTERS[1:], "a", "x"]):
        with pytest.raises(InputError, match=r"its tokenizer differs from .*: token") as caught:
            et.generate(model, "a", draft_model=spelling(tmp_path, 23, tokens))
        assert "\n" not in str(caught.value)
    et.generate(model, "b", draft_model=spelling(tmp_path, 23, [*LETTERS, "t"]), max_new_tokens=4)
    with pytest.raises(InputError, match="vocabulary of 25"):
        et.generate(model, "a", draft_model=replace(spelling(tmp_path, 25), tokenizer=None))


@pytest.mark.parametrize(
    "name", ["num_assistant_tokens", "prompt_lookup_num_tokens", "max_matching_ngram_size"]
)
def test_the_file_s_length_of_a_draft(name: str) -> None:
    how: dict[str, Any] = {"draft_layers": 1} if name == "num_assistant_tokens" else {"prompt_lookup": True}
    made = speculative.speculation(MODELS["plain"], stated={name: 7}, **how)
    assert made is not None
    if name == "max_matching_ngram_size":
        assert isinstance(made.drafter, PromptLookup)
        assert made.drafter.longest == 7
    else:
        assert made.drafts == 7
    for wrong in ("x", 0, 2.5):
        model = replace(MODELS["plain"], generation_config={name: wrong})
        with pytest.raises(InputError, match=f"generation_config.json: key '{name}' is"):
            et.generate(model, [1], **how)
    looked = et.generate(MODELS["plain"], [1, 2, 1], prompt_lookup_num_tokens=2, max_new_tokens=4)
    assert looked.speculation is not None


def test_mistakes() -> None:
    model = MODELS["plain"]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"draft_layers": 3}, "`draft_layers` is 3"),
        ({"draft_layers": 0}, "`draft_layers` is 0"),
        ({"draft_model": SMALL}, "vocabulary of 4"),
        ({"draft_layers": 1, "prompt_lookup": True}, "choose one"),
        ({"num_draft_tokens": 3}, "needs"),
        ({"draft_layers": 1, "num_draft_tokens": 0}, "`num_draft_tokens` is 0"),
        ({"prompt_lookup": -1}, "`prompt_lookup` is -1"),
    ]
    for settings, words in wrong:
        with pytest.raises(InputError, match=words):
            et.generate(model, [1, 2], max_new_tokens=3, **settings)
    with pytest.raises(InputError, match="one prompt"):
        et.generate(model, [[1, 2], [3, 4]], max_new_tokens=3, draft_layers=1)


@pytest.mark.parametrize("window", [1, 3, 8])
@pytest.mark.parametrize("slack", [1, 4, 9])
def test_a_cache_with_slack(window: int, slack: int) -> None:
    """Whatever is appended and taken back, the last keys are there, in order."""
    rng = np.random.default_rng([window, slack])
    cache, text, longest = layer_cache(window, slack=slack), [], 0
    for _ in range(200):
        new = rng.integers(1, 6)
        fresh = rng.standard_normal(new)
        text = [*text, *fresh]
        keys, values, index = cache.append(fresh[None, :, None, None], 2 * fresh[None, :, None, None])
        due = slice(max(0, len(text) - new - window + 1), len(text))
        np.testing.assert_array_equal(keys[0, :, 0, 0], text[due])
        np.testing.assert_array_equal(values[0, :, 0, 0], 2 * np.array(text[due]))
        np.testing.assert_array_equal(index, np.arange(len(text))[due])
        longest = max(longest, len(text))
        back = int(rng.integers(0, min(slack - (longest - len(text)), len(text)) + 1))
        text = text[: len(text) - back]
        cache.truncate(len(text))
    assert cache.nbytes <= 2 * 8 * (2 * (window + slack) + 6)
