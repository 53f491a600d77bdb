"""What the process does with memory that arrays have given back."""

from __future__ import annotations

import ctypes
import sys

# Parameters of glibc's mallopt (man 3 mallopt).
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST = 2**31 - 1


def keep_freed() -> bool:
    """Let freed memory stay with the process for its next arrays; returns whether the system's malloc can.

    A program that needs the same arrays again and again, as training does, otherwise hands each of them back
    and is given new pages, which the system clears first: for SmolLM2 and 4 x 128 tokens 100,000 pages a
    step, a tenth of its time (docs/performance.md). The peak stays the same. It holds for the rest of the
    process's life.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl, the other C library of Linux, has none
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST) and mallopt(_M_TRIM_THRESHOLD, -1))
