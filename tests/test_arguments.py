"""The check of arguments: which values fit an annotation, and what the message says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from einsum_transformer.arguments import checked, fits, words
from einsum_transformer.errors import ArgumentError, InputError


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (1, int),
        (np.int64(1), int),
        (1, float),
        (np.float32(1), float),
        (np.bool_(True), bool),
        (None, int | None),
        ("a", Literal["a", "b"]),
        (["a"], Sequence[str]),
        (("a",), Sequence[str]),
        ("a", str | Path),
        ({"a": 1}, Mapping[str, Any]),
        ([{"role": "user"}, "text"], Sequence[str | Mapping[str, Any]]),
        (len, Callable[[Any], int]),
        (object(), Any),
    ],
)
def test_a_value_fits(value: Any, hint: Any) -> None:
    assert fits(value, hint)


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (True, int, "int"),
        (1.0, int, "int"),
        ("1", float, "float"),
        (1, bool, "bool"),
        (None, int, "int"),
        ("c", Literal["a", "b"], "'a' or 'b'"),
        ("a", Sequence[str], "sequence of str"),
        ([1], Sequence[str], "sequence of str"),
        ({1: 1}, Mapping[str, int], "mapping"),
        (1, str | Path | None, "str, Path or None"),
        (1, Callable[[Any], int] | None, "a function or None"),
        ("x", Literal["sgd"] | Path, "'sgd' or Path"),
    ],
)
def test_a_value_does_not_fit(value: Any, hint: Any, expected: str) -> None:
    assert not fits(value, hint)
    assert words(hint) == expected


@checked
def called(count: int, *, name: str = "x", **options: Any) -> tuple[int, str, dict[str, Any]]:
    return count, name, options


@checked
@dataclass(frozen=True)
class Settings:
    rate: float = 1.0
    names: tuple[str, ...] = ()


def test_a_right_call_is_a_call() -> None:
    assert called(2, name="y", other=3) == (2, "y", {"other": 3})
    assert Settings(2, names=("a",)).names == ("a",)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: called(), "missing a required argument: 'count'"),
        (lambda: called("2"), r"called\(\): `count` is '2' \(str\), expected int"),
        (lambda: called(2, name=3), r"`name` is 3 \(int\), expected str"),
        (lambda: Settings(rat=2), r"Settings\(\) has no argument `rat`; did you mean `rate`\?"),  # type: ignore[call-arg]
        (lambda: Settings(names=(1,)), r"`names` is \(1,\) \(tuple\), expected tuple of str"),  # type: ignore[arg-type]
    ],
)
def test_a_wrong_call_names_the_argument(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as error:
        call()
    assert isinstance(error.value, InputError)
    assert isinstance(error.value, TypeError)
