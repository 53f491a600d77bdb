"""Chat templates: render a conversation to the text of a prompt with the checkpoint's Jinja template."""

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
    """Render a conversation like transformers' `apply_chat_template(tokenize=False)`.

    Returns the text and the (start, end) character offsets of each `{% generation %}` block in it.
    The template is untrusted: it runs in a sandbox for at most `seconds` and writes at most `max_chars`
    characters. Raises InputError for a malformed message and for a template that is invalid, runs too long or
    raises an exception.
    """
    conversation = check_messages(messages)
    if continue_final_message:
        if add_generation_prompt:
            raise InputError(
                "continue_final_message and add_generation_prompt: the first continues the last message, "
                "the second begins a new message; choose one"
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
    """Append a mark to a message's field; returns the field's text without the mark."""
    name = field if isinstance(field, str) else "content"
    value = message.get(name)
    if value is None:
        raise InputError(f"continue_final_message: the last message has no {name!r} to continue")
    # Reasoning is stored under several names; a template may read any of them.
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
        raise InputError(f"continue_final_message: {name!r} of the last message is not a string")
    message.update(dict.fromkeys(fields, value + _END))
    return value


def _cut_at_end(text: str, final: str) -> str:
    """Return the rendered text up to the mark, without trailing space if the template strips messages."""
    mark = _END.strip()
    if final.strip() not in text or mark not in text:
        raise InputError(
            "continue_final_message: the chat template changes or omits the last message, so it cannot be "
            "continued"
        )
    end = text.rindex(mark)
    return text[:end] if text[end : end + len(_END)] == _END else text[:end].rstrip()


@lru_cache(maxsize=32)
def template_variables(template: str) -> frozenset[str]:
    """Return the names of the variables that a template reads; raises InputError if it is invalid."""
    from jinja2 import meta

    from einsum_transformer.text.sandbox import WATCHED, compile_template, environment

    def read() -> frozenset[str]:
        compile_template(template)
        return frozenset(meta.find_undeclared_variables(environment().parse(template)))

    return _bounded(read, _SECONDS, len(template) + 1000, WATCHED)


def _render(
    template: str, variables: dict[str, Any], seconds: float, max_chars: int
) -> tuple[str, list[tuple[int, int]]]:
    """Return the text and the character offsets of each generation block."""
    from einsum_transformer.text.sandbox import EDGE, WATCHED, compile_template

    chunks: list[str] = []
    edges: list[tuple[bool, int]] = []
    written = 0

    def run() -> None:
        nonlocal written
        compiled = compile_template(template)
        for chunk in compiled.root_render_func(compiled.new_context(variables)):
            chunks.append(chunk)
            written += len(chunk)
            if written > max_chars:
                raise InputError(f"chat template: writes more than {max_chars} characters")

    token = EDGE.set(lambda begins: edges.append((begins, written)))
    try:
        _bounded(run, seconds, max_chars, WATCHED)
    finally:
        EDGE.reset(token)
    return "".join(chunks), _spans(edges)


def _spans(edges: Sequence[tuple[bool, int]]) -> list[tuple[int, int]]:
    """Return the non-empty blocks; a block that is left by `{% break %}` has no end and is omitted."""
    pairs = pairwise(edges)
    return [(a, b) for (begins, a), (next_begins, b) in pairs if begins and not next_begins and a < b]


def _bounded(run: Callable[[], T], seconds: float, max_chars: int, watched: frozenset[str]) -> T:
    """Compile or render a template within limits; every failure becomes an InputError."""
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
    except Exception as error:  # raised by the template's expressions
        raise InputError(f"chat template: {type(error).__name__}: {_line(error)}") from None


def _line(message: Any) -> str:
    return " ".join(str(message).split())[:1000]


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """Return a conversation in plain JSON types; raises InputError that names the first invalid message.

    A message is {"role": str, "content": str or [{"type": "text", "text": str}, ...], ...}; the content is
    optional if there are "tool_calls".
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise InputError(f"messages: expected a list of messages, got {type(messages).__name__}")
    if not messages:
        raise InputError("messages: empty; a conversation has at least one message")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InputError(f"{where}: expected a dict with role and content, got {type(message).__name__}")
    # As in transformers, a key without a value is dropped: templates test whether it is defined.
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
    # Templates read a reasoning trace from different keys; transformers provides these two.
    reasoning = next((plain[name] for name in _REASONING if plain.get(name) is not None), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _objects(value: Any, where: str) -> list[dict[str, Any]] | None:
    if value is None:
        return None
    if not isinstance(value, Sequence) or not all(isinstance(item, Mapping) for item in value):
        raise InputError(f"{where}: expected a list of JSON objects (dicts)")
    return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """Rebuild `value` from JSON types, so that a template never gets an object with other methods."""
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
    raise InputError(f"{where}: expected a JSON value, got {type(value).__name__}")


def _key(key: Any, where: str) -> str:
    if not isinstance(key, str):
        raise InputError(f"{where}: keys must be strings, got {key!r}")
    return str(key)
