"""The text of the project uses the terms of its field: words and names that must not come back."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PHRASES = {
    r"told": "the config sets, a message reports",
    r"tells": "reports, describes",
    r"(?:who|which|what|it|file|key|config|model|flag) (?:says|said)": "the value of, the config sets",
    r"says so": "reports it",
    r"the house": "the package",
    r"rooms?": "space, capacity, headroom",
    r"keys count": "keys are used",
    r"(?:no|some)body": "name the function or module",
    r"whoever": "name the function or module",
    r"who computes": "name the function or module",
    r"(?<!there )is no (?:regular|variable|key|file|model|number|tensor|product)": "is not a",
    r"learnt": "learned",
    r"what is its own": "differs from Llama in",
    r"belongs to RoPE": "the model does not use RoPE",
    r"no config is": "not a config",
    r"anew": "again",
    r"thereby": "plain words",
    r"wherefore": "plain words",
    r"meanwhile": "at the same time",
    r"as much as is": "name the quantity",
    r"of so many": "name the quantity",
    r"(?:training|conversation|text|that) goes on": "continues, resumes",
    r"in vain": "without effect, ignored",
    r"left aside": "ignored",
    r"at hand": "current",
    r"grows long": "exceeds the trained length",
    r"likeliest": "most probable",
    r"are refused": "are rejected",
    r"is refused": "is rejected",
    r"by place": "per position",
    r"as it lies": "as it is stored",
    r"stands? for": "means, represents",
    r"scores after": "logits after",
    r"the file's numbers": "the values of the file",
    r"chosen expert says": "output of each chosen expert",
    r"a machine's word": "the term",
    r"has its say": "the term",
    r"what is right": "correct",
}
"""Pattern (whole words, any case) -> what to write."""

NAMES = {"told", "said", "through", "along", "room", "rooms", "house", "anew", "aside", "nobody", "lies"}
"""Names of variables, parameters, fields and functions."""
NUMPY = {"take_along_axis", "put_along_axis"}
ROPE_NAMES = {"turn", "turned", "turns"}
"""In RoPE the term is rotation; a turn of a conversation is right."""
ROPE_FILES = ("rope.py", "rotation.py", "attention.py", "latent_attention.py")

EXCEPTIONS = {
    ("src/einsum_transformer/api/profile.py", "likeliest"): "the key likeliest_next of the JSON output",
    ("src/einsum_transformer/cli/run_flags.py", "likeliest"): "the field likeliest_next of Profile",
}
"""(file, word) -> why it may be there."""


def files() -> list[Path]:
    """Everything that a user reads, without what is generated and without training data."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    for folder, kinds in (
        ("src", ("py", "json")),
        ("docs", ("md", "py")),
        ("examples", ("py", "md")),
    ):
        found += [path for kind in kinds for path in sorted((ROOT / folder).rglob(f"*.{kind}"))]
    return [path for path in found if "_build" not in path.parts and path.name != "_commands.md"]


FILES = files()


def sentences(text: str) -> Iterator[tuple[int, str]]:
    """(line, text) of every line joined with the next one, so that a phrase over a line end is found.

    The marks between them (comment signs, quotes of adjacent strings) are spaces.
    """
    lines = text.splitlines()
    for i, line in enumerate(lines):
        both = line + " " + (lines[i + 1] if i + 1 < len(lines) else "")
        yield i + 1, re.sub(r"[\s#\"'*|>]+", " ", re.sub(r"\bf\"", " ", both))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_words(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    found = []
    for line, text in sentences(path.read_text(encoding="utf-8")):
        for phrase, better in PHRASES.items():
            # Names with underscores are several words.
            match = re.search(rf"(?<![^\W_])(?:{phrase})(?![^\W_])", text, flags=re.IGNORECASE)
            if match and (name, match[0]) not in EXCEPTIONS:
                found.append(f"{name}:{line}: {match[0]!r}: write: {better}")
    assert found == []


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.suffix == ".py"], ids=lambda path: str(path.relative_to(ROOT))
)
def test_names(path: Path) -> None:
    unwanted = NAMES | (ROPE_NAMES if path.name in ROPE_FILES else set())
    found = []
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        if token.string in NUMPY or token.type != tokenize.NAME:
            continue
        if unwanted & set(token.string.strip("_").split("_")):
            found.append(f"{path.relative_to(ROOT)}:{token.start[0]}: {token.string}")
    assert found == []


def test_docstrings_are_phrases_of_their_own() -> None:
    """No docstring begins with `Of`, which continues a name that the reader has to find first."""
    found = []
    for path in FILES:
        if path.suffix == ".py":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if (
                    isinstance(node, ast.Expr)
                    and isinstance(node.value, ast.Constant)
                    and isinstance(node.value.value, str)
                    and node.value.value.startswith("Of ")
                ):
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.value.value}")
    assert found == []


def test_every_exception_is_needed() -> None:
    for (name, word), reason in EXCEPTIONS.items():
        assert reason
        assert word in (ROOT / name).read_text(encoding="utf-8")
