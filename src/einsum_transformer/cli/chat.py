"""`chat`: a conversation that reuses its KV cache between turns."""

from __future__ import annotations

import importlib
import io
import sys
from contextlib import nullcontext, suppress
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
    equations: options.Equations = False,
    loading: options.Loading,
    hub: options.Hub,
    shown: options.Shown,
) -> None:
    """Chat with a model; every line is a message.

    The KV cache is reused between turns, unless the chat template rewrites earlier messages. /system TEXT
    sets the system message and starts a new conversation, /reset starts a new conversation, /exit ends the
    program. --equations shows the times of all turns at the end. In Python: et.Chat, and et.Profiler.

    \b
    etx chat
    etx chat -m HuggingFaceTB/SmolLM2-360M-Instruct --system-prompt "Answer in one sentence." --temp 0.7
    etx chat qwen3/ --no-thinking --tools tools.json
    printf 'Hello!\\nWhat did I say?\\n' | etx chat --temp 0 --quiet
    """
    from einsum_transformer.analysis.profiler import Profiler
    from einsum_transformer.generation.chat import Chat

    loaded, _ = loading.open(named.source(), hub, sampled.seed, shown.silent)
    templates = {} if loaded.tokenizer is None else loaded.tokenizer.chat_templates
    given = template.options(templates)
    settings = options.generation_options(sampled, context, drafting, loading, hub, shown.silent)
    chosen = {name: given.pop(name, None) for name in ("tools", "chat_template")}
    talk = Chat(loaded, template.system_prompt, template_kwargs=given, **chosen, **settings)
    profiler = Profiler(loaded) if equations else None
    try:
        with profiler or nullcontext():
            _converse(talk, shown, terminal=sys.stdin.isatty() and not shown.silent)
    finally:
        # Write the answers so far, also if a later turn fails.
        if shown.json:
            output.write_line(talk.to_dict() | (profiler.to_dict() if profiler else {}))
        elif profiler is not None and not shown.quiet:
            for part in profiler.tables():
                output.console().print(part)


def _converse(talk: Chat, shown: options.Shown, terminal: bool) -> None:
    """Read lines until /exit or the end of the input."""
    if terminal:
        with suppress(ImportError):  # line editing and a history for input(); not available on Windows
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
            output.note(f"{command}: unknown command; expected /system TEXT, /reset or /exit")
        elif line:
            _turn(talk, line, shown, terminal)


def _turn(talk: Chat, line: str, shown: options.Shown, terminal: bool) -> None:
    """Answer one message; at a terminal, an error or an interruption does not end the conversation."""
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
        counts = f"{turn.cached_tokens} tokens reused, {turn.prompt_tokens} new, {turn.tokens} generated"
        output.note(f"[{counts}, {turn.seconds:.1f} s]")


def _next_line() -> str:
    """Return a line of standard input, decoded as UTF-8, without a byte order mark."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        raw = sys.stdin.buffer.readline()
    else:  # replaced by a text stream
        raw = sys.stdin.readline().encode()
    if not raw:
        raise EOFError
    try:
        return raw.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(f"standard input: not UTF-8 text (byte {error.start} of a line)") from None
