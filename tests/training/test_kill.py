"""Trainings that are killed at random times and at named file operations; see kill_training.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    paths = [str(HERE.parent.parent / "src"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, str(HERE / "kill_training.py"), *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks and kills")
def test_some_kills_lose_nothing() -> None:
    done = run("--kills", "12")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "nothing lost, nothing changed" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_many_kills_lose_nothing() -> None:
    done = run("--kills", "120", "--seed", "1")
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_a_rename_that_copies_is_found() -> None:
    done = run("--kills", "60", "--plant")
    assert done.returncode == 1
    assert "BROKEN" in done.stderr
