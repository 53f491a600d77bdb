"""Examples to learn, from the texts and the JSON records of a data file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from einsum_transformer.errors import InputError
from einsum_transformer.notes import note
from einsum_transformer.tables import some
from einsum_transformer.text.chat_template import check_messages
from einsum_transformer.text.tokenizer import Tokenizer
from einsum_transformer.training import record_keys as keys
from einsum_transformer.training.files import Data, Record, read_data
from einsum_transformer.training.turns import Conversation, Rewritten, Span, held, offsets

Array = np.ndarray
_TRIED = 8  # answers of a conversation, from the last on


@dataclass(frozen=True, slots=True)
class Example:
    """A sequence to learn: its token ids, and which of them are targets."""

    tokens: Array
    trained: Array
    place: str
    """Where it stands: `file`, or `file: line 3`."""
    divisible: bool = True
    """A plain text, of which a part is a text too; a conversation or an answer is one only as a whole."""


def read_examples(
    path: str | Path, tokenizer: Tokenizer, mask_prompt: bool = False, part: str = "train"
) -> list[Example]:
    """The sequences of a data file: each record of JSONL or of a JSON array, any other file as one text; of a
    folder those of `<part>.jsonl` in it.

    A record is one of
    {"text": ...};
    {"prompt": ..., "completion": ...}: two strings, one after the other as they are, or two lists of
    messages;
    {"messages": [...]}, rendered by the tokenizer's chat template with the record's tools, documents,
    system prompt and chat_template_kwargs; or "conversations" of {"from", "value"}.
    A text and a completion end with EOS, if there is one. mask_prompt: only completions and the assistant's
    messages are targets. A message with "weight": 0 or "train": false is no target in any case.
    Keys that are not used are named in one note. Errors: InputError that names the file and the record.
    """
    return examples_of(read_data(path, keys.has_form, part), tokenizer, mask_prompt)


def examples_of(data: Data, tokenizer: Tokenizer, mask_prompt: bool = False) -> list[Example]:
    """The examples of a file that was read; see `read_examples`."""
    if data.records is None:
        if mask_prompt:
            why = f"{data.doubt}, and " * bool(data.doubt)
            raise InputError(
                f"{data.path}: {why}a plain text has no prompt to mask; that needs JSONL records"
            )
        return [_whole(tokenizer.encode_once(data.text, end=True), str(data.path))]
    reader = _Reader(tokenizer, mask_prompt)
    found = [reader.example(record) for record in data.records]
    examples = [example for example in found if example is not None]
    reader.write_notes(data.path, len(found))
    return examples


def texts_of(data: Data) -> list[str]:
    """The texts that a tokenizer can be trained on: the lines of a text, or all strings of the records."""
    if data.records is None:
        return data.text.splitlines(keepends=True)
    found: list[str] = []
    for record in data.records:
        _collect(record.values, found)
    return found


def _collect(value: Any, found: list[str]) -> None:
    if isinstance(value, str):
        found.append(value)
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _collect(item, found)


def _whole(tokens: Sequence[int], place: str, divisible: bool = True) -> Example:
    return Example(np.array(tokens, np.int32), np.ones(len(tokens), bool), place, divisible)


@dataclass
class _Reader:
    """Makes the examples of one file, and collects what its notes say."""

    tokenizer: Tokenizer
    mask_prompt: bool
    unused: Counter[str] = field(default_factory=Counter)
    """Keys and template variables that change nothing, and in how many records they are."""
    last_only: int = 0
    """Conversations of which only the last answer is learnt."""
    not_located: int = 0
    """Conversations in which the answers cannot be located."""

    def example(self, record: Record) -> Example | None:
        """The example; None for a conversation in which the answers cannot be located."""
        try:
            return self._example(record.values, record.place)
        except InputError as error:
            raise (
                error if str(error).startswith(record.place) else InputError(f"{record.place}: {error}")
            ) from None
        except Rewritten:
            self.not_located += 1
            return None

    def write_notes(self, path: Path, count: int) -> None:
        """The notes of a file of so many records; raises InputError if none can be learnt."""
        why = "the chat template does not show which words are the assistant's"
        if self.not_located == count:
            raise InputError(
                f"{path}: {why}, so the prompt cannot be masked; learn whole conversations (without "
                '--mask-prompt), write {"prompt": ..., "completion": ...}, or use a template with '
                "{% generation %} blocks"
            )
        if self.not_located:
            note(f"{path}: {self.not_located} of {count} records are left out: in them {why}")
        if self.unused:
            named = some([f"{name} ({number})" for name, number in self.unused.most_common()], 12)
            note(f"{path}: keys that change nothing here, and in how many records: {named}")
        if self.last_only:
            which = "conversations" if self.last_only > 1 else "conversation"
            note(
                f"{path}: the chat template writes earlier turns anew, so of {self.last_only} {which} "
                "only the last answer is learnt"
            )

    def _example(self, raw: dict[str, Any], place: str) -> Example:
        form, used = keys.form_of(raw)
        self.unused.update(keys.unused(raw, used))
        if form == "text":
            if self.mask_prompt:
                raise InputError('a "text" has no prompt to mask; write {"prompt": ..., "completion": ...}')
            return _whole(self.tokenizer.encode_once(raw["text"], end=True), place)
        if form == "completion":
            return self._completion(raw["prompt"], raw["completion"], place)
        if form == "chat completion":
            return self._chat_completion(raw, place)
        return self._conversation(raw, keys.messages_of(raw, form), place)

    def _completion(self, prompt: str, completion: str, place: str) -> Example:
        eos = self.tokenizer.eos_id
        first = self._begun(prompt)
        answer = self._after(prompt, first, completion)
        if eos is not None and answer[-1:] != [eos]:
            answer.append(eos)
        example = _whole([*first, *answer], place, divisible=False)
        example.trained[: len(first) if self.mask_prompt else 0] = False
        return example

    def _after(self, prompt: str, first: list[int], completion: str) -> list[int]:
        """The ids of a completion: the prompt's ids stay as they are, as in generation. Some tokenizers begin
        a text, but not what follows one, with a space."""
        both = self._begun(prompt + completion)
        if both[: len(first)] == first:
            return both[len(first) :]
        return self.tokenizer.encode(completion, add_special_tokens=False)

    def _begun(self, text: str) -> list[int]:
        """The ids of a text that is not over: without the EOS that some tokenizers add."""
        ids, eos = self.tokenizer.encode_once(text), self.tokenizer.eos_id
        added = eos is not None and self.tokenizer.encode("")[-1:] == ids[-1:] == [eos]
        return ids[:-1] if added else ids

    def _chat_completion(self, raw: dict[str, Any], place: str) -> Example:
        prompt = keys.with_system(raw, keys.plain_messages(raw["prompt"], "prompt"))
        completion = keys.plain_messages(raw["completion"], "completion")
        chat = self._rendered(raw, [*prompt, *completion])
        if not self.mask_prompt:
            return self._plain(chat, place)
        try:
            learnt = [(chat.start(len(prompt)), len(chat.text))]
        except Rewritten:
            chosen = [None if i >= len(prompt) else False for i in range(len(chat.messages))]
            learnt = self._learnt(chat, chosen)[0]
        example = self._plain(chat, place)
        example.trained[:] = held(offsets(self.tokenizer, chat.text), learnt)
        return example

    def _plain(self, chat: Conversation, place: str) -> Example:
        return _whole(self.tokenizer.encode(chat.text, add_special_tokens=False), place, divisible=False)

    def _rendered(self, raw: Mapping[str, Any], messages: list[dict[str, Any]]) -> Conversation:
        check_messages(messages)
        if not self.tokenizer.chat_templates:
            raise InputError(
                f"{self.tokenizer.source} has no chat template, which messages need; put its "
                'chat_template.jinja into the model\'s folder, or write {"prompt": ..., "completion": ...}'
            )
        tools, variables = keys.objects_of(raw, "tools"), keys.variables_of(raw)
        sources = " ".join(self.tokenizer.chat_templates.values())
        if sources:
            named = [*(["tools"] if tools else []), *variables, *keys.message_keys(messages)]
            self.unused.update(name for name in named if not keys.is_read(name, sources))
        return Conversation.of(self.tokenizer, messages, tools, variables)

    def _conversation(self, raw: dict[str, Any], messages: list[dict[str, Any]], place: str) -> Example:
        check_messages(messages)
        chosen = [keys.chosen(message, f"messages[{i}]") for i, message in enumerate(messages)]
        plain = [keys.without_flags(message) for message in messages]
        chat = self._rendered(raw, plain)
        if not self.mask_prompt and False not in chosen:
            return self._plain(chat, place)
        if self.mask_prompt and not chat.answers and True not in chosen:
            raise InputError(
                "no message is the assistant's, so with the prompt masked nothing is left to learn"
            )
        learnt, masked = self._learnt(chat, chosen) if self.mask_prompt else ([], _switched_off(chat, chosen))
        example, places = self._plain(chat, place), offsets(self.tokenizer, chat.text)
        if self.mask_prompt:
            example.trained[:] = held(places, learnt)
        example.trained[held(places, masked)] = False
        if not example.trained.any():
            raise InputError(_nothing_left(chosen))
        return example

    def _learnt(self, chat: Conversation, chosen: Sequence[bool | None]) -> tuple[list[Span], list[Span]]:
        """Characters that are learnt where the prompt is masked, and those that never are.

        Raises Rewritten if no answer can be located.
        """
        on = [i for i in chat.answers if chosen[i] is not False]
        off = [i for i in chat.answers if chosen[i] is False]
        others = [i for i, choice in enumerate(chosen) if choice and i not in on]
        more = chat.message_spans(others)
        if not on:
            return more, []
        if chat.has_blocks:
            if not chat.blocks and not more:
                raise Rewritten
            owned = chat.owned_blocks() if off else {}
            return chat.blocks + more, [span for i in off for span in owned[i]]
        try:
            turns = chat.turns()
        except Rewritten:
            return more + self._last(chat, on, bool(more)), []
        return more + [turns[i] for i in on], [turns[i] for i in off]

    def _last(self, chat: Conversation, numbers: Sequence[int], more: bool) -> list[Span]:
        """The last of these answers that can be located; raises Rewritten if none can, and there is no
        more to learn."""
        for i in list(reversed(numbers))[:_TRIED]:
            try:
                found = [chat.turn(i)]
            except Rewritten:
                continue
            self.last_only += len(numbers) > 1
            return found
        if not more:
            raise Rewritten
        self.last_only += 1
        return []


def _switched_off(chat: Conversation, chosen: Sequence[bool | None]) -> list[Span]:
    """Characters of the messages that weight or train switches off, where the whole is learnt."""
    off = [i for i, choice in enumerate(chosen) if choice is False]
    answers = [i for i in off if i in chat.answers]
    try:
        found = chat.message_spans([i for i in off if i not in answers])
        if not answers:
            return found
        try:
            turns = chat.turns()
            return found + [turns[i] for i in answers]
        except Rewritten:
            owned = chat.owned_blocks() if chat.has_blocks else {i: [chat.turn(i)] for i in answers}
        return found + [span for i in answers for span in owned[i]]
    except Rewritten:
        raise InputError(
            f"messages[{off[0]}]: the chat template writes earlier messages anew, so that it cannot be left "
            "out; leave the record out, or remove its weight or train"
        ) from None


def _nothing_left(chosen: Sequence[bool | None]) -> str:
    if False in chosen:
        return "nothing is left to learn: weight, train or loss switches off every message that would be"
    return "nothing is left to learn: the chat template writes nothing for the messages that would be"
