"""Character spans of the assistant's messages in a rendered conversation, and the tokens that they cover.

Where the template has `{% generation %}` blocks, the blocks are the spans, as in transformers. Otherwise the
span of assistant message i is the difference of two rendered prefixes: `messages[:i]` with the generation
prompt, and `messages[:i + 1]`. Rendering every prefix takes time quadratic in the length of the conversation.
So only the prefixes of the steps 1, 2, 4, 8, ... and of the last two are rendered. For any other step, its
messages are rendered after a shorter prefix that ends in the same role, and the text which that adds must
occur at the current position of the whole text; if it does not, the prefix of the step is rendered.
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
"""Start and end (exclusive) of a range of characters."""
Message = Mapping[str, Any]

_MARK = "\ue000\ue001"  # placeholder of a message's content; private-use characters do not occur in text
_BASES = 8  # shorter prefixes that are tried for one step


class Rewritten(Exception):
    """The template changes earlier turns when others follow: the whole text does not begin with a prefix."""


class _Irregular(Exception):
    """The text that the template adds for some messages depends on more than the role before them."""


@dataclass(frozen=True)
class Conversation:
    """The messages of a conversation, a function that renders them, and their rendered text."""

    messages: Sequence[Message]
    render: Callable[[Sequence[Message], bool], tuple[str, list[Span]]]
    """(messages, add_generation_prompt) -> (text, spans of `{% generation %}` blocks)."""
    eos: str
    has_blocks: bool
    """Whether the template contains `{% generation %}` blocks."""
    text: str
    blocks: list[Span]
    """The spans of the `{% generation %}` blocks in `text`."""

    @classmethod
    def of(
        cls, tokenizer: Tokenizer, messages: Sequence[Message], tools: Any, variables: Mapping[str, Any]
    ) -> Conversation:
        """Render a conversation with the tokenizer's chat template."""

        def render(part: Sequence[Message], prompt: bool) -> tuple[str, list[Span]]:
            return tokenizer.chat_text(part, prompt, tools, **variables)

        eos = "" if tokenizer.eos_id is None else tokenizer.token(tokenizer.eos_id)
        template = choose_template(tokenizer.chat_templates, None, tools is not None, tokenizer.source)
        return cls(messages, render, eos, "endgeneration" in template, *render(messages, False))

    @property
    def answers(self) -> list[int]:
        """The indices of the assistant's messages."""
        return [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]

    def prefix(self, messages: Sequence[Message], prompt: bool) -> str:
        """Render the first messages; raises Rewritten if the whole text does not begin with the result.

        EOS at its end is omitted if the template writes it after the last message only.
        """
        try:
            text = self.render(messages, prompt)[0] if messages else ""
        except InputError:
            raise Rewritten from None  # a template may reject a prefix of a conversation that it accepts
        if self.text.startswith(text):
            return text
        shorter = text.removesuffix(self.eos)
        if prompt or not self.text.startswith(shorter):
            raise Rewritten
        return shorter

    def turns(self) -> dict[int, Span]:
        """The span of every assistant message with its end-of-turn marker, by the index of the message.

        Raises Rewritten if the whole text does not begin with each rendered prefix.
        """
        return self._between([step for i in self.answers for step in ((i, True), (i + 1, False))])

    def whole_messages(self) -> dict[int, Span]:
        """The span of every rendered message, including its header and end; raises Rewritten."""
        steps = [step for i in range(len(self.messages)) for step in ((i, False), (i + 1, False))]
        return self._between(steps)

    def _between(self, steps: list[tuple[int, bool]]) -> dict[int, Span]:
        """Spans between pairs of prefixes (number of messages, generation prompt), by the first number."""
        try:
            ends = _Prefixes(self).ends(steps)
        except _Irregular:
            ends = _Prefixes(self, exact=True).ends(steps)
        return {steps[j][0]: (ends[j], ends[j + 1]) for j in range(0, len(steps), 2)}

    def turn(self, number: int) -> Span:
        """The span of one message with its end-of-turn marker, where earlier turns may be rewritten; raises
        Rewritten if it cannot be located."""
        begin = self.start(number)
        if number + 1 == len(self.messages):
            return begin, len(self.text)
        try:
            return begin, len(self.prefix(self.messages[: number + 1], False))
        except Rewritten:
            return begin, self._with_end(number)[1]

    def start(self, number: int) -> int:
        """The position at which the answer to messages[:number] begins.

        A generation prompt may open more than the answer contains, such as `<think>`. The answer then begins
        at its header or, if that is not found, at its content.
        """
        if not number:
            return 0
        try:
            prompted = self.render(self.messages[:number], True)[0]
            plain = self.render(self.messages[:number], False)[0]
        except InputError:
            return self._content(number)[0][0]
        if self.text.startswith(prompted):
            return len(prompted)
        (begin, _), _ = self._content(number)
        header = prompted.removeprefix(plain)
        if header == prompted or not header:
            return begin
        try:
            (_, last), _ = self._content(number - 1)
        except Rewritten:
            return begin
        position = self.text.rfind(header, last, begin)
        return begin if position < 0 else position + len(header)

    def _with_end(self, number: int) -> Span:
        (begin, end), tail = self._content(number)
        same = takewhile(lambda pair: pair[0] == pair[1], zip(self.text[end:], tail))
        return begin, end + len(list(same))

    def _content(self, number: int) -> tuple[Span, str]:
        """The span of a message's content, and the text that the template writes after a last message.

        Located by rendering the message with a placeholder as its content; raises Rewritten if the rest of
        the text changes with it.
        """
        message, first, rest = self.messages[number], self.messages[:number], self.messages[number + 1 :]
        plain, full = {"role": message["role"], "content": _MARK}, {**message, "content": _MARK}
        for marked in (plain, full) if message["role"] == "assistant" else (full, plain):
            try:
                whole = self.render([*first, marked, *rest], False)[0]
                alone = self.render([*first, marked], False)[0] if rest else whole
            except InputError:
                continue  # the template rejects such a message here
            before, _, after = whole.partition(_MARK)
            fits = self.text.startswith(before) and self.text.endswith(after)
            if whole.count(_MARK) == 1 and fits and len(before) + len(after) <= len(self.text):
                return (len(before), len(self.text) - len(after)), alone.rpartition(_MARK)[2]
        raise Rewritten

    def message_spans(self, numbers: Sequence[int]) -> list[Span]:
        """The spans of whole messages, or of content and end where the template rewrites earlier messages;
        raises Rewritten if they cannot be located."""
        try:
            spans = self.whole_messages() if numbers else {}
        except Rewritten:
            return [self._with_end(i) for i in numbers]
        return [spans[i] for i in numbers]

    def owned_blocks(self) -> dict[int, list[Span]]:
        """The generation blocks by the index of the message that contains them; raises Rewritten."""
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
        """The generation blocks by message, from the number of blocks in each rendered prefix."""
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
class _Prefixes:
    """Computes where prefixes of a conversation end in its text, in increasing order."""

    chat: Conversation
    exact: bool = False
    """Render every prefix."""
    position: int = 0
    bases: dict[Any, list[tuple[int, int]]] = field(default_factory=dict)
    """(number of messages, length) of rendered prefixes, by generation prompts and the role before a step."""

    def ends(self, steps: Sequence[tuple[int, bool]]) -> list[int]:
        """The lengths of prefixes (number of messages, generation prompt), which increase."""
        found: list[int] = []
        last = (0, False)
        for number, step in enumerate(steps, 1):
            check = number & (number - 1) == 0 or number >= len(steps) - 1
            if step[0]:
                self._advance(last, step, check)
            found.append(self.position)
            last = step
        return found

    def _advance(self, last: tuple[int, bool], step: tuple[int, bool], check: bool) -> None:
        """Move `position` from the end of one prefix to the next; check: compare with the rendered prefix."""
        chat, (begin, prompted), (end, prompt) = self.chat, last, step
        if end == len(chat.messages) and not prompt:
            self.position = len(chat.text)
            return
        bases = self.bases.setdefault((prompted, prompt, begin and chat.messages[begin - 1]["role"]), [])
        for base in [] if self.exact else bases:
            size = self._added(base, chat.messages[begin:end], prompt)
            if size is not None:
                self.position += size
                if check and self.position != len(chat.prefix(chat.messages[:end], prompt)):
                    raise _Irregular
                return
        before = self.position
        if bases and not self.exact and before != len(chat.prefix(chat.messages[:begin], prompted)):
            raise _Irregular  # an earlier step gave a wrong length
        self.position = len(chat.prefix(chat.messages[:end], prompt))
        if self.position < before:
            raise Rewritten
        if len(bases) < _BASES:
            bases.append((begin, before))

    def _added(self, base: tuple[int, int], messages: Sequence[Message], prompt: bool) -> int | None:
        """The length of the text that messages add to a prefix, if it occurs at `position`; else None."""
        chat, (count, size) = self.chat, base
        try:
            text = chat.render([*chat.messages[:count], *messages], prompt)[0]
        except InputError:
            return None  # the template rejects these messages after a shorter prefix
        if not text.startswith(chat.text[:size]):
            return None
        for each in (text, text if prompt else text.removesuffix(chat.eos)):
            if len(each) >= size and chat.text.startswith(each[size:], self.position):
                return len(each) - size
        return None


def offsets(tokenizer: Tokenizer, text: str) -> Array:
    """The character span of every token of a text, encoded without BOS and EOS: (t, 2)."""
    found = checked(
        f"{tokenizer.source}: cannot encode the text",
        lambda: tokenizer.backend.encode(text, add_special_tokens=False).offsets,
    )
    exact: list[Span] = []
    for (first, end), group in groupby(found):
        count, part = len(list(group)), text[first:end]
        size = len(part.encode()) if end - first > 1 else 0
        # With byte fallback, Unigram gives every byte token of a run of characters the span of the whole run.
        exact += _of_bytes(first, part) if size == count else [(first, end)] * count
    return np.array(exact, np.int64).reshape(-1, 2)


def _of_bytes(first: int, text: str) -> list[Span]:
    """The span of its character for every byte."""
    return [(first + i, first + i + 1) for i, letter in enumerate(text) for _ in letter.encode()]


def held(offsets: Array, spans: Sequence[Span]) -> Array:
    """The mask of the tokens that overlap one of the spans, as transformers' assistant masks: (t,) bool.

    A token without characters, such as SentencePiece's word boundary, counts as part of the next token.
    """
    firsts, ends = offsets.T
    found = np.zeros(len(offsets), bool)
    for first, end in spans:
        found |= ((ends > first) | (firsts >= first)) & (firsts < end)
    return found
