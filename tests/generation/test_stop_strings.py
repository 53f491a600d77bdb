"""Stop strings: found across the borders of pieces, and neither they nor what follows is ever shown."""

from __future__ import annotations

import string
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import einsum_transformer as et
from einsum_transformer.generation.decode import Generation, Settings, decode_batch
from einsum_transformer.generation.sampling import Sampling
from einsum_transformer.generation.stopping import StopMatcher
from tiny_models import make_tokenizer, successor_model

LETTERS = st.text("ab.", max_size=30)


def run(stops: list[str], pieces: list[str]) -> tuple[list[str], bool]:
    """What is shown after each piece and at the end, and whether a stop string was met."""
    matcher, shown = StopMatcher(stops), []
    for piece in pieces:
        text, stopped = matcher.put(piece)
        shown.append(text)
        if stopped:
            return shown, True
    text, stopped = matcher.put("", last=True)
    return [*shown, text], stopped


def cut(text: str, at: list[int]) -> list[str]:
    bounds = sorted({0, len(text), *(i % (len(text) + 1) for i in at)})
    return [text[a:b] for a, b in pairwise(bounds)]


def naive(stop: str, text: str) -> tuple[str, bool]:
    before, found, _ = text.partition(stop)
    return before, bool(found)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(stop=st.text("ab.", min_size=1, max_size=5), text=LETTERS, at=st.lists(st.integers(0, 30), max_size=6))
@example(stop="aab", text="aaab", at=[1, 2, 3])
@example(stop="abab", text="abaabab", at=[1, 2, 3, 4, 5, 6])
def test_one_stop_string(stop: str, text: str, at: list[int]) -> None:
    """However the text is cut, the outcome is that of a search in the whole."""
    shown, stopped = run([stop], cut(text, at))
    assert ("".join(shown), stopped) == naive(stop, text)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    stops=st.lists(st.text("ab.", min_size=1, max_size=4), max_size=4),
    text=LETTERS,
    at=st.lists(st.integers(0, 30), max_size=6),
)
def test_several_stop_strings(stops: list[str], text: str, at: list[int]) -> None:
    """Stops if and only if one occurs; what is shown is the beginning of the text and contains none."""
    shown, stopped = run(stops, cut(text, at))
    joined = "".join(shown)
    assert stopped == any(stop in text for stop in stops)
    assert text.startswith(joined)
    assert not any(stop in joined for stop in stops)
    if stopped:
        assert any(text[len(joined) :].startswith(stop) for stop in stops)
    else:
        assert joined == text


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    stops=st.lists(st.text("ab.", min_size=1, max_size=4), min_size=1, max_size=3),
    text=LETTERS,
    at=st.lists(st.integers(0, 30), max_size=6),
)
def test_nothing_is_held_back_that_cannot_become_a_stop_string(
    stops: list[str], text: str, at: list[int]
) -> None:
    matcher, shown, seen = StopMatcher(stops), "", ""
    for piece in cut(text, at):
        ready, stopped = matcher.put(piece)
        if stopped:
            return
        shown, seen = shown + ready, seen + piece
        held = seen[len(shown) :]
        assert seen.startswith(shown)
        assert any(stop.startswith(held) for stop in stops) or not held


def test_no_stop_strings() -> None:
    assert run([], ["a", "", "bc"]) == (["a", "", "bc", ""], False)


def test_the_borders_of_pieces_do_not_decide_which_of_two_is_met() -> None:
    """`b` is complete before `abc` is, whether the text comes at once or letter by letter."""
    assert "".join(run(["abc", "b"], ["abc"])[0]) == "".join(run(["abc", "b"], list("abc"))[0])


@pytest.fixture(scope="module")
def speller(tmp_path_factory: pytest.TempPathFactory) -> et.Model:
    """Counts through the ids: a to z, then <|x|>, then A to Z, then <|y|>; the two are special tokens."""
    tokens = [*string.ascii_lowercase, "<|x|>", *string.ascii_uppercase, "<|y|>"]
    return replace(successor_model(54), tokenizer=make_tokenizer(tmp_path_factory.mktemp("special"), tokens))


class TestSpecialTokens:
    """Stop strings are matched on the text with special tokens; what is shown has none."""

    @pytest.mark.parametrize(
        ("stop", "text"),
        [
            ("<|x|>", "wxyz"),
            ("<|y|>", "wxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"),
            ("z<|x|>", "wxy"),
            ("<|x|>AB", "wxyz"),
            ("yz<|x|>AB", "wx"),
            ("|x|", "wxyz"),
            ("x|>A", "wxyz"),
            ("C", "wxyzAB"),
            (["q<|x|>", "DE"], "wxyzABC"),
        ],
    )
    @pytest.mark.parametrize("drafts", [None, 4])
    def test_they_stop_and_are_not_shown(
        self, speller: et.Model, stop: str | list[str], text: str, drafts: int | None
    ) -> None:
        draft = {} if drafts is None else {"draft_model": speller, "num_draft_tokens": drafts}
        result = et.generate(speller, "uv", max_new_tokens=60, stop=stop, **draft)
        assert (result.text, result.finish_reason) == (text, "stop")

    def test_of_a_batch_and_of_the_file(self, speller: et.Model) -> None:
        model = replace(speller, generation_config={"stop_strings": ["z<|x|>", "f"]})
        results = et.generate(model, ["w", "c", "B"], max_new_tokens=5)
        assert [result.text for result in results] == ["xy", "de", "CDEFG"]
        assert et.generate(model, "w", max_new_tokens=5, stop=()).text == "xyzA"

    @pytest.mark.parametrize("stop", ["zA", "<|x|", "yzAB", "<|y|>"])
    def test_text_that_only_looks_so_without_special_tokens(self, speller: et.Model, stop: str) -> None:
        """`z<|x|>A` is no `zA`; `<|x|` is one of `<|x|>`, as in transformers."""
        result = et.generate(speller, "uv", max_new_tokens=10, stop=stop)
        assert result.text == ("wxyz" if stop == "<|x|" else "wxyzABCDE")

    def test_the_end_token_can_complete_one(self, speller: et.Model) -> None:
        ended = replace(speller, config=replace(speller.config, eos_token_id=(26,)))
        for stop, text in (("z<|x|>", "wxy"), ("<|x|>", "wxyz"), ("zA", "wxyz")):
            result = et.generate(ended, "uv", max_new_tokens=10, stop=stop)
            assert (result.text, result.finish_reason) == (text, "stop")

    def test_the_stream_shows_nothing_too_early(self, speller: et.Model) -> None:
        results = [Generation(speller.tokenizer.encode("uv"))]  # type: ignore[union-attr]
        settings_ = Settings(12, stop=("yz<|x|>AC", "zzz"))
        pieces = [text for _, text in decode_batch(speller, results, Sampling(), settings_)]
        assert "".join(pieces) == results[0].text == "wxyzABCDEFG"
        assert "yzAB" in pieces  # held back until the C did not come


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    stop=st.text("ab<>", min_size=1, max_size=4),
    pieces=st.lists(st.sampled_from([("a", "a"), ("b", "b"), ("<>", ""), (" a", "a")]), max_size=12),
)
def test_shown_text_ends_where_the_raw_text_has_the_stop_string(
    stop: str, pieces: list[tuple[str, str]]
) -> None:
    """Of every piece the shown part that lies before the stop string."""
    matcher, shown = StopMatcher([stop]), ""
    raw = "".join(each for each, _ in pieces)
    for whole, part in [*pieces, ("", "")]:
        text, stopped = matcher.put(part, whole)
        shown += text
        if stopped:
            break
    else:
        shown += matcher.put("", "", last=True)[0]
    at, due = raw.find(stop) if stop in raw else len(raw), ""
    assert stopped == (stop in raw)
    for whole, part in pieces:
        due += part[: max(0, min(at, len(whole)) - (len(whole) - len(part)))]
        at = max(0, at - len(whole))
    assert shown == due


def test_a_stop_string_without_a_tokenizer(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(et.InputError, match=r"`stop` needs a tokenizer"):
        et.generate(successor_model(9), [1], stop="a")
    model = replace(successor_model(9), generation_config={"stop_strings": ["a"]})
    assert et.generate(model, [1], max_new_tokens=2).tokens == [2, 3]
    assert "stop_strings are not used" in caplog.text
