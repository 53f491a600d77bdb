"""Shared by the benchmarks: the machine and its measured limits, medians, progress and tables."""

from __future__ import annotations

import json
import mmap
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SGEMM_SIZE = 2048
STREAM_BYTES = 400_000_000
_STREAM_COLUMNS = 1000


@dataclass(frozen=True, slots=True)
class Table:
    """A titled table of strings; the first column is left-aligned, the others right-aligned."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def text(self) -> str:
        """The table in aligned columns for a terminal."""
        lines = [self.header, ["-" * width for width in self._widths()], *self.rows]
        return "\n".join(["", self.title, "", *("  ".join(self._aligned(line)).rstrip() for line in lines)])

    def markdown(self) -> str:
        """The table in GitHub Markdown."""
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


def touch_memory(size: int = 4_000_000_000) -> None:
    """Write to so many bytes of memory and free them.

    A virtual machine returns memory that has been free for some seconds to its host; the first process that
    uses it again waits for the host (0.1 to 1 s for 540 MB), whichever program it runs.
    """
    with mmap.mmap(-1, size) as memory:
        for start in range(0, size, mmap.PAGESIZE):
            memory[start] = 1


def targets_table(targets: Iterable[tuple[str, float | None, str, float]]) -> Table:
    """The table of (name, measured value, "at least" or "at most", target)."""
    rows = []
    for name, value, bound, target in targets:
        met = None if value is None else value >= target if bound == "at least" else value <= target
        verdict = {None: "not measured", True: "met", False: "missed"}[met]
        rows.append((name, "-" if value is None else f"{value:.2f}", f"{bound} {target:.2f}", verdict))
    return Table("Targets", ("", "measured", "target", ""), rows)


def show(lines: Sequence[str], tables: Sequence[Table], markdown: bool) -> None:
    """Print the results to stdout: lines of text, then the tables."""
    for line in lines:
        print(f"- {line}" if markdown else line)
    for table in tables:
        print(table.markdown() if markdown else table.text())


def save_json(path: Path | None, result: dict[str, Any]) -> None:
    """Write the results to a JSON file, if a path is given."""
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        progress(f"wrote {path}")


def progress(text: str) -> None:
    """Print a progress line to stderr."""
    print(text, file=sys.stderr, flush=True)


def describe() -> dict[str, Any]:
    """The processor, the cores available to this process, system, Python and date."""
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
    # Virtual machines hide the product name; family and model still identify the generation.
    family = f"family {facts['cpu family']} model {facts['model']}" if "cpu family" in facts else ""
    return f"{facts['model name']} ({family})" if family else facts["model name"]


def median(values: Sequence[float]) -> float:
    """The middle value, or the mean of the two middle ones."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def spread(values: Sequence[float]) -> float:
    """(largest - smallest) / median of the rounds of a run."""
    return (max(values) - min(values)) / median(values)


def fastest(task: Callable[[], Any], tries: int = 3) -> float:
    """The time of the fastest of a few runs, in seconds."""
    best = float("inf")
    for _ in range(tries):
        start = time.perf_counter()
        task()
        best = min(best, time.perf_counter() - start)
    return best


def sgemm_gflops(
    matmul: Callable[[Any, Any], Any], convert: Callable[[Any], Any], size: int = SGEMM_SIZE
) -> float:
    """GFLOP/s of a square float32 product; `convert` converts an ndarray to the array type of the library."""
    import numpy as np

    rng = np.random.default_rng(0)
    a, b = (convert(rng.standard_normal((size, size), dtype=np.float32)) for _ in range(2))
    return 2 * size**3 / fastest(lambda: matmul(a, b)) / 1e9


def stream_gbs(threads: int, total: int = STREAM_BYTES) -> float:
    """Bandwidth, in GB/s, of reading a float32 array in Python threads; BLAS must use one thread.

    The fastest of a sum, a dot product, and a matrix-vector product as in decoding.
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
    """The peak memory of this process so far (VmHWM); None on systems other than Linux."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
