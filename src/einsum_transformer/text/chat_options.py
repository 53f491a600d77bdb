"""Select a chat template, and check the keywords of transformers' `apply_chat_template`."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from einsum_transformer.errors import InputError
from einsum_transformer.notes import note
from einsum_transformer.text.chat_template import template_variables

# Keyword -> (values that have no effect, what to do instead of using another value).
UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "tokenize": ((True, False), "apply_chat_template returns token ids or text"),
    "return_dict": ((False,), "apply_chat_template returns a list of ids"),
    "return_tensors": ((None,), "apply_chat_template returns a list of ids; numpy.array converts it"),
    "return_assistant_tokens_mask": ((False,), "train with mask_prompt to learn the answers alone"),
    "padding": (
        (False, None, "do_not_pad"),
        "conversations are encoded one at a time; generate pads a batch",
    ),
    "truncation": ((False, None, "do_not_truncate"), "truncate the list of ids"),
    "max_length": ((None,), "truncate the list of ids"),
    "tokenizer_kwargs": ((None, {}), "encode the text of render_chat"),
    "sanitize_control_tokens": ((False,), "special tokens in messages are encoded as special tokens"),
}


def check_options(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords that are template variables; InputError for an unsupported keyword."""
    for name, (unused, advice) in UNSUPPORTED.items():
        if name in variables and not any(variables[name] == value for value in unused):
            raise InputError(f"{name}={variables[name]!r} is not supported: {advice}")
    if "conversation" in variables:
        raise InputError("conversation: give the messages as the first argument")
    return {name: value for name, value in variables.items() if name not in UNSUPPORTED}


def choose_template(templates: Mapping[str, str], wanted: str | None, tools: bool, source: str) -> str:
    """Return the template `wanted` (a name or a template), or else the one that transformers selects."""
    if wanted is not None:
        if not isinstance(wanted, str):
            raise InputError(f"`chat_template` has type {type(wanted).__name__}, expected a string")
        if wanted in templates or "{" in wanted:
            return templates.get(wanted, wanted)
        raise InputError(
            f"`chat_template` {wanted!r} is neither a Jinja template nor the name of one; "
            f"{source} has {_names(templates)}"
        )
    if not templates:
        raise InputError(
            f"{source} has no chat template; give a plain prompt, or a template as `chat_template`"
        )
    if tools and "tool_use" in templates:
        return templates["tool_use"]
    if "default" not in templates:
        raise InputError(
            f"{source} has no default chat template: choose one of {_names(templates)} as `chat_template`"
        )
    return templates["default"]


def _names(templates: Mapping[str, str]) -> str:
    return ", ".join(map(repr, sorted(templates))) if templates else "no templates"


def note_unused(
    template: str,
    variables: Mapping[str, Any],
    tools: Sequence[Any] | None,
    documents: Sequence[Any] | None,
) -> None:
    """Note once the variables that are given but not used by the template."""
    given = list(variables)
    given += [name for name, value in (("tools", tools), ("documents", documents)) if value]
    unused = sorted(set(given) - template_variables(template)) if given else []
    if unused:
        _note_once(template, ", ".join(unused))


@lru_cache(maxsize=64)
def _note_once(template: str, names: str) -> None:
    note(f"the chat template does not use {names}")
