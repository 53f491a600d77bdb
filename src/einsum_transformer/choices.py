"""Settings with a fixed set of values, given by their type: `norm: Literal["rms", "layer"]`."""

from collections.abc import Iterable
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from einsum_transformer.errors import ConfigError


def check_choices(config: Any) -> None:
    """Raise ConfigError if a field of this dataclass has a value that its `Literal` type does not list.

    A field of type `Literal[...] | None` may be None; every entry of a `tuple[Literal[...], ...]` is checked.
    """
    for name, (choices, is_tuple) in _choices(type(config)).items():
        value = getattr(config, name)
        for each in value if is_tuple and isinstance(value, Iterable) else (value,):
            if each not in choices:
                supported = ", ".join(choice for choice in choices if choice is not None)
                raise ConfigError(f"{name} {each!r:.60} is not supported; supported: {supported}")


@cache
def _choices(kind: type) -> dict[str, tuple[tuple[Any, ...], bool]]:
    """Return field -> (the values that its type lists, whether the field is a tuple of them)."""
    found = {name: (_listed(hint), get_origin(hint) is tuple) for name, hint in get_type_hints(kind).items()}
    return {name: each for name, each in found.items() if set(each[0]) - {None}}


def _listed(hint: Any) -> tuple[Any, ...]:
    if hint is type(None):
        return (None,)
    arguments = get_args(hint)
    return arguments if get_origin(hint) is Literal else tuple(v for each in arguments for v in _listed(each))
