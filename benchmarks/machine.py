"""What the benchmarks share: the machine and its measured limits, medians, progress and tables."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SGEMM_SIZE = 2048
STREAM_BYTES = 400_000_000
_STREAM_COLUMNS = 1000


@dataclass(frozen=True, slots=True)
class Table:
    """A titled table of texts; the first column is left-aligned, the others right-aligned."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def text(self) -> str:
        """The table in aligned columns, for a terminal."""
        lines = [self.header, ["-" * width for width in self._widths()], *self.rows]
        return "\n".join(["", self.title, "", *("  ".join(self._aligned(line)).rstrip() for line in lines)])

    def markdown(self) -> str:
        """The table as GitHub shows it."""
        rule = ["-" * (width - 1) + (":" if i else "-") for i, width in enumerate(self._widths())]
        lines = [f"| {' | '.join(self._aligned(line))} |" for line in (self.header, *self.rows)]
        return "\n".join(["", f"## {self.title}", "", lines[0], f"| {' | '.join(rule)} |", *lines[1:]])

    def _widths(self) -> list[int]:
        return [max(len(line[i]) for line in (self.header, *self.rows)) for i in range(len(self.header))]

    def _aligned(self, line: Sequence[str]) -> list[str]:
        widths = self._widths()
        return [
            cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(line, widths))
        ]


def show(lines: Sequence[str], tables: Sequence[Table], markdown: bool) -> None:
    """Print what was measured on stdout: lines of facts, then the tables."""
    for line in lines:
        print(f"- {line}" if markdown else line)
    for table in tables:
        print(table.markdown() if markdown else table.text())


def save_json(path: Path | None, result: dict[str, Any]) -> None:
    """Write every sample and what was made of it, if a file is wanted."""
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        progress(f"wrote {path}")


def progress(text: str) -> None:
    """A line for whoever waits, on stderr."""
    print(text, file=sys.stderr, flush=True)


def describe() -> dict[str, Any]:
    """Processor, cores that this process may use, system, Python and date."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    return {
        "cpu": _cpu_model(),
        "cores": cores,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def machine_line() -> str:
    """`describe` in one line."""
    facts = describe()
    return "{date}; {cpu}, {cores} cores; {system}; Python {python}".format(**facts)


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    facts: dict[str, str] = {}
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            facts.setdefault(name.strip(), value.strip())
    if "model name" not in facts:
        return platform.processor() or platform.machine()
    # Virtual machines hide the product's number; family and model still tell the generation.
    family = f"family {facts['cpu family']} model {facts['model']}" if "cpu family" in facts else ""
    return f"{facts['model name']} ({family})" if family else facts["model name"]


def median(values: Sequence[float]) -> float:
    """The middle value, or the mean of the two middle ones."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def spread(values: Sequence[float]) -> float:
    """(largest - smallest) / median: how far one run's rounds lie apart."""
    return (max(values) - min(values)) / median(values)


def fastest(task: Callable[[], Any], tries: int = 3) -> float:
    """Seconds of the fastest of a few tries."""
    best = float("inf")
    for _ in range(tries):
        start = time.perf_counter()
        task()
        best = min(best, time.perf_counter() - start)
    return best


def sgemm_gflops(
    matmul: Callable[[Any, Any], Any], convert: Callable[[Any], Any], size: int = SGEMM_SIZE
) -> float:
    """GFLOP/s of a square float32 product; `convert` makes the library's own array of an ndarray."""
    import numpy as np

    rng = np.random.default_rng(0)
    a, b = (convert(rng.standard_normal((size, size), dtype=np.float32)) for _ in range(2))
    return 2 * size**3 / fastest(lambda: matmul(a, b)) / 1e9


def stream_gbs(threads: int, total: int = STREAM_BYTES) -> float:
    """GB/s that Python threads read a float32 array with, each its part; BLAS must be at one thread.

    The fastest of three ways to read: a sum, a dot product, and the matrix-vector product of decoding.
    """
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    rows = np.ones((max(total // 4 // _STREAM_COLUMNS, threads), _STREAM_COLUMNS), np.float32)
    parts, vector = np.array_split(rows, threads), np.ones(_STREAM_COLUMNS, np.float32)
    ways: list[Callable[[Any], Any]] = [
        np.sum,
        lambda part: np.dot(part.ravel(), part.ravel()),
        lambda part: np.dot(part, vector),
    ]
    with ThreadPoolExecutor(threads) as pool:
        seconds = min(fastest(lambda way=way: list(pool.map(way, parts))) for way in ways)
    return rows.nbytes / seconds / 1e9


def peak_bytes() -> int | None:
    """The most memory this process has held so far (VmHWM); None off Linux."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
