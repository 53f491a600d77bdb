"""Growth laws y = c x^p: the exponent by least squares in logarithms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Curve = Sequence[tuple[float, float]]
"""Pairs (x, y) that differ in x only; both are above 0."""


@dataclass(frozen=True, slots=True)
class Law:
    """The exponent p of y = c x^p in several curves, each with a factor c of its own.

    With u = log x and v = log y minus their means in the curve, p = sum(u v) / sum(u^2). For n points in m
    curves its standard error is sqrt(sum((v - p u)^2) / (n - m - 1) / sum(u^2)), and the interval is p +- t
    times that, with the quantile t of Student's distribution.
    """

    key: str
    """The name of x, a varied key."""
    phase: str
    """"prefill", "decode", "training", or "model" for what does not depend on the phase."""
    quantity: str
    """The name of y."""
    exponent: float
    standard_error: float
    low: float
    """The lower end of the 95 % confidence interval."""
    high: float
    r_squared: float | None
    """1 - sum((v - p u)^2) / sum(v^2); None for a quantity that does not change."""
    points: int
    combinations: int
    """The number of curves: combinations of the other varied keys."""


def fit(curves: Sequence[Curve], key: str = "", phase: str = "", quantity: str = "") -> Law:
    """Return the law of curves that have the same exponent; at least one has three points or more."""
    pairs: list[tuple[float, float]] = []
    for curve in curves:
        logs = [(math.log(x), math.log(y)) for x, y in curve]
        x_mean, y_mean = (math.fsum(column) / len(logs) for column in zip(*logs))
        constant = len({y for _, y in curve}) == 1
        pairs += [(x - x_mean, 0.0 if constant else y - y_mean) for x, y in logs]
    freedom = len(pairs) - len(curves) - 1
    u_squared = math.fsum(u * u for u, _ in pairs)
    v_squared = math.fsum(v * v for _, v in pairs)
    exponent = math.fsum(u * v for u, v in pairs) / u_squared
    residual = math.fsum((v - exponent * u) ** 2 for u, v in pairs)
    error = math.sqrt(residual / freedom / u_squared)
    half = quantile(freedom) * error
    return Law(
        key,
        phase,
        quantity,
        exponent,
        error,
        exponent - half,
        exponent + half,
        1 - residual / v_squared if v_squared else None,
        len(pairs),
        len(curves),
    )


def quantile(freedom: int) -> float:
    """Return t with P(|T| <= t) = 0.95 for Student's distribution with this number of degrees of freedom.

    By bisection on the sums in Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < 0.95 else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _within(angle: float, freedom: int) -> float:
    """P(|T| <= t) with angle = atan(t / sqrt(freedom))."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = total = (cosine if freedom > 1 else 0.0) if odd else 1.0
    for i in range(2 + odd, freedom - 1, 2):
        term *= (i - 1) / i * cosine**2
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
