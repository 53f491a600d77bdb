"""Stop strings: found across the borders of pieces, and neither they nor what follows is ever shown."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import example, given, settings
from hypothesis import strategies as st

from einsum_transformer.generation.decode import StopMatcher

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
