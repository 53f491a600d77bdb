"""The parameters of a decoder: trained arrays, gradients by name, and decoders with other arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from einsum_transformer.engine import Gradients, Leaf, ShapeArray
from einsum_transformer.tree import map_named, named_leaves

Array = np.ndarray


def trainable(decoder: Any) -> dict[str, Array]:
    """Name -> trained array of a decoder: its plain arrays, and the trained parts of its leaves."""
    found: dict[str, Array] = {}
    for path, weight in named_leaves(decoder):
        if not isinstance(weight, Leaf):
            found[path] = weight
            continue
        parts = weight.parts()
        for part, name in weight.trained_parts(path).items():
            found.setdefault(name, parts[part])
    return found


def frozen(decoder: Any) -> dict[str, Any]:
    """Name -> frozen array or leaf of a decoder, with the names of `with_arrays`."""
    trained, found = trainable(decoder), {}

    def leaf(name: str, weight: Any) -> Any:
        if name not in trained:
            found[name] = weight
        return weight

    with_arrays(decoder, leaf)
    return found


def gradients_by_name(decoder: Any, gradient: Any) -> dict[str, Array]:
    """The gradients of a decoder by the names of `trainable`; gradients of shared parts are summed."""
    weights = dict(named_leaves(decoder))
    found: dict[str, Array] = {}
    for path, own in named_leaves(gradient):
        if not isinstance(own, Gradients):
            found[path] = own
            continue
        names = weights[path].trained_parts(path)
        for part, array in own.parts.items():
            name = names[part]
            found[name] = found[name] + array if name in found else array
    return found


def with_dropout(decoder: Any, key: tuple[int, ...], first_row: int) -> Any:
    """The decoder with the same weights and the dropout masks of `key`, for the rows of a batch from
    first_row on."""
    return map_named(lambda _, w: w.with_dropout(key, first_row) if isinstance(w, Leaf) else w, decoder)


def writable(decoder: Any) -> Any:
    """The decoder with writable trained arrays: those in a read-only file are copied to memory."""

    def own(_: str, weight: Any) -> Any:
        if isinstance(weight, Leaf):
            return weight.writable()
        return weight if weight.flags.writeable else weight.copy(order="K")

    return map_named(own, decoder)


def with_arrays(decoder: Any, array: Callable[[str, Any], Any]) -> Any:
    """The decoder with array(name, old) in place of each array; names are those of `trainable`, or
    "path/part" for a frozen part of a leaf."""

    def replaced(path: str, weight: Any) -> Any:
        if not isinstance(weight, Leaf):
            return array(path, weight)
        if not (parts := weight.parts()):
            return array(path, weight)
        names = weight.trained_parts(path)
        return weight.with_parts(
            {part: replaced(names.get(part, f"{path}/{part}"), old) for part, old in parts.items()}
        )

    return map_named(replaced, decoder)


def shapes_of(decoder: Any) -> Any:
    """The decoder with a ShapeArray in place of each array."""
    return with_arrays(decoder, lambda _, weight: ShapeArray(tuple(weight.shape), weight.dtype))
