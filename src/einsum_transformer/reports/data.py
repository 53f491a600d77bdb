"""What a page shows, as typed data: `to_dict()` of a Report is the JSON object in the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from einsum_transformer.analysis.compare import Comparison
from einsum_transformer.analysis.explain import Program
from einsum_transformer.analysis.memory_use import MemoryUse
from einsum_transformer.analysis.quantization import QuantizationReport
from einsum_transformer.analysis.rates import Rates
from einsum_transformer.analysis.report import Report as Timings
from einsum_transformer.arguments import checked
from einsum_transformer.engine import blas
from einsum_transformer.engine.equation import LEGEND
from einsum_transformer.formats.files import atomic_file
from einsum_transformer.reports.arrays import Key, Sample
from einsum_transformer.reports.cascade import Stage
from einsum_transformer.reports.lens import Attention, Lens, NextToken
from einsum_transformer.reports.measure import Measured, TrainingRun
from einsum_transformer.reports.page import html
from einsum_transformer.tables import quantity


@dataclass(frozen=True, slots=True)
class Token:
    """A token of the text."""

    id: int
    text: str


@dataclass(frozen=True, slots=True)
class Arrays:
    """Samples of the operands and results of the equations."""

    samples: tuple[Sample, ...]
    calls: Mapping[Key, Sequence[tuple[int | None, ...]]]
    """For each call the indices of its operands and of its result in `samples`; None: not in memory."""

    def to_dict(self) -> dict[str, Any]:
        """Return the samples, and the calls as a list."""
        calls = [
            {"stage": stage, "layer": layer, "path": list(path), "role": role, "equation": equation}
            | {"samples": [list(each) for each in found]}
            for (stage, layer, path, role, equation), found in self.calls.items()
        ]
        return {"samples": [each.to_dict() for each in self.samples], "calls": calls}


@dataclass(frozen=True, slots=True)
class Run:
    """One model and what it did with the prompt."""

    model: str
    """The source of the model."""
    quantization: str | None
    kv_cache: tuple[str, str]
    program: Program
    stages: tuple[Stage, ...]
    tokens: tuple[Token, ...]
    """The tokens that the page shows, from the first of the prompt."""
    vocabulary: dict[int, str]
    """The text of each token in the predictions."""
    prompt_tokens: int
    new_tokens: int
    text: str
    """The continuation."""
    left_out: tuple[str, ...]
    """What the page does not show."""
    measured: Measured
    timings: Timings
    memory: MemoryUse
    arrays: Arrays
    attention: Attention
    lens: Lens
    next_tokens: tuple[NextToken, ...]
    quantization_report: QuantizationReport | None
    training: TrainingRun | None

    def to_dict(self) -> dict[str, Any]:
        """Return the run in JSON types."""
        return {
            "model": self.model,
            "quantization": self.quantization,
            "kv_cache": list(self.kv_cache),
            "program": self.program.to_dict(),
            "stages": [stage.to_dict() for stage in self.stages],
            "tokens": [asdict(token) for token in self.tokens],
            "vocabulary": {str(id_): text for id_, text in self.vocabulary.items()},
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "text": self.text,
            "left_out": list(self.left_out),
            "measured": self.measured.to_dict(),
            "timings": asdict(self.timings) | {"rows": [asdict(row) for row in self.timings.rows]},
            "memory": self.memory.to_dict() | {"samples": [asdict(each) for each in self.memory.samples]},
            "arrays": self.arrays.to_dict(),
            "attention": self.attention.to_dict(),
            "lens": self.lens.to_dict(),
            "next_tokens": [each.to_dict() for each in self.next_tokens],
            "quantization_report": None
            if self.quantization_report is None
            else self.quantization_report.to_dict(),
            "training": None if self.training is None else self.training.to_dict(),
        }


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine of the runs, and its rates if `etx machine` measured them."""

    blas: str
    threads: int
    peak: float | None
    """Operations per second; None without a measurement."""
    bandwidth: float | None
    """Bytes per second; None without a measurement."""

    @staticmethod
    def current(rates: Rates | None) -> Machine:
        """Return the machine of this process."""
        known = (None, None) if rates is None else (rates.peak, rates.bandwidth)
        return Machine(blas.description(), blas.get_threads(), *known)


@checked
@dataclass(frozen=True, slots=True)
class Report:
    """One or two models on a prompt, as data and as a page. `str()` is a summary."""

    runs: tuple[Run, ...]
    machine: Machine
    comparison: Comparison | None = None
    """The comparison of two models from their configs, as `diff` returns it."""

    @property
    def names(self) -> tuple[str, ...]:
        """A short name of each model: the last part of its source."""
        short = tuple(Path(run.model).name or run.model for run in self.runs)
        if len(set(short)) == len(short):
            return short
        return tuple(f"{name} ({letter})" for name, letter in zip(short, "AB"))

    def to_dict(self) -> dict[str, Any]:
        """Return everything that the page shows in JSON types."""
        letters = {letter: LEGEND.get(letter, "") for run in self.runs for letter in run.program.letters()}
        return {
            "names": list(self.names),
            "runs": [run.to_dict() for run in self.runs],
            "machine": asdict(self.machine),
            "letters": letters,
            "comparison": None if self.comparison is None else self.comparison.to_dict(),
        }

    def html(self) -> str:
        """Return the page: one HTML file that needs no other file."""
        return html(self.to_dict())

    def write(self, path: str | Path) -> None:
        """Write the page; an existing file is replaced once the new one is on disk."""
        with atomic_file(Path(path)) as file:
            file.write(self.html().encode())

    def __str__(self) -> str:
        lines: list[str] = []
        for run in self.runs:
            sums = {stage.stage: stage.seconds for stage in run.measured.stages}
            times = ", ".join(
                f"{name} {1e3 * sums[name]:.1f} ms" for name in ("prefill", "decode") if name in sums
            )
            lines.append(
                f"{run.model}: {run.prompt_tokens} prompt tokens, {run.new_tokens} new tokens; {times}; "
                f"peak memory {quantity(run.memory.peak, 'B')}"
            )
            lines += [f"  {each}" for each in run.left_out]
        return "\n".join(lines)
