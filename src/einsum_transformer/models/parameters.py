"""The parameters of a decoder: what is trained, its gradients by name, and decoders of other arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from einsum_transformer.engine import Gradients, Leaf, ShapeArray
from einsum_transformer.tree import map_named, named_leaves

Array = np.ndarray


def trainable(decoder: Any) -> dict[str, Array]:
    """Name -> array of everything in a decoder that is trained: its arrays, and the trained parts of its
    leaves."""
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
    """Name -> array or leaf of everything in a decoder that is not trained, by the names of `with_arrays`."""
    trained, found = trainable(decoder), {}

    def leaf(name: str, weight: Any) -> Any:
        if name not in trained:
            found[name] = weight
        return weight

    with_arrays(decoder, leaf)
    return found


def gradients_by_name(decoder: Any, gradient: Any) -> dict[str, Array]:
    """The gradient of a decoder by the names of `trainable`; those of a part that several weights share are
    added."""
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


def drawn(decoder: Any, key: tuple[int, ...], first_row: int) -> Any:
    """The decoder on the same weights, for a pass over the rows of a batch from first_row on with the random
    numbers of `key`."""
    return map_named(lambda _, w: w.drawn(key, first_row) if isinstance(w, Leaf) else w, decoder)


def writable(decoder: Any) -> Any:
    """The decoder with every array that is trained in memory of its own, if it is in a read-only file."""

    def own(_: str, weight: Any) -> Any:
        if isinstance(weight, Leaf):
            return weight.writable()
        return weight if weight.flags.writeable else weight.copy(order="K")

    return map_named(own, decoder)


def with_arrays(decoder: Any, array: Callable[[str, Any], Any]) -> Any:
    """The decoder with array(name, old) in the place of each array; names are those of `trainable`, or
    "path/part" for a part of a leaf that is not trained."""

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
    """The decoder with only shapes in the place of its numbers."""
    return with_arrays(decoder, lambda _, weight: ShapeArray(tuple(weight.shape), weight.dtype))
