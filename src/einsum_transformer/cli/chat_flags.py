"""The flags of a chat template, for `chat` and `run --chat`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from einsum_transformer.cli.prompts import read_text
from einsum_transformer.errors import InputError

_MAX_BYTES = 1 << 22
_RESERVED = frozenset(
    {"messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message"}
)


def chat_options(
    templates: Mapping[str, str],
    chat_template: str | None,
    chat_template_kwargs: str | None,
    enable_thinking: bool | None,
    tools: str | None,
) -> dict[str, Any]:
    """The options of `Tokenizer.encode_chat` that the flags ask for; `templates`: the checkpoint's."""
    found: dict[str, Any] = {}
    if chat_template_kwargs is not None:
        found |= _object(chat_template_kwargs, "--chat-template-kwargs")
        if reserved := sorted(found.keys() & _RESERVED):
            raise InputError(f"--chat-template-kwargs: {', '.join(reserved)} is no variable of a template")
    if enable_thinking is not None:
        if found.get("enable_thinking", enable_thinking) != enable_thinking:
            raise InputError(
                "--chat-template-kwargs and --enable-thinking/--no-thinking contradict each other"
            )
        found["enable_thinking"] = enable_thinking
    if chat_template is not None:
        found["chat_template"] = _template(chat_template, templates)
    if tools is not None:
        found["tools"] = _tools(tools)
    return found


def _template(given: str, templates: Mapping[str, str]) -> str:
    """A name of one of the checkpoint's templates, a template itself, or the text of a file."""
    if given in templates or "{%" in given or "{{" in given:
        return given
    path = Path(given)
    if path.is_file():
        return _read(path, "--chat-template")
    names = ", ".join(sorted(templates)) or "none"
    raise InputError(
        f"--chat-template {given!r}: no such file, no jinja template, and no name of a template "
        f"(the model has: {names})"
    )


def _tools(given: str) -> list[dict[str, Any]]:
    """The tools in a JSON file: a list of objects."""
    value = _parsed(_read(Path(given), "--tools"), f"--tools {given}")
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise InputError(f"--tools {given}: expected a list of JSON objects, one for each tool")
    return value


def _object(text: str, flag: str) -> dict[str, Any]:
    value = _parsed(text, flag)
    if not isinstance(value, dict):
        raise InputError(f"{flag}: expected a JSON object such as '{{\"enable_thinking\": false}}'")
    return value


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON: {error}") from None


def _read(path: Path, flag: str) -> str:
    return read_text(path, f"{flag} {path}", _MAX_BYTES).replace("\r\n", "\n").replace("\r", "\n")
