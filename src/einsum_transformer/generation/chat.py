# pyright: reportUnnecessaryIsInstance=false
"""A conversation whose KV cache is reused from one turn to the next."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Unpack, cast

from einsum_transformer.arguments import checked
from einsum_transformer.components.kv_cache import KVCache
from einsum_transformer.errors import InputError
from einsum_transformer.generation.context import LengthNote
from einsum_transformer.generation.decode import decode_batch, settings_of, stated_options
from einsum_transformer.generation.options import GenerationOptions
from einsum_transformer.generation.rows import Generation
from einsum_transformer.models.model import Model
from einsum_transformer.text.tokenizer import Tokenizer


@checked
@dataclass(frozen=True, slots=True)
class Turn:
    """A question and its answer. `str()` is the answer."""

    prompt: str
    text: str
    cached_tokens: int
    """Tokens of the conversation whose keys and values are reused from the previous turn."""
    prompt_tokens: int
    """Tokens of the prompt that are computed in this turn."""
    tokens: int
    """Tokens of the answer."""
    finish_reason: str | None
    seconds: float

    def __str__(self) -> str:
        return self.text

    def to_dict(self) -> dict[str, Any]:
        """The turn in JSON types."""
        return asdict(self)


@checked
class Chat:
    """A conversation with a model.

        chat = et.Chat(et.load(), system="Answer in one sentence.")
        print(chat.send("Why is the sky blue?"))
        for piece in chat.stream("And at sunset?"):
            print(piece, end="")

    system: the system message. tools, chat_template: as in `Tokenizer.apply_chat_template`. template_kwargs:
    variables of the template, such as {"enable_thinking": False}. options: as in `generate`.
    `messages` is the conversation, `turns` are the answers with their token counts.

    Raises InputError for a model without tokenizer or chat template.
    """

    def __init__(
        self,
        model: Model,
        system: str | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[GenerationOptions],
    ) -> None:
        tokenizer = model.tokenizer
        if tokenizer is None or (not tokenizer.chat_templates and chat_template is None):
            raise InputError(f"{model.source}: has no chat template; use generate (`etx run`) for plain text")
        self.model: Model = model
        self.tokenizer: Tokenizer = tokenizer
        self.system: str | None = system
        self.template_options: dict[str, Any] = {
            **(template_kwargs or {}),
            **({} if tools is None else {"tools": tools}),
            **({} if chat_template is None else {"chat_template": chat_template}),
        }
        self._settings = settings_of(model, options, stated_options(model))
        self.turns: list[Turn] = []
        self.messages: list[dict[str, Any]] = []
        self._cached: list[int] = []
        """Tokens whose keys and values are in the cache."""
        self._cache: KVCache | None = None
        self._length_note = LengthNote(model.config)
        self.reset()

    def reset(self) -> None:
        """Start a new conversation with the same system message; `turns` keeps the turns so far."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        self._cached, self._cache, self._length_note = [], None, LengthNote(self.model.config)

    @checked
    def send(self, message: str | Mapping[str, Any]) -> Turn:
        """Answer a message.

        message: the text of the user, or a message with another role, such as the result of a tool:
        `{"role": "tool", "content": "21 degrees"}`.
        """
        for _ in self.stream(message):
            pass
        return self.turns[-1]

    @checked
    def stream(self, message: str | Mapping[str, Any]) -> Iterator[str]:
        """Answer a message and yield the answer in pieces; `turns[-1]` describes it when it is complete.

        message: as for `send`. If the iterator is not exhausted, the message does not become part of the
        conversation.
        """
        return self._answer(
            {"role": "user", "content": message} if isinstance(message, str) else dict(message)
        )

    def _answer(self, message: dict[str, Any]) -> Iterator[str]:
        messages = [*self.messages, message]
        rendered = cast("list[int]", self.tokenizer.apply_chat_template(messages, **self.template_options))
        cache, reused = self._reused(rendered)
        result = Generation(rendered[reused:])
        # If the caller stops early, the state of the cache is unknown.
        self._cached, self._cache = [], None
        started = time.perf_counter()
        sampling, settings, speculation = self._settings
        pieces = decode_batch(self.model, [result], sampling, settings, cache, speculation, self._length_note)
        for _, piece in pieces:
            yield piece
        seconds = time.perf_counter() - started
        self._cache, self._cached = cache, [*rendered, *result.tokens][: cache.length]
        self.messages = [*messages, {"role": "assistant", "content": result.text}]
        counts = (reused, len(result.prompt_tokens), len(result.tokens))
        self.turns.append(
            Turn(str(message.get("content", "")), result.text, *counts, result.finish_reason, seconds)
        )

    def to_dict(self) -> dict[str, Any]:
        """Model, messages and turns in JSON types."""
        turns = [turn.to_dict() for turn in self.turns]
        return {"model": self.model.source, "messages": self.messages, "turns": turns}

    def _reused(self, rendered: list[int]) -> tuple[KVCache, int]:
        """Return a cache (the previous one, truncated to the common prefix, or a new one) and its length."""
        if self._cache is not None:
            pairs = zip(self._cached, rendered[:-1])  # the last token is always computed, for its logits
            common = next((i for i, (old, new) in enumerate(pairs) if old != new), None)
            common = min(len(self._cached), len(rendered) - 1) if common is None else common
            if common and self._truncated(self._cache, common):
                return self._cache, common
        speculation = self._settings[2]
        slack = 0 if speculation is None else speculation.drafts + 1
        return self.model.cache(slack=slack), 0

    def _truncated(self, cache: KVCache, length: int) -> bool:
        """Truncate the cache to `length` tokens; returns False if that is not possible."""
        if length == len(self._cached):
            return True
        # These frequencies depend on the length of the text, which may have been longer before.
        if any(rope.rope_type in ("dynamic", "longrope") for rope in self.model.config.ropes):
            return False
        try:
            cache.truncate(length)
        except ValueError:  # the ring of a sliding window has overwritten the keys before `length`
            return False
        return True
