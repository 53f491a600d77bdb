"""A flag has one meaning: the same metavar and help text in every command; a command line is a thin layer."""

from __future__ import annotations

import ast
import difflib
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from command_line import etx
from einsum_transformer.cli.app import _application

COMMANDS: Mapping[str, Any] = get_command(_application()).commands  # type: ignore[attr-defined]
CLI = Path(__file__).parents[1] / "src" / "einsum_transformer" / "cli"

MOVED = {
    ("explain", "--tokens"): "--seq-len",
    ("explain", "--batch"): "--batch-size",
    ("diff", "--tokens"): "--seq-len",
    ("diff", "--batch"): "--batch-size",
    ("merge", "--dtype"): "--save-dtype",
}
"""(command, old flag) -> its name now."""

DEFAULTS = {"--seq-len", "--tolerance", "--optimizer"}
"""Flags whose default differs between commands: the models and the checks are of other sizes, and plan
assumes the optimizer with the largest state."""


def flags() -> dict[str, dict[str, Any]]:
    """Flag -> command -> its option; without those that have moved."""
    found: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    for command, each in COMMANDS.items():
        for option in each.params:
            if option.param_type_name == "option" and not option.hidden:
                for name in (*option.opts, *option.secondary_opts):
                    found[name][command] = option
    return dict(found)


FLAGS = flags()
SHARED = {name: options for name, options in FLAGS.items() if len(options) > 1}


def test_many_flags_are_shared() -> None:
    assert {"--tokens", "-b", "--dtype", "--seq-len", "--seed", "--json", "-o", "--adapter-path"} <= set(
        SHARED
    )
    assert set(FLAGS["--tokens"]) == {"run", "profile", "parity", "report"}
    assert set(FLAGS["--seq-len"]) == {"explain", "plan", "diff", "train", "gradcheck"}
    assert set(FLAGS["-b"]) == {"run", "profile", "explain", "plan", "diff", "train", "gradcheck"}
    assert set(FLAGS["--save-dtype"]) == {"merge"}


@pytest.mark.parametrize("name", SHARED)
def test_a_flag_has_one_meaning(name: str) -> None:
    """The same metavar, the same alternative names, the same kind of value, nearly the same help."""
    options = list(SHARED[name].values())
    first = options[0]
    for other in options[1:]:
        assert other.metavar == first.metavar
        assert (other.opts, other.secondary_opts) == (first.opts, first.secondary_opts)
        assert (other.is_flag, other.multiple) == (first.is_flag, first.multiple)
        likeness = difflib.SequenceMatcher(None, first.help, other.help).ratio()
        assert likeness > 0.6, (first.help, other.help)
        if name not in DEFAULTS:
            assert other.default == first.default


def test_a_short_flag_has_one_long_name() -> None:
    longs: defaultdict[str, set[str]] = defaultdict(set)
    for options in FLAGS.values():
        for option in options.values():
            for short in option.opts:
                if not short.startswith("--"):
                    longs[short].add(option.name)
    # -b is the parameter `batch` of explain and diff, as in Python, and `batch_size` elsewhere.
    assert {short: names for short, names in longs.items() if len(names) > 1} == {
        "-b": {"batch", "batch_size"}
    }


def test_flags_with_a_value_have_a_metavar() -> None:
    for name, options in FLAGS.items():
        for command, option in options.items():
            assert option.is_flag or option.metavar, f"{command} {name}"


@pytest.mark.parametrize(("command", "flag"), MOVED)
def test_a_moved_flag_names_the_new_one(command: str, flag: str) -> None:
    models = {"explain": ["llama"], "diff": ["llama", "gemma"], "merge": ["llama"]}[command]
    for value in ("5", "bf16"):
        ran = etx(command, *models, flag, value)
        assert (ran.code, ran.out) == (2, "")
        assert ran.err.count("\n") == 1
        assert ran.err.startswith("error: ")
        assert f"{flag}: this flag is now {MOVED[command, flag]} " in ran.err
    assert MOVED[command, flag] in {name for name in FLAGS if command in FLAGS[name]}
    assert flag not in set(etx(command, "--help").out.split())


def test_all_hidden_flags_are_moved_ones() -> None:
    hidden = {
        (command, option.opts[0])
        for command, each in COMMANDS.items()
        for option in each.params
        if getattr(option, "hidden", False)
    }
    assert hidden == set(MOVED)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_file_of_a_command_is_short_and_computes_nothing(command: str) -> None:
    """Fewer than 150 lines; no import of NumPy, no loop over numbers, and one call of the library."""
    text = (CLI / f"{command}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 150
    tree = ast.parse(text)
    assert command in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    imported = {
        name
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([alias.name for alias in node.names] + [getattr(node, "module", None) or ""])
    }
    assert not {name.split(".")[0] for name in imported} & {"numpy", "np", "opt_einsum", "ml_dtypes"}
    layers = {name.split(".")[1] for name in imported if name.startswith("einsum_transformer.")}
    assert not layers & {"engine", "numerics", "components", "leaves", "formats"}
    arithmetic = (ast.Mult, ast.Div, ast.MatMult, ast.Pow, ast.Sub, ast.FloorDiv)
    assert not [
        node for node in ast.walk(tree) if isinstance(node, ast.BinOp) and isinstance(node.op, arithmetic)
    ]


def test_numpy_in_the_command_line() -> None:
    """Only where token ids are read from a file."""
    users = {file.stem for file in CLI.glob("*.py") if "import numpy" in file.read_text(encoding="utf-8")}
    assert users == {"prompts"}
