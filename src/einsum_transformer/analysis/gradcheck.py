"""Hand-derived gradients against central differences of the loss, in float64, through the whole model.

Along a direction v the derivative is <gradient, v>, and by differences of fourth order

    (8 (f(+h) - f(-h)) - (f(+2h) - f(-2h))) / (12 h).

Their relative error is |a - n| / max(|a|, |n|, floor). The loss is a float64 near 10 with a rounding error of
about 1e-15, so the quotient cannot be known better than 1e-15 / h; the floor is a million times that, below
which 1e-6 cannot be distinguished from rounding. Where the loss bends much, or breaks off because a router
chooses other experts, smaller steps are tried: those of a right gradient converge to it, those of a wrong one
do not.
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

_STEP = 1e-3  # of the weights' own size: error of the differences ~ _STEP^4, of rounding ~ 1e-15 / _STEP
_STEP_OF_ALL = 1e-4  # where all parameters move at once, the loss bends more
_ROUNDING = 1e-15
_ENTRIES = 2


@dataclass(frozen=True, slots=True)
class Checked:
    """One comparison. what: "direction", or the place of a single entry."""

    name: str
    what: str
    analytic: float
    numeric: float
    error: float


@checked
@dataclass(frozen=True, slots=True)
class GradCheck:
    """All comparisons; whole: along one direction through every parameter at once."""

    model: str
    """The source of the model."""
    tolerance: float
    loss: float
    whole: Checked
    rows: tuple[Checked, ...]
    filled: bool
    """Whether adapters whose B was zero were given random numbers, as zero would make A's gradient zero."""

    @property
    def passed(self) -> bool:
        """Whether no error exceeds the tolerance."""
        return all(row.error <= self.tolerance for row in (self.whole, *self.rows))

    def to_dict(self) -> dict[str, Any]:
        """The comparisons in JSON types."""
        return asdict(self) | {"passed": self.passed}

    def table(self) -> Any:
        """The comparisons by component, for a terminal."""
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
    """Check the gradient of the loss of targets after tokens, both (b, t), by every trained parameter.

    parameters: a regular expression that some part of a parameter's name must match. Weights are changed
    while this runs, and are bit for bit as before afterwards.
    """
    if not 0 < tolerance < 1:
        raise InputError(f"the tolerance is {tolerance}: a number between 0 and 1 is expected")
    weights = trainable(model.decoder)
    if any(w.dtype != np.float64 for w in weights.values()):
        raise InputError(f"{model.source}: gradients are checked in float64; load the model with that dtype")
    try:
        chosen = {name: w for name, w in weights.items() if re.search(parameters, name)}
    except re.error as error:
        raise InputError(f"{parameters!r} is not a regular expression: {error}") from None
    if not chosen:
        raise InputError(f"{parameters!r} matches no parameter; one is {next(iter(weights))!r}")
    kept = {name: w.copy(order="K") for name, w in weights.items()}
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
            found = []
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
        rows = []
        for done, name in enumerate(chosen):
            for what, v in _directions(gradients[name], rng):
                rows.append(check(name, what, {name: v}))
            progress(done + 1, len(chosen))
    finally:
        for name, w in weights.items():
            np.copyto(w, kept[name])
    return GradCheck(model.source, tolerance, loss, whole, tuple(rows), bool(empty))


def _scale(weights: dict[str, Array], directions: dict[str, Array]) -> float:
    """The size of the numbers that are moved, so that a step is small beside them."""
    total = sum(float(np.sum(np.square(weights[name]))) for name in directions)
    return max(float(np.sqrt(total / sum(weights[name].size for name in directions))), 1e-3)


def _directions(gradient: Array, rng: np.random.Generator) -> Iterator[tuple[str, Array]]:
    yield "direction", rng.standard_normal(gradient.shape)
    largest = int(np.argmax(np.abs(gradient)))
    for index in dict.fromkeys([largest, *rng.integers(0, gradient.size, _ENTRIES - 1).tolist()]):
        place = np.unravel_index(index, gradient.shape)
        v = np.zeros(gradient.shape)
        v[place] = 1.0
        yield str([int(i) for i in place]), v


def _difference(
    model: Model, tokens: Array, targets: Array, weights: dict[str, Array], v: dict[str, Array], h: float
) -> float:
    kept = {name: weights[name].copy(order="K") for name in v}

    def loss(steps: int) -> float:
        for name, direction in v.items():
            np.add(kept[name], steps * h * direction, out=weights[name])
        return cross_entropy(model.decoder.forward(tokens)[0], targets)[0]

    try:
        return float((8 * (loss(1) - loss(-1)) - (loss(2) - loss(-2))) / (12 * h))
    finally:
        for name, w in kept.items():
            np.copyto(weights[name], w)


def by_component(found: GradCheck) -> list[tuple[str, int, Checked]]:
    """(component, comparisons, the worst of them) over all layers."""
    groups: dict[str, list[Checked]] = {}
    for row in found.rows:
        component = re.sub(r"^layers\.\d+\.|\.weight", "", row.name)
        groups.setdefault(component, []).append(row)
    return [(name, len(rows), max(rows, key=lambda row: row.error)) for name, rows in groups.items()]


def render(found: GradCheck) -> Any:
    """The comparisons for a terminal, as a rich renderable."""
    table = terminal_table(("component", "checks", "worst error", "where", ""), left=(0, 3, 4))
    for name, count, worst in [("all at once", 1, found.whole), *by_component(found)]:
        verdict = "ok" if worst.error <= found.tolerance else "WRONG"
        table.add_row(name, str(count), f"{worst.error:.1e}", f"{worst.name} {worst.what}", verdict)
    lines = ["adapters were zero and were filled with random numbers for the check"] * found.filled
    verdict = "equal" if found.passed else "do NOT equal"
    lines.append(
        f"{len(found.rows) + 1} checks: gradients {verdict} central differences to {found.tolerance:g}"
    )
    return with_lines([table], lines)
