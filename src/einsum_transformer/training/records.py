"""Training examples from the text or the JSON records of a data file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from einsum_transformer.errors import InputError
from einsum_transformer.notes import note
from einsum_transformer.tables import first_names
from einsum_transformer.text.chat_template import check_messages
from einsum_transformer.text.tokenizer import Tokenizer
from einsum_transformer.training import record_keys as keys
from einsum_transformer.training.files import Data, Record, read_data
from einsum_transformer.training.turns import Conversation, Rewritten, Span, held, offsets

Array = np.ndarray
_TRIED = 8  # the last answers of a conversation that `_last` tries to locate


@dataclass(frozen=True, slots=True)
class Example:
    """A training sequence: its token ids, and a mask of those that are targets."""

    tokens: Array
    trained: Array
    place: str
    """Its location for messages: `file`, or `file: line 3`."""
    divisible: bool = True
    """Whether it may be split: true for plain text, false for a conversation or a completion."""


def read_examples(
    path: str | Path, tokenizer: Tokenizer, mask_prompt: bool = False, part: str = "train"
) -> list[Example]:
    """Read the examples of a data file, or of `<part>.jsonl` in a folder.

    Each record of JSONL or of a JSON array is an example; any other file is one text. A record is one of

    - `{"text": ...}`;
    - `{"prompt": ..., "completion": ...}`: two strings, which are concatenated, or two lists of messages;
    - `{"messages": [...]}`, rendered by the tokenizer's chat template with the record's tools, documents,
      system prompt and chat_template_kwargs; or `"conversations"` of `{"from", "value"}`.

    EOS, if the tokenizer has one, is appended to texts and completions. mask_prompt: only completions and the
    assistant's messages are targets. A message with "weight": 0 or "train": false is never a target.
    A note lists the keys that are not used. Errors: InputError that names the file and the record.
    """
    return examples_of(read_data(path, keys.has_form, part), tokenizer, mask_prompt)


def examples_of(data: Data, tokenizer: Tokenizer, mask_prompt: bool = False) -> list[Example]:
    """The examples of a data file that is already read; see `read_examples`."""
    if data.records is None:
        if mask_prompt:
            why = f"{data.doubt}, and " * bool(data.doubt)
            raise InputError(f"{data.path}: {why}plain text has no prompt to mask; JSONL records are needed")
        return [_whole(tokenizer.encode_once(data.text, end=True), str(data.path))]
    reader = _Reader(tokenizer, mask_prompt)
    found = [reader.example(record) for record in data.records]
    examples = [example for example in found if example is not None]
    reader.write_notes(data.path, len(found))
    return examples


def texts_of(data: Data) -> list[str]:
    """The texts to train a tokenizer on: the lines of a plain text, or all strings of the records."""
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
    """Converts the records of one file to examples, and counts what its notes report."""

    tokenizer: Tokenizer
    mask_prompt: bool
    unused: Counter[str] = field(default_factory=Counter)
    """Ignored keys and template variables, with the number of records that contain them."""
    last_only: int = 0
    """The number of conversations of which only the last answer is a target."""
    not_located: int = 0
    """The number of conversations whose answers cannot be located in the rendered text."""

    def example(self, record: Record) -> Example | None:
        """The example of a record; None for a conversation whose answers cannot be located."""
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
        """Write the notes of a file with `count` records; raises InputError if none is an example."""
        why = "the assistant's messages cannot be located in the rendered conversation"
        if self.not_located == count:
            raise InputError(
                f"{path}: {why}, so the prompt cannot be masked; train on whole conversations (without "
                '`mask_prompt`), write {"prompt": ..., "completion": ...}, or use a template with '
                "{% generation %} blocks"
            )
        if self.not_located:
            note(f"{path}: {self.not_located} of {count} records are skipped: {why}")
        if self.unused:
            named = first_names([f"{name} ({number})" for name, number in self.unused.most_common()], 12)
            note(f"{path}: ignored keys, with the number of records that contain them: {named}")
        if self.last_only:
            which = "conversations" if self.last_only > 1 else "conversation"
            note(
                f"{path}: the chat template changes earlier turns, so only the last assistant message "
                f"of {self.last_only} {which} is a target"
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
        prompt_ids = self._without_eos(prompt)
        completion_ids = self._continuation(prompt, prompt_ids, completion)
        if eos is not None and completion_ids[-1:] != [eos]:
            completion_ids.append(eos)
        example = _whole([*prompt_ids, *completion_ids], place, divisible=False)
        example.trained[: len(prompt_ids) if self.mask_prompt else 0] = False
        return example

    def _continuation(self, prompt: str, prompt_ids: list[int], completion: str) -> list[int]:
        """The ids of a completion that follow the unchanged ids of the prompt, as in generation. They are
        taken from both texts together, as some tokenizers add a space at the start of a text."""
        both = self._without_eos(prompt + completion)
        if both[: len(prompt_ids)] == prompt_ids:
            return both[len(prompt_ids) :]
        return self.tokenizer.encode(completion, add_special_tokens=False)

    def _without_eos(self, text: str) -> list[int]:
        """The ids of a text without the EOS that some tokenizers append."""
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
            targets = [(chat.start(len(prompt)), len(chat.text))]
        except Rewritten:
            chosen = [None if i >= len(prompt) else False for i in range(len(chat.messages))]
            targets = self._targets(chat, chosen)[0]
        example = self._plain(chat, place)
        example.trained[:] = held(offsets(self.tokenizer, chat.text), targets)
        return example

    def _plain(self, chat: Conversation, place: str) -> Example:
        return _whole(self.tokenizer.encode(chat.text, add_special_tokens=False), place, divisible=False)

    def _rendered(self, raw: Mapping[str, Any], messages: list[dict[str, Any]]) -> Conversation:
        check_messages(messages)
        if not self.tokenizer.chat_templates:
            raise InputError(
                f"{self.tokenizer.source}: has no chat template, which messages require; put a "
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
            raise InputError("no message is the assistant's, so no targets are left with the prompt masked")
        targets, masked = self._targets(chat, chosen) if self.mask_prompt else ([], _excluded(chat, chosen))
        example, characters = self._plain(chat, place), offsets(self.tokenizer, chat.text)
        if self.mask_prompt:
            example.trained[:] = held(characters, targets)
        example.trained[held(characters, masked)] = False
        if not example.trained.any():
            raise InputError(_no_targets(chosen))
        return example

    def _targets(self, chat: Conversation, chosen: Sequence[bool | None]) -> tuple[list[Span], list[Span]]:
        """Character spans of the targets where the prompt is masked, and spans that are never targets.

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
        """The span of the last of these answers that can be located. If none can, the spans are empty where
        the conversation has other targets (`more`); else Rewritten is raised."""
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


def _excluded(chat: Conversation, chosen: Sequence[bool | None]) -> list[Span]:
    """Character spans of the messages whose flags exclude them, where the prompt is not masked."""
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
            f"messages[{off[0]}]: cannot be masked, because the chat template changes earlier messages; "
            "remove the record, or the weight or train of the message"
        ) from None


def _no_targets(chosen: Sequence[bool | None]) -> str:
    if False in chosen:
        return "no targets are left: weight, train or loss excludes every message that would be one"
    return "no targets are left: the chat template renders nothing for the messages that would be targets"
