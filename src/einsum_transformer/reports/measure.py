"""The runs behind a page: one for the times, one for the memory, one for the arrays, and a training."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from einsum_transformer.analysis import dry_plan
from einsum_transformer.analysis.explain import matrices_of, role_of
from einsum_transformer.analysis.memory_use import MemoryReader, MemoryUse
from einsum_transformer.analysis.plan import PlanPhase
from einsum_transformer.analysis.profiler import EquationTime, Profiler, StageTime
from einsum_transformer.analysis.report import Report as Timings
from einsum_transformer.analysis.report import Run
from einsum_transformer.analysis.report import report as timings_of
from einsum_transformer.analysis.training import optimizer_bytes
from einsum_transformer.engine import Recorder, phase
from einsum_transformer.engine.recorder import Event, Span
from einsum_transformer.generation.decode import Request, prefill
from einsum_transformer.generation.rows import next_logits
from einsum_transformer.models.model import Model
from einsum_transformer.models.parameters import trainable
from einsum_transformer.reports.arrays import ArrayReader
from einsum_transformer.training.loop import StepReport, Trainer, TrainingSettings
from einsum_transformer.training.schedule import Schedule

Array = np.ndarray
Requested = Callable[[], Request]
"""Returns the prompt and the settings of a run; called for each run."""

TRAINING_STEPS = 3
_RATE = 1e-3
_DETAILED = ("prefill", "forward", "backward")
"""Stages whose inner phases are on the time line."""


@dataclass(frozen=True, slots=True)
class TimeLine:
    """The phases of a run in the order in which they began."""

    spans: tuple[Span, ...]
    started: float

    def to_dict(self) -> list[dict[str, Any]]:
        """Return the phases with their seconds since the start of the run."""
        ordered = sorted(self.spans, key=lambda span: (span.start, len(span.path)))
        return [
            {
                "path": "/".join(span.path),
                "layer": span.layer,
                "start": round(span.start - self.started, 7),
                "seconds": round(span.seconds, 7),
            }
            for span in ordered
        ]


@dataclass(frozen=True, slots=True)
class Measured:
    """The times of a run by equation, and the counts of its stages."""

    stages: tuple[StageTime, ...]
    equations: tuple[EquationTime, ...]
    lowerings: dict[tuple[str, str, str], str]
    """Stage, role and equation -> how the most expensive call runs."""
    timeline: TimeLine
    planned: tuple[PlanPhase, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return stages and equations as `etx profile --json`, and the time line."""
        rows = [
            asdict(row) | {"lowering": self.lowerings.get((row.stage, row.role, row.equation), "")}
            for row in self.equations
        ]
        stages = [stage.to_dict() for stage in self.stages]
        return {"stages": stages, "equations": rows, "timeline": self.timeline.to_dict()}


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """Some steps of training on the tokens of the text."""

    losses: tuple[float, ...]
    measured: Measured
    memory: MemoryUse

    def to_dict(self) -> dict[str, Any]:
        """Return losses, times and memory in JSON types."""
        losses = [loss if math.isfinite(loss) else None for loss in self.losses]
        return {"losses": losses, **self.measured.to_dict(), "memory": self.memory.to_dict()}


@dataclass(slots=True)
class _Lowerings:
    """Keeps how the most expensive call of each equation runs."""

    matrices: set[str]
    found: dict[tuple[str, str, str], tuple[int, str]] = field(
        default_factory=dict[tuple[str, str, str], tuple[int, str]]
    )

    def __call__(self, event: Event) -> None:
        key = event.path[0], role_of(event, self.matrices), event.equation
        if key not in self.found or event.flops > self.found[key][0]:
            self.found[key] = event.flops, event.how

    def texts(self) -> dict[tuple[str, str, str], str]:
        """Stage, role and equation -> text."""
        return {key: how for key, (_, how) in self.found.items()}


def timed(model: Model, requested: Requested) -> tuple[Measured, Timings, Request]:
    """Continue the prompt and measure each equation, as `etx profile`."""
    job, recorder, profiler = requested(), Recorder(), Profiler(model)
    lowerings = _Lowerings(matrices_of(model.config))
    profiler.record(recorder).on_event(lowerings)
    with recorder:
        started = time.perf_counter()
        _run(model, job)
        seconds = time.perf_counter() - started
    (result,) = job.results
    prompt, new = len(result.prompt_tokens), len(result.tokens)
    planned = dry_plan.of_run(model, 1, prompt, prompt + new // 2)
    steps = sum(span.path == ("decode",) for span in recorder.spans)
    profiler.compare(planned[0])
    profiler.compare(planned[1], steps)
    run = Run(model.config, started, seconds, 0.0, (prompt,), (new,), result.kv_cache_bytes)
    line = TimeLine(_shown(recorder.spans), started)
    measured = Measured(profiler.stages(), profiler.rows(), lowerings.texts(), line, planned)
    return measured, timings_of(recorder.spans, run), job


def memory_of(model: Model, requested: Requested, planned: Sequence[PlanPhase]) -> MemoryUse:
    """Continue the prompt and measure the memory of each owner, as `etx run --memory`."""
    job, recorder = requested(), Recorder()
    reader = MemoryReader(model, lambda: job.counters().get("KV cache bytes", 0))
    reader.record(recorder)
    with recorder:
        _run(model, job)
    return reader.stop(max(phase.peak_bytes for phase in planned))


def arrays_of(
    model: Model, tokens: Sequence[int], new: int, planned: Sequence[PlanPhase], training: bool
) -> ArrayReader:
    """Run prompt, one decode step and, with `training`, one pass forward and backward; returns samples of the
    arrays of the first, the middle and the last layer, and of the first layer of each kind.

    tokens: the prompt and the new tokens, of which there are `new`.
    """
    last = model.config.num_hidden_layers - 1
    kinds = {step.layers[0] for each in planned for step in each.steps if step.layers}
    reader = ArrayReader({0, last // 2, last, *kinds}, matrices_of(model.config))
    ids, prompt = np.array([tokens]), len(tokens) - new
    cache = model.cache(len(tokens), horizon=len(tokens))
    with Recorder(spans=False).on_arrays(reader):
        with phase("prefill"):
            prefill(model, ids[:, :prompt], cache)
        if new:
            with phase("decode"):
                next_logits(model, ids[:, prompt : prompt + 1], cache, "last")
        if training:
            model.decoder.loss_and_gradient(ids[:, :-1], ids[:, 1:])
    return reader


def training_of(model: Model, tokens: Sequence[int], seed: int) -> TrainingRun:
    """Train on the tokens for some steps with SGD, as `etx train`, and restore the weights."""
    ids = np.array([tokens])
    settings = TrainingSettings(Schedule(_RATE, TRAINING_STEPS), seed=seed)
    batches = _Text(ids[:, :-1], ids[:, 1:])
    with _restored(model):
        measured, losses = _timed_training(model, batches, settings)
        trainer = Trainer(model, batches, settings)
        recorder = Recorder()
        reader = MemoryReader(trainer.model, optimizer=lambda: optimizer_bytes(trainer))
        reader.record(recorder)
        with recorder:
            list(trainer.run(TRAINING_STEPS))
        memory = reader.stop(measured.planned[0].peak_bytes)
    return TrainingRun(losses, measured, memory)


def _timed_training(
    model: Model, batches: _Text, settings: TrainingSettings
) -> tuple[Measured, tuple[float, ...]]:
    trainer, recorder, profiler = Trainer(model, batches, settings), Recorder(), Profiler(model)
    lowerings = _Lowerings(matrices_of(model.config))
    profiler.record(recorder).on_event(lowerings)
    with recorder:
        started = time.perf_counter()
        reports: list[StepReport] = list(trainer.run(TRAINING_STEPS))
    planned = dry_plan.of_training(trainer.model, 1, batches.tokens.shape[1], settings.recompute)
    profiler.compare(planned, TRAINING_STEPS)
    # The last step, when memory is allocated and BLAS is warm.
    begin = max(i for i, span in enumerate(recorder.spans) if span.path == ("batch",))
    spans = recorder.spans[begin:]
    line = TimeLine(_shown(spans), min((span.start for span in spans), default=started))
    measured = Measured(profiler.stages(), profiler.rows(), lowerings.texts(), line, (planned,))
    return measured, tuple(report.loss for report in reports)


@dataclass(frozen=True, slots=True)
class _Text:
    """The same batch at every step."""

    tokens: Array
    targets: Array

    def batch(self, step: int) -> list[tuple[Array, Array]]:
        return [(self.tokens, self.targets)]

    def description(self) -> dict[str, Any]:
        return {"kind": "text of a report"}


@contextmanager
def _restored(model: Model) -> Generator[None]:
    """Context manager that restores the weights at its end; those of a read-only file do not change."""
    before = {name: a.copy() for name, a in trainable(model.decoder).items() if a.flags.writeable}
    try:
        yield
    finally:
        for name, array in trainable(model.decoder).items():
            if name in before:
                np.copyto(array, before[name])


def _run(model: Model, job: Request) -> None:
    for _ in job.run(model):
        pass


def _shown(spans: Sequence[Span]) -> tuple[Span, ...]:
    """All stages, with the inner phases of the first of each detailed one, and of three decode steps."""
    decodes = [span.start for span in spans if span.path == ("decode",)]
    picked = {decodes[i] for i in (0, len(decodes) // 2, -1)} if decodes else set[float]()
    detailed = [
        span for span in spans if len(span.path) == 1 and (span.path[0] in _DETAILED or span.start in picked)
    ]
    ranges = [(span.start, span.start + span.seconds) for span in detailed]

    def shown(span: Span) -> bool:
        inside = any(start <= span.start < end for start, end in ranges)
        return len(span.path) == 1 or (inside and not span.divided)

    return tuple(span for span in spans if shown(span))
