"""Comparison of hand-derived gradients with central differences of the loss, in float64, for a whole model.

Along a direction v the derivative is <gradient, v>; its approximation by fourth-order differences is

    (8 (f(+h) - f(-h)) - (f(+2h) - f(-2h))) / (12 h).

The relative error is |a - n| / max(|a|, |n|, floor). The loss is a float64 near 10 with a rounding error of
about 1e-15, so the quotient has an error of about 1e-15 / h; the floor is 1e6 times that, since a relative
error of 1e-6 below it may be rounding alone. Smaller steps are tried where the loss has a large curvature, or
is discontinuous because a router selects other experts: the differences then converge to a correct gradient,
but not to a wrong one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from einsum_transformer.arguments import checked
from einsum_transformer.errors import InputError
from einsum_transformer.models.model import Model
from einsum_transformer.models.parameters import gradients_by_name, trainable
from einsum_transformer.numerics.softmax import cross_entropy
from einsum_transformer.tables import as_text, terminal_table, with_lines

Array = np.ndarray

_STEP = 1e-3  # relative to the weights' RMS: truncation error ~ _STEP^4, rounding error ~ 1e-15 / _STEP
_STEP_OF_ALL = 1e-4  # for all parameters at once, since the loss has a larger curvature in that direction
_ROUNDING = 1e-15
_ENTRIES = 2


@dataclass(frozen=True, slots=True)
class Checked:
    """One comparison. what: "direction", or the index of a single element."""

    name: str
    what: str
    analytic: float
    numeric: float
    error: float


@checked
@dataclass(frozen=True, slots=True)
class GradCheck:
    """All comparisons; whole: along one direction in all parameters at once."""

    model: str
    """The source of the model."""
    tolerance: float
    loss: float
    whole: Checked
    rows: tuple[Checked, ...]
    filled: bool
    """Whether adapters with B = 0, for which the gradient of A is 0, were filled with random values."""

    @property
    def passed(self) -> bool:
        """Whether no error exceeds the tolerance."""
        return all(row.error <= self.tolerance for row in (self.whole, *self.rows))

    def to_dict(self) -> dict[str, Any]:
        """Return the comparisons in JSON types."""
        return asdict(self) | {"passed": self.passed}

    def table(self) -> Any:
        """Return the comparisons per component as a rich renderable."""
        return render(self)

    def __str__(self) -> str:
        return as_text(render(self))


def gradcheck(
    model: Model,
    tokens: Array,
    targets: Array,
    tolerance: float = 1e-6,
    parameters: str = ".*",
    recompute: bool = False,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> GradCheck:
    """Check the gradient of the loss for tokens and targets, both (b, t), by every trained parameter.

    parameters: a regular expression, searched for in the names of parameters. Weights change while this runs
    and are restored bit for bit at the end.
    """
    if not 0 < tolerance < 1:
        raise InputError(f"`tolerance` is {tolerance}: expected a number between 0 and 1")
    weights = trainable(model.decoder)
    if any(w.dtype != np.float64 for w in weights.values()):
        raise InputError(
            f"{model.source}: a gradient check needs float64 weights; load the model with dtype float64"
        )
    try:
        chosen = {name: w for name, w in weights.items() if re.search(parameters, name)}
    except re.error as error:
        raise InputError(f"`parameters` {parameters!r} is not a regular expression: {error}") from None
    if not chosen:
        raise InputError(
            f"`parameters` {parameters!r} does not match any parameter, such as {next(iter(weights))!r}"
        )
    original = {name: w.copy(order="K") for name, w in weights.items()}
    rng = np.random.default_rng(seed)
    empty = [name for name in weights if name.endswith("lora_B") and not weights[name].any()]
    try:
        for name in empty:
            weights[name][...] = 0.05 * rng.standard_normal(weights[name].shape)
        loss, gradient = model.decoder.loss_and_gradient(tokens, targets, recompute=recompute)
        gradients = gradients_by_name(model.decoder, gradient)

        def check(name: str, what: str, directions: dict[str, Array]) -> Checked:
            analytic = sum(float(np.sum(gradients[key] * v)) for key, v in directions.items())
            step = (_STEP if len(directions) == 1 else _STEP_OF_ALL) * _scale(weights, directions)
            found: list[Checked] = []
            for h in (step, step / 8, step / 64):
                numeric = _difference(model, tokens, targets, weights, directions, h)
                floor = 1e6 * _ROUNDING * max(1.0, abs(loss)) / h
                error = abs(analytic - numeric) / max(abs(analytic), abs(numeric), floor)
                found.append(Checked(name, what, analytic, numeric, float(error)))
                if error <= tolerance:
                    break
            return min(found, key=lambda each: each.error)

        everywhere = {name: rng.standard_normal(w.shape) for name, w in chosen.items()}
        whole = check("all parameters", "direction", everywhere)
        rows: list[Checked] = []
        for done, name in enumerate(chosen):
            for what, v in _directions(gradients[name], rng):
                rows.append(check(name, what, {name: v}))
            progress(done + 1, len(chosen))
    finally:
        for name, w in weights.items():
            np.copyto(w, original[name])
    return GradCheck(model.source, tolerance, loss, whole, tuple(rows), bool(empty))


def _scale(weights: dict[str, Array], directions: dict[str, Array]) -> float:
    """Return the RMS of the weights that change, to which the step is relative."""
    total = sum(float(np.sum(np.square(weights[name]))) for name in directions)
    return max(float(np.sqrt(total / sum(weights[name].size for name in directions))), 1e-3)


def _directions(gradient: Array, rng: np.random.Generator) -> Iterator[tuple[str, Array]]:
    yield "direction", rng.standard_normal(gradient.shape)
    largest = int(np.argmax(np.abs(gradient)))
    for index in dict.fromkeys([largest, *rng.integers(0, gradient.size, _ENTRIES - 1).tolist()]):
        position = np.unravel_index(index, gradient.shape)
        v = np.zeros(gradient.shape)
        v[position] = 1.0
        yield str([int(i) for i in position]), v


def _difference(
    model: Model, tokens: Array, targets: Array, weights: dict[str, Array], v: dict[str, Array], h: float
) -> float:
    original = {name: weights[name].copy(order="K") for name in v}

    def loss(steps: int) -> float:
        for name, direction in v.items():
            np.add(original[name], steps * h * direction, out=weights[name])
        return cross_entropy(model.decoder.forward(tokens)[0], targets)[0]

    try:
        return float((8 * (loss(1) - loss(-1)) - (loss(2) - loss(-2))) / (12 * h))
    finally:
        for name, w in original.items():
            np.copyto(weights[name], w)


def by_component(found: GradCheck) -> list[tuple[str, int, Checked]]:
    """Return (component, number of comparisons, the worst of them) over all layers."""
    groups: dict[str, list[Checked]] = {}
    for row in found.rows:
        component = re.sub(r"^layers\.\d+\.|\.weight", "", row.name)
        groups.setdefault(component, []).append(row)
    return [(name, len(rows), max(rows, key=lambda row: row.error)) for name, rows in groups.items()]


def render(found: GradCheck) -> Any:
    """Return the comparisons as a rich renderable."""
    table = terminal_table(("component", "checks", "worst error", "where", ""), left=(0, 3, 4))
    for name, count, worst in [("all at once", 1, found.whole), *by_component(found)]:
        verdict = "ok" if worst.error <= found.tolerance else "WRONG"
        table.add_row(name, str(count), f"{worst.error:.1e}", f"{worst.name} {worst.what}", verdict)
    lines = ["adapters with B = 0 were filled with random values for the check"] * found.filled
    verdict = "equal" if found.passed else "do NOT equal"
    lines.append(
        f"{len(found.rows) + 1} checks: gradients {verdict} central differences to {found.tolerance:g}"
    )
    return with_lines([table], lines)
