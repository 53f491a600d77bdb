"""Points before, within and after each file operation of a process, to count them or to kill it there."""

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
    """Count every point that this process passes from now on."""
    _watch(lambda point: seen.update([point]))


def die_at(point: str, occurrence: int) -> None:
    """Kill this process at the given occurrence of a point."""
    seen: Counter[str] = Counter()

    def at_point(passed: str) -> None:
        seen[passed] += 1
        if passed == point and seen[point] == occurrence:
            os.kill(os.getpid(), signal.SIGKILL)

    _watch(at_point)


def _watch(passed: Callable[[str], None]) -> None:
    """Patch file operations to report their points: `before rename step-#`, `half of write state.json`."""
    for module, names in _CHANGES:
        for name in names:
            _surround(module, name, passed)
    io.open = builtins.open = _opener(passed)


def _surround(module: ModuleType, name: str, passed: Callable[[str], None]) -> None:
    real = getattr(module, name)

    def reporting(*arguments: Any, **options: Any) -> Any:
        # The second argument of mkdir is a mode, not a file.
        files = [each for number, each in enumerate(arguments) if isinstance(each, (str, Path)) or not number]
        operation = " ".join([name, *map(_name, files)])
        passed(f"before {operation}")
        result = real(*arguments, **options)
        passed(f"after {operation}")
        return result

    setattr(module, name, reporting)


def _opener(passed: Callable[[str], None]) -> Any:
    real = io.open

    def reporting(file: Any, mode: str = "r", buffering: int = -1, *text: Any, **named: Any) -> Any:
        if not set(mode) & set("wax+") or isinstance(file, int):
            return real(file, mode, buffering, *text, **named)
        raw = _Written(file, mode.replace("b", "").replace("t", ""))
        raw.passed = passed
        return (
            io.BufferedWriter(raw)
            if "b" in mode
            else io.TextIOWrapper(io.BufferedWriter(raw), *text, **named)
        )

    return reporting


class _Written(io.FileIO):
    """A file that writes its data in two halves."""

    passed: Callable[[str], None]

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        operation = f"write {_name(str(self.name))}"
        self.passed(f"before {operation}")
        done = super().write(view[: len(view) // 2]) or 0
        self.passed(f"half of {operation}")
        done += super().write(view[done:]) or 0
        self.passed(f"after {operation}")
        return done


def _name(file: int | str | Path) -> str:
    """The name of a file, with step numbers and random parts (which may begin with eight digits) as `#`."""
    path = os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else file
    return re.sub(r"[0-9a-f]{12}|\d{8}", "#", Path(path).name)
