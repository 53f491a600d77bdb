"""The directional gradient check: <dy, (f(p + e v) - f(p - e v)) / 2e> == <dp, v>, for one parameter at a
time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from einsum_transformer.tree import named_leaves

Array = np.ndarray

TOLERANCE = 1e-6
_STEP = 1e-4
_DIRECTIONS = 2
_LEAST = 1e-4


def assert_gradient(what: str, f: Callable[[Array], Array], p: Array, dp: Array, dy: Array) -> None:
    """`dp` is the gradient of <dy, f(p)> by the float64 array p, along random directions.

    The difference quotient is the one of fourth order, so that its own error lies far below the tolerance.
    """
    assert p.dtype == dp.dtype == np.float64, f"{what}: {p.dtype}, gradient {dp.dtype}"
    assert p.shape == dp.shape, f"{what}: shape {p.shape}, gradient {dp.shape}"
    rng = np.random.default_rng(p.size)
    for _ in range(_DIRECTIONS):
        v = rng.standard_normal(p.shape)

        def along(step: float, v: Array = v) -> float:
            return float(np.sum(dy * f(p + step * v)))

        near, far = along(_STEP) - along(-_STEP), along(2 * _STEP) - along(-2 * _STEP)
        numeric, analytic = (8 * near - far) / (12 * _STEP), float(np.sum(dp * v))
        # A gradient of exactly 0 (a softmax over one key) has no relative error, so there is a least scale.
        scale = max(abs(numeric), abs(analytic), _LEAST * float(np.linalg.norm(dy) * np.linalg.norm(v)))
        assert abs(numeric - analytic) <= TOLERANCE * scale, (
            f"{what}: by differences {numeric}, by the backward pass {analytic}"
        )


def assert_weight_gradients(forward: Callable[[Any], Array], weights: Any, gradient: Any, dy: Array) -> None:
    """`gradient` has a right array for each array of `weights` (nested dataclasses), and for nothing else."""
    arrays, gradients = dict(named_leaves(weights)), dict(named_leaves(gradient))
    assert type(weights) is type(gradient)
    assert arrays.keys() == gradients.keys()
    for path, array in arrays.items():
        assert_gradient(
            path, lambda p, path=path: forward(replaced(weights, path, p)), array, gradients[path], dy
        )


def replaced(tree: Any, path: str, array: Array) -> Any:
    """The tree with another array at the dotted path."""
    name, _, rest = path.partition(".")
    if isinstance(tree, tuple):
        changed = replaced(tree[int(name)], rest, array) if rest else array
        return (*tree[: int(name)], changed, *tree[int(name) + 1 :])
    return dataclasses.replace(tree, **{name: replaced(getattr(tree, name), rest, array) if rest else array})
