"""The output of `train` while it runs: costs, progress and messages."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack

from rich.progress import BarColumn, Progress, TextColumn

from einsum_transformer.analysis.training import render_costs
from einsum_transformer.api.train import TrainingObserver
from einsum_transformer.cli import output
from einsum_transformer.training.loop import StepReport, Trainer

_LINE_EVERY = 1.0  # seconds between lines of progress without a terminal


class TrainingProgress(TrainingObserver):
    """Shows a progress bar at a terminal, else a line per second; no output if `silent`."""

    def __init__(self, silent: bool) -> None:
        self.silent: bool = silent
        self.steps: int = 0
        self.written: float = 0.0
        """The time of the last line of progress."""
        self.live: Progress | None = None
        self.stack: ExitStack = ExitStack()

    def __enter__(self) -> TrainingProgress:
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def begin(self, trainer: Trainer, steps: int) -> None:
        self.steps = steps
        if self.silent:
            return
        output.console().print(render_costs(trainer))
        if sys.stderr.isatty():
            columns = (BarColumn(bar_width=20), TextColumn("{task.description}", markup=False))
            self.live = self.stack.enter_context(Progress(*columns, console=output.console()))
            self.live.add_task("", total=steps, completed=trainer.steps_done)

    def step(self, report: StepReport, line: str) -> None:
        done = report.step + 1
        if self.live is not None:
            self.live.update(self.live.task_ids[0], completed=done, description=line)
            if report.fault:
                self.live.console.print(line)
            return
        due = time.monotonic() - self.written >= _LINE_EVERY or done <= 3 or done == self.steps
        if not self.silent and (report.fault or due):
            output.note(line)
            self.written = time.monotonic()

    def message(self, text: str) -> None:
        if self.silent:
            return
        self.live.console.print(text) if self.live is not None else output.note(text)
