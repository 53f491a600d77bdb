"""Which characters of a rendered conversation are the assistant's, and which tokens hold them.

Where the template has `{% generation %}` blocks, they are the assistant's words, as in transformers.
Elsewhere the words of assistant message i are what the template writes between the prompt for it,
`messages[:i]` with the generation prompt, and `messages[:i + 1]`. The time to render all these prefixes is
quadratic in the length of the conversation. So only those of the steps 1, 2, 4, 8, ... and the last two are
rendered. For all others the messages of the step are rendered after the first messages that end in the same
role: what that adds must stand in the whole text at the same place, else the prefix is rendered after all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise, takewhile
from typing import Any

import numpy as np

from einsum_transformer.errors import InputError
from einsum_transformer.text.chat_options import choose_template
from einsum_transformer.text.native import checked
from einsum_transformer.text.tokenizer import Tokenizer

Array = np.ndarray
Span = tuple[int, int]
"""(first, past the last) character."""
Message = Mapping[str, Any]

_MARK = "\ue000\ue001"  # stands for a message's words; private characters, which no text should have
_BASES = 8  # beginnings that are tried for one step


class Rewritten(Exception):
    """The template writes earlier turns differently once others follow, so a prefix is not in the whole."""


class _Irregular(Exception):
    """What the template adds for some messages depends on more than the role before them."""


@dataclass(frozen=True)
class Conversation:
    """Messages, and what renders them: (messages, add_generation_prompt) -> (text, generation blocks)."""

    messages: Sequence[Message]
    render: Callable[[Sequence[Message], bool], tuple[str, list[Span]]]
    eos: str
    has_blocks: bool
    """Whether the template has `{% generation %}` blocks at all."""
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
        template = choose_template(tokenizer.chat_templates, None, tools is not None, tokenizer.source)
        return cls(messages, render, eos, "endgeneration" in template, *render(messages, False))

    @property
    def answers(self) -> list[int]:
        """The numbers of the assistant's messages."""
        return [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]

    def prefix(self, messages: Sequence[Message], prompt: bool) -> str:
        """The text of some first messages if the whole begins with it; else raises Rewritten.

        EOS at the very end is left out if the template writes it after the last message only.
        """
        try:
            text = self.render(messages, prompt)[0] if messages else ""
        except InputError:
            raise Rewritten from None  # a template may refuse a part of what it renders as a whole
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

    def turn(self, number: int) -> Span:
        """The words of one message, with what ends its turn, where earlier turns may be rewritten; raises
        Rewritten if they cannot be located."""
        begin = self.start(number)
        if number + 1 == len(self.messages):
            return begin, len(self.text)
        try:
            return begin, len(self.prefix(self.messages[: number + 1], False))
        except Rewritten:
            return begin, self._with_end(number)[1]

    def start(self, number: int) -> int:
        """Where the answer to messages[:number] begins.

        A generation prompt may open more than the answer has, such as `<think>`. Then it begins where the
        words of a plain answer would.
        """
        if not number:
            return 0
        try:
            asked = self.render(self.messages[:number], True)[0]
            plain = self.render(self.messages[:number], False)[0]
        except InputError:
            return self._words(number)[0][0]
        if self.text.startswith(asked):
            return len(asked)
        (words, _), _ = self._words(number)
        header = asked.removeprefix(plain)
        if header == asked or not header:
            return words
        try:
            (_, last), _ = self._words(number - 1)
        except Rewritten:
            return words
        place = self.text.rfind(header, last, words)
        return words if place < 0 else place + len(header)

    def _with_end(self, number: int) -> Span:
        (begin, end), tail = self._words(number)
        same = takewhile(lambda pair: pair[0] == pair[1], zip(self.text[end:], tail))
        return begin, end + len(list(same))

    def _words(self, number: int) -> tuple[Span, str]:
        """Where the words of a message stand, and what the template writes after them if it is the last.

        The words are what a mark in their place replaces; raises Rewritten if it replaces more or less.
        """
        message, first, rest = self.messages[number], self.messages[:number], self.messages[number + 1 :]
        plain, kept = {"role": message["role"], "content": _MARK}, {**message, "content": _MARK}
        for marked in (plain, kept) if message["role"] == "assistant" else (kept, plain):
            try:
                whole = self.render([*first, marked, *rest], False)[0]
                alone = self.render([*first, marked], False)[0] if rest else whole
            except InputError:
                continue  # the template refuses such a message here
            before, _, after = whole.partition(_MARK)
            fits = self.text.startswith(before) and self.text.endswith(after)
            if whole.count(_MARK) == 1 and fits and len(before) + len(after) <= len(self.text):
                return (len(before), len(self.text) - len(after)), alone.rpartition(_MARK)[2]
        raise Rewritten

    def message_spans(self, numbers: Sequence[int]) -> list[Span]:
        """Messages with what the template writes around them, or only after them where it rewrites earlier
        ones; raises Rewritten if they cannot be located."""
        try:
            spans = self.whole_messages() if numbers else {}
        except Rewritten:
            return [self._with_end(i) for i in numbers]
        return [spans[i] for i in numbers]

    def owned_blocks(self) -> dict[int, list[Span]]:
        """The generation blocks by the number of the message that they belong to; raises Rewritten."""
        try:
            spans = self.whole_messages()
        except Rewritten:
            return self._counted_blocks()
        pairs = [(i, max(a, c), min(b, d)) for i, (a, b) in spans.items() for c, d in self.blocks]
        found: dict[int, list[Span]] = {i: [] for i in spans}
        for i, first, end in pairs:
            if first < end:
                found[i].append((first, end))
        return found

    def _counted_blocks(self) -> dict[int, list[Span]]:
        """The blocks by how many more there are with each message."""
        answers = self.answers
        if len(self.blocks) == len(answers):
            return {i: [block] for i, block in zip(answers, self.blocks)}
        try:
            counts = [len(self.render(self.messages[: i + 1], False)[1]) for i in range(len(self.messages))]
        except InputError:
            raise Rewritten from None
        pairs = list(pairwise([0, *counts]))
        if counts[-1] != len(self.blocks) or any(before > after for before, after in pairs):
            raise Rewritten
        return {i: self.blocks[before:after] for i, (before, after) in enumerate(pairs)}


@dataclass
class _Reading:
    """Where prefixes end in the text, in its order."""

    chat: Conversation
    exact: bool = False
    """Render every prefix."""
    position: int = 0
    bases: dict[Any, list[tuple[int, int]]] = field(default_factory=dict)
    """Numbers of first messages, and where they end, by the role of the last and the generation prompts."""

    def ends(self, steps: Sequence[tuple[int, bool]]) -> list[int]:
        """The lengths of prefixes, each (number of messages, generation prompt), from the shortest on."""
        found: list[int] = []
        last = (0, False)
        for number, step in enumerate(steps, 1):
            check = number & (number - 1) == 0 or number >= len(steps) - 1
            if step[0]:
                self._pass(last, step, check)
            found.append(self.position)
            last = step
        return found

    def _pass(self, last: tuple[int, bool], step: tuple[int, bool], check: bool) -> None:
        """Go on from one prefix to the next; check: compare with the text of the prefix."""
        chat, (begin, asked), (end, prompt) = self.chat, last, step
        if end == len(chat.messages) and not prompt:
            self.position = len(chat.text)
            return
        bases = self.bases.setdefault((asked, prompt, begin and chat.messages[begin - 1]["role"]), [])
        for base in [] if self.exact else bases:
            size = self._added(base, chat.messages[begin:end], prompt)
            if size is not None:
                self.position += size
                if check and self.position != len(chat.prefix(chat.messages[:end], prompt)):
                    raise _Irregular
                return
        before = self.position
        if bases and not self.exact and before != len(chat.prefix(chat.messages[:begin], asked)):
            raise _Irregular  # an earlier step was too short or too long
        self.position = len(chat.prefix(chat.messages[:end], prompt))
        if self.position < before:
            raise Rewritten
        if len(bases) < _BASES:
            bases.append((begin, before))

    def _added(self, base: tuple[int, int], messages: Sequence[Message], prompt: bool) -> int | None:
        """The length of what messages add to first ones, if that stands at the position; else None."""
        chat, (count, size) = self.chat, base
        try:
            text = chat.render([*chat.messages[:count], *messages], prompt)[0]
        except InputError:
            return None  # the template refuses these messages so early
        if not text.startswith(chat.text[:size]):
            return None
        for each in (text, text if prompt else text.removesuffix(chat.eos)):
            if len(each) >= size and chat.text.startswith(each[size:], self.position):
                return len(each) - size
        return None


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
