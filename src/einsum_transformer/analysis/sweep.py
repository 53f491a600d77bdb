"""A sweep: the counts and the measurements of a model for all combinations of some keys, and growth laws.

A point is one combination of values. Its counts are those of a plan; `growth` fits the exponents.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from einsum_transformer.analysis.growth import Curve, Law, fit
from einsum_transformer.analysis.plan import Plan, PlanPhase, PlanStep
from einsum_transformer.analysis.plots import new_figure, write_figure
from einsum_transformer.analysis.step_times import StepTimes
from einsum_transformer.arguments import checked, nearest
from einsum_transformer.displays import as_html
from einsum_transformer.errors import InputError
from einsum_transformer.formats.files import atomic_file
from einsum_transformer.models.builder import weights_of
from einsum_transformer.models.config import ModelConfig
from einsum_transformer.tables import as_text, quantity, terminal_table

Measure = Literal["prefill", "decode", "training", "none"]

_LEAST = 3
"""Distinct values of a key that a law needs."""
_LABELS = 6
"""Curves that a plot names."""


@dataclass(frozen=True, slots=True)
class PhaseCounts:
    """The counts of a phase, summed over all layers, from its plan."""

    flops: int
    """Operations as computed: attention in tiles, also the masked part of a tile."""
    flops_causal: int
    """Operations of visible pairs of a query and a key only, as are the next three."""
    projection_flops: int
    """Products with the matrices of the layers, or with their gradients."""
    attention_flops: int
    """Scores and their mix with the values: equations with the letters `t` and `s`."""
    head_flops: int
    """Products with the matrix of the output head."""
    weight_bytes: int
    """Bytes of weights, of keys and values, and of all other arrays that the equations read and write."""
    kv_bytes: int
    activation_bytes: int
    peak_bytes: int
    """Most bytes of activations, saved activations and gradients at any time."""
    memory_bytes: int
    """Memory of the run: `peak_bytes`, the weights, and the KV cache or the state of the optimizer (SGD)."""


@dataclass(frozen=True, slots=True)
class Point:
    """The counts and the measurement of one combination of values."""

    values: dict[str, Any]
    """Varied key -> its value."""
    parameters: int
    block_parameters: int
    """Parameters of the layers: without embedding, last norm and output head."""
    trained_parameters: int
    """All parameters, or those of the adapters with `use_lora`."""
    weight_bytes: int
    kv_bytes: int
    """Bytes of the KV cache of `batch_size` rows of `seq_len` tokens."""
    phases: dict[str, PhaseCounts]
    """"prefill", "decode", "training" -> counts."""
    measured: StepTimes | None = None


@checked
@dataclass(frozen=True, slots=True)
class Sweep:
    """The points of a sweep and its growth laws. `str()` is the tables."""

    model: str
    """The source of the run config."""
    measure: str
    """What was measured: "prefill", "decode", "training" or "none"."""
    varied: dict[str, tuple[Any, ...]]
    """Key -> values, in the order of the argument; the last key varies fastest."""
    repetitions: int
    seed: int
    threads: int
    """BLAS threads of the points that do not vary them."""
    processor: str
    blas: str
    points: tuple[Point, ...]
    laws: tuple[Law, ...]
    """One law per key with three or more numbers and per quantity."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields in JSON types."""
        return asdict(self)

    def law(self, key: str, name: str) -> Law:
        """Return the law of a quantity, such as "kv_bytes" or "prefill.seconds" (the names in the table).

        Raises InputError for a key or a quantity without a law.
        """
        titles = {_title(law): law for law in self.laws if law.key == key}
        if name not in titles:
            keys = ", ".join(numeric(self.varied)) or "none"
            raise InputError(
                f"there is no law of {name!r} by {key!r}{nearest(name, titles)} (keys with laws: {keys})"
            )
        return titles[name]

    def tables(self) -> Iterator[Any]:
        """Yield the tables and lines as rich renderables."""
        yield from _heading(self)
        yield ""
        yield _points_table(self)
        if self.laws:
            yield ""
            yield _laws_table(self)
        yield from _lines(self)

    def write_csv(self, path: str | Path) -> None:
        """Write one row per point to a CSV file: the varied keys, the counts, the measurement."""
        text = io.StringIO()
        rows = [_flat(point) for point in self.points]
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        with atomic_file(Path(path)) as file:
            file.write(text.getvalue().encode())

    def plot(self, path: str | Path) -> None:
        """Plot seconds (or FLOPs) and memory against each numeric key to a PNG file (needs matplotlib)."""
        _plot(self, path)

    def __str__(self) -> str:
        return as_text(*self.tables())

    def _repr_html_(self) -> str:
        return as_html(*self.tables())


def point_of(
    values: Mapping[str, Any], config: ModelConfig, plan: Plan, adapted: PlanPhase | None, ledger: int
) -> Point:
    """Return the point of a plan. adapted: the training step of the adapters, if any; ledger: the index of
    the memory of training."""
    memory = plan.training[ledger]
    phases = {
        each.name: _counts(each, plan.weight_bytes + plan.kv_bytes + each.peak_bytes)
        for each in plan.phases
        if each.name != "training"
    }
    phases["training"] = _counts(adapted or plan.phase("training"), memory.peak)
    layers = (weight for weight in weights_of(config) if weight.path.startswith("layers."))
    return Point(
        dict(values),
        plan.parameters,
        sum(math.prod(weight.stored) for weight in layers),
        memory.trained,
        plan.weight_bytes,
        plan.kv_bytes,
        phases,
    )


def _counts(phase: PlanPhase, memory: int) -> PhaseCounts:
    parts = {"projections": 0, "attention": 0, "head": 0, "": 0}
    for step in phase.steps:
        parts[_part(step)] += step.times * step.flops_causal
    return PhaseCounts(
        phase.total("flops"),
        phase.total("flops_causal"),
        parts["projections"],
        parts["attention"],
        parts["head"],
        phase.total("weight_bytes"),
        phase.total("kv_bytes"),
        phase.total("activation_bytes"),
        phase.peak_bytes,
        memory,
    )


def _part(step: PlanStep) -> str:
    if {"t", "s"} <= set(step.sizes):
        return "attention"
    # The role is the inner phase if the equation uses no weight.
    if step.role == step.path[-1]:
        return ""
    return "projections" if step.layers else "head"


def growth(points: Sequence[Point], varied: Mapping[str, Sequence[Any]], measure: Measure) -> tuple[Law, ...]:
    """Return the laws of each key with three or more numbers above 0.

    The points of one combination of the other keys are a curve; all curves of a key have one exponent.
    """
    found: list[Law] = []
    for key in numeric(varied):
        for phase, name, value in _quantities(measure):
            curves = [[(each.values[key], value(each)) for each in curve] for curve in _curves(points, key)]
            if all(y > 0 for curve in curves for _, y in curve):
                found.append(fit(curves, key, phase, name))
    return tuple(found)


def numeric(varied: Mapping[str, Sequence[Any]]) -> list[str]:
    """Return the keys with three or more values that are numbers above 0."""
    return [
        key
        for key, values in varied.items()
        if len(values) >= _LEAST
        and all(isinstance(each, (int, float)) and not isinstance(each, bool) and each > 0 for each in values)
    ]


def _curves(points: Sequence[Point], key: str) -> list[list[Point]]:
    """The points by the values of the other keys."""
    found: dict[str, list[Point]] = {}
    for point in points:
        found.setdefault(_label(point, key), []).append(point)
    return list(found.values())


def _label(point: Point, without: str) -> str:
    return named({key: value for key, value in point.values.items() if key != without})


def named(values: Mapping[str, Any]) -> str:
    """Return a combination of values as text: `seq_len=128, n_layers=2`."""
    return ", ".join(f"{key}={shown(value)}" for key, value in values.items())


def shown(value: Any) -> str:
    """Return a value as on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


_OF_MODEL = ("parameters", "block_parameters", "trained_parameters", "weight_bytes", "kv_bytes")
_OF_PHASE = tuple(PhaseCounts.__annotations__)
_PHASES = ("prefill", "decode", "training")


def phases_of(measure: str) -> tuple[str, ...]:
    """Return the phases whose growth is of interest: the measured one, or all."""
    return _PHASES if measure == "none" else (measure,)


def _quantities(measure: Measure) -> Iterator[tuple[str, str, Callable[[Point], float]]]:
    """Yield phase, name and reader of each quantity."""
    for name in _OF_MODEL:
        yield "model", name, lambda point, name=name: getattr(point, name)
    for phase in phases_of(measure):
        for name in _OF_PHASE:
            yield phase, name, lambda point, phase=phase, name=name: getattr(point.phases[phase], name)
    if measure != "none":
        yield measure, "seconds", lambda point: point.measured.seconds if point.measured else 0
        yield measure, "measured_bytes", lambda point: point.measured.peak_bytes if point.measured else 0


def _flat(point: Point) -> dict[str, Any]:
    row = {key: shown(value) for key, value in point.values.items()}
    row |= {name: getattr(point, name) for name in _OF_MODEL}
    for phase, counts in point.phases.items():
        row |= {f"{phase}_{name}": value for name, value in asdict(counts).items()}
    if (each := point.measured) is not None:
        last = each.losses[-1] if each.losses else None
        row |= {"seconds": each.seconds, "measured_bytes": each.peak_bytes, "loss": last}
    return row


def _heading(found: Sweep) -> Iterator[str]:
    count = f"{len(found.points)} point{'s' * (len(found.points) != 1)}"
    if found.measure == "none":
        yield f"{found.model}: {count}, counted"
        return
    threads = "" if "threads" in found.varied else f", {found.threads} thread{'s' * (found.threads != 1)}"
    yield f"{found.model}: {count}, {found.measure}; median of {found.repetitions} repetitions"
    yield f"{found.processor}, {found.blas}{threads}"


def _points_table(found: Sweep) -> Any:
    columns = ["parameters"]
    if found.measure == "none":
        columns += ["KV cache", *(f"{name} FLOPs" for name in _PHASES), "inference memory", "training memory"]
    else:
        columns += ["FLOPs", "memory", "peak planned", "measured", "ms", "GFLOP/s"]
        columns += ["loss"] if found.measure == "training" else []
    table = terminal_table((*found.varied, *columns), left=())
    for point in found.points:
        cells = [shown(value) for value in point.values.values()]
        table.add_row(*cells, quantity(point.parameters), *_cells(point, found.measure))
    return table


def _cells(point: Point, measure: str) -> Iterator[str]:
    if point.measured is None:
        yield quantity(point.kv_bytes, "B")
        yield from (quantity(point.phases[name].flops) for name in _PHASES)
        inference = max(point.phases[name].memory_bytes for name in ("prefill", "decode"))
        yield from (quantity(size, "B") for size in (inference, point.phases["training"].memory_bytes))
        return
    counts, each = point.phases[measure], point.measured
    yield quantity(counts.flops)
    yield from (quantity(size, "B") for size in (counts.memory_bytes, counts.peak_bytes, each.peak_bytes))
    yield f"{1000 * each.seconds:.3f}"
    yield f"{counts.flops / each.seconds / 1e9:.1f}"
    if each.losses:
        yield "not finite" if each.losses[-1] is None else f"{each.losses[-1]:.4f}"


def _laws_table(found: Sweep) -> Any:
    """The laws of quantities that change."""
    table = terminal_table(("key", "quantity", "exponent", "95 % interval", "R^2"), left=(0, 1))
    for law in found.laws:
        if law.r_squared is not None:
            interval = f"{law.low:.3f} to {law.high:.3f}"
            table.add_row(law.key, _title(law), f"{law.exponent:.3f}", interval, f"{law.r_squared:.4f}")
    return table


def _title(law: Law) -> str:
    return law.quantity if law.phase == "model" else f"{law.phase}.{law.quantity}"


def _lines(found: Sweep) -> Iterator[str]:
    for key in dict.fromkeys(law.key for law in found.laws):
        if same := [_title(law) for law in found.laws if law.key == key and law.r_squared is None]:
            yield f"{key} does not change {', '.join(same)}"
    if found.laws:
        yield (
            "exponent p: quantity = c key^p, least squares in logarithms, with one c per combination of the "
            "other keys"
        )


def _plot(found: Sweep, path: str | Path) -> None:
    keys = numeric(found.varied)
    figure = new_figure(path, 6 * max(1, len(keys)))
    if not keys:
        figure.text(0.5, 0.5, f"no key has {_LEAST} numbers: there is no curve", ha="center")
        write_figure(figure, path)
        return
    figure.set_size_inches(6 * len(keys), 8)
    upper = "seconds" if found.measure != "none" else "flops"
    lower = ("memory_bytes",) if found.measure == "none" else ("peak_bytes", "measured_bytes")
    rows = (_drawn(found, upper), [law for name in lower for law in _drawn(found, name)])
    grid = figure.subplots(2, len(keys), squeeze=False)
    labels = ("seconds" if upper == "seconds" else "FLOPs", "bytes")
    for axes_row, laws, label in zip(grid, rows, labels):
        for axes, key in zip(axes_row, keys):
            _plot_key(axes, found, key, [law for law in laws if law.key == key])
            axes.set(xscale="log", yscale="log", xlabel=key, ylabel=label)
            axes.set_xticks(found.varied[key], labels=list(map(shown, found.varied[key])))
            axes.minorticks_off()
            axes.legend(frameon=False, fontsize=7)
    write_figure(figure, path)


def _drawn(found: Sweep, name: str) -> list[Law]:
    return [law for law in found.laws if law.quantity == name and law.phase != "model"]


def _plot_key(axes: Any, found: Sweep, key: str, laws: Sequence[Law]) -> None:
    """The points of each curve, and lines of the fitted exponent through their means."""
    readers = {(phase, name): value for phase, name, value in _quantities(_measure(found))}
    count = 0
    for law, style in zip(laws, ("-", "--", ":")):
        title = f"{_title(law)} ~ {key}^{law.exponent:.2f}"
        for curve in _curves(found.points, key):
            pairs: Curve = [(point.values[key], readers[law.phase, law.quantity](point)) for point in curve]
            own = _label(curve[0], key)
            label = f"{title} {own and f'({own})'}".strip() if count < _LABELS else None
            color = f"C{count % 10}"
            axes.plot(*zip(*pairs), "o", color=color, markersize=4)
            logs = [(math.log(x), math.log(y)) for x, y in pairs]
            x_mean, y_mean = (math.fsum(column) / len(logs) for column in zip(*logs))
            ends = sorted(x for x, _ in pairs)[:: len(pairs) - 1]
            line = [math.exp(y_mean + law.exponent * (math.log(x) - x_mean)) for x in ends]
            axes.plot(ends, line, style, color=color, linewidth=1, label=label)
            count += 1


def _measure(found: Sweep) -> Measure:
    return found.measure  # type: ignore[return-value]
