"""Softmax over the last axis, its logarithm, and the cross-entropy built on it."""

import numpy as np

Array = np.ndarray

IGNORE_INDEX = -100
"""Targets with this value take no part in the loss (the convention of PyTorch and Hugging Face)."""


def softmax(x: Array) -> Array:
    """exp(x) / sum(exp(x)) over the last axis; a row that is all -inf gives zeros, not NaN."""
    top = x.max(axis=-1, keepdims=True)
    y = np.exp(x - np.where(np.isfinite(top), top, 0))
    total = y.sum(axis=-1, keepdims=True)
    return y / np.where(total == 0, 1, total)


def log_softmax(x: Array) -> Array:
    """x - log(sum(exp(x))) over the last axis."""
    shifted = x - x.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def cross_entropy(logits: Array, targets: Array) -> tuple[float, tuple[Array, Array, int]]:
    """Mean of -log softmax(logits)[target] over the targets that are not IGNORE_INDEX.

    logits: (..., v); targets: (...) ints. Returns the loss and what the backward needs. With no target at all
    the loss is 0 and so is its gradient.
    """
    log_p = log_softmax(logits)
    counted = targets != IGNORE_INDEX
    picked = np.take_along_axis(log_p, np.where(counted, targets, 0)[..., None], axis=-1)[..., 0]
    count = int(counted.sum())
    loss = -float(np.sum(picked, where=counted, dtype=np.float64)) / max(count, 1)
    return loss, (log_p, targets, count)


def cross_entropy_backward(saved: tuple[Array, Array, int]) -> Array:
    """dlogits = (softmax(logits) - onehot(target)) / count, and 0 where the target is ignored."""
    log_p, targets, count = saved
    counted = (targets != IGNORE_INDEX)[..., None]
    dlogits = np.exp(log_p)
    index = np.where(counted, targets[..., None], 0)
    at_target = np.take_along_axis(dlogits, index, axis=-1)
    np.put_along_axis(dlogits, index, at_target - 1, axis=-1)
    dlogits *= counted / max(count, 1)
    return dlogits
