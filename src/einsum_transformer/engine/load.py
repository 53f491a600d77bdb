"""The cores that other processes leave free, so that no thread waits for one that cannot run.

A product on several threads ends when the last of them ends. If another process uses a core, the thread on
it waits for a time slice (milliseconds) while the others wait for it in a busy loop, in each of the 120
products of a decoded token. One thread less is then faster than all of them (docs/performance.md).

If other processes want all cores, a single thread gets less of the processor than several do. Products that
take longer than a time slice, as in a prefill, then use all threads.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

_INTERVAL = 0.1
"""Seconds between two readings. The kernel counts in hundredths of a second, so shorter intervals are
inaccurate."""
_STAT = Path("/proc/stat")


class Load:
    """Counts the cores that other processes use, from the kernel's counters (Linux)."""

    def __init__(self) -> None:
        self._next = 0.0
        self._time = self._busy = self._own = 0.0
        self._free: int | None = None
        self._all_wanted = False

    def limit(self, threads: Callable[[], int], long: bool) -> int | None:
        """Maximum number of threads for the next products, at least 1; None for no limit.

        threads: returns the number of threads in use now, which do not count as other processes; called only
        when the counters are read, at most ten times per second. In between, the last result is returned.
        long: whether products take longer than a time slice.
        """
        self._read(threads)
        return None if long and self._all_wanted else self._free

    def _read(self, threads: Callable[[], int]) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        first = self._next == 0
        self._next = now + _INTERVAL
        cores = _cores()
        busy, runnable = _counters(cores)
        if busy is None:
            self._next = math.inf
            return
        own = time.process_time()
        if not first:
            others = max(0.0, (busy - self._busy) - (own - self._own)) / (now - self._time)
            self._free = _rounded(len(cores) - others, self._free)
            self._all_wanted = runnable - threads() >= len(cores)
        self._time, self._busy, self._own = now, busy, own


def _rounded(free: float, before: int | None) -> int:
    """Round the number of free cores; a core counts as free again at 0.7, so that the number is stable."""
    count = math.floor(free + 0.5)
    if before is not None and count > before:
        count = max(before, math.floor(free + 0.3))
    return max(1, count)


def _cores() -> frozenset[int]:
    """The cores that this process may use, empty if unknown."""
    return frozenset(os.sched_getaffinity(0)) if sys.platform == "linux" else frozenset()


def _counters(cores: frozenset[int]) -> tuple[float | None, int]:
    """Return (seconds in which these cores were busy since the start of the system, None if unknown; threads
    that run or wait for a core)."""
    ticks = runnable = 0
    try:
        for line in _STAT.read_text(encoding="ascii").splitlines():
            name, *counts = line.split()
            if name == "procs_running":
                runnable = int(counts[0])
            elif name.startswith("cpu") and name != "cpu" and int(name[3:]) in cores:
                user, nice, system, _idle, _waiting, *others = map(int, counts[:8])
                ticks += user + nice + system + sum(others)
        return (ticks / os.sysconf("SC_CLK_TCK") if cores else None), runnable
    except (OSError, ValueError, IndexError):
        return None, 0
