"""The report of a training: loss, time, memory and advice."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from einsum_transformer.analysis.dry_plan import training_memory
from einsum_transformer.analysis.dry_run import without_weights
from einsum_transformer.analysis.plots import new_figure, write_figure
from einsum_transformer.engine import blas
from einsum_transformer.engine.phases import (
    ATTENTION,
    COUNTED_AS,
    FEED_FORWARD,
    LAYER,
    OPTIMIZER,
    PASS,
    TRAINING,
)
from einsum_transformer.engine.recorder import Span
from einsum_transformer.models.builder import weights_of
from einsum_transformer.models.model import Model
from einsum_transformer.models.parameters import shapes_of
from einsum_transformer.tables import peak_rss_bytes, quantity, terminal_table, with_lines
from einsum_transformer.training.loop import StepReport, Trainer

Key = tuple[str, ...]

_INSIDE = tuple((*ATTENTION, name) for name in ("qkv", "rope", "scores", "output"))
_NORM, _EMBEDDING, _HEAD = (*LAYER, "norm"), ("embedding",), ("head",)
_TABLES: dict[str, tuple[Key, ...]] = {
    "forward": (_EMBEDDING, _NORM, *_INSIDE, FEED_FORWARD, _HEAD),
    "backward": (_HEAD, *reversed(_INSIDE), FEED_FORWARD, _NORM, _EMBEDDING, (*LAYER, "recomputed")),
}
"""The lines of each table: phases inside the phase of the table."""


def _label(path: Key) -> str:
    """Return the name of a line without remarks, with the name of its parent if that is attention."""
    name = PASS[path].partition(" (")[0]
    return f"{PASS[ATTENTION]}: {name}" if path[:-1] == ATTENTION else name


class StepTimes:
    """The seconds of every phase per step. Spans are summed and dropped, so that memory stays small."""

    def __init__(self) -> None:
        self.steps: int = 0
        self.by_path: defaultdict[Key, dict[int, float]] = defaultdict(dict)

    def add(self, spans: list[Span]) -> dict[str, float]:
        """Add the spans of one step and clear the list; returns the seconds of the step's stages."""
        found: defaultdict[Key, float] = defaultdict(float)
        for span in spans:
            found[span.path] += span.seconds
        spans.clear()
        for path, seconds in found.items():
            self.by_path[path][self.steps] = seconds
        self.steps += 1
        return {name: found[(name,)] for name in TRAINING if (name,) in found}

    def of(self, *paths: Key) -> list[float]:
        """Return the summed seconds of these phases for every step."""
        return [math.fsum(self.by_path[path].get(i, 0.0) for path in paths) for i in range(self.steps)]


@dataclass(frozen=True, slots=True)
class Stage:
    """Seconds of one part of a step: mean, median, 99th percentile, sum over all steps, share of total."""

    name: str
    mean: float
    p50: float
    p99: float
    seconds: float
    share: float


_STATISTICS = ("mean", "p50", "p99", "seconds", "share")
"""The numeric fields of a Stage."""


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """The statistics of a training, in seconds, bytes and parameters."""

    steps: int
    skipped: int
    """Steps without an update, because a value was not finite."""
    seconds: float
    step: Stage
    stages: tuple[Stage, ...]
    outside_seconds: float
    """The seconds of the steps that no stage covers."""
    tables: Mapping[str, tuple[Stage, ...]]
    """The parts of the forward pass, the backward pass and the optimizer, which add up to the stages."""
    loss_first: float
    loss_last: float
    loss_trend: float
    """Change of the loss per step: the slope of a least-squares line through all losses."""
    tokens_per_second: float
    parameters: int
    trainable: int
    gradient_bytes: int
    optimizer_bytes: int
    peak_rss_bytes: int | None
    blas: str
    threads: int
    advice: tuple[str, ...] = field(default=())


def training_report(
    times: StepTimes,
    reports: Sequence[StepReport],
    trainer: Trainer,
    random_vocabulary: int | None = None,
) -> TrainingReport:
    """Return the report from the seconds of all phases and the report of each step.

    random_vocabulary: the size of the vocabulary if every step used new random tokens, which cannot be
    learned.
    """
    losses, seconds = [report.loss for report in reports], [report.seconds for report in reports]
    weights, clip = trainer.weights.values(), trainer.settings.clip_norm
    clipped = sum(clip is not None and report.norm > clip for report in reports)
    whole = math.fsum(seconds)
    stages = tuple(_stage(name, times.of((name,)), whole) for name in TRAINING if (name,) in times.by_path)
    finite = np.flatnonzero(np.isfinite(losses))
    slope = float(np.polyfit(finite, np.array(losses)[finite], 1)[0]) if len(finite) > 1 else 0.0
    step = _stage("step", seconds, whole)
    return TrainingReport(
        steps=len(losses),
        skipped=trainer.bad_steps,
        seconds=whole,
        step=step,
        stages=stages,
        outside_seconds=whole - math.fsum(stage.seconds for stage in stages),
        tables={name: _parts(times, name, lines) for name, lines in _TABLES.items()}
        | {"optimizer": _optimizer_parts(times)},
        loss_first=losses[0],
        loss_last=losses[-1],
        loss_trend=slope,
        tokens_per_second=sum(report.targets for report in reports) / whole if whole > 0 else 0.0,
        parameters=_parameters(trainer.model),
        trainable=sum(array.size for array in weights),
        gradient_bytes=sum(array.nbytes for array in weights),
        optimizer_bytes=optimizer_bytes(trainer),
        peak_rss_bytes=peak_rss_bytes(),
        blas=blas.description(),
        threads=blas.get_threads(),
        advice=tuple(_advice(np.array(losses)[finite], step, trainer.bad_steps, clipped, random_vocabulary)),
    )


def optimizer_bytes(trainer: Trainer) -> int:
    """Return the bytes of the optimizer's state."""
    moments = trainer.compute.moments()
    return sum(array.nbytes for arrays in moments.values() for array in arrays.values())


def _parameters(model: Model) -> int:
    """Return the number of parameters of a model without its adapters. The weights are not read: those of a
    quantized model would be dequantized."""
    return sum(math.prod(weight.stored) for weight in weights_of(model.config))


def _stage(name: str, values: list[float], whole: float) -> Stage:
    p50, p99 = (float(p) for p in np.percentile(values, (50, 99))) if values else (0.0, 0.0)
    total = math.fsum(values)
    return Stage(name, total / max(len(values), 1), p50, p99, total, total / whole if whole > 0 else 0.0)


def _parts(times: StepTimes, table: str, lines: Sequence[Key]) -> tuple[Stage, ...]:
    """Return the lines of a table that occurred, and the rest of its stage."""
    whole = times.of((table,))
    rest, total = np.array(whole), math.fsum(whole)
    found = []
    for line in lines:
        counted = [path for path, other in COUNTED_AS.items() if other == line]
        paths = [(table, *path) for path in (line, *counted)]
        if any(path in times.by_path for path in paths):
            values = times.of(*paths)
            found.append(_stage(_label(line), values, total))
            rest -= values
    return (*found, _stage("residuals, tiles, Python", rest.tolist(), total)) if found else ()


def _optimizer_parts(times: StepTimes) -> tuple[Stage, ...]:
    total = math.fsum(times.of(*((name,) for name in OPTIMIZER)))
    return tuple(_stage(name, times.of((name,)), total) for name in OPTIMIZER)


def _advice(
    losses: np.ndarray, step: Stage, skipped: int, clipped: int, random_vocabulary: int | None
) -> list[str]:
    """Return advice that follows from the losses and times of the run."""
    found = []
    if skipped:
        found.append(
            f"{skipped} steps were not finite: lower the learning rate, or clip gradients with `clip_norm` 1"
        )
    if len(losses) >= 6:
        third = len(losses) // 3
        first, last = float(losses[:third].mean()), float(losses[-third:].mean())
        noise = float(np.abs(np.diff(losses)).mean())
        if random_vocabulary is not None:
            floor = math.log(random_vocabulary)
            found.append(
                f"the loss of new random tokens in every step cannot fall below log({random_vocabulary}) = "
                f"{floor:.2f}: use `fix_batch` to see a loss fall, `data` to train on text"
            )
        elif last > first * 1.01:
            found.append(f"the loss rises, from {first:.3f} to {last:.3f}: lower the learning rate")
        elif last > first * 0.99:
            found.append("the loss is flat: try a learning rate 3 to 10 times as high, or more steps")
        elif noise > 5 * (first - last):
            found.append("the loss varies more from step to step than it falls: use a larger batch")
        elif float(losses[-third:].mean()) < float(losses[-2 * third : -third].mean()) * 0.98:
            found.append("the loss was still falling at the end: train for more steps")
    if clipped > len(losses) / 2:
        found.append(f"gradients were clipped in {clipped} of {len(losses)} steps: is `clip_norm` too low?")
    if step.p50 > 0 and step.p99 > 2 * step.p50 and len(losses) >= 10:
        found.append(
            f"the slowest steps took {step.p99 / step.p50:.1f} times the median: is the machine shared?"
        )
    return found


def render(found: TrainingReport) -> Any:
    """Return the report as a rich renderable."""
    tables: list[Any] = [_table("stage", [found.step, *found.stages], indent=True), ""]
    for name, parts in found.tables.items():
        if parts:
            sums = (math.fsum(getattr(part, key) for part in parts) for key in _STATISTICS)
            total = Stage(f"{name}, sum", *sums)
            tables += [_table(name, [*parts, total], heading=f"of {name}"), ""]
    return with_lines(tables, summary(found))


def _table(title: str, stages: Sequence[Stage], indent: bool = False, heading: str = "share") -> Any:
    table = terminal_table((title, "mean ms", "p50 ms", "p99 ms", "total s", heading))
    for i, stage in enumerate(stages):
        times = [f"{1000 * value:.2f}" for value in (stage.mean, stage.p50, stage.p99)]
        depth = "  " if indent and i else ""
        table.add_row(depth + stage.name, *times, f"{stage.seconds:.3f}", f"{100 * stage.share:.1f} %")
    return table


def render_costs(trainer: Trainer) -> Any:
    """Return the memory of a step as a table, counted in dry runs: for all weights, and for adapters if any.

    The peak contains weights, optimizer, and the most of activations and gradients in one micro-batch."""
    optimizer, model = trainer.settings.optimizer, trainer.model
    batches = trainer.batches.batch(0)
    (rows, tokens), several = batches[0][0].shape, len(batches) > 1
    kinds = {"all weights": without_weights(model.config, model.source).decoder}
    if model.lora is not None:
        kinds[f"LoRA rank {model.lora.r}"] = shapes_of(model.decoder)
    parameters = _parameters(model)
    columns = ("weights", "gradients", type(optimizer).__name__, "saved", "peak")
    table = terminal_table(("to train", "parameters", "share", *columns))
    for name, decoder in kinds.items():
        found = training_memory(
            name, model.config, decoder, rows, tokens, trainer.settings.recompute, len(optimizer.moments)
        )
        # The gradients of earlier micro-batches.
        peak = found.peak + found.gradients * several
        sizes = (found.weights, found.gradients, found.optimizer, found.saved, peak)
        share = f"{100 * found.trained / max(parameters, 1):.2f} %"
        table.add_row(name, f"{found.trained:,}", share, *(quantity(size, "B") for size in sizes))
    return table


def summary(found: TrainingReport) -> list[str]:
    """Return the summary that follows the tables."""
    covered = found.seconds - found.outside_seconds
    share = 100 * covered / found.seconds if found.seconds > 0 else 100.0
    peak = "unknown" if found.peak_rss_bytes is None else quantity(found.peak_rss_bytes, "B")
    trained = 100 * found.trainable / max(found.parameters, 1)
    skipped = f", {found.skipped} of them skipped (not finite)" if found.skipped else ""
    return [
        f"stages {covered:.3f} s = {share:.1f} % of {found.seconds:.3f} s; outside of all stages: "
        f"{found.outside_seconds:.3f} s (Python)",
        "",
        f"{found.steps} steps in {found.seconds:.1f} s{skipped}, {found.tokens_per_second:.1f} tokens/s",
        f"loss {found.loss_first:.4f} -> {found.loss_last:.4f}, {found.loss_trend:+.5f} per step",
        *_backward_line(found),
        f"trained {quantity(found.trainable)} of {quantity(found.parameters)} parameters "
        f"({trained:.2f} %); gradients {quantity(found.gradient_bytes, 'B')}, "
        f"optimizer {quantity(found.optimizer_bytes, 'B')}, peak memory {peak}",
        f"BLAS {found.blas}, {found.threads} thread{'s' * (found.threads != 1)}",
        *(f"advice: {line}" for line in found.advice),
    ]


def _backward_line(found: TrainingReport) -> list[str]:
    """The seconds of the backward pass per second of the forward pass. With all weights trained, each matrix
    has two products there and one in the forward pass; frozen weights need one."""
    seconds = {stage.name: stage.seconds for stage in found.stages}
    forward, backward = seconds.get("forward", 0.0), seconds.get("backward", 0.0)
    return [f"backward / forward {backward / forward:.2f} (about 2 for all weights)"] if forward else []


def plot_losses(
    path: str | Path, losses: Mapping[int, float], validation: Mapping[int, float], title: str
) -> None:
    """Write a PNG file of the loss over the steps. losses, validation: step -> loss."""
    figure = new_figure(path)
    axes = figure.add_subplot()
    axes.plot(list(losses), list(losses.values()), color="#1f77b4", linewidth=1, label="training batch")
    if validation:
        axes.plot(list(validation), list(validation.values()), "o-", color="#d62728", label="validation")
        axes.legend(frameon=False)
    axes.set(xlabel="step", ylabel="cross-entropy per token (nats)", title=title)
    write_figure(figure, path)


def step_line(report: StepReport, steps: int, reports: Sequence[StepReport]) -> str:
    """Return a line for one step of `steps`; reports: of all steps so far, to estimate the time left."""
    recent = reports[-10:]
    left = (steps - report.step - 1) * sum(each.seconds for each in recent) / len(recent)
    fault = f"  skipped: {report.fault}" if report.fault else ""
    peak = peak_rss_bytes()
    memory = "" if peak is None else f"peak {quantity(peak, 'B')}"
    numbers = f"loss {report.loss:.4f}  norm {report.norm:.3g}  lr {report.lr:.3g}"
    speed = f"{report.seconds:.2f} s  {report.targets / report.seconds:.0f} tokens/s"
    return f"step {report.step + 1}/{steps}  {numbers}  {speed}  {memory}  {_clock(left)} left{fault}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
