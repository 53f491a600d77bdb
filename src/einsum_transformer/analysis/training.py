"""The reading of a training: how the loss went, where the time went, what the memory holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from einsum_transformer.analysis.report import peak_rss_bytes, quantity
from einsum_transformer.engine import blas
from einsum_transformer.engine.recorder import Span

STAGES = ("batch", "forward", "loss", "backward", "clipping", "update")


@dataclass(frozen=True, slots=True)
class Stage:
    """Seconds of one part of a step: mean, median, 99th percentile, sum over all steps, share of them."""

    name: str
    mean: float
    p50: float
    p99: float
    seconds: float
    share: float


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """The numbers of a training; seconds, bytes, parameters."""

    steps: int
    skipped: int
    """Steps that changed nothing, because a number was not finite."""
    seconds: float
    step: Stage
    stages: tuple[Stage, ...]
    outside_seconds: float
    """The steps minus their stages: what no phase covers."""
    loss_first: float
    loss_last: float
    loss_trend: float
    """Change of the loss per step: the slope of the line nearest to all losses."""
    tokens_per_second: float
    parameters: int
    trainable: int
    gradient_bytes: int
    optimizer_bytes: int
    peak_rss_bytes: int | None
    blas: str
    threads: int

    def to_dict(self) -> dict[str, Any]:
        """The report in JSON types."""
        return asdict(self)


def training_report(
    spans: Sequence[Span],
    losses: Sequence[float],
    seconds: Sequence[float],
    targets: int,
    skipped: int,
    parameters: int,
    weights: Sequence[np.ndarray],
    optimizer_bytes: int,
) -> TrainingReport:
    """From a recorder's spans and what each step reported: its loss and its seconds."""
    whole = math.fsum(seconds)
    per_step = {name: [0.0] * len(losses) for name in STAGES}
    step = -1
    for span in spans:
        step += span.path == ("batch",)  # every step begins with its batch
        if len(span.path) == 1 and span.name in per_step:
            per_step[span.name][step] += span.seconds
    stages = tuple(_stage(name, per_step[name], whole) for name in STAGES)
    finite = np.flatnonzero(np.isfinite(losses))
    slope = float(np.polyfit(finite, np.array(losses)[finite], 1)[0]) if len(finite) > 1 else 0.0
    return TrainingReport(
        steps=len(losses),
        skipped=skipped,
        seconds=whole,
        step=_stage("step", list(seconds), whole),
        stages=stages,
        outside_seconds=whole - math.fsum(stage.seconds for stage in stages),
        loss_first=losses[0],
        loss_last=losses[-1],
        loss_trend=slope,
        tokens_per_second=targets / whole if whole > 0 else 0.0,
        parameters=parameters,
        trainable=sum(array.size for array in weights),
        gradient_bytes=sum(array.nbytes for array in weights),
        optimizer_bytes=optimizer_bytes,
        peak_rss_bytes=peak_rss_bytes(),
        blas=str(blas.current()),
        threads=blas.get_threads(),
    )


def _stage(name: str, values: list[float], whole: float) -> Stage:
    p50, p99 = (float(p) for p in np.percentile(values, (50, 99)))
    total = math.fsum(values)
    return Stage(name, total / len(values), p50, p99, total, total / whole if whole > 0 else 0.0)


def render(found: TrainingReport) -> Any:
    """The report for a terminal, as a rich renderable."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("stage")
    for heading in ("mean ms", "p50 ms", "p99 ms", "total s", "share"):
        table.add_column(heading, justify="right")
    for stage in (found.step, *found.stages):
        times = [f"{1000 * value:.2f}" for value in (stage.mean, stage.p50, stage.p99)]
        depth = "" if stage is found.step else "  "
        table.add_row(depth + stage.name, *times, f"{stage.seconds:.3f}", f"{100 * stage.share:.1f} %")
    return Group(table, *(Text(line) for line in summary(found)))


def summary(found: TrainingReport) -> list[str]:
    """The lines below the table."""
    covered = found.seconds - found.outside_seconds
    share = 100 * covered / found.seconds if found.seconds > 0 else 100.0
    peak = "unknown" if found.peak_rss_bytes is None else quantity(found.peak_rss_bytes, "B")
    trained = 100 * found.trainable / max(found.parameters, 1)
    skipped = f", {found.skipped} of them left out (numbers that are not finite)" if found.skipped else ""
    return [
        f"stages {covered:.3f} s = {share:.1f} % of {found.seconds:.3f} s; outside of any: "
        f"{found.outside_seconds:.3f} s (Python)",
        "",
        f"{found.steps} steps{skipped}, {found.tokens_per_second:.1f} tokens/s",
        f"loss {found.loss_first:.4f} -> {found.loss_last:.4f}, {found.loss_trend:+.5f} a step",
        f"trained {quantity(found.trainable)} of {quantity(found.parameters)} parameters "
        f"({trained:.2f} %); gradients {quantity(found.gradient_bytes, 'B')}, "
        f"optimizer {quantity(found.optimizer_bytes, 'B')}, peak memory {peak}",
        f"BLAS {found.blas}, {found.threads} thread{'s' * (found.threads != 1)}",
    ]
