"""`chat`: a conversation that reuses its KV cache between turns."""

from __future__ import annotations

import importlib
import io
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from einsum_transformer.cli import options, output
from einsum_transformer.cli.chat_flags import ChatFlags
from einsum_transformer.errors import InputError

if TYPE_CHECKING:
    from einsum_transformer.generation.chat import Chat


def chat(
    *,
    named: options.Named,
    template: ChatFlags,
    sampled: options.Sampled,
    context: options.Context,
    drafting: options.Drafting,
    loading: options.Loading,
    hub: options.Hub,
    shown: options.Shown,
) -> None:
    """Talk to a model; every line is a message.

    Keys and values of the conversation stay in the KV cache, as far as the chat template keeps what was
    written. /system TEXT sets the system message and starts a new conversation, /reset forgets the
    conversation, /exit ends it. In Python: et.Chat.

    \b
    etx chat
    etx chat -m HuggingFaceTB/SmolLM2-360M-Instruct --system-prompt "Answer in one sentence." --temp 0.7
    etx chat qwen3/ --no-thinking --tools tools.json
    printf 'Hello!\\nWhat did I say?\\n' | etx chat --temp 0 --quiet
    """
    from einsum_transformer.generation.chat import Chat

    loaded, _ = loading.open(named.source(), hub, sampled.seed, shown.silent)
    templates = {} if loaded.tokenizer is None else loaded.tokenizer.chat_templates
    given = template.options(templates)
    settings = options.generation_options(sampled, context, drafting, loading, hub, shown.silent)
    chosen = {name: given.pop(name, None) for name in ("tools", "chat_template")}
    talk = Chat(loaded, template.system_prompt, template_kwargs=given, **chosen, **settings)
    try:
        _converse(talk, shown, terminal=sys.stdin.isatty() and not shown.silent)
    finally:
        # Also if a later turn fails: the answers so far.
        if shown.json:
            output.write_line(talk.to_dict())


def _converse(talk: Chat, shown: options.Shown, terminal: bool) -> None:
    """Read lines until /exit or the end of the input."""
    if terminal:
        with suppress(ImportError):  # gives input() a history and line editing, except on Windows
            importlib.import_module("readline")
        output.note("/system TEXT, /reset, /exit")
    while True:
        try:
            line = (input("> ") if terminal else _next_line()).strip()
        except EOFError:
            return
        command, _, rest = line.partition(" ")
        if command == "/exit":
            return
        if command == "/reset":
            talk.reset()
        elif command == "/system":
            talk.system = rest or None
            talk.reset()
        elif command.startswith("/"):
            output.note(f"{command}: no such command; /system TEXT, /reset, /exit")
        elif line:
            _turn(talk, line, shown, terminal)


def _turn(talk: Chat, line: str, shown: options.Shown, terminal: bool) -> None:
    """One message; at a terminal neither an error nor an interruption ends the conversation."""
    try:
        _answer(talk, line, shown)
    except InputError as error:
        if not terminal:
            raise
        output.note(f"error: {error} (/reset starts a new conversation)")
    except KeyboardInterrupt:
        if not terminal:
            raise
        output.note("stopped; this message is not part of the conversation")


def _answer(talk: Chat, line: str, shown: options.Shown) -> None:
    pieces = talk.stream(line)
    try:
        for piece in pieces:
            if not shown.json:
                output.write(piece)
    finally:
        if not shown.json:
            output.write("\n")
    if not shown.silent:
        turn = talk.turns[-1]
        counts = f"{turn.cached_tokens} tokens reused, {turn.prompt_tokens} read, {turn.tokens} generated"
        output.note(f"[{counts}, {turn.seconds:.1f} s]")


def _next_line() -> str:
    """A line of standard input in UTF-8, without a byte order mark."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        raw = sys.stdin.buffer.readline()
    else:  # a program may have replaced it with text
        raw = sys.stdin.readline().encode()
    if not raw:
        raise EOFError
    try:
        return raw.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(f"standard input: not UTF-8 text (byte {error.start} of a line)") from None
