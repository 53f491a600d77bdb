"""The points of a process between two changes of files: to be named, counted, and to die at."""

from __future__ import annotations

import builtins
import io
import os
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

_CHANGES = (
    (os, ("mkdir", "rename", "replace", "fsync", "unlink", "rmdir")),
    (shutil, ("rmtree", "copytree")),
)


def record(seen: Counter[str]) -> None:
    """Count every point that this process passes from here on."""
    _watch(lambda point: seen.update([point]))


def die_at(point: str, occurrence: int) -> None:
    """Have this process kill itself when it passes a point for the so-manieth time."""
    seen: Counter[str] = Counter()

    def pass_by(passed: str) -> None:
        seen[passed] += 1
        if passed == point and seen[point] == occurrence:
            os.kill(os.getpid(), signal.SIGKILL)

    _watch(pass_by)


def _watch(passed: Callable[[str], None]) -> None:
    """Replace what changes files by what tells of it: `before rename step-#`, `half of state.json`."""
    for module, names in _CHANGES:
        for name in names:
            _surround(module, name, passed)
    io.open = builtins.open = _opener(passed)


def _surround(module: ModuleType, name: str, passed: Callable[[str], None]) -> None:
    real = getattr(module, name)

    def told(*arguments: Any, **options: Any) -> Any:
        # The second number of mkdir is no file but a mode.
        places = [
            each for number, each in enumerate(arguments) if isinstance(each, (str, Path)) or not number
        ]
        what = " ".join([name, *map(_name, places)])
        passed(f"before {what}")
        result = real(*arguments, **options)
        passed(f"after {what}")
        return result

    setattr(module, name, told)


def _opener(passed: Callable[[str], None]) -> Any:
    real = io.open

    def told(file: Any, mode: str = "r", buffering: int = -1, *text: Any, **named: Any) -> Any:
        if not set(mode) & set("wax+") or isinstance(file, int):
            return real(file, mode, buffering, *text, **named)
        raw = _Written(file, mode.replace("b", "").replace("t", ""))
        raw.passed = passed
        return (
            io.BufferedWriter(raw)
            if "b" in mode
            else io.TextIOWrapper(io.BufferedWriter(raw), *text, **named)
        )

    return told


class _Written(io.FileIO):
    """A file whose writes are made in two halves."""

    passed: Callable[[str], None]

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        what = f"write {_name(str(self.name))}"
        self.passed(f"before {what}")
        done = super().write(view[: len(view) // 2]) or 0
        self.passed(f"half of {what}")
        done += super().write(view[done:]) or 0
        self.passed(f"after {what}")
        return done


def _name(place: int | str | Path) -> str:
    """The name of a file, the same for all steps and all random parts (which may begin with eight digits)."""
    path = os.readlink(f"/proc/self/fd/{place}") if isinstance(place, int) else place
    return re.sub(r"[0-9a-f]{12}|\d{8}", "#", Path(path).name)
