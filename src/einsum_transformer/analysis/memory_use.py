"""The memory of a running program over time, by owner: weights, KV cache, gradients, and so on."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from einsum_transformer.analysis.plots import new_figure, write_figure
from einsum_transformer.analysis.trace import rss_bytes
from einsum_transformer.displays import as_html
from einsum_transformer.engine import Recorder
from einsum_transformer.engine.recorder import Path as Phase
from einsum_transformer.engine.recorder import Span
from einsum_transformer.models.model import Model
from einsum_transformer.models.parameters import trainable
from einsum_transformer.tables import as_text, columns, quantity
from einsum_transformer.tree import named_leaves

OWNERS = ("weights", "cache", "optimizer", "gradients", "saved", "temporary")
_INNER = {"prefill", "forward", "backward"}
"""Stages whose inner phases have a sample each."""


@dataclass(frozen=True, slots=True)
class MemorySample:
    """The bytes of each owner at the end of a phase."""

    phase: str
    """The phases from the outermost, "forward/layer"."""
    layer: int | None
    seconds: float
    """Since the start of the measurement."""
    weights: int
    cache: int
    """The KV cache, with reserved memory."""
    optimizer: int
    gradients: int
    saved: int
    """Activations saved for the backward pass."""
    temporary: int
    """All other arrays and objects, when most bytes were allocated since the sample before."""

    @property
    def total(self) -> int:
        """The sum of all owners."""
        return sum(getattr(self, name) for name in OWNERS)


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """The memory of a run over time. `str()` is a table."""

    samples: tuple[MemorySample, ...]
    python: int | None
    """Resident bytes of the interpreter and the libraries at the start, without the weights; None if the
    system does not report it."""
    predicted: int | None
    """The peak of all owners that the dry run predicts."""

    @property
    def peak(self) -> int:
        """The largest sum of all owners."""
        return max(sample.total for sample in self.samples)

    @property
    def residual(self) -> float | None:
        """(peak - predicted) / predicted."""
        return (self.peak - self.predicted) / self.predicted if self.predicted else None

    def to_dict(self) -> dict[str, Any]:
        """Return the samples and the peak in JSON types."""
        return asdict(self) | {"peak": self.peak, "residual": self.residual}

    def tables(self) -> Iterator[Any]:
        """Yield the sample with the most bytes of each stage as a table, and the peak."""
        stages: dict[str, MemorySample] = {}
        for sample in self.samples:
            stage = sample.phase.partition("/")[0]
            if stage not in stages or sample.total > stages[stage].total:
                stages[stage] = sample
        owners = [name for name in OWNERS if any(getattr(each, name) for each in stages.values())]
        rows = [["memory of", "most after", *owners, "total"]]
        for stage, sample in stages.items():
            inner = sample.phase.partition("/")[2] + ("" if sample.layer is None else f" {sample.layer}")
            sizes = [getattr(sample, name) for name in owners]
            cells = [quantity(size, "B") if size else "" for size in sizes]
            rows.append([stage, inner, *cells, quantity(sample.total, "B")])
        yield "\n".join(columns(rows, range(2, len(rows[0]))))
        yield self._peak_line()

    def _peak_line(self) -> str:
        line = f"peak {quantity(self.peak, 'B')}"
        if self.predicted is not None and self.residual is not None:
            line += f", predicted {quantity(self.predicted, 'B')} ({100 * self.residual:+.1f} %)"
        python = "" if self.python is None else f"; interpreter and libraries {quantity(self.python, 'B')}"
        return line + python

    def plot(self, path: str | Path) -> None:
        """Plot the bytes of each owner over time to a PNG file (needs matplotlib)."""
        figure = new_figure(path)
        axes = figure.add_subplot()
        seconds = [sample.seconds for sample in self.samples]
        values = {name: [getattr(each, name) / 1e6 for each in self.samples] for name in OWNERS}
        shown = {name: bytes_ for name, bytes_ in values.items() if any(bytes_)}
        axes.stackplot(seconds, *shown.values(), labels=list(shown), step="pre")
        axes.set(xlabel="seconds", ylabel="MB")
        axes.legend(frameon=False, loc="upper left")
        write_figure(figure, path)

    def __str__(self) -> str:
        return as_text(*self.tables())

    def _repr_html_(self) -> str:
        return as_html(*self.tables())


class MemoryReader:
    """Takes the samples of a run. Python's allocations are traced (tracemalloc), which makes it slower.

    cache: returns the bytes of the KV cache. optimizer: returns the bytes of the optimizer's state.
    """

    def __init__(
        self, model: Model, cache: Callable[[], int] = lambda: 0, optimizer: Callable[[], int] = lambda: 0
    ) -> None:
        self._cache, self._optimizer = cache, optimizer
        self._weights = sum(leaf.nbytes for _, leaf in named_leaves(model.decoder))
        self._gradients = _gradients(trainable(model.decoder))
        self._samples: list[MemorySample] = []
        self._python: int | None = None
        self._held = 0
        """Bytes of gradients."""
        self._traced = False
        self._start, self._base, self._state = 0.0, 0, 0

    def record(self, recorder: Recorder) -> Recorder:
        """Add a reader to a recorder that is not active yet, and start to trace."""
        resident = rss_bytes()
        self._python = None if resident is None else max(0, resident - self._weights)
        self._traced = tracemalloc.is_tracing()
        if not self._traced:
            tracemalloc.start()
        self._start, self._base = time.perf_counter(), tracemalloc.get_traced_memory()[0]
        self._state = self._optimizer()
        tracemalloc.reset_peak()
        return recorder.on_span(self._span)

    def stop(self, predicted: int | None = None) -> MemoryUse:
        """Return the samples. predicted: the peak of activations, saved activations and gradients."""
        if not self._traced:
            tracemalloc.stop()
        cache = max((sample.cache for sample in self._samples), default=0)
        total = None if predicted is None else self._weights + cache + self._optimizer() + predicted
        return MemoryUse(tuple(self._samples), self._python, total)

    def _span(self, span: Span) -> None:
        path = span.path
        if span.divided or len(path) > 1 + (path[0] in _INNER):
            return
        live, peak = (each - self._base for each in tracemalloc.get_traced_memory())
        tracemalloc.reset_peak()
        optimizer, cache = self._optimizer(), self._cache()
        known = optimizer - self._state + cache  # the state that existed before is not traced
        gradients = self._gradients_after(path, span.layer, live - known)
        saved = max(0, live - known - gradients) if path[0] in ("forward", "loss", "backward") else 0
        temporary = max(0, peak - known - gradients - saved)
        owners = self._weights, cache, optimizer, gradients, saved, temporary
        seconds = time.perf_counter() - self._start
        self._samples.append(MemorySample("/".join(path), span.layer, seconds, *owners))

    def _gradients_after(self, path: Phase, layer: int | None, most: int) -> int:
        """The bytes of gradients at the end of a phase."""
        if path == ("batch",):
            self._held = 0
        if path[0] == "backward" and len(path) == 2:
            self._held += self._gradients.get(path[1] if layer is None else layer, 0)
        return min(self._held, max(0, most))


def _gradients(arrays: Mapping[str, np.ndarray]) -> dict[str | int, int]:
    """The bytes of the gradients by layer, and by the phase outside of the layers that computes them."""
    found: dict[str | int, int] = {}
    for name, array in arrays.items():
        first, _, rest = name.partition(".")
        key: str | int = "embedding" if first.startswith("embed") else "head"
        if first == "layers":
            key = int(rest.partition(".")[0])
        found[key] = found.get(key, 0) + array.nbytes
    return found
