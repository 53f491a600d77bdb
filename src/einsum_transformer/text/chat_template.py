"""Chat templates: a conversation and the checkpoint's jinja2 template give the prompt's text."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, TypeVar

from einsum_transformer.errors import InputError

T = TypeVar("T")

_REASONING = ("reasoning_content", "thinking", "reasoning")
_MAX_DEPTH = 90
_SECONDS = 2.0
_END = "CONTINUE_FINAL_MESSAGE_TAG "  # the mark that transformers uses


def render_chat_spans(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    continue_final_message: bool | str = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    seconds: float = _SECONDS,
    max_chars: int = 1_000_000,
    **variables: Any,
) -> tuple[str, list[tuple[int, int]]]:
    """Render a conversation as transformers' `apply_chat_template(tokenize=False)` does.

    Returns the text, and the (first, past the last) character of each `{% generation %}` block in it.
    The template is untrusted: it runs in a sandbox, for at most `seconds`, and makes at most `max_chars`
    characters. Raises InputError for a malformed message and for a template that is wrong, runs too long or
    raises an exception of its own.
    """
    conversation = check_messages(messages)
    if continue_final_message:
        if add_generation_prompt:
            raise InputError(
                "continue_final_message and add_generation_prompt: the first goes on with the last message, "
                "the second begins a new one; choose one"
            )
        final = _mark_end(conversation[-1], continue_final_message, template)
    given = _plain(variables, "variables") | {
        "messages": conversation,
        "tools": _objects(tools, "tools"),
        "documents": _objects(documents, "documents"),
        "add_generation_prompt": add_generation_prompt,
    }
    text, spans = _render(template, given, seconds, max_chars)
    if continue_final_message:
        text = _cut_at_end(text, final)
        spans = [(a, min(b, len(text))) for a, b in spans if a < len(text)]
    return text, spans


def _mark_end(message: dict[str, Any], field: bool | str, template: str) -> str:
    """Write a mark at the end of a message's field; returns the field's text without it."""
    name = field if isinstance(field, str) else "content"
    value = message.get(name)
    if value is None:
        raise InputError(f"continue_final_message: the last message has no {name!r} to continue")
    # Reasoning is there under several names; a template may read any of them.
    fields = [name] if name not in _REASONING else [key for key in _REASONING if message.get(key) == value]
    if not any(key in template for key in fields):
        raise InputError(f"continue_final_message: the chat template does not use {name!r}")
    if isinstance(value, list):
        part = next((part for part in reversed(value) if isinstance(part.get("text"), str)), None)
        if part is None:
            raise InputError("continue_final_message: the last message has no text to continue")
        text = part["text"]
        part["text"] = text + _END
        return text
    if not isinstance(value, str):
        raise InputError(f"continue_final_message: {name!r} of the last message is not text")
    message.update(dict.fromkeys(fields, value + _END))
    return value


def _cut_at_end(text: str, final: str) -> str:
    """The rendered text up to the mark, without trailing space if the template strips messages."""
    mark = _END.strip()
    if final.strip() not in text or mark not in text:
        raise InputError(
            "continue_final_message: the chat template does not write the last message as it is, "
            "so it cannot be continued"
        )
    place = text.rindex(mark)
    return text[:place] if text[place : place + len(_END)] == _END else text[:place].rstrip()


@lru_cache(maxsize=32)
def template_variables(template: str) -> frozenset[str]:
    """Names of the variables that a template reads; raises InputError for one that is wrong."""
    from jinja2 import meta

    from einsum_transformer.text.sandbox import WATCHED, compile_template, environment

    def read() -> frozenset[str]:
        compile_template(template)
        return frozenset(meta.find_undeclared_variables(environment().parse(template)))

    return _bounded(read, _SECONDS, len(template) + 1000, WATCHED)


def _render(
    template: str, variables: dict[str, Any], seconds: float, max_chars: int
) -> tuple[str, list[tuple[int, int]]]:
    """The text, and the characters of each generation block."""
    from einsum_transformer.text.sandbox import EDGE, WATCHED, compile_template

    chunks: list[str] = []
    edges: list[tuple[bool, int]] = []
    room = max_chars

    def run() -> None:
        nonlocal room
        compiled = compile_template(template)
        for chunk in compiled.root_render_func(compiled.new_context(variables)):
            chunks.append(chunk)
            room -= len(chunk)
            if room < 0:
                raise InputError(f"chat template: writes more than {max_chars} characters")

    token = EDGE.set(lambda begins: edges.append((begins, max_chars - room)))
    try:
        _bounded(run, seconds, max_chars, WATCHED)
    finally:
        EDGE.reset(token)
    return "".join(chunks), _spans(edges)


def _spans(edges: Sequence[tuple[bool, int]]) -> list[tuple[int, int]]:
    """Blocks with text in them; one that a `{% break %}` leaves has no end and is left out."""
    pairs = pairwise(edges)
    return [(a, b) for (begins, a), (goes_on, b) in pairs if begins and not goes_on and a < b]


def _bounded(run: Callable[[], T], seconds: float, max_chars: int, watched: frozenset[str]) -> T:
    """Run what a template does within limits; whatever goes wrong becomes an InputError."""
    from jinja2 import TemplateError, TemplateSyntaxError

    from einsum_transformer.text.bounds import OutOfTime, bounded

    try:
        with bounded(seconds, max_chars, watched):
            return run()
    except InputError:
        raise
    except OutOfTime:
        raise InputError(f"chat template: ran for more than {seconds:g} seconds") from None
    except TemplateSyntaxError as error:
        raise InputError(f"chat template, line {error.lineno}: {_line(error.message)}") from None
    except TemplateError as error:
        raise InputError(f"chat template: {_line(error.message)}") from None
    except Exception as error:  # anything the template's own expressions do wrong
        raise InputError(f"chat template: {type(error).__name__}: {_line(error)}") from None


def _line(message: Any) -> str:
    return " ".join(str(message).split())[:1000]


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """Return a conversation in plain JSON types; raises InputError that names the first wrong message.

    A message is {"role": str, "content": str or [{"type": "text", "text": str}, ...], ...}; one that has
    "tool_calls" needs no content.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise InputError(f"messages: expected a list of messages, got {type(messages).__name__}")
    if not messages:
        raise InputError("messages: empty; a conversation has at least one message")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InputError(f"{where}: expected a dict with role and content, got {type(message).__name__}")
    # As in transformers, a key without a value is dropped: templates ask whether it is there.
    plain = {key: value for key, value in _plain(message, where).items() if value is not None}
    if not isinstance(plain.get("role"), str):
        raise InputError(f"{where}: 'role' must be a string such as 'user', got {plain.get('role')!r}")
    content = plain.get("content")
    if isinstance(content, list):
        for index, part in enumerate(content):
            if (
                not isinstance(part, dict)
                or part.get("type") != "text"
                or not isinstance(part.get("text"), str)
            ):
                raise InputError(f"{where}.content[{index}]: expected {{'type': 'text', 'text': ...}}")
    elif not isinstance(content, str) and not (content is None and plain.get("tool_calls")):
        kind = type(content).__name__
        raise InputError(f"{where}: 'content' must be a string or a list of text parts, got {kind}")
    # Templates differ in the name they read a reasoning trace from; transformers gives it under these two.
    reasoning = next((plain[name] for name in _REASONING if plain.get(name) is not None), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _objects(value: Any, where: str) -> list[dict[str, Any]] | None:
    if value is None:
        return None
    if not isinstance(value, Sequence) or not all(isinstance(item, Mapping) for item in value):
        raise InputError(f"{where}: expected a list of JSON objects (dicts)")
    return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """Rebuild `value` from JSON types, so that a template never holds an object with methods of its own."""
    if depth > _MAX_DEPTH:
        raise InputError(f"{where}: nested more than {_MAX_DEPTH} levels deep")
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {_key(key, where): _plain(item, f"{where}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)]
    raise InputError(f"{where}: a template takes JSON values only, got {type(value).__name__}")


def _key(key: Any, where: str) -> str:
    if not isinstance(key, str):
        raise InputError(f"{where}: keys must be strings, got {key!r}")
    return str(key)
