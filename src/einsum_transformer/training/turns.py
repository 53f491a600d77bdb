"""Which characters of a rendered conversation are the assistant's, and which tokens hold them.

The words of assistant message i are what the template writes between the prompt for it, `messages[:i]` with
the generation prompt, and `messages[:i + 1]`. The time to render all these prefixes is quadratic in the
length of the conversation. So only some are rendered: those of the first messages of each shape (role, keys,
outer white space), which show the text around the contents, and those of the turns 1, 2, 4, 8, ... and the
last. All others are read off the whole text, where the same must stand around them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np

from einsum_transformer.text.native import checked
from einsum_transformer.text.tokenizer import Tokenizer

Array = np.ndarray
Span = tuple[int, int]
"""(first, past the last) character."""
Message = Mapping[str, Any]

_SLOT = re.compile("\ue000([0-9]+)\ue001")
_FIXED = frozenset({"role", "type"})  # keys with values that templates compare


class Rewritten(Exception):
    """The template writes earlier turns differently once others follow, so a prefix is not in the whole."""


class _Irregular(Exception):
    """What is written around the contents of one message is not what it is for others of its shape."""


@dataclass(frozen=True)
class Conversation:
    """Messages, and what renders them: (messages, add_generation_prompt) -> (text, generation blocks)."""

    messages: Sequence[Message]
    render: Callable[[Sequence[Message], bool], tuple[str, list[Span]]]
    eos: str
    text: str
    blocks: list[Span]
    """Of the `{% generation %}` blocks of the whole."""

    @classmethod
    def of(
        cls, tokenizer: Tokenizer, messages: Sequence[Message], tools: Any, variables: Mapping[str, Any]
    ) -> Conversation:
        """The conversation, rendered by the tokenizer's chat template."""

        def render(part: Sequence[Message], prompt: bool) -> tuple[str, list[Span]]:
            return tokenizer.chat_text(part, prompt, tools, **variables)

        eos = "" if tokenizer.eos_id is None else tokenizer.token(tokenizer.eos_id)
        return cls(messages, render, eos, *render(messages, False))

    @property
    def answers(self) -> list[int]:
        """The numbers of the assistant's messages."""
        return [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]

    def prefix(self, messages: Sequence[Message], prompt: bool) -> str:
        """The text of some first messages if the whole begins with it; else raises Rewritten.

        EOS at the very end is left out if the template writes it after the last message only.
        """
        text = self.render(messages, prompt)[0] if messages else ""
        if self.text.startswith(text):
            return text
        shorter = text.removesuffix(self.eos)
        if prompt or not self.text.startswith(shorter):
            raise Rewritten
        return shorter

    def turns(self) -> dict[int, Span]:
        """The words of every assistant message, with what ends its turn, by the message's number.

        Raises Rewritten if the whole does not begin with one of the prefixes.
        """
        return self._read([step for i in self.answers for step in ((i, True), (i + 1, False))])

    def whole_messages(self) -> dict[int, Span]:
        """Every message as it is rendered, with what the template writes around it; raises Rewritten."""
        return self._read([step for i in range(len(self.messages)) for step in ((i, False), (i + 1, False))])

    def _read(self, steps: list[tuple[int, bool]]) -> dict[int, Span]:
        """Spans between pairs of prefixes, (number of messages, generation prompt), by the first number."""
        try:
            ends = _Reading(self).ends(steps)
        except _Irregular:
            ends = _Reading(self, exact=True).ends(steps)
        return {steps[j][0]: (ends[j], ends[j + 1]) for j in range(0, len(steps), 2)}

    def last_turn(self) -> dict[int, Span]:
        """The words of the last assistant message alone; raises Rewritten if they cannot be told apart."""
        last = self.answers[-1]
        end = len(self.prefix(self.messages[: last + 1], False))
        return {last: (self.start(self.messages[:last]), end)}

    def start(self, prompt: Sequence[Message]) -> int:
        """Where the answer to a prompt begins. A generation prompt may open more than the answer has, such as
        `<think>`; then at the first character in which they differ."""
        if not prompt:
            return 0
        text = self.render(prompt, True)[0]
        if self.text.startswith(text):
            return len(text)
        first = len(self.prefix(prompt, False))
        same = next((i for i, (a, b) in enumerate(zip(text, self.text)) if a != b), len(self.text))
        if same <= first:
            raise Rewritten
        return same


@dataclass
class _Reading:
    """Where prefixes end in the text, in its order."""

    chat: Conversation
    exact: bool = False
    """Render every prefix."""
    position: int = 0
    forms: dict[Any, list[str]] = field(default_factory=dict)
    """What the template writes around the values of messages of one shape: text, number, text, ..., text."""

    def ends(self, steps: Sequence[tuple[int, bool]]) -> list[int]:
        """The lengths of prefixes, each (number of messages, generation prompt), from the shortest on."""
        found: list[int] = []
        begin = 0
        for number, (end, prompt) in enumerate(steps, 1):
            check = self.exact or number & (number - 1) == 0 or number >= len(steps) - 1
            if end:
                self._pass(begin, end, prompt, check)
            found.append(self.position)
            begin = end
        return found

    def _pass(self, begin: int, end: int, prompt: bool, check: bool) -> None:
        """Go on behind messages[begin:end] and, where asked for, the generation prompt."""
        chat, values = self.chat, list[str]()
        if end == len(chat.messages) and not prompt:
            self.position = len(chat.text)
            return
        emptied = [_emptied(message, values) for message in chat.messages[begin:end]]
        shape = (prompt, min(begin, 2), json.dumps(emptied))
        form = self.forms.get(shape)
        if form is not None:
            text = _filled(form, values)
            if chat.text.startswith(text, self.position):
                self.position += len(text)
                if check and self.position != len(chat.prefix(chat.messages[:end], prompt)):
                    raise _Irregular
                return
        position, self.position = self.position, len(chat.prefix(chat.messages[:end], prompt))
        if self.position < position:
            raise Rewritten
        if not self.exact:
            for form in self._forms(begin, end, prompt, position):
                if _filled(form, values) == chat.text[position : self.position]:
                    self.forms[shape] = form

    def _forms(self, begin: int, end: int, prompt: bool, position: int) -> list[list[str]]:
        """What may stand around the values of messages[begin:end], with EOS at the very end and without."""
        chat, numbers = self.chat, list[str]()
        marked = [_marked(message, numbers) for message in chat.messages[begin:end]]
        text = chat.render([*chat.messages[:begin], *marked], prompt)[0]
        if not text.startswith(chat.text[:position]):
            return []
        return [_SLOT.split(each[position:]) for each in (text, text.removesuffix(chat.eos))]


def _filled(form: Sequence[str], values: Sequence[str]) -> str:
    return "".join(values[int(part)] if i % 2 else part for i, part in enumerate(form))


def _emptied(value: Any, values: list[str], key: str = "") -> Any:
    """The value with its strings taken out to `values`, but for the white space around them."""
    if isinstance(value, str) and key not in _FIXED and value.strip():
        values.append(value.strip())
        return ["", *value.split(values[-1], 1)]
    if isinstance(value, Mapping):
        return {name: _emptied(item, values, name) for name, item in value.items()}
    return [_emptied(item, values) for item in value] if isinstance(value, list) else value


def _marked(value: Any, numbers: list[str], key: str = "") -> Any:
    """The value with a numbered mark in the place of each string that `_emptied` takes out."""
    if isinstance(value, str) and key not in _FIXED and value.strip():
        numbers.append(f"\ue000{len(numbers)}\ue001")
        return value.replace(value.strip(), numbers[-1], 1)
    if isinstance(value, Mapping):
        return {name: _marked(item, numbers, name) for name, item in value.items()}
    return [_marked(item, numbers) for item in value] if isinstance(value, list) else value


def offsets(tokenizer: Tokenizer, text: str) -> Array:
    """(first, past the last) character of every token of a text, encoded without BOS and EOS: (t, 2)."""
    found = checked(
        f"{tokenizer.source}: cannot encode the text",
        lambda: tokenizer.backend.encode(text, add_special_tokens=False).offsets,
    )
    exact: list[Span] = []
    for (first, end), group in groupby(found):
        count, part = len(list(group)), text[first:end]
        size = len(part.encode()) if end - first > 1 else 0
        # Unigram gives all tokens of a run of characters that it spells in bytes the place of the whole run.
        exact += _of_bytes(first, part) if size == count else [(first, end)] * count
    return np.array(exact, np.int64).reshape(-1, 2)


def _of_bytes(first: int, text: str) -> list[Span]:
    """The place of the character of every byte."""
    return [(first + i, first + i + 1) for i, letter in enumerate(text) for _ in letter.encode()]


def held(offsets: Array, spans: Sequence[Span]) -> Array:
    """Which tokens hold a character of one of the spans, as in transformers' assistant masks: (t,) bool.

    A token without characters, such as SentencePiece's mark of a word's start, belongs to what follows it.
    """
    firsts, ends = offsets.T
    found = np.zeros(len(offsets), bool)
    for first, end in spans:
        found |= ((ends > first) | (firsts >= first)) & (firsts < end)
    return found
