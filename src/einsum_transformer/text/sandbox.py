"""The jinja2 environment of chat templates, in which every operation is bounded.

A template is part of a checkpoint and untrusted. jinja2's immutable sandbox denies access to Python's
internals; bounds.py limits time and memory.
"""

import json
from collections.abc import Callable
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache, wraps
from typing import Any

from jinja2 import Template, filters, nodes, pass_context, pass_environment, pass_eval_context, utils
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment

from einsum_transformer.errors import InputError
from einsum_transformer.text.bounds import (
    FILTER_SIZES,
    METER,
    METHOD_SIZES,
    OPERATOR_SIZES,
    keep,
    show,
    weigh,
)

MAX_SOURCE = 200_000  # characters; the longest published templates have about a tenth of this
WATCHED = frozenset({"<template>", __file__})  # jinja2 calls compiled templates "<template>"
# Filters and methods that can run for hours on a malicious string, or return bytes; prompts do not need them.
_UNSUPPORTED = frozenset({"striptags", "urlize", "wordwrap", "encode", "to_bytes"})
_JINJA_ARGUMENTS = frozenset({"_loop_vars", "_block_vars"})  # jinja2 adds them to calls and removes them


EDGE: ContextVar[Callable[[bool], None]] = ContextVar("EDGE")
"""Called with True at the start and with False at the end of a generation block."""


def _join(parts: Any) -> str:
    parts = list(parts)
    METER.get().charge(sum(map(len, parts)))
    return "".join(parts)


class ChatCodeGenerator(CodeGenerator):
    """Passes the result of every container, slice and `~` of a template to `keep`."""

    def _checked(self, visit: Callable[..., None], node: nodes.Node, frame: Frame, new: bool = True) -> None:
        self.write("environment.keep(" if new else "(")
        visit(node, frame)
        self.write(")")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._checked(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._checked(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        self._checked(super().visit_Tuple, node, frame, node.ctx == "load")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        self._checked(super().visit_Getitem, node, frame, isinstance(node.arg, nodes.Slice))

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concatenate(context, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """jinja2's immutable sandbox in which every operation that creates a value is bounded."""

    intercepted_binops: frozenset[str] = frozenset(OPERATOR_SIZES)
    code_generator_class: type[CodeGenerator] = ChatCodeGenerator
    concat: Any = staticmethod(_join)
    keep: Any = staticmethod(keep)

    def concatenate(self, context: Context, parts: tuple[Any, ...]) -> str:
        """Join the operands of `~`."""
        return keep((markup_join if context.eval_ctx.autoescape else str_join)(keep(parts)))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        METER.get().check(OPERATOR_SIZES[operator](left, right))
        return keep(super().call_binop(context, operator, left, right))

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        method = getattr(obj, "__wrapped__", obj)  # str.format arrives wrapped by the sandbox
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if name in _UNSUPPORTED:
            raise SecurityError(f"the method {name!r} is not supported")
        if isinstance(owner, str) and name in METHOD_SIZES:
            if name == "join":
                args = tuple(list(parts) for parts in args)
            named = {key: kwargs[key] for key in kwargs.keys() - _JINJA_ARGUMENTS}
            METER.get().check(METHOD_SIZES[name](owner, *args, **named))
        return keep(super().call(context, obj, *args, **kwargs))


class GenerationTag(Extension):
    """`{% generation %} ... {% endgeneration %}` marks the assistant's text; the body is rendered unchanged.

    The start and end of a block are reported to `EDGE`, which the rendering function sets.
    """

    tags: set[str] = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        first, last = (
            nodes.ExprStmt(self.call_method("edge", [nodes.Const(begins)]), lineno=line)
            for begins in (True, False)
        )
        return nodes.Scope([first, *body, last], lineno=line)

    def edge(self, begins: bool) -> None:
        """Called by the template at both ends of a block."""
        EDGE.get()(begins)


class ChatNamespace(utils.Namespace):
    """`namespace(...)` without underscore names, and with a repr that does not contain its attributes."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` stays free as an attribute name
        attributes = ChatDict()(*args[1:], **kwargs)
        for name in attributes:
            _public(name)
        utils.Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(_public(name), value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _public(name: Any) -> Any:
    if str(name).startswith("_"):
        raise SecurityError(f"namespace attribute {name!r} starts with an underscore")
    return name


class ChatDict:
    """`dict(...)` and `dict.fromkeys(...)`, without the other attributes of the class."""

    def __call__(self, pairs: Any = (), /, **more: Any) -> dict[Any, Any]:
        # Python loops, because one call of the built-in runs for minutes if all keys collide.
        pairs = pairs.items() if isinstance(pairs, dict) else pairs
        return {key: value for key, value in pairs} | more  # noqa: C416

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        return {key: value for key in keys}  # noqa: C420


def _raise_exception(message: Any) -> None:
    raise TemplateError(str(message))


def _strftime_now(form: str) -> str:
    METER.get().check(len(form) * 1000)  # one directive can request a field of any width
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    METER.get().check(1000 * (indent if isinstance(indent, int) else len(indent or "")))
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    parts: list[str] = []
    for part in encoder.iterencode(value):
        METER.get().charge(len(part))
        parts.append(part)
    return _join(parts)


@pass_context
def _show(context: Context, value: Any) -> Any:
    return show(value)  # with pass_context, jinja2 evaluates constants at run time, not at compile time


def _picker(environment: Any, attribute: str | int | None) -> Callable[[Any], Any]:
    return (lambda value: value) if attribute is None else filters.make_attrgetter(environment, attribute)


@pass_environment
def _sum(environment: Any, values: Any, attribute: str | int | None = None, start: Any = 0) -> Any:
    pick, total = _picker(environment, attribute), start
    for value in values:
        total = keep(total + pick(value))
    return total


@pass_eval_context
def _join_filter(context: Any, value: Any, d: str = "", attribute: str | int | None = None) -> str:
    pick = _picker(context.environment, attribute)
    values = keep([pick(item) for item in value])
    METER.get().check(len(values) * len(str(d)) + weigh(values))
    return filters.sync_do_join(context, values, d)


def _bound_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    size = FILTER_SIZES.get(name)
    first = int(getattr(function, "jinja_pass_arg", None) is not None)

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if size is not None:
            METER.get().check(size(*args[first:], **kwargs))
        return keep(function(*args, **kwargs))

    return run


@lru_cache(maxsize=1)
def environment() -> ChatEnvironment:
    """Return the environment of all chat templates: transformers' names and options, bounded."""
    env = ChatEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_show,
        optimized=False,
        extensions=[GenerationTag, "jinja2.ext.loopcontrols"],
    )
    env.filters.update(tojson=_tojson, sum=_sum, join=_join_filter)
    env.filters = {
        name: _bound_filter(name, function)
        for name, function in env.filters.items()
        if name not in _UNSUPPORTED
    }
    del env.globals["lipsum"]
    env.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, dict=ChatDict(), namespace=ChatNamespace
    )
    return env


@lru_cache(maxsize=32)
def compile_template(source: str) -> Template:
    """Compile a template's source once; call this inside `bounded`."""
    if len(source) > MAX_SOURCE:
        raise InputError(f"chat template: {len(source)} characters long; at most {MAX_SOURCE} are allowed")
    return environment().from_string(source)
