"""Activation functions and their derivatives."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class Activation:
    """An elementwise function, and the function that returns its value and its derivative."""

    forward: Callable[[Array], Array]
    with_derivative: Callable[[Array], tuple[Array, Array]]


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


def gelu(x: Array) -> Array:
    """x * P(x) with the standard normal distribution function P (Hendrycks and Gimpel, 2016)."""
    y = _normal_distribution(x)
    y *= x
    return y


def gelu_and_derivative(x: Array) -> tuple[Array, Array]:
    """y = x P(x) and dy/dx = P(x) + x p(x) with the standard normal density p."""
    derivative = _normal_distribution(x)
    y = x * derivative
    x = np.clip(x, -_FLAT, _FLAT)
    density = np.square(x)
    density *= -0.5
    np.exp(density, out=density)
    density *= x
    density *= 1 / math.sqrt(2 * math.pi)
    derivative += density
    return y, derivative


_FLAT = 30.0  # beyond it the derivative of gelu is constant in float64; up to it squares stay finite
_CUBE = 0.044715
_SLOPE = math.sqrt(2 / math.pi)


def gelu_tanh(x: Array) -> Array:
    """x (1 + tanh(u)) / 2 with u = sqrt(2/pi) (x + 0.044715 x^3), the approximation of `gelu`."""
    y = _tanh_of_cubic(x)
    y += 1
    y *= 0.5
    y *= x
    return y


def gelu_tanh_and_derivative(x: Array) -> tuple[Array, Array]:
    """y and dy/dx = (1 + tanh(u)) / 2 + x (1 - tanh(u)^2) u' / 2."""
    t = _tanh_of_cubic(x)
    half = (t + 1) * 0.5
    y, x = half * x, np.clip(x, -_FLAT, _FLAT)
    slope = np.square(x)
    slope *= 1.5 * _CUBE * _SLOPE
    slope += 0.5 * _SLOPE
    slope *= x
    slope *= 1 - np.square(t, out=t)
    slope += half
    return y, slope


SILU = Activation(silu, silu_and_derivative)
GELU = Activation(gelu, gelu_and_derivative)
GELU_TANH = Activation(gelu_tanh, gelu_tanh_and_derivative)
HiddenAct = Literal["silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"]
ACTIVATIONS: dict[HiddenAct, Activation] = {
    "silu": SILU,
    "swish": SILU,
    "gelu": GELU,
    "gelu_new": GELU_TANH,
    "gelu_fast": GELU_TANH,
    "gelu_pytorch_tanh": GELU_TANH,
}
"""Hugging Face's `hidden_act` -> activation."""


def _one_plus_exp(x: Array) -> Array:
    """1 + exp(-x); exp may overflow to infinity, whose reciprocal is the correct limit 0."""
    y = np.negative(x)
    with np.errstate(over="ignore"):
        np.exp(y, out=y)
    y += 1
    return y


def _tanh_of_cubic(x: Array) -> Array:
    """tanh(sqrt(2/pi) (x + 0.044715 x^3)); the cube may overflow to infinity, where tanh is 1."""
    with np.errstate(over="ignore"):
        u = np.square(x)
        u *= _CUBE * _SLOPE
        u += _SLOPE
        u *= x
    return np.tanh(u, out=u)


_FAR = 6.0  # erfc(6) = 2e-17: beyond it the normal distribution is 0 or 1 in float64 too


def _normal_distribution(x: Array) -> Array:
    """P(x) = erfc(-x / sqrt(2)) / 2, from erfc(z) = t exp(-z^2 + series(t)), t = 2 / (2 + z), for z >= 0.

    NumPy does not provide erf. One exponential and one polynomial are valid for all z, without branches.
    """
    series = _erfc_series(8 if x.dtype.itemsize <= 4 else 18)
    z = np.abs(x)
    z *= math.sqrt(0.5)
    t = 2 / (2 + np.minimum(z, _FAR))
    power = t * series[-1]
    for coefficient in series[-2:0:-1]:
        power += coefficient
        power *= t
    power += series[0]
    with np.errstate(over="ignore"):
        power -= np.square(z, out=z)
    np.exp(power, out=power)
    power *= t
    power *= 0.5  # P(-|x|)
    return np.where(x > 0, 1 - power, power)


@cache
def _erfc_series(degree: int) -> list[float]:
    """Coefficients, in powers of t, of log(erfc(z) exp(z^2) / t), interpolated at Chebyshev points."""
    least = 2 / (2 + _FAR)

    def exact(s: Array) -> Array:
        t = (s + 1) * (1 - least) / 2 + least
        return np.array([math.log(math.erfc(2 / each - 2) / each) + (2 / each - 2) ** 2 for each in t])

    by_s = np.polynomial.Chebyshev.interpolate(exact, degree).convert(kind=np.polynomial.Polynomial)
    s_of_t = np.polynomial.Polynomial([-(1 + least) / (1 - least), 2 / (1 - least)])
    return by_s(s_of_t).coef.tolist()
