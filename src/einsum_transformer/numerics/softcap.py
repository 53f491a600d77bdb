"""Soft capping, y = cap tanh(x / cap): limits scores to between -cap and cap (Gemma 2)."""

import numpy as np

Array = np.ndarray


def softcap(x: Array, cap: float) -> Array:
    """cap * tanh(x / cap), in place."""
    x *= 1 / cap
    np.tanh(x, out=x)
    x *= cap
    return x


def softcap_derivative(y: Array, cap: float) -> Array:
    """dy/dx = 1 - tanh(x / cap)^2 = 1 - (y / cap)^2, from the capped y."""
    slope = np.square(y)
    slope *= -1 / cap**2
    slope += 1
    return slope
