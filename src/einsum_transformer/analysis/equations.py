"""The time of each equation of a run: calls, seconds, rates, and what they are predicted to be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from einsum_transformer.analysis.explain import in_layer, matrices_of, role_of
from einsum_transformer.analysis.plan import PlanStep
from einsum_transformer.analysis.rates import Rates
from einsum_transformer.engine import Leaf
from einsum_transformer.engine.recorder import Event
from einsum_transformer.models.model import Model
from einsum_transformer.tables import columns
from einsum_transformer.tree import named_leaves


@dataclass(frozen=True, slots=True)
class EquationTime:
    """The calls of an equation in one role, in one stage: prefill, decode, forward, backward, ..."""

    stage: str
    role: str
    """The weight that it uses, `dq_proj` for the gradient of that weight, else the inner phase."""
    equation: str
    calls: int
    p50: float
    """Seconds of a call; p90: 90 % of the calls take at most this long."""
    p90: float
    p99: float
    seconds: float
    """All calls, summed over the threads."""
    share: float
    """The share of the seconds of all equations of the stage."""
    gflops: float
    """10^9 operations per second."""
    gbps: float
    """10^9 bytes of operands and results per second."""
    predicted: float | None
    """Seconds of all calls by the measured rates of this machine; None without a measurement."""
    roofline: float | None
    """The least seconds by the peak rate and the bandwidth, as a share of the seconds."""
    bound: str
    """What bounds it: "compute", "memory" or "Python"; "" without a measurement."""


@dataclass(slots=True)
class _Calls:
    """The calls of an equation in one role and stage."""

    seconds: list[float] = field(default_factory=list[float])
    flops: int = 0
    nbytes: int = 0
    predicted: float = 0.0
    bounds: dict[str, float] = field(default_factory=dict[str, float])


class EquationTimes:
    """Reads the einsum events of a run (see `Recorder.on_event`).

    rates: those of this machine, or None."""

    def __init__(self, model: Model, rates: Rates | None) -> None:
        leaves = dict(named_leaves(model.decoder))
        self._rates = rates
        self._matrices = matrices_of(model.config)
        self._types = {path: leaf.product_type for path, leaf in leaves.items() if isinstance(leaf, Leaf)}
        self._nbytes = {path: leaf.nbytes for path, leaf in leaves.items()}
        self._found: dict[tuple[str, str, str], _Calls] = {}
        self._predicted: dict[Any, tuple[float, str]] = {}

    def __call__(self, event: Event) -> None:
        key = event.path[0], role_of(event, self._matrices), event.equation
        calls = self._found.setdefault(key, _Calls())
        calls.seconds.append(event.seconds)
        calls.flops += event.flops
        calls.nbytes += event.bytes
        if self._rates is not None:
            seconds, bound = self._of_call(event, key[1])
            calls.predicted += seconds
            calls.bounds[bound] = calls.bounds.get(bound, 0.0) + seconds

    def _of_call(self, event: Event, role: str) -> tuple[float, str]:
        """The predicted seconds of a call and what bounds it."""
        assert self._rates is not None
        key = event.equation, tuple(event.sizes.values()), event.weight and in_layer(event.weight)
        if key not in self._predicted:
            step = self._step(event, role)
            self._predicted[key] = self._rates.of_step(step), self._rates.bound(step)
        return self._predicted[key]

    def _step(self, event: Event, role: str) -> PlanStep:
        weight = self._nbytes.get(event.weight or "", 0)
        dtype = self._types.get(event.weight or "", "float32")
        flops = event.flops
        costs = 1, flops, flops, flops, weight, 0, event.bytes
        return PlanStep(event.path, role, event.equation, event.sizes, dtype, (), *costs)

    def rows(self) -> tuple[EquationTime, ...]:
        """Return the equations, those with most seconds of each stage first."""
        stages: dict[str, float] = {}
        for (stage, _, _), calls in self._found.items():
            stages[stage] = stages.get(stage, 0.0) + math.fsum(calls.seconds)
        rows = [self._row(*key, calls, stages[key[0]]) for key, calls in self._found.items()]
        order = list(stages)
        return tuple(sorted(rows, key=lambda row: (order.index(row.stage), -row.seconds)))

    def _row(self, stage: str, role: str, equation: str, calls: _Calls, whole: float) -> EquationTime:
        seconds = math.fsum(calls.seconds)
        p50, p90, p99 = (float(p) for p in np.percentile(calls.seconds, (50, 90, 99)))
        rates = self._rates
        least = None
        if rates is not None:
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
            predicted=None if rates is None else calls.predicted,
            roofline=None if least is None or not seconds else least / seconds,
            bound=max(calls.bounds, key=lambda name: calls.bounds[name]) if calls.bounds else "",
        )


def render(rows: Sequence[EquationTime]) -> str:
    """Return the equations as a table of text, one row per equation."""
    headings = ["stage", "role", "equation", "calls", "p50 us", "p90 us", "p99 us", "total ms", "share"]
    headings += ["GFLOP/s", "GB/s"]
    timed = any(row.predicted is not None for row in rows)
    headings += ["predicted ms", "of roofline", "bound"] if timed else []
    table, stage = [headings], ""
    for row in rows:
        times = [f"{1e6 * value:.0f}" for value in (row.p50, row.p90, row.p99)]
        cells = [*times, f"{1e3 * row.seconds:.2f}", f"{100 * row.share:.1f} %"]
        cells += [f"{row.gflops:.1f}", f"{row.gbps:.1f}"]
        if row.predicted is not None:
            cells += [f"{1e3 * row.predicted:.2f}", f"{100 * (row.roofline or 0):.0f} %", row.bound]
        shown = row.stage if row.stage != stage else ""
        table.append([shown, row.role, row.equation, str(row.calls), *cells])
        stage = row.stage
    return "\n".join(columns(table, range(3, 13)))
