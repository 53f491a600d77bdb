"""The jinja2 environment of chat templates: what a template can reach, and how much time and memory it gets.

A template comes with a checkpoint and is untrusted. jinja2's immutable sandbox keeps it away from Python's
internals; this module adds two bounds. A trace function ends a rendering that runs too long, which works
because jinja2 compiles templates to Python. It cannot interrupt one long operation of the interpreter
('a' * 10**9), so the size of every value is estimated before a template makes it, and checked afterwards.
"""

import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache, wraps
from typing import Any

from jinja2 import Template, filters, nodes, pass_environment, pass_eval_context, utils
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment

from einsum_transformer.errors import InputError

MAX_SOURCE = 200_000  # characters; the longest published templates have about a tenth of that
MAX_BITS = 20_000  # of an integer; Python itself refuses to write one of more than 14,300 bits
MAX_DEPTH = 100  # of containers in containers: C code that hashes or compares them recurses without a check
TOTAL = 100  # values made in one rendering, in units of the largest value allowed
_LOOPS = (
    "<template>",
    __file__,
)  # whose frames are watched line by line; elsewhere it is enough to watch calls
_SIZED = (list, tuple, set, frozenset, dict, type({}.keys()), type({}.values()), type({}.items()))


class OutOfTime(BaseException):
    """Raised by the trace function; not an Exception, so that no handler on the way out keeps it."""


@dataclass(slots=True)
class Meter:
    """How much one rendering has made so far, in characters and list items."""

    largest: int
    total: int = 0

    def check(self, size: float) -> None:
        if size > self.largest:
            raise InputError(f"chat template: makes a value of more than {self.largest} characters")

    def charge(self, size: int) -> None:
        self.check(size)
        self.total += size
        if self.total > TOTAL * self.largest:
            raise InputError(f"chat template: makes more than {TOTAL * self.largest} characters in all")


_METER: ContextVar[Meter] = ContextVar("_METER")


@contextmanager
def bounded(seconds: float, largest: int) -> Iterator[None]:
    """Bound the time and the memory of template code run in this thread inside the `with` block."""
    end = time.monotonic() + seconds

    def trace(frame: Any, event: str, argument: Any) -> Any:
        if time.monotonic() > end:
            raise OutOfTime
        return trace if frame.f_code.co_filename in _LOOPS and frame.f_code is not weigh.__code__ else None

    token, previous = _METER.set(Meter(largest)), sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(previous)
        _METER.reset(token)


def weigh(value: Any) -> int:
    """Characters and items of `value` written out in full, shared parts counted each time they occur."""
    level, total, depth = [value], 0, 0
    meter = _METER.get()
    while level:
        if depth > MAX_DEPTH:
            raise InputError(f"chat template: makes a value with more than {MAX_DEPTH} levels")
        below: list[Any] = []
        for item in level:
            if isinstance(item, str):
                total += len(item)
            elif isinstance(item, int):
                meter.check(_bits_size(item.bit_length()))
            elif isinstance(item, _SIZED):
                below.extend(item)
                if isinstance(item, dict):
                    below.extend(item.values())
            total += 1
            meter.check(total + len(below))
        level, depth = below, depth + 1
    return total


def keep(value: Any) -> Any:
    """Return `value`, made by a template, once it is known to be small enough."""
    weigh(value)
    _METER.get().charge(len(value) if isinstance(value, (str, *_SIZED)) else 1)
    return value


def show(value: Any) -> Any:
    """Return `value`, about to be written to the output, once its text is known to be short enough."""
    _METER.get().charge(weigh(value))
    return value


def _join(parts: Any) -> str:
    parts = list(parts)
    _METER.get().charge(sum(map(len, parts)))
    return "".join(parts)


def _bits_size(bits: int) -> float:
    return 0 if bits <= MAX_BITS else math.inf


def _power_size(left: Any, right: Any) -> float:
    whole = isinstance(left, int) and isinstance(right, int) and right > 0
    return _bits_size(left.bit_length() * right) if whole else 0


def _product_size(left: Any, right: Any) -> float:
    if isinstance(left, int) and isinstance(right, int):
        return _bits_size(left.bit_length() + right.bit_length())
    sequence, count = (right, left) if isinstance(left, int) else (left, right)
    return weigh(sequence) * max(count, 0) if isinstance(count, int) else 0


def _percent_size(text: Any, values: Any) -> int:
    if not isinstance(text, str):
        return 0
    # Every part of this pattern is optional, so it never backtracks. A width follows "%" or "%(name)".
    widths = [run for pair in re.findall(r"[%)][-#0 +]*(\d*)(?:\.(\d*))?", text) for run in pair if run]
    if "*" in text:
        widths += values if isinstance(values, tuple) else (values,)
    return len(text) + text.count("%") * (_widest(widths) + weigh(values))


def _braces_size(text: str, *args: Any, **kwargs: Any) -> int:
    values = [*args, *kwargs.values()]
    fields = re.findall(r"\{([^{}]*)", text)
    widths: list[Any] = re.findall(r"\d+", " ".join(fields))
    if re.search(r"\{[^{}]*\{", text):
        widths += values
    return len(text) + len(fields) * (_widest(widths) + weigh(values))


def _widest(widths: Sequence[Any]) -> int:
    """The largest width among digits of a format string and the integer arguments that can serve as one."""
    return max(
        (abs(int(width)) for width in widths if isinstance(width, int) or _is_digits(width)), default=0
    )


def _is_digits(value: Any) -> bool:
    return isinstance(value, str) and value.isdecimal()


def _replaced_size(text: Any, old: Any, new: Any, *_: Any, **__: Any) -> int:
    text, old, new = str(text), str(old), str(new)
    return len(text) + text.count(old) * len(new)


def _strip_size(text: str, chars: str | None = None) -> int:
    return 1000 * len(chars or "")  # each character of the text may be compared with each of these


# Upper bounds of what an operation makes, by its name; the arguments are those of the operation.
_OPERATOR_SIZES: dict[str, Callable[[Any, Any], float]] = {
    "*": _product_size,
    "**": _power_size,
    "%": _percent_size,
    "+": lambda left, right: 0,
}
_METHOD_SIZES: dict[str, Callable[..., float]] = {
    "center": lambda text, width=0, *_: width,
    "ljust": lambda text, width=0, *_: width,
    "rjust": lambda text, width=0, *_: width,
    "zfill": lambda text, width=0: width,
    "expandtabs": lambda text, tabsize=8: len(text) + text.count("\t") * tabsize,
    "replace": _replaced_size,
    "join": lambda text, parts=(): len(text) * len(parts) + weigh(parts),
    "translate": lambda text, table=(): len(text) * weigh(table),
    "strip": _strip_size,
    "lstrip": _strip_size,
    "rstrip": _strip_size,
    "format": _braces_size,
    "format_map": lambda text, values=(): _braces_size(text, values),
}
_FILTER_SIZES: dict[str, Callable[..., float]] = {
    "batch": lambda value, linecount, fill_with=None: linecount,
    "center": lambda value, width=80: width,
    "format": lambda value, *args, **kwargs: _percent_size(str(value), kwargs or args),
    "indent": lambda s, width=4, *_, **__: (
        len(str(s)) * (1 + (width if isinstance(width, int) else len(width)))
    ),
    "replace": _replaced_size,
    "round": lambda value, precision=0, method="common": abs(precision),
    "trim": _strip_size,
    "slice": lambda value, slices, fill_with=None: slices,
}
# HTML helpers that can run for hours on one hostile string.
_LEFT_OUT = ("striptags", "urlize", "wordwrap")


class ChatCodeGenerator(CodeGenerator):
    """Writes every container, slice and `~` of a template so that what it makes passes through `keep`."""

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self.write("environment.keep(")
        super().visit_List(node, frame)
        self.write(")")

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self.write("environment.keep(")
        super().visit_Dict(node, frame)
        self.write(")")

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        self.write("environment.keep(" if node.ctx == "load" else "(")
        super().visit_Tuple(node, frame)
        self.write(")")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        self.write("environment.keep(" if isinstance(node.arg, nodes.Slice) else "(")
        super().visit_Getitem(node, frame)
        self.write(")")

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concatenate(context, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """jinja2's immutable sandbox in which every operation that makes a value is bounded."""

    intercepted_binops = frozenset(_OPERATOR_SIZES)
    code_generator_class = ChatCodeGenerator
    concat = staticmethod(_join)
    keep = staticmethod(keep)

    def concatenate(self, context: Context, parts: tuple[Any, ...]) -> str:
        """Join the operands of `~`."""
        return keep((markup_join if context.eval_ctx.autoescape else str_join)(keep(parts)))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _METER.get().check(_OPERATOR_SIZES[operator](left, right))
        return keep(super().call_binop(context, operator, left, right))

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        method = getattr(obj, "__wrapped__", obj)  # str.format arrives wrapped by the sandbox
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if name in ("encode", "to_bytes"):
            raise SecurityError(f"{name} makes bytes, which have no place in a chat template")
        if isinstance(owner, str) and name in _METHOD_SIZES:
            if name == "join":
                args = tuple(list(parts) for parts in args)
            _METER.get().check(_METHOD_SIZES[name](owner, *args, **kwargs))
        return keep(super().call(context, obj, *args, **kwargs))


class GenerationTag(Extension):
    """`{% generation %} ... {% endgeneration %}` marks the assistant's words; the body is kept as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class ChatNamespace(utils.Namespace):
    """`namespace(...)` without underscore names, and with a text that does not repeat its contents."""

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
    """`dict(...)` and `dict.fromkeys(...)`, and nothing else of the class."""

    def __call__(self, pairs: Any = (), /, **more: Any) -> dict[Any, Any]:
        # Python loops, because keys that all collide make one call of the built-in run for minutes.
        pairs = pairs.items() if isinstance(pairs, dict) else pairs
        return {key: value for key, value in pairs} | more  # noqa: C416

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        return {key: value for key in keys}  # noqa: C420


def _raise_exception(message: Any) -> None:
    raise TemplateError(str(message))


def _strftime_now(form: str) -> str:
    _METER.get().check(len(form) * 1000)  # one directive can ask for a field of any width
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    _METER.get().check(1000 * (indent if isinstance(indent, int) else len(indent or "")))
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    parts: list[str] = []
    for part in encoder.iterencode(value):
        _METER.get().charge(len(part))
        parts.append(part)
    return _join(parts)


@pass_environment
def _sum(environment: Any, values: Any, attribute: str | int | None = None, start: Any = 0) -> Any:
    pick = (lambda value: value) if attribute is None else filters.make_attrgetter(environment, attribute)
    total = start
    for value in values:
        total = keep(total + pick(value))
    return total


@pass_eval_context
def _join_filter(context: Any, value: Any, d: str = "", attribute: str | int | None = None) -> str:
    values = keep(list(value))
    _METER.get().check(len(values) * len(str(d)) + weigh(values))
    return filters.sync_do_join(context, values, d, attribute)


def _bound_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    size = _FILTER_SIZES.get(name)
    first = int(getattr(function, "jinja_pass_arg", None) is not None)

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if size is not None:
            _METER.get().check(size(*args[first:], **kwargs))
        return keep(function(*args, **kwargs))

    return run


@lru_cache(maxsize=1)
def environment() -> ChatEnvironment:
    """The environment all chat templates are compiled in: transformers' names and options, bounded."""
    made = ChatEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=show,
        extensions=[GenerationTag, "jinja2.ext.loopcontrols"],
    )
    made.filters.update(tojson=_tojson, sum=_sum, join=_join_filter)
    made.filters = {
        name: _bound_filter(name, function)
        for name, function in made.filters.items()
        if name not in _LEFT_OUT
    }
    del made.globals["lipsum"]
    made.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, dict=ChatDict(), namespace=ChatNamespace
    )
    return made


@lru_cache(maxsize=32)
def compile_template(source: str) -> Template:
    """Compile a template's source, once; call it inside `bounded`."""
    if len(source) > MAX_SOURCE:
        raise InputError(f"chat template: {len(source)} characters long; at most {MAX_SOURCE} are accepted")
    return environment().from_string(source)
