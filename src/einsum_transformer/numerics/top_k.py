"""The k largest values along the last axis."""

import numpy as np

Array = np.ndarray


def top_k(scores: Array, k: int) -> Array:
    """Return the indices of the k largest values along the last axis, sorted: (..., n) -> (..., k)."""
    if k >= scores.shape[-1]:
        return np.broadcast_to(np.arange(scores.shape[-1]), scores.shape).copy()
    return np.sort(np.argpartition(-scores, k - 1, axis=-1)[..., :k], axis=-1)


def mask_groups(scores: Array, groups: int, kept: int) -> Array:
    """Return the scores with 0 outside of the `kept` groups of adjacent entries with the largest maxima."""
    grouped = scores.reshape(*scores.shape[:-1], groups, -1)
    best = top_k(grouped.max(axis=-1), kept)
    mask = np.zeros(grouped.shape[:-1], scores.dtype)
    np.put_along_axis(mask, best, 1, axis=-1)
    return (grouped * mask[..., None]).reshape(scores.shape)
