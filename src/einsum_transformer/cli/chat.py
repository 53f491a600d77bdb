"""`chat`: a conversation that keeps its KV cache between turns."""

from __future__ import annotations

import importlib
import io
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from einsum_transformer.cli import options
from einsum_transformer.cli.chat_flags import ChatFlags
from einsum_transformer.errors import InputError

if TYPE_CHECKING:
    from einsum_transformer.components.kv_cache import KVCache
    from einsum_transformer.generation.context import LengthNote
    from einsum_transformer.generation.decode import Settings
    from einsum_transformer.generation.sampling import Sampling
    from einsum_transformer.generation.speculative import Speculation
    from einsum_transformer.models.model import Model


def chat(
    named: options.Named,
    template: ChatFlags,
    sampled: options.Sampled,
    context: options.Context,
    drafting: options.Drafting,
    loading: options.Loading,
    hub: options.Hub,
    shown: options.Shown,
) -> None:
    """Talk with a model.

    /system TEXT sets the system message, /reset forgets the conversation, /exit ends it.

    \b
    etx chat
    etx chat -m HuggingFaceTB/SmolLM2-360M-Instruct --system-prompt "Answer in one sentence." --temp 0.7
    etx chat qwen3/ --no-thinking --tools tools.json
    printf 'Hello!\\nWhat did I say?\\n' | etx chat --temp 0 --quiet
    """
    source = named.source()
    config = None if isinstance(source, str) else source
    loaded, _ = loading.open(source, hub, sampled.seed, shown.silent)
    templates = {} if loaded.tokenizer is None else loaded.tokenizer.chat_templates
    if loaded.tokenizer is None or (not templates and template.chat_template is None):
        raise InputError(f"{loaded.source}: has no chat template; `run` continues plain text")
    asked = template.options(templates)
    sampling, settings = options.generation_settings(loaded, config, sampled, context)
    speculation = options.speculation_of(loaded, config, drafting, loading, hub, shown.silent)
    talk = _Talk(loaded, sampling, settings, template.system_prompt, speculation, asked, shown)
    try:
        _converse(talk, terminal=sys.stdin.isatty() and not shown.silent)
    finally:
        # What was answered is shown also if a later turn fails.
        if shown.json:
            options.write_line({"model": loaded.source, "messages": talk.messages, "turns": talk.turns})


def _converse(talk: _Talk, terminal: bool) -> None:
    """Read lines until /exit or the end of the input."""
    if terminal:
        with suppress(ImportError):  # gives input() a history and line editing, except on Windows
            importlib.import_module("readline")
        options.note("/system TEXT, /reset, /exit")
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
            options.note(f"{command}: no such command; /system TEXT, /reset, /exit")
        elif line:
            _turn(talk, line, terminal)


def _turn(talk: _Talk, line: str, terminal: bool) -> None:
    """One question; at a terminal its mistake or its interruption is no reason to leave."""
    try:
        talk.say(line)
    except InputError as error:
        if not terminal:
            raise
        options.note(f"error: {error} (/reset starts anew)")
    except KeyboardInterrupt:
        if not terminal:
            raise
        options.note("stopped; this question is forgotten")


def _next_line() -> str:
    """A line of standard input in UTF-8; a byte order mark before the first is no text."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        raw = sys.stdin.buffer.readline()
    else:  # whatever a program puts in its place has text
        raw = sys.stdin.readline().encode()
    if not raw:
        raise EOFError
    try:
        return raw.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(f"standard input: not UTF-8 text (byte {error.start} of a line)") from None


@dataclass(slots=True)
class _Talk:
    """A conversation, and the tokens of it whose keys and values are in the cache."""

    model: Model
    sampling: Sampling
    settings: Settings
    system: str | None
    speculation: Speculation | None
    options: dict[str, Any]
    """Those of `Tokenizer.encode_chat`."""
    shown: options.Shown
    messages: list[dict[str, str]] = field(default_factory=list)
    turns: list[dict[str, Any]] = field(default_factory=list)
    cached: list[int] = field(default_factory=list)
    cache: KVCache | None = None
    passed: LengthNote | None = None
    """Of the text so far, whose length is noted once."""

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all but the system message."""
        from einsum_transformer.generation.context import LengthNote

        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.cached, self.cache, self.passed = [], None, LengthNote(self.model.config)

    def say(self, text: str) -> None:
        """One turn: the question, and the answer as it comes."""
        from einsum_transformer.generation.decode import Generation, stream

        assert self.model.tokenizer is not None
        messages = [*self.messages, {"role": "user", "content": text}]
        rendered = self.model.tokenizer.encode_chat(messages, **self.options)
        cache, held = self._reuse(rendered)
        result = Generation(rendered[held:])
        # Whatever ends the answer before its time leaves the cache in an unknown state.
        self.cached, self.cache = [], None
        started = time.perf_counter()
        try:
            pieces = stream(
                self.model, [result], self.sampling, self.settings, cache, self.speculation, self.passed
            )
            for _, piece in pieces:
                if not self.shown.json:
                    options.write(piece)
        finally:
            if not self.shown.json:
                options.write("\n")
        seconds = time.perf_counter() - started
        self.cache, self.cached = cache, [*rendered, *result.tokens][: cache.length]
        self.messages = [*messages, {"role": "assistant", "content": result.text}]
        self._tell(held, result, seconds)

    def _reuse(self, rendered: list[int]) -> tuple[KVCache, int]:
        """(a cache, how many of these tokens it holds): the last turn's, cut to what both have in common."""
        if self.cache is not None:
            pairs = zip(self.cached, rendered[:-1])  # one token at least is read anew, for its scores
            held = next((i for i, (old, new) in enumerate(pairs) if old != new), None)
            held = min(len(self.cached), len(rendered) - 1) if held is None else held
            if held and self._goes_back(held):
                return self.cache, held
        slack = 0 if self.speculation is None else self.speculation.drafts + 1
        return self.model.cache(slack=slack), 0

    def _goes_back(self, held: int) -> bool:
        """Cut the cache to `held` tokens, if it can go back so far."""
        if held == len(self.cached):
            return True
        assert self.cache is not None
        # These turn keys by the length of the text, which may have been longer than it is now.
        if any(rope.rope_type in ("dynamic", "longrope") for rope in self.model.config.ropes):
            return False
        try:
            self.cache.truncate(held)
        except ValueError:  # a sliding window has lost what lay before
            return False
        return True

    def _tell(self, held: int, result: Any, seconds: float) -> None:
        turn = {
            "prompt": self.messages[-2]["content"],
            "text": result.text,
            "cached_tokens": held,
            "prompt_tokens": len(result.prompt_tokens),
            "tokens": len(result.tokens),
            "finish_reason": result.finish_reason,
            "seconds": seconds,
        }
        self.turns.append(turn)
        if not self.shown.silent:
            read, new = turn["prompt_tokens"], turn["tokens"]
            options.note(f"[{held} tokens kept, {read} read, {new} generated, {seconds:.1f} s]")
