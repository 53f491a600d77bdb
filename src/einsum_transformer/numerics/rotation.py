"""Rotation of pairs of head dimensions, the arithmetic of RoPE, forward and backward."""

import numpy as np

Array = np.ndarray


def rotate(x: Array, cos: Array, sin: Array, interleaved: bool = False) -> Array:
    """Rotate each pair (a, b) of the last axis: (a cos - b sin, b cos + a sin).

    x: (..., h); cos, sin: broadcastable to (..., r/2) with r <= h rotated dimensions, the rest passes
    unchanged. Pairs are (i, i + r/2), the layout of Hugging Face, or (2i, 2i + 1) if `interleaved`.
    The backward pass is the rotation by the opposite angle: rotate(dy, cos, -sin).
    """
    half = cos.shape[-1]
    if interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    else:
        first, second = slice(0, half), slice(half, 2 * half)
    y = np.empty_like(x)
    a, b, ya, yb = x[..., first], x[..., second], y[..., first], y[..., second]
    np.multiply(a, cos, out=ya)
    part = b * sin
    ya -= part
    np.multiply(b, cos, out=yb)
    np.multiply(a, sin, out=part)
    yb += part
    if 2 * half < x.shape[-1]:
        y[..., 2 * half :] = x[..., 2 * half :]
    return y
