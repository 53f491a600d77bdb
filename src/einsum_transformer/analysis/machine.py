"""Measure the BLAS libraries of this machine, and choose one for each kind of matrix product."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from typing import Any

import numpy as np

from einsum_transformer.analysis.rates import STEPS as RATES_STEPS
from einsum_transformer.analysis.rates import Rates
from einsum_transformer.analysis.rates import measure as measure_rates
from einsum_transformer.arguments import checked
from einsum_transformer.engine import blas, einsum
from einsum_transformer.engine.libraries import Library, numpy_library
from einsum_transformer.engine.mkl import mkl_library
from einsum_transformer.engine.parallel import for_each
from einsum_transformer.loading.libraries import processor
from einsum_transformer.tables import as_text, terminal_table, with_lines

Array = np.ndarray

_ROUNDS = 5
_SECONDS = 0.012
"""Minimum time of one sample; the idle threads of the other library are asleep after a part of it."""
_CACHED = 64 << 20
"""Bytes of different weights that a sample reads, so that they come from memory as in a decode step."""
_STREAM = 256 << 20
_BETTER = 1.05
"""How many times faster than NumPy's another library must be to be chosen."""


@dataclass(frozen=True, slots=True)
class Case:
    """A product to measure: `count` results of rows x columns, from `inner` terms each."""

    kind: blas.Kind
    rows: int
    inner: int
    columns: int
    count: int = 1
    weights_transposed: bool = False
    """Whether the first matrix is stored column by column, as input-major weights are."""

    @property
    def size(self) -> str:
        stack = f" x{self.count}" if self.count > 1 else ""
        return f"{self.rows}x{self.inner} . {self.inner}x{self.columns}{stack}"

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inner * self.columns * self.count


CASES = (
    Case("vector", 3072, 576, 1, weights_transposed=True),
    Case("vector", 576, 1536, 1),
    Case("vector", 4096, 4096, 1),
    Case("narrow", 576, 1536, 8),
    Case("narrow", 3072, 576, 16),
    Case("matrix", 3072, 576, 128, weights_transposed=True),
    Case("matrix", 576, 1536, 128),
    Case("matrix", 3072, 576, 512, weights_transposed=True),
    Case("matrix", 576, 1536, 512),
    Case("stack", 512, 64, 128, 3),
    Case("stack", 64, 512, 128, 3),
)
"""Products of a model of 135M parameters, and one of a larger model."""


@dataclass(frozen=True, slots=True)
class Measured:
    """The speed of a library in one case."""

    kind: str
    product: str
    threads: int
    library: str
    gflops: float
    """Median of the rounds, 10^9 operations per second."""


@checked
@dataclass(frozen=True, slots=True)
class Machine:
    """What was measured: the speed of each library, the memory bandwidth, and the library of each kind."""

    processor: str
    threads: int
    libraries: dict[str, str]
    """numpy, mkl -> name and version."""
    measured: tuple[Measured, ...]
    bandwidth: float
    """GB/s of reading memory with all threads."""
    choice: dict[str, str]
    """Kind of product -> library, for `--blas auto`; "kind, 1 thread" for products on one thread."""
    date: str
    rates: Rates | None = None
    """The rates by which `plan` predicts seconds."""
    path: str | None = None
    """The file that `--blas auto` and `plan` read; None if it was not written."""

    def to_dict(self) -> dict[str, Any]:
        """Return the measurement in JSON types."""
        return asdict(self)

    def table(self) -> Any:
        """Return the measurement as a rich renderable."""
        return render(self)

    def __str__(self) -> str:
        return as_text(render(self))


def measure(threads: int, progress: Callable[[int, int], object], cases: Sequence[Case] = CASES) -> Machine:
    """Measure every case with every library on one thread and on all threads."""
    libraries = {"numpy": numpy_library()}
    if (mkl := mkl_library()) is not None:
        libraries["mkl"] = mkl
    counts = sorted({1, threads})
    found: list[Measured] = []
    total = len(counts) * len(cases) + 1 + RATES_STEPS
    settings = blas.settings()
    with blas.fixed_threads():
        try:
            for count in counts:
                for each in libraries.values():
                    each.set_threads(count)
                for case in cases:
                    progress(len(found) // len(libraries), total)
                    found += _measured(case, count, libraries)
        finally:
            blas.use(*settings)
            blas.set_threads(threads)
        done = len(counts) * len(cases)
        progress(done, total)
        bandwidth = _bandwidth(threads)
    rates = measure_rates(threads, 1e9 * bandwidth, lambda i, _: progress(done + i, total))
    progress(total, total)
    return Machine(
        processor(),
        threads,
        {name: str(library) for name, library in libraries.items()},
        tuple(found),
        bandwidth,
        choose(found, threads) if len(libraries) > 1 else {},
        time.strftime("%Y-%m-%d"),
        rates,
    )


def choose(measured: Sequence[Measured], threads: int) -> dict[str, str]:
    """Return the library of each kind of product: MKL if it is at least 5 % faster (geometric mean)."""
    choice: dict[str, str] = {}
    for kind in blas.KINDS:
        for count in sorted({1, threads}, reverse=True):
            speeds: dict[str, list[float]] = {}
            for each in measured:
                if (each.kind, each.threads) == (kind, count):
                    speeds.setdefault(each.library, []).append(math.log(each.gflops))
            gain = statistics.mean(speeds["mkl"]) - statistics.mean(speeds["numpy"])
            key = kind if count == threads else f"{kind}, 1 thread"
            choice[key] = "mkl" if gain >= math.log(_BETTER) else "numpy"
    return choice


def _measured(case: Case, threads: int, libraries: Mapping[str, Library]) -> Iterator[Measured]:
    """Measure one case; the libraries alternate."""
    rng = np.random.default_rng(0)
    stack = (case.count,) if case.count > 1 else ()
    size = case.count * case.rows * case.inner * 4
    # Weights of a product with few columns come from memory.
    different = max(1, _CACHED // size) if case.kind in ("vector", "narrow") else 1
    weights: list[Array] = []
    for _ in range(different):
        plain = (
            (*stack, case.inner, case.rows) if case.weights_transposed else (*stack, case.rows, case.inner)
        )
        matrix = rng.standard_normal(plain, dtype=np.float32)
        weights.append(matrix.swapaxes(-1, -2) if case.weights_transposed else matrix)
    x = rng.standard_normal((*stack, case.inner, case.columns), dtype=np.float32)
    samples: dict[str, list[float]] = {name: [] for name in libraries}
    for _ in range(_ROUNDS):
        for name, library in libraries.items():
            remaining = cycle(weights)
            library.matmul(next(remaining), x)
            start, calls, seconds = time.perf_counter(), 0, 0.0
            while seconds < _SECONDS:
                library.matmul(next(remaining), x)
                calls += 1
                seconds = time.perf_counter() - start
            samples[name].append(case.flops * calls / seconds / 1e9)
    for name, values in samples.items():
        yield Measured(case.kind, case.size, threads, name, statistics.median(values))


def _bandwidth(threads: int) -> float:
    """GB/s of reading an array, a part of it on each thread; the best of a few attempts."""
    parts = [(part,) for part in np.array_split(np.ones(_STREAM // 4, np.float32), threads)]

    def dot(part: Array) -> None:
        einsum("t,t->", part, part)

    def add(part: Array) -> None:
        np.add.reduce(part)

    best = math.inf
    for read in (dot, add) * 3:
        start = time.perf_counter()
        for_each(read, parts)
        best = min(best, time.perf_counter() - start)
    return _STREAM / best / 1e9


def render(machine: Machine) -> Any:
    """The table: one row per case, one column per library."""
    names = list(machine.libraries)
    headings = ("product", "kind", "threads", *(f"{name} GFLOP/s" for name in names))
    table = terminal_table(headings, left=(0, 1))
    by_case: dict[tuple[str, str, int], dict[str, float]] = {}
    for each in machine.measured:
        by_case.setdefault((each.product, each.kind, each.threads), {})[each.library] = each.gflops
    for (product, kind, threads), speeds in by_case.items():
        table.add_row(product, kind, str(threads), *(f"{speeds[name]:.1f}" for name in names))
    lines = [
        f"{machine.processor}, {machine.threads} threads, {machine.date}; "
        + ", ".join(machine.libraries.values()),
        f"memory bandwidth: {machine.bandwidth:.1f} GB/s",
        *_rate_lines(machine.rates),
    ]
    return with_lines([table], [*lines, *_choice_lines(machine)])


def _rate_lines(rates: Rates | None) -> list[str]:
    """The products of weights inside of a model, by rows."""
    lines: list[str] = []
    if rates is None:
        return lines
    for dtype, by_rows in rates.products.items():
        each = ", ".join(f"{rows}: {found.rate / 1e9:.0f}" for rows, found in by_rows.items())
        lines.append(f"weights in {dtype} inside of a model, 10^9 operations/s by rows: {each}")
    return lines


def _choice_lines(machine: Machine) -> list[str]:
    if not machine.choice:
        return ["one library is installed: all products use it (MKL: pip install 'einsum-transformer[mkl]')"]
    by_library: dict[str, list[str]] = {}
    for kind, library in machine.choice.items():
        by_library.setdefault(library, []).append(kind)
    lines = [f"auto uses {library} for: {'; '.join(kinds)}" for library, kinds in by_library.items()]
    return [*lines, *([f"stored in {machine.path}"] if machine.path else [])]
