"""The flags of a chat, for `chat` and `run --chat`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from einsum_transformer.cli.flags import flag
from einsum_transformer.cli.prompts import read_text
from einsum_transformer.errors import InputError

if TYPE_CHECKING:
    from einsum_transformer.text.tokenizer import Tokenizer

_MAX_BYTES = 1 << 22
_RESERVED = frozenset(
    {"messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message"}
)


@dataclass(frozen=True, slots=True)
class ChatFlags:
    """What a chat begins with, and how it is written."""

    system_prompt: str | None = flag(metavar="TEXT", help="The system message of a chat.")
    chat_template: str | None = flag(
        "--chat-template",
        "--chat-template-file",
        metavar="FILE|TEXT|NAME",
        help="A jinja template, its file, or the name of one of the model's; default the model's own.",
    )
    chat_template_kwargs: str | None = flag(
        "--chat-template-kwargs",
        "--chat-template-config",
        metavar="JSON",
        help="Variables of the chat template, as a JSON object.",
    )
    enable_thinking: bool | None = flag(
        "--enable-thinking/--no-thinking", help="The template's variable enable_thinking."
    )
    tools: str | None = flag(
        "--tools", metavar="FILE.json", help="Tools for the chat template, a list of objects."
    )

    def options(self, templates: Mapping[str, str]) -> dict[str, Any]:
        """The options of `Tokenizer.apply_chat_template` that the flags set; `templates`: the
        checkpoint's."""
        found: dict[str, Any] = {}
        if self.chat_template_kwargs is not None:
            found |= _object(self.chat_template_kwargs, "--chat-template-kwargs")
            if reserved := sorted(found.keys() & _RESERVED):
                raise InputError(
                    f"--chat-template-kwargs: {', '.join(reserved)} is not a variable of a template"
                )
        thinking = self.enable_thinking
        if thinking is not None:
            if found.get("enable_thinking", thinking) != thinking:
                raise InputError(
                    "--chat-template-kwargs and --enable-thinking/--no-thinking contradict each other"
                )
            found["enable_thinking"] = thinking
        if self.chat_template is not None:
            found["chat_template"] = _template(self.chat_template, templates)
        if self.tools is not None:
            found["tools"] = _tools(self.tools)
        return found

    def encoded(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """The token ids of a chat of one message."""
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt is not None else []
        messages = [*system, {"role": "user", "content": text}]
        return tokenizer.apply_chat_template(messages, **self.options(tokenizer.chat_templates))


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
