"""Activation functions, each beside its derivative."""

import numpy as np

Array = np.ndarray


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), in the memory layout of x."""
    y = _one_plus_exp(x)
    return np.reciprocal(y, out=y)


def silu(x: Array) -> Array:
    """x * sigmoid(x), in the memory layout of x."""
    y = _one_plus_exp(x)
    return np.divide(x, y, out=y)


def silu_and_derivative(x: Array) -> tuple[Array, Array]:
    """y = x s and dy/dx = s + y (1 - s) with s = sigmoid(x), from one exponential."""
    s = sigmoid(x)
    y = x * s
    derivative = 1 - s
    derivative *= y
    derivative += s
    return y, derivative


def _one_plus_exp(x: Array) -> Array:
    """1 + exp(-x); exp may overflow to infinity, whose reciprocal is the right limit 0."""
    y = np.negative(x)
    with np.errstate(over="ignore"):
        np.exp(y, out=y)
    y += 1
    return y
