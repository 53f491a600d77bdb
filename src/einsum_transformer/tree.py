"""Iterate and map over nested frozen dataclasses: weights, gradients and optimizer moments share one type."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any


def named_leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, leaf) for every entry of the tree that is not a dataclass, a tuple or None."""
    for key, child in _children(tree):
        path = f"{prefix}.{key}" if prefix else key
        if _is_node(child):
            yield from named_leaves(child, path)
        elif child is not None:
            yield path, child


def tree_map(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Apply a function to the corresponding leaves of trees of one type and return such a tree; None stays
    None."""
    if tree is None:
        return None
    if isinstance(tree, tuple):
        return tuple(tree_map(function, *children) for children in zip(tree, *others, strict=True))
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        changes = {
            field.name: tree_map(
                function, getattr(tree, field.name), *(getattr(other, field.name) for other in others)
            )
            for field in dataclasses.fields(tree)
            if not field.metadata.get("static")
        }
        return dataclasses.replace(tree, **changes)
    return function(tree, *others)


def map_named(function: Callable[[str, Any], Any], tree: Any, prefix: str = "") -> Any:
    """Return a tree of the same type with function(dotted path, leaf) as its leaves; None stays None."""
    if tree is None:
        return None
    if not _is_node(tree):
        return function(prefix, tree)
    mapped = {
        key: map_named(function, child, f"{prefix}.{key}" if prefix else key)
        for key, child in _children(tree)
    }
    return tuple(mapped.values()) if isinstance(tree, tuple) else dataclasses.replace(tree, **mapped)


def static(**options: Any) -> Any:
    """Declare a dataclass field that is a setting, not a weight: the functions of this module skip it."""
    return dataclasses.field(metadata={"static": True}, **options)


def _is_node(value: Any) -> bool:
    return isinstance(value, tuple) or (dataclasses.is_dataclass(value) and not isinstance(value, type))


def _children(tree: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, tuple):
        yield from ((str(i), child) for i, child in enumerate(tree))
        return
    for field in dataclasses.fields(tree):
        if not field.metadata.get("static"):
            yield field.name, getattr(tree, field.name)
