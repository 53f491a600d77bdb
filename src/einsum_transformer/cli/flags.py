"""Groups of flags: dataclasses whose fields are command-line options."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import field, fields, is_dataclass
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer

_KEYWORD = inspect.Parameter.KEYWORD_ONLY
EXIT_CODES = (
    "Exit codes: 0 success; 1 a check found a difference (inspect, parity, gradcheck); "
    "2 wrong input or usage; 130 interrupted."
)


def flag(*names: str, default: Any = None, **options: Any) -> Any:
    """Return a field of a group of flags with these names, default and arguments of `typer.Option`."""
    return field(default=default, metadata={"option": typer.Option(*names, **options)})


def moved(name: str, to: str) -> Any:
    """Return a field for a flag that was renamed: using it is an error that gives the new name."""

    def fail(value: Any) -> None:
        if value is not None:
            raise typer.BadParameter(f"this flag is now {to}", param_hint=name)

    return flag(name, metavar="X", hidden=True, callback=fail)


def ungrouped(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command with one parameter per field of its groups of flags, as typer requires."""
    signature = inspect.signature(command, eval_str=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    for name, parameter in signature.parameters.items():
        if is_dataclass(parameter.annotation):
            groups[name] = parameter.annotation
            parameters += _flags(parameter.annotation)
        else:
            parameters.append(parameter)

    @wraps(command)
    def called(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{each.name: given.pop(each.name) for each in fields(group)})
        command(**given)

    called.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return called


def _flags(group: Any) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    for each in fields(group):
        kind = hints[each.name]
        kind = Annotated[kind, each.metadata["option"]] if each.metadata else kind
        yield inspect.Parameter(each.name, _KEYWORD, default=each.default, annotation=kind)
