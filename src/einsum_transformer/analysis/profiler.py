"""The time of each equation and of each phase of a running program, and what it is predicted to be."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from einsum_transformer.analysis.explain import in_layer, matrices_of, role_of
from einsum_transformer.analysis.plan import PlanPhase, PlanStep
from einsum_transformer.analysis.rates import Rates, stored_rates
from einsum_transformer.arguments import checked
from einsum_transformer.displays import as_html
from einsum_transformer.engine import Leaf, Recorder
from einsum_transformer.engine.phases import PASS
from einsum_transformer.engine.recorder import Event, Path, Span
from einsum_transformer.models.model import Model
from einsum_transformer.tables import as_text, columns, quantity
from einsum_transformer.tree import named_leaves


@dataclass(frozen=True, slots=True)
class EquationTime:
    """The calls of an equation in one role, in one stage: prefill, decode, forward, backward, ...

    A row without an equation is the rest of a phase: elementwise operations, copies and Python."""

    stage: str
    role: str
    """The weight that it uses, `dq_proj` for the gradient of that weight, else the inner phase."""
    equation: str
    """"" for the rest of a phase."""
    calls: int
    p50: float
    """Seconds of a call; p90: 90 % of the calls take at most this long."""
    p90: float
    p99: float
    seconds: float
    """All calls, summed over the threads."""
    share: float
    """The share of the seconds of all rows of the stage."""
    gflops: float
    """10^9 operations per second; 0 for the rest of a phase."""
    gbps: float
    """10^9 bytes of operands and results per second; 0 for the rest of a phase."""
    elements: int | None
    """For the rest of a phase: elements of its elementwise operations, from a dry run; None: not counted."""
    predicted: float | None
    """Seconds of all calls by the measured rates of this machine; None without a measurement."""
    roofline: float | None
    """The least seconds by the peak rate and the bandwidth, as a share of the seconds."""
    bound: str
    """What bounds it: "compute", "memory", "Python" or "elementwise"; "" without a measurement."""


@dataclass(frozen=True, slots=True)
class StageTime:
    """One stage of a program, such as all decode steps."""

    stage: str
    calls: int
    seconds: float
    equations: float
    """Seconds of its equations, summed over the threads."""
    rest: float
    """Seconds of elementwise operations, copies and Python, summed over the threads."""
    predicted: float | None
    """Its seconds by the measured rates of this machine; None without a measurement or a dry run."""

    @property
    def residual(self) -> float | None:
        """(measured - predicted) / predicted."""
        return (self.seconds - self.predicted) / self.predicted if self.predicted else None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and the residual in JSON types."""
        return asdict(self) | {"residual": self.residual}


@dataclass(slots=True)
class _Calls:
    """The calls of an equation in one role and stage, or the rest of a phase."""

    seconds: list[float] = field(default_factory=list[float])
    flops: int = 0
    nbytes: int = 0
    elements: int | None = None
    predicted: float = 0.0
    bounds: dict[str, float] = field(default_factory=dict[str, float])


@checked
class Profiler:
    """Measures what the program of a model does while it is active. `str()` is the tables.

        profiler = et.Profiler(model)
        with profiler:
            chat.send("Why is the sky blue?")
        print(profiler)

    `et.profile` does this for one run. If `machine` has measured this machine, the seconds are compared with
    those that its rates predict.
    """

    def __init__(self, model: Model) -> None:
        leaves = dict(named_leaves(model.decoder))
        self._rates: Rates | None = stored_rates()
        self._matrices = matrices_of(model.config)
        self._types = {path: leaf.product_type for path, leaf in leaves.items() if isinstance(leaf, Leaf)}
        self._nbytes = {path: leaf.nbytes for path, leaf in leaves.items()}
        self._calls: dict[tuple[str, str, str], _Calls] = {}
        self._predicted: dict[Any, tuple[float, str]] = {}
        self._inside: defaultdict[Path, float] = defaultdict(float)
        """Phase -> seconds of its equations and of its inner phases since it began."""
        self._inside_busy: defaultdict[Path, float] = defaultdict(float)
        """The same, with the seconds of inner phases summed over the threads."""
        self._stages: defaultdict[str, list[float]] = defaultdict(list)
        self._planned: defaultdict[str, float] = defaultdict(float)
        """Stage -> predicted seconds."""
        self._recorder: Recorder | None = None

    def __enter__(self) -> Profiler:
        self._recorder = self.record(Recorder(spans=False)).__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._recorder is not None:
            self._recorder.__exit__(*error)
        self._recorder = None

    def record(self, recorder: Recorder) -> Recorder:
        """Add readers to a recorder that is not active yet."""
        return recorder.on_span(self._span).on_event(self._event)

    def _event(self, event: Event) -> None:
        key = _stage(event.path), role_of(event, self._matrices), event.equation
        calls = self._calls.setdefault(key, _Calls())
        calls.seconds.append(event.seconds)
        calls.flops += event.flops
        calls.nbytes += event.bytes
        self._inside[event.path] += event.seconds
        self._inside_busy[event.path] += event.seconds
        if self._rates is not None:
            seconds, bound = self._of_call(self._rates, event, key[1])
            calls.predicted += seconds
            calls.bounds[bound] = calls.bounds.get(bound, 0.0) + seconds

    def _span(self, span: Span) -> None:
        path = span.path
        inside, inside_busy = self._inside.pop(path, 0.0), self._inside_busy.pop(path, 0.0)
        rest = span.seconds - inside if span.busy is None else span.busy - inside_busy
        calls = self._calls.setdefault((_stage(path), span.name, ""), _Calls())
        calls.seconds.append(max(0.0, rest))
        if len(path) > 1:
            self._inside[path[:-1]] += span.seconds
            self._inside_busy[path[:-1]] += span.seconds if span.busy is None else span.busy
        else:
            self._stages[_stage(path)].append(span.seconds)

    def _of_call(self, rates: Rates, event: Event, role: str) -> tuple[float, str]:
        """The predicted seconds of a call and what bounds it."""
        key = event.equation, tuple(event.sizes.values()), event.weight and in_layer(event.weight)
        if key not in self._predicted:
            step = self._step(event, role)
            self._predicted[key] = rates.of_step(step), rates.bound(step)
        return self._predicted[key]

    def _step(self, event: Event, role: str) -> PlanStep:
        weight = self._nbytes.get(event.weight or "", 0)
        dtype = self._types.get(event.weight or "", "float32")
        flops = event.flops
        costs = 1, flops, flops, flops, weight, 0, event.bytes
        return PlanStep(event.path, role, event.equation, event.sizes, dtype, (), *costs)

    def compare(self, planned: PlanPhase, times: int = 1) -> None:
        """Compare with the counts of a dry run: a phase that ran so many times."""
        rates = self._rates
        for each in planned.elementwise:
            calls = self._calls.get((_stage(each.path), each.path[-1], ""))
            if calls is None:
                continue
            calls.elements = (calls.elements or 0) + times * each.times * each.elements
            if rates is not None:
                calls.predicted += times * each.times * rates.of_pass(each)
                calls.bounds["elementwise"] = calls.predicted
        if rates is not None:
            for step in planned.steps:
                self._planned[_stage(step.path)] += times * step.times * rates.of_step(step)
            for each in planned.elementwise:
                self._planned[_stage(each.path)] += times * each.times * rates.of_pass(each)

    def stages(self) -> tuple[StageTime, ...]:
        """Return the outermost phases, in the order in which they ended for the first time."""
        sums: defaultdict[tuple[str, bool], float] = defaultdict(float)
        for (stage, _, equation), calls in self._calls.items():
            sums[stage, bool(equation)] += math.fsum(calls.seconds)
        return tuple(
            StageTime(
                stage,
                len(seconds),
                math.fsum(seconds),
                sums[stage, True],
                sums[stage, False],
                self._planned.get(stage),
            )
            for stage, seconds in self._stages.items()
        )

    def rows(self) -> tuple[EquationTime, ...]:
        """Return the equations and the rest of each phase, those with most seconds of each stage first."""
        wholes: dict[str, float] = {}
        for (stage, _, _), calls in self._calls.items():
            wholes[stage] = wholes.get(stage, 0.0) + math.fsum(calls.seconds)
        rows = [self._row(*key, calls, wholes[key[0]]) for key, calls in self._calls.items()]
        order = list(wholes)
        return tuple(sorted(rows, key=lambda row: (order.index(row.stage), -row.seconds)))

    def _row(self, stage: str, role: str, equation: str, calls: _Calls, whole: float) -> EquationTime:
        seconds = math.fsum(calls.seconds)
        p50, p90, p99 = (float(p) for p in np.percentile(calls.seconds, (50, 90, 99)))
        rates = self._rates
        is_predicted = rates is not None and (bool(equation) or calls.elements is not None)
        least = None
        if rates is not None and equation:
            least = max(calls.flops / rates.peak, calls.nbytes / rates.bandwidth)
        return EquationTime(
            stage=stage,
            role=role,
            equation=equation,
            calls=len(calls.seconds),
            p50=p50,
            p90=p90,
            p99=p99,
            seconds=seconds,
            share=seconds / whole if whole else 0.0,
            gflops=calls.flops / seconds / 1e9 if seconds else 0.0,
            gbps=calls.nbytes / seconds / 1e9 if seconds else 0.0,
            elements=calls.elements,
            predicted=calls.predicted if is_predicted else None,
            roofline=None if least is None or not seconds else least / seconds,
            bound=max(calls.bounds, key=lambda name: calls.bounds[name]) if calls.bounds else "",
        )

    def to_dict(self) -> dict[str, Any]:
        """Return stages and rows in JSON types."""
        stages = [stage.to_dict() for stage in self.stages()]
        return {"stages": stages, "equations": list(map(asdict, self.rows()))}

    def tables(self) -> Iterator[Any]:
        """Yield the tables as text."""
        yield from tables(self.stages(), self.rows())

    def __str__(self) -> str:
        return as_text(*self.tables())

    def _repr_html_(self) -> str:
        return as_html(*self.tables())


def _stage(path: Path) -> str:
    """The outermost phase; "pass" for a pass through the model outside of generation and training."""
    return path[0] if path and path[:1] not in PASS else "pass"


def tables(stages: Sequence[StageTime], rows: Sequence[EquationTime]) -> Iterator[str]:
    """Yield the stages and the rows as tables of text."""
    if stages:
        yield _stages_table(stages)
        yield ""
    if rows:
        yield _rows_table(rows)


def _stages_table(stages: Sequence[StageTime]) -> str:
    timed = any(stage.predicted is not None for stage in stages)
    headings = ["stage", "calls", "ms", "equations ms", "rest ms", *(["predicted ms", "residual"] * timed)]
    lines = [headings]
    for stage in stages:
        cells = [f"{1e3 * value:.2f}" for value in (stage.seconds, stage.equations, stage.rest)]
        if timed:
            given = stage.predicted is not None and stage.residual is not None
            cells += [f"{1e3 * (stage.predicted or 0):.2f}", f"{100 * (stage.residual or 0):+.0f} %"] * given
        lines.append([stage.stage, str(stage.calls), *cells, *[""] * (len(headings) - 2 - len(cells))])
    return "\n".join(columns(lines, range(1, 7)))


def _rows_table(rows: Sequence[EquationTime]) -> str:
    headings = ["stage", "role", "equation", "calls", "p50 us", "p90 us", "p99 us", "total ms", "share"]
    headings += ["GFLOP/s", "GB/s", *(["elements"] * any(row.elements is not None for row in rows))]
    timed = any(row.predicted is not None for row in rows)
    headings += ["predicted ms", "of roofline", "bound"] if timed else []
    table, stage = [headings], ""
    for row in rows:
        times = [f"{1e6 * value:.0f}" for value in (row.p50, row.p90, row.p99)]
        cells = [*times, f"{1e3 * row.seconds:.2f}", f"{100 * row.share:.1f} %"]
        cells += [f"{row.gflops:.1f}", f"{row.gbps:.1f}"] if row.equation else ["", ""]
        if "elements" in headings:
            cells.append("" if row.elements is None else quantity(row.elements))
        if timed:
            cells.append("" if row.predicted is None else f"{1e3 * row.predicted:.2f}")
            cells += ["" if row.roofline is None else f"{100 * row.roofline:.0f} %", row.bound]
        shown = row.stage if row.stage != stage else ""
        table.append([shown, row.role, row.equation or "(elementwise, Python)", str(row.calls), *cells])
        stage = row.stage
    right = [i for i, heading in enumerate(headings) if i > 2 and heading != "bound"]
    return "\n".join(columns(table, right))
