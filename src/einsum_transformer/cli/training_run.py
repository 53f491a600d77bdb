"""What `train` shows and writes while it runs: progress, log, metrics, validation, checkpoints, tables."""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.progress import BarColumn, Progress, TextColumn

from einsum_transformer.analysis.training import (
    StepTimes,
    TrainingReport,
    plot_losses,
    render,
    render_costs,
    training_report,
)
from einsum_transformer.cli import options
from einsum_transformer.engine import Recorder
from einsum_transformer.errors import InputError
from einsum_transformer.models.adapters import merged
from einsum_transformer.tables import peak_rss_bytes, quantity
from einsum_transformer.training import state
from einsum_transformer.training.data import Rows, mean_loss
from einsum_transformer.training.journal import Journal
from einsum_transformer.training.loop import StepReport, Trainer

_LINE_EVERY = 1.0  # seconds between lines of progress where there is no terminal


@dataclass(slots=True)
class TrainingRun:
    """A training as the command shows it: progress, log, metrics, validation, checkpoints."""

    trainer: Trainer
    journal: Journal
    steps: int
    validation: Rows | None
    batch_size: int
    silent: bool
    stack: ExitStack
    losses: dict[int, float] = field(default_factory=dict)
    validated: dict[int, float] = field(default_factory=dict)
    reports: list[StepReport] = field(default_factory=list)
    times: StepTimes = field(default_factory=StepTimes)
    live: Progress | None = None
    spoken: float = 0.0

    def begin(self, resume: bool) -> None:
        """Go on from the newest checkpoint, or write what is begun; then the costs and a first validation."""
        trainer, journal = self.trainer, self.journal
        found = state.checkpoints(journal.folder) if resume else []
        if found:
            for difference in state.restore(trainer, found[-1]):
                self.say(f"note: {difference}; the last bits may differ from an uninterrupted run")
            journal.forget_after(trainer.steps_done)
            self.say(f"resumed after step {trainer.steps_done} from {found[-1]}")
        else:
            if resume:
                self.say(f"{journal.folder} holds no checkpoint: beginning at step 1")
            journal.forget_after(-1)
            about = {"source": trainer.model.source, "begun": time.strftime("%Y-%m-%d %H:%M:%S")}
            journal.about(about | {"steps": self.steps} | state.description(trainer))
        if not self.silent:
            options.console().print(render_costs(trainer))
        if self.validation is not None and not found:
            self.validate()

    def train(self, save_every: int | None, keep_last: int, eval_every: int | None) -> None:
        """All steps that are left."""
        done = self.trainer.steps_done
        self.live = None if self.silent or not sys.stderr.isatty() else self._progress(done)
        with Recorder() as recorder:
            for report in self.trainer.run(self.steps):
                stages = self.times.add(recorder.spans)
                self.reports.append(report)
                self.losses[report.step + 1] = report.loss
                self._tell(report, stages)
                if save_every and (report.step + 1) % save_every == 0:
                    self.save(keep_last)
                if eval_every and self.validation is not None and (report.step + 1) % eval_every == 0:
                    self.validate()
                recorder.spans.clear()
        if self.validation is not None and self.steps not in self.validated:
            self.validate()
        if self.live is not None:
            self.live.stop()

    def validate(self) -> None:
        assert self.validation is not None
        step = self.trainer.steps_done
        loss = self.validated[step] = mean_loss(self.trainer.model, self.validation, self.batch_size)
        self.journal.metrics({"step": step, "validation_loss": loss})
        self.say(f"step {step}/{self.steps}  validation loss {loss:.4f}")

    def save(self, keep_last: int) -> None:
        place = state.save(self.trainer, self.journal.folder, keep_last)
        self.journal.note(f"checkpoint {place.name}")
        self.journal.commit()

    def merge(self, folder: Path) -> None:
        whole, report = merged(self.trainer.model)
        whole.save(folder)
        self.say(f"merged {len(report)} adapters into the weights: {folder}")

    def say(self, text: str) -> None:
        """A line in the log, and for whoever watches."""
        self.journal.note(text)
        if not self.silent:
            self.live.console.print(text) if self.live is not None else options.note(text)

    def report(self, random_vocabulary: int | None) -> TrainingReport:
        if not self.reports:
            raise InputError(
                f"{self.journal.folder}: all {self.steps} steps are done already; ask for more with --steps"
            )
        found = training_report(self.times, self.reports, self.trainer, random_vocabulary)
        self.journal.note(json.dumps(asdict(found)))
        return found

    def plot(self, path: str) -> None:
        plot_losses(path, self.losses, self.validated, self.trainer.model.source)
        self.say(f"wrote {path}")

    def _tell(self, report: StepReport, stages: dict[str, float]) -> None:
        numbers = {"step": report.step + 1, "loss": report.loss, "norm": report.norm, "lr": report.lr}
        speed = report.targets / report.seconds
        self.journal.metrics(
            numbers
            | {"targets": report.targets, "seconds": report.seconds, "fault": report.fault, "stages": stages}
        )
        done, last = report.step + 1, report.step + 1 == self.steps
        left = (self.steps - done) * sum(r.seconds for r in self.reports[-10:]) / len(self.reports[-10:])
        fault = f"  left out: {report.fault}" if report.fault else ""
        line = (
            f"step {done}/{self.steps}  loss {report.loss:.4f}  norm {report.norm:.3g}  lr {report.lr:.3g}  "
            f"{report.seconds:.2f} s  {speed:.0f} tokens/s  {_memory()}  {_clock(left)} left{fault}"
        )
        self.journal.note(line)
        if self.live is not None:
            self.live.update(self.live.task_ids[0], completed=done, description=line)
            if fault:
                self.live.console.print(line)
        elif not self.silent and (
            fault or last or time.monotonic() - self.spoken >= _LINE_EVERY or done <= 3
        ):
            options.note(line)
            self.spoken = time.monotonic()

    def _progress(self, done: int) -> Progress:
        console = options.console()
        columns = (BarColumn(bar_width=20), TextColumn("{task.description}", markup=False))
        live = self.stack.enter_context(Progress(*columns, console=console))
        live.add_task("", total=self.steps, completed=done)
        return live


def show(found: TrainingReport, run: TrainingRun, folder: Path, kept: bool) -> None:
    terminal = options.console()
    terminal.print()
    terminal.print(render(found))
    if run.validated:
        curve = ", ".join(f"{loss:.4f} after step {step}" for step, loss in run.validated.items())
        terminal.print(f"validation loss {curve}")
    result = f"{folder}/step-{run.trainer.steps_done:08d}" if kept else "nothing, as there is no --output"
    terminal.print(f"log and metrics: {folder}; kept: {result}")


def _memory() -> str:
    peak = peak_rss_bytes()
    return "" if peak is None else f"peak {quantity(peak, 'B')}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
