"""The keys of data records: the supported forms, and how each key is handled."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from einsum_transformer.errors import InputError
from einsum_transformer.formats.files import parse_json

CONTEXT = ("tools", "documents", "chat_template_kwargs", "system")
"""Inputs of a chat template other than the messages."""
FORMS: dict[str, tuple[str, ...]] = {
    "messages": ("messages", *CONTEXT),
    "conversations": ("conversations", *CONTEXT),
    "chat completion": ("prompt", "completion", *CONTEXT),
    "completion": ("prompt", "completion"),
    "text": ("text",),
}
"""The keys of each form; a record has the first form whose keys (CONTEXT is optional) it contains."""
IGNORED = frozenset(
    {
        "id",
        "idx",
        "index",
        "uuid",
        "_id",
        "row_id",
        "example_id",
        "conversation_id",
        "conv_id",
        "prompt_id",
        "source",
        "source_id",
        "dataset",
        "dataset_name",
        "origin",
        "url",
        "split",
        "metadata",
        "meta",
        "category",
        "subset",
        "domain",
        "topic",
        "title",
        "tags",
        "lang",
        "language",
        "license",
        "author",
        "created",
        "created_at",
        "timestamp",
        "date",
        "model",
        "model_name",
        "hash",
        "parallel_tool_calls",
        "__index_level_0__",
    }
)
"""Metadata keys, which are ignored without a note."""
UNSUPPORTED = {
    "images": "images are not supported",
    "image": "images are not supported",
    "videos": "videos are not supported",
    "video": "videos are not supported",
    "audio": "audio is not supported",
    "audios": "audio is not supported",
    "suffix": "fill-in-the-middle is not supported; write the text into prompt and completion",
    "functions": "the deprecated form of tools; write tools",
    "function_call": "the deprecated form of tool_calls; write tool_calls into the message",
}
"""Keys that are rejected in every form, because they change the meaning of a record."""
WEIGHTS = ("weight", "weights", "sample_weight", "loss_weight")
"""Weights of a whole record; only 1 is supported."""
SWITCHES = ("train", "training", "loss")
"""Switches of a whole record; only true is supported. A float under `loss` is a measured loss and ignored."""
OTHER_FORMS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("chosen", "rejected"), "preference data; keep the chosen answer as completion or in messages"),
    (("preferred_output", "non_preferred_output"), "preference data; keep the preferred answer, in messages"),
    (("completions", "labels"), "stepwise supervision; write prompt and completion"),
    (("input_ids",), "token ids; write their text"),
    (
        ("instruction", "output"),
        "Alpaca data, which has no standard rendering; write prompt and completion, or messages of user "
        "(instruction, input) and assistant (output)",
    ),
    (("instruction", "response"), "write prompt for instruction and completion for response"),
    (("question", "answer"), "write prompt for question and completion for answer"),
    (("query", "response"), "write prompt for query and completion for response"),
    (("prompt", "response"), "write completion for response"),
    (("input", "output"), "write prompt for input and completion for output"),
    (("conversation",), "write messages for conversation"),
    (("dialogue",), "write messages for dialogue"),
    (("dialog",), "write messages for dialog"),
    (("turns",), "write messages for turns"),
    (("chat",), "write messages for chat"),
    (("role", "content"), 'a message; a record is {"messages": [...]}'),
    (("prompt",), "a prompt without a completion has no targets"),
)
"""Known forms that are not supported: their keys, and what to write instead."""

MESSAGE_FLAGS = ("weight", "train", "training", "loss")
"""Flags of a message; 0 or false masks it in the loss (weight: OpenAI, train: axolotl, loss: ms-swift)."""
MESSAGE_UNSUPPORTED = {
    "train_detail": "parts of a message cannot be selected; use train for the whole message",
    "loss_scale": "fractional weights of messages are not supported; use train",
    "images": "images are not supported",
    "function_call": "the deprecated form of tool_calls; write tool_calls",
}
MESSAGE_IGNORED = frozenset({"role", "content", "tool_call_id"})
"""Message keys without a note; tool_call_id is redundant, as tool responses follow the order of the calls."""
_SHAREGPT = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "chatgpt": "assistant",
    "bing": "assistant",
    "observation": "tool",
}
"""Roles of ShareGPT, FastChat and LLaMA-Factory, in lower case."""
_ARGUMENTS = frozenset(
    {
        "template",
        "messages",
        "tools",
        "documents",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "conversation",
        "chat_template",
        "tokenizer_kwargs",
        "seconds",
        "max_chars",
        "self",
        "spans",
    }
)
_EMPTY: tuple[Any, ...] = (None, "", [], {})
_ALIASES = frozenset({"thinking", "reasoning", "reasoning_content"})


def has_form(raw: Mapping[str, Any]) -> bool:
    """Whether a JSON object has a form of training records, supported or known and not supported."""
    present = {key for key, value in raw.items() if value is not None}
    own = [{key for key in names if key not in CONTEXT} for names in FORMS.values()]
    return any(names <= present for names in (*own, *(set(names) for names, _ in OTHER_FORMS)))


def form_of(raw: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """The form of a record and the keys of that form; a key with the value null counts as absent.

    Raises InputError for a record that has no supported form, and for keys that change its meaning.
    """
    present = {key: value for key, value in raw.items() if value is not None}
    for key in ("text", "prompt", "completion"):
        value = raw.get(key, "")
        conversational = key != "text" and isinstance(value, list)
        if not isinstance(value, str) and not conversational and (value is not None or len(present) == 0):
            raise InputError(f"{key!r} is {type(value).__name__}, expected a string")
    form = _form(present)
    if form is None:
        for names, advice in OTHER_FORMS:
            if all(name in present for name in names):
                raise InputError(
                    f"expected text, prompt and completion, or messages, got {', '.join(raw)}: {advice}"
                )
        raise InputError(f"expected text, prompt and completion, or messages, got {_named(raw)}")
    _check_meaning(present, form)
    return form, FORMS[form]


def _form(present: Mapping[str, Any]) -> str | None:
    if "messages" in present:
        return "messages"
    if "conversations" in present:
        return "conversations"
    if "prompt" in present and "completion" in present:
        lists = [isinstance(present[key], list) for key in ("prompt", "completion")]
        if lists[0] != lists[1]:
            raise InputError("prompt and completion: expected two strings or two lists of messages")
        return "chat completion" if lists[0] else "completion"
    return "text" if "text" in present else None


def _named(raw: Mapping[str, Any]) -> str:
    wrapped = [
        key for key, value in raw.items() if isinstance(value, list) and value and isinstance(value[0], dict)
    ]
    hint = f"; if {wrapped[0]} is the list of records, write it alone" if len(raw) == 1 and wrapped else ""
    return (", ".join(raw) or "an empty object") + hint


def _check_meaning(present: Mapping[str, Any], form: str) -> None:
    used = FORMS[form]
    for key, why in UNSUPPORTED.items():
        if key not in used and present.get(key) not in _EMPTY:
            raise InputError(f"{key!r}: {why}")
    for key in WEIGHTS:
        if present.get(key, 1) != 1:
            raise InputError(
                f"{key!r} is {_shown(present[key])}: weights are not supported; remove or repeat the record"
            )
    for key in SWITCHES:
        value = present.get(key, 1)
        measured = key == "loss" and isinstance(value, float) and value
        if value != 1 and not measured:
            raise InputError(
                f"{key!r} is {_shown(value)}: every record of the file is trained on; remove the record"
            )
    label = present.get("label")
    # An integer label of a text is its class, which is ignored with a note.
    preference = (0, 1) if form in ("completion", "chat completion") else (0,) if form != "text" else ()
    if label is False or label in preference:
        raise InputError(
            "'label': unpaired preference data; write the records whose label is true, without the key"
        )
    for key in CONTEXT:
        if key not in used and present.get(key) not in (*_EMPTY, "[]", "{}"):
            raise InputError(
                f"{key!r}: used by chat templates only, which require messages instead of {used[0]!r}"
            )


def unused(raw: Mapping[str, Any], used: Sequence[str]) -> list[str]:
    """The keys of a record that are ignored with a note."""
    known = {*used, *IGNORED, *WEIGHTS}
    return [
        key
        for key, value in raw.items()
        if key not in known and value not in _EMPTY and not (key in SWITCHES and value == 1)
    ]


def plain_messages(value: Any, where: str) -> list[dict[str, Any]]:
    """The messages of a prompt or a completion, without flags; InputError for other values, and for flags
    that exclude a message from the loss (the split into prompt and completion determines that)."""
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise InputError(f"{where}: expected a list of messages")
    for i, message in enumerate(value):
        if chosen(message, f"{where}[{i}]") is False:
            raise InputError(
                f"{where}[{i}]: weights are not supported in prompt and completion; write messages"
            )
    return [without_flags(message) for message in value]


def messages_of(raw: Mapping[str, Any], form: str) -> Any:
    """The messages of a record, starting with its system prompt; from and value (ShareGPT) become role and
    content."""
    if form == "messages":
        return with_system(raw, raw["messages"])
    found = raw["conversations"]
    if not isinstance(found, list) or not all(isinstance(message, dict) for message in found):
        raise InputError("conversations: expected a list of messages")
    return with_system(raw, [_renamed(message, f"conversations[{i}]") for i, message in enumerate(found)])


def with_system(raw: Mapping[str, Any], messages: Any) -> Any:
    """The messages, preceded by the system prompt of the record if it has one."""
    system = raw.get("system")
    if system is None or system == "" or not isinstance(messages, list):
        return messages
    first = messages[0] if messages and isinstance(messages[0], dict) else {}
    if not isinstance(system, str) or first.get("role") == "system":
        raise InputError("'system': expected a string, without a system message in addition")
    return [{"role": "system", "content": system}, *messages]


def _renamed(message: dict[str, Any], where: str) -> dict[str, Any]:
    if "from" not in message:
        return message
    role = message["from"]
    if role == "function_call":
        raise InputError(f"{where}: function_call: write a message of role assistant with tool_calls")
    if not isinstance(role, str) or role.lower() not in _SHAREGPT:
        raise InputError(f"{where}: 'from' is {_shown(role)}; expected one of {', '.join(_SHAREGPT)}")
    if "role" in message or ("value" in message and "content" in message):
        raise InputError(f"{where}: has both from and value, and role and content; write one pair")
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    return {"role": _SHAREGPT[role.lower()], "content": message.get("value")} | rest


def variables_of(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The chat_template_kwargs and documents of a record, as variables of the chat template."""
    variables = raw.get("chat_template_kwargs")
    if isinstance(variables, str) and variables.strip():
        variables = parse_json(Path("chat_template_kwargs"), "the string", variables.encode())
    if not variables:
        variables = {}
    if not isinstance(variables, dict):
        raise InputError(f"chat_template_kwargs: expected an object, got {type(variables).__name__}")
    for name in variables:
        if name in _ARGUMENTS or not name.isidentifier():
            raise InputError(f"chat_template_kwargs: {name!r} is not a template variable")
    documents = objects_of(raw, "documents")
    return variables if documents is None else {**variables, "documents": documents}


def objects_of(raw: Mapping[str, Any], key: str) -> list[Any] | None:
    """The tools or documents of a record: a list of objects, or a JSON string of such a list."""
    value = raw.get(key)
    if isinstance(value, str):
        if not value.strip():
            return None
        value = parse_json(Path(key), "the string", b'{"value": ' + value.encode() + b"}")["value"]
    if value is not None and not (isinstance(value, list) and all(isinstance(item, dict) for item in value)):
        raise InputError(f"{key}: expected a list of objects, or a JSON string of such a list")
    return value


def chosen(message: Mapping[str, Any], where: str) -> bool | None:
    """Whether the flags of a message include it in the loss; None if they leave the default.

    weight (OpenAI) is a factor, so that 1 leaves the default; true of the others (axolotl) includes it.
    """
    for key, why in MESSAGE_UNSUPPORTED.items():
        if message.get(key) not in (None, [], {}):
            raise InputError(f"{where}: {key!r}: {why}")
    found: set[bool] = set()
    for key in MESSAGE_FLAGS:
        value = message.get(key)
        if value is None:
            continue
        if not isinstance(value, int | float) or value not in (0, 1):
            raise InputError(f"{where}: {key!r} is {_shown(value)}: expected 0 or 1 (false or true)")
        if key != "weight" or not value:
            found.add(bool(value))
    if len(found) > 1:
        flags = ", ".join(key for key in MESSAGE_FLAGS if key in message)
        raise InputError(f"{where}: {flags} contradict each other; write one of them")
    return found.pop() if found else None


def without_flags(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message without flags, as the chat template receives it."""
    removed = (*MESSAGE_FLAGS, *MESSAGE_UNSUPPORTED)
    return {key: value for key, value in message.items() if key not in removed}


def message_keys(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys of messages that have a value, except role, content and tool_call_id."""
    pairs = (pair for message in messages for pair in message.items())
    return list(dict.fromkeys(k for k, v in pairs if k not in MESSAGE_IGNORED and v not in _EMPTY))


def is_read(name: str, template: str) -> bool:
    """Whether a template contains the name; the names of a reasoning trace are equivalent."""
    names = _ALIASES if name in _ALIASES else {name}
    return any(re.search(rf"\b{re.escape(each)}\b", template) for each in names)


def _shown(value: Any) -> str:
    return json.dumps(value)[:60]
