"""Walks over nested frozen dataclasses: weights, gradients and optimizer moments are one type."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any


def named_leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, leaf) for everything in the tree that is neither a dataclass, a tuple nor None."""
    for key, child in _children(tree):
        path = f"{prefix}.{key}" if prefix else key
        if _is_node(child):
            yield from named_leaves(child, path)
        elif child is not None:
            yield path, child


def tree_map(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """A tree of the same type whose leaves are function(leaf, *leaves of the others at the same place); None
    stays None."""
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
    """A tree of the same type whose leaves are function(dotted path, leaf); None stays None."""
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
    """A dataclass field that is a setting and no weight: the walks pass it by."""
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
