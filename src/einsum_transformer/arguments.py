"""Checks the arguments of public functions against their annotations: a mistake is one line that names the
argument.

Messages put the names of arguments into backticks; the command line prints the flag in their place.
"""

from __future__ import annotations

import difflib
import inspect
import numbers
from collections.abc import Callable, Collection, Iterable, Mapping
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


def checked(called: Called, *, choices: bool = True) -> Called:
    """Decorator of a public function or dataclass: raise ArgumentError, which names the argument, for a call
    with an unknown or missing argument or with one of another type than its annotation.

    choices: also check the values that a `Literal` lists; False for a class that checks these itself.
    `float` takes integers; neither `int` nor `float` takes a bool; NumPy's scalars count as numbers. A
    function with `**options` checks these itself.
    """
    if isinstance(called, type):
        called.__init__ = _checking(called.__init__, called, choices)  # type: ignore[misc]
        return called  # type: ignore[return-value]
    return _checking(called, called, choices)  # type: ignore[return-value]


def _checking(function: Callable[..., Any], owner: Callable[..., Any], choices: bool) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        _check(function, owner, choices, args, kwargs)
        return function(*args, **kwargs)

    return call


def _check(
    function: Callable[..., Any],
    owner: Callable[..., Any],
    choices: bool,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    signature, hints, any_keyword = _declared(function, owner)
    name = owner.__name__
    for keyword in () if any_keyword else kwargs:
        if keyword not in hints:
            raise ArgumentError(f"{name}() has no argument `{keyword}`{nearest(keyword, hints)}")
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ArgumentError(f"{name}(): {error}") from None
    for argument, value in bound.arguments.items():
        if argument in hints and (choices or not _lists_choices(hints[argument])):
            check_type(name, argument, value, hints[argument])


@cache
def _declared(
    function: Callable[..., Any], owner: Callable[..., Any]
) -> tuple[inspect.Signature, dict[str, Any], bool]:
    """The signature, the annotation of each named parameter, and whether any other keyword is accepted."""
    signature = inspect.signature(function)
    hints = get_type_hints(owner if owner is function or is_dataclass(owner) else function)
    parameters = signature.parameters.values()
    named = {each.name: hints.get(each.name, Any) for each in parameters if each.kind not in _VARIADIC}
    return signature, named, any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters)


def check_type(name: str, argument: str, value: Any, hint: Any) -> None:
    """Raise ArgumentError if the value of an argument of `name` does not have the type of the annotation."""
    if not fits(value, hint):
        raise _mismatch(name, argument, value, hint)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value has the type of an annotation; of containers also the elements, where they are cheap to
    see. What cannot be checked fits."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(fits(value, each) for each in inner)
    if origin is Annotated:
        return fits(value, inner[0])
    if origin is Literal:
        return value in inner
    if hint in (None, NoneType):
        return value is None
    if hint is bool:
        return isinstance(value, bool) or type(value).__name__ == "bool"  # NumPy's is called so too
    if hint in (int, float):
        number = numbers.Integral if hint is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool)
    if origin is Callable:
        return callable(value)
    if isinstance(origin, type):
        if not isinstance(value, origin) or isinstance(value, (str, bytes)):
            return False
        return _elements_fit(value, inner)
    if isinstance(hint, type) and not is_typeddict(hint) and not _is_protocol(hint):
        return isinstance(value, hint)
    return True


def _lists_choices(hint: Any) -> bool:
    return get_origin(hint) is Literal or any(map(_lists_choices, get_args(hint)))


def _elements_fit(value: Any, inner: tuple[Any, ...]) -> bool:
    if isinstance(value, Mapping):
        return len(inner) != 2 or all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    if not isinstance(value, (list, tuple)) or not inner:
        return True
    if isinstance(value, tuple) and len(inner) == len(value) and Ellipsis not in inner:
        return all(map(fits, value, inner))
    return all(fits(each, inner[0]) for each in value)


def _is_protocol(hint: type) -> bool:
    return bool(vars(hint).get("_is_protocol"))


def _mismatch(name: str, argument: str, value: Any, hint: Any) -> ArgumentError:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    kind = "" if isinstance(value, str) and get_origin(hint) is Literal else f" ({type(value).__name__})"
    return ArgumentError(f"{name}(): `{argument}` is {shown}{kind}, expected {words(hint)}")


def words(hint: Any) -> str:
    """An annotation in words: `int or None`."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return _alternatives(dict.fromkeys(map(words, inner)))
    if origin is Annotated:
        return words(inner[0])
    if origin is Literal:
        return _alternatives(map(repr, inner))
    if hint in (None, NoneType):
        return "None"
    if origin is Callable:
        return "a function"
    if isinstance(origin, type):
        elements = [words(each) for each in inner if each is not Ellipsis]
        return f"{origin.__name__.lower()} of {' to '.join(dict.fromkeys(elements))}"
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _alternatives(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def nearest(name: str, known: Collection[str]) -> str:
    """The end of a message about an unknown name: the known name that is most similar, or nothing."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean `{close[0]}`?" if close else ""
