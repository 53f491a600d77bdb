"""Softmax over the last axis, and the cross-entropy built on it."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

Array = np.ndarray
Saved = tuple[Array, Array, Array, Array, int]

_PIECE = 1 << 17  # elements

ForEach = Callable[[Callable[..., Any], Sequence[tuple[Any, ...]]], None]


def _in_turn(task: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> None:
    for given in arguments:
        task(*given)


IGNORE_INDEX = -100
"""Targets with this value are excluded from the loss (the convention of PyTorch and Hugging Face)."""


def softmax(x: Array) -> Array:
    """exp(x) / sum(exp(x)) over the last axis; a row of -inf yields zeros, not NaN."""
    top = x.max(axis=-1, keepdims=True)
    y = np.exp(x - np.where(np.isfinite(top), top, 0))
    total = y.sum(axis=-1, keepdims=True)
    return y / np.where(total == 0, 1, total)


def cross_entropy(
    logits: Array, targets: Array, count: int | None = None, for_each: ForEach = _in_turn
) -> tuple[float, Saved]:
    """Sum of -log softmax(logits)[target] over the targets that are not IGNORE_INDEX, divided by `count`.

    logits: (b, t, v), overwritten; targets: (b, t) ints. count: the divisor; by default the number of targets
    that are not ignored. For a part of a batch, pass the count of the whole batch: the losses of the parts
    then add up to its mean. for_each: calls a function for each of a list of arguments, also in parallel.
    Returns (loss, saved). If all targets are ignored, loss and gradient are 0.
    """
    counted = targets != IGNORE_INDEX
    count = max(1, int(counted.sum()) if count is None else count)
    top = logits.max(axis=-1)
    index = np.where(counted, targets, 0)[..., None]
    at_target = np.take_along_axis(logits, index, axis=-1)[..., 0]
    # Pieces of the vocabulary, for all positions, stay in the CPU cache during all operations.
    pieces = list(_pieces(logits))
    sums: list[Array] = [top] * len(pieces)

    def exponentials(i: int, piece: Array) -> None:
        piece -= top
        np.exp(piece, out=piece)
        sums[i] = piece.sum(axis=0)

    for_each(exponentials, list(enumerate(pieces)))
    total = np.zeros(top.shape, np.float64)
    for each in sums:
        total += each
    nll = np.log(total) + top - at_target
    loss = float(np.sum(nll, where=counted, dtype=np.float64)) / count
    return loss, (logits, total, counted, index, count)


def cross_entropy_backward(saved: Saved, for_each: ForEach = _in_turn) -> Array:
    """dlogits = (softmax(logits) - onehot(target)) / count, and 0 for ignored targets; overwrites the
    logits."""
    p, total, counted, index, count = saved
    scale = (counted / (total * count)).astype(p.dtype)
    for_each(lambda piece: np.multiply(piece, scale, out=piece), [(piece,) for piece in _pieces(p)])
    at_target = np.take_along_axis(p, index, axis=-1) - (counted / count).astype(p.dtype)[..., None]
    np.put_along_axis(p, index, at_target, axis=-1)
    return p


def _pieces(logits: Array) -> Iterator[Array]:
    """Return views (v', b, t) of consecutive pieces of the vocabulary."""
    by_token = np.moveaxis(logits, -1, 0)
    step = max(1, _PIECE // max(1, by_token[0].size))
    return (by_token[start : start + step] for start in range(0, len(by_token), step))
