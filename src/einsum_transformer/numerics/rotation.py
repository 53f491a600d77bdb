"""Rotation of pairs of head dimensions, as in RoPE, forward and backward."""

import numpy as np

Array = np.ndarray


def rotate(x: Array, cos: Array, signed_sin: Array, interleaved: bool = False) -> Array:
    """Rotate each pair (a, b) of the last axis: (a cos - b sin, b cos + a sin).

    x: (..., h); cos: (..., r/2), signed_sin: (..., 2, r/2) = (-sin, sin), broadcastable over x's other axes,
    with r <= h rotated dimensions; the others are copied. Pairs are (i, i + r/2), the layout of Hugging
    Face, or (2i, 2i + 1) if `interleaved`. The backward pass is the rotation by the opposite angle:
    rotate(dy, cos, -signed_sin).
    """
    half = cos.shape[-1]
    y = np.empty_like(x)
    if 2 * half < x.shape[-1]:
        y[..., 2 * half :] = x[..., 2 * half :]
        x_part, y_part = x[..., : 2 * half], y[..., : 2 * half]
    else:
        x_part, y_part = x, y
    pairs, rotated = _pairs(x_part, half, interleaved), _pairs(y_part, half, interleaved)
    np.multiply(pairs, cos[..., None, :], out=rotated)
    # (b, a) * (-sin, sin): reversing the pair axis swaps a and b without a copy.
    rotated += pairs[..., ::-1, :] * signed_sin
    return y


def _pairs(x: Array, half: int, interleaved: bool) -> Array:
    """Return the view (..., 2, r/2): the first elements of all pairs, then the second ones."""
    if interleaved:
        return x.reshape(*x.shape[:-1], half, 2).swapaxes(-1, -2)
    return x.reshape(*x.shape[:-1], 2, half)
