"""The public API is documented: docstrings, the reference page, `etx COMMAND --help`, and equal defaults."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import einsum_transformer as et
from command_line import etx
from einsum_transformer.cli.app import _application
from einsum_transformer.engine.calls import Keywords

REFERENCE = (Path(__file__).parents[1] / "docs" / "reference" / "python.md").read_text(encoding="utf-8")
COMMANDS: Mapping[str, Any] = get_command(_application()).commands  # type: ignore[attr-defined]
FUNCTIONS = [name for name in et.__all__ if inspect.isfunction(getattr(et, name))]
CONSTRUCTED = (
    *("AdamW", "Chat", "LoRAConfig", "RandomTokens", "RayWorkers", "Recorder", "SGD", "Schedule"),
    *("TextBatches", "Trainer", "TrainingSettings"),
)
"""Classes that a user constructs, apart from RunConfig and ModelConfig: docs/reference/configs.md describes
the keys of the former, which the fields of the latter repeat in transformers' names."""

CALLS = {name: name for name in COMMANDS} | {
    "run": "profile",
    "chat": "Chat",
    "eval": "perplexity",
}
"""Command -> the call that does the same."""
RENAMED = {("merge", "dtype"): "save_dtype"}
"""(command, parameter of the call) -> parameter of the command, where the names differ."""


def parameters(name: str) -> dict[str, inspect.Parameter]:
    """The named parameters of a public function or constructor."""
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    found = inspect.signature(getattr(et, name)).parameters
    return {each.name: each for each in found.values() if each.kind not in variadic}


@pytest.mark.parametrize("name", et.__all__)
def test_every_name_has_a_docstring(name: str) -> None:
    """Of at least one sentence, and its own, not the signature that dataclasses write or a base class's."""
    doc = vars(getattr(et, name)).get("__doc__") if isinstance(getattr(et, name), type) else None
    doc = doc or inspect.getdoc(getattr(et, name)) or ""
    assert re.match(r"[A-Z`](?s:.*?)[a-z`)\"\d][.:]", doc), doc
    assert len(doc.split()) >= 4
    assert not doc.startswith(f"{name}(")


@pytest.mark.parametrize("name", [*FUNCTIONS, *CONSTRUCTED])
def test_every_parameter_is_in_the_docstring(name: str) -> None:
    doc = getattr(et, name).__doc__ or ""
    missing = [each for each in parameters(name) if not re.search(rf"(?<!\w){each}(?!\w)", doc)]
    assert missing == []
    if name == "einsum":
        assert all(key in doc for key in Keywords.__annotations__)


def test_every_public_method_has_a_docstring() -> None:
    """Of every public class, and every public property."""
    for name in et.__all__:
        found = getattr(et, name)
        if isinstance(found, type) and not issubclass(found, (Exception, dict)):
            for method, value in vars(found).items():
                if not method.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
                    doc = inspect.getdoc(value) or inspect.getdoc(getattr(found, method))
                    assert doc, f"{name}.{method}"


def test_the_reference_names_what_exists() -> None:
    names = re.findall(r"^\.\. auto(\w+):: (\w+)$", REFERENCE, flags=re.MULTILINE)
    assert sorted(name for _, name in names) == sorted(et.__all__)
    for kind, name in names:
        found = getattr(et, name)
        expected = "function"
        if isinstance(found, type):
            expected = "exception" if issubclass(found, Exception) else "class"
        assert kind == expected, name
    # Options of the directives, and the words of the text that look like names.
    options = set(re.findall(r"^   :([\w-]+):", REFERENCE, flags=re.MULTILINE))
    assert options <= {"members", "undoc-members"}
    for name in re.findall(r"`(?:et\.)?(\w+)`", REFERENCE):
        assert name in et.__all__ or any(name in parameters(each) for each in [*FUNCTIONS, *CONSTRUCTED])


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_the_call_and_the_exit_codes(command: str) -> None:
    ran = etx(command, "--help")
    text = " ".join(ran.out.split())
    assert (ran.code, ran.err) == (0, "")
    assert f"In Python: et.{CALLS[command]}" in text
    assert re.search(r"Exit codes: 0 success; 1 .*; 2 .*; 130 interrupted\.", text)
    assert CALLS[command] in et.__all__


def test_help_of_all_commands_names_the_exit_codes() -> None:
    assert "Exit codes: 0 success; 1 " in " ".join(etx("--help").out.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_has_a_help_text(command: str) -> None:
    for each in COMMANDS[command].params:
        if not getattr(each, "hidden", False):
            assert re.search(r"\w.*[.\]\w]$", each.help or ""), f"{command} {each.opts}"


@pytest.mark.parametrize("command", COMMANDS)
def test_defaults_are_those_of_the_call(command: str) -> None:
    """Where the command has a default: otherwise the call's own applies."""
    call = parameters(CALLS[command])
    flags = {each.name: each for each in COMMANDS[command].params}
    for (of, name), flag in RENAMED.items():
        if of == command and name in call:
            flags[name] = flags[flag]
    shared = [name for name in call if name in flags and flags[name].default is not None]
    for name in shared:
        default, expected = flags[name].default, call[name].default
        if default is False and expected is None:  # a switch that is not set
            continue
        assert default == expected, name
        assert type(default) is type(expected), name
    expected = {"train": 10, "gradcheck": 3, "parity": 1, "explain": 2, "diff": 1, "merge": 2}
    assert len(shared) >= expected.get(command, 0)


def test_defaults_that_a_flag_describes() -> None:
    """The text of a flag without a default of its own names the default of the library."""
    flags = {flag: each for command in COMMANDS.values() for each in command.params for flag in each.opts}

    def described(flag: str) -> str:
        return re.findall(r"[Dd]efault:? ([\w./-]+?)[.;,]?(?: |$)", flags[flag].help)[0]

    lora, adam, workers = parameters("LoRAConfig"), parameters("AdamW"), parameters("RayWorkers")
    for flag, default in {
        "--lora-rank": lora["r"],
        "--lora-alpha": lora["lora_alpha"],
        "--lora-dropout": lora["lora_dropout"],
        "--beta1": adam["beta1"],
        "--beta2": adam["beta2"],
        "--eps": adam["eps"],
    }.items():
        assert float(described(flag)) == default.default, flag
    assert f"{','.join(lora['target_modules'].default)} (default)" in flags["--lora-targets"].help
    assert flags["--worker-timeout"].default == workers["timeout"].default
    assert flags["--momentum"].default == parameters("SGD")["momentum"].default
