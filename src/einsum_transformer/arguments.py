# pyright: reportUnnecessaryIsInstance=false
"""Checks of arguments of public functions against their annotations.

Error messages are one line, with the argument in backticks, which the command line replaces by the flag.
"""

from __future__ import annotations

import difflib
import inspect
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from functools import cache, wraps
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from einsum_transformer.errors import ArgumentError

Called = TypeVar("Called", bound=Callable[..., Any])
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def checked(called: Called) -> Called:
    """Decorate a public function or dataclass so that an unknown or missing argument, or one whose type
    differs from its annotation, raises ArgumentError, which names the argument.

    `float` accepts integers; neither `int` nor `float` accepts a bool; NumPy scalars are numbers. A function
    with `**options` checks these itself.
    """
    if isinstance(called, type):
        called.__init__ = _checking(called.__init__, called)  # type: ignore[misc]
        return called  # type: ignore[return-value]
    return _checking(called, called)  # type: ignore[return-value]


def checked_config(called: Called) -> Called:
    """Like `checked`, for a dataclass that is also built from files: it checks fields with a Literal type
    itself (`check_choices`), with an error about the file."""
    called.__init__ = _checking(called.__init__, called, literals=False)  # type: ignore[misc]
    return called


def _checking(
    function: Callable[..., Any], owner: Callable[..., Any], literals: bool = True
) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        _check(function, owner, args, kwargs, literals)
        return function(*args, **kwargs)

    return call


def _check(
    function: Callable[..., Any],
    owner: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    literals: bool,
) -> None:
    signature, hints, any_keyword = _declared(function, owner)
    name = owner.__name__
    for keyword in () if any_keyword else kwargs:
        if keyword not in hints:
            raise ArgumentError(f"{name}() has no argument `{keyword}`{nearest(keyword, hints, '`')}")
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ArgumentError(f"{name}(): {error}") from None
    for argument, value in bound.arguments.items():
        if argument in hints:
            check_type(name, argument, value, hints[argument], literals)


@cache
def _declared(
    function: Callable[..., Any], owner: Callable[..., Any]
) -> tuple[inspect.Signature, dict[str, Any], bool]:
    """Return the signature, the annotations of named parameters, and whether other keywords are accepted."""
    signature = inspect.signature(function)
    hints = get_type_hints(owner if owner is function or is_dataclass(owner) else function)
    parameters = signature.parameters.values()
    named = {each.name: hints.get(each.name, Any) for each in parameters if each.kind not in _VARIADIC}
    return signature, named, any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters)


def check_type(name: str, argument: str, value: Any, hint: Any, literals: bool = True) -> None:
    """Raise ArgumentError if the value of an argument of `name` does not have the type of the annotation."""
    if fits(value, hint, literals):
        return
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    kind = "" if isinstance(value, str) and get_origin(hint) is Literal else f" ({type(value).__name__})"
    raise ArgumentError(f"{name}(): `{argument}` is {shown}{kind}, expected {words(hint)}")


def fits(value: Any, hint: Any, literals: bool = True) -> bool:
    """Return whether a value has the type of an annotation. Elements of lists, tuples and mappings are
    checked too; a value fits an annotation that cannot be checked. literals: check the values of Literals."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(fits(value, each, literals) for each in inner)
    if origin is Annotated:
        return fits(value, inner[0], literals)
    if origin is Literal:
        return not literals or value in inner
    if hint in (None, NoneType):
        return value is None
    if hint is bool:
        return isinstance(value, bool) or type(value).__name__ == "bool"  # also the name of np.bool
    if hint in (int, float):
        number = numbers.Integral if hint is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool)
    if origin is Callable:
        return callable(value)
    if isinstance(origin, type):
        if not isinstance(value, origin) or isinstance(value, (str, bytes)):
            return False
        return _elements_fit(value, inner, literals)
    if isinstance(hint, type) and not is_typeddict(hint) and _can_be_tested(hint):
        return isinstance(value, hint)
    return True


def _elements_fit(value: Mapping[Any, Any] | Sequence[Any], inner: tuple[Any, ...], literals: bool) -> bool:
    if isinstance(value, Mapping):
        pairs = value.items() if len(inner) == 2 else ()
        return all(fits(k, inner[0], literals) and fits(v, inner[1], literals) for k, v in pairs)
    if not isinstance(value, (list, tuple)) or not inner:
        return True
    if isinstance(value, tuple) and len(inner) == len(value) and Ellipsis not in inner:
        return all(fits(each, hint, literals) for each, hint in zip(value, inner))
    return all(fits(each, inner[0], literals) for each in value)


def _can_be_tested(hint: type) -> bool:
    """False for a protocol that is not `runtime_checkable`."""
    return not vars(hint).get("_is_protocol") or bool(vars(hint).get("_is_runtime_protocol"))


def words(hint: Any) -> str:
    """Return an annotation in words: `int or None`."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return _alternatives(dict.fromkeys(name for each in inner for name in _names(each)))
    if origin is Annotated:
        return words(inner[0])
    if origin is Literal:
        return _alternatives(_names(hint))
    if hint in (None, NoneType):
        return "None"
    if origin is Callable:
        return "a function"
    if isinstance(origin, type):
        elements = dict.fromkeys(words(each) for each in inner if each not in (Ellipsis, Any))
        name = origin.__name__.lower()
        return f"{name} of {' to '.join(elements)}" if elements and origin.__name__ != "Mapping" else name
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _names(hint: Any) -> list[str]:
    """Return the values of a Literal, or any other annotation in words."""
    return list(map(repr, get_args(hint))) if get_origin(hint) is Literal else [words(hint)]


def _alternatives(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def nearest(name: str, known: Iterable[str], quote: str = "'") -> str:
    """Return the end of a message about an unknown name: `; did you mean 'x'?`, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {quote}{close[0]}{quote}?" if close else ""
