"""Freed memory: asked to, the process keeps what its arrays gave back."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Page faults of a second array as large as a freed one, without and with keep_freed.
_PROGRAM = """
import resource, sys
import numpy as np
from einsum_transformer.engine.memory import keep_freed

kept = sys.argv[1] == "keep" and keep_freed()
np.ones(2**26, np.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(2**26, np.uint8)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(mode: str) -> tuple[str, int]:
    run = subprocess.run(
        [sys.executable, "-c", _PROGRAM, mode], capture_output=True, text=True, check=True, timeout=60
    )
    kept, faults = run.stdout.split()
    return kept, int(faults)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's mallopt")
def test_the_next_array_takes_the_pages_of_the_last() -> None:
    kept, faults = _faults("keep")
    if kept == "False":
        pytest.skip("this C library has no mallopt")
    assert faults < 10
    # Pages are 4 kB, or 2 MB where the system joins them: 64 MB are at least 30 of them.
    assert _faults("leave")[1] > 10
