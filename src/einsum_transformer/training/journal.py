"""The folder of a training: run.json, train.log, metrics.jsonl, and the checkpoints beside them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

from einsum_transformer.errors import InputError
from einsum_transformer.formats.files import atomic_file, write_json
from einsum_transformer.training import state

ABOUT, LOG, METRICS = "run.json", "train.log", "metrics.jsonl"


class Journal:
    """What a training writes while it runs: nothing if `folder` is None. A folder holds one training, which
    is
    continued only on request."""

    def __init__(self, folder: str | Path | None, resume: bool = False) -> None:
        self.folder = None if folder is None else Path(folder)
        if self.folder is None:
            return
        metrics = self.folder / METRICS
        begun = metrics.exists() and metrics.stat().st_size > 0
        if not resume and (begun or state.checkpoints(self.folder)):
            raise InputError(f"{self.folder}: holds a training already; `resume` continues it")
        self.folder.mkdir(parents=True, exist_ok=True)
        state.clean(self.folder)
        self._log = (self.folder / LOG).open("a", encoding="utf-8")
        self._metrics = (self.folder / METRICS).open("a", encoding="utf-8")

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if self.folder is None:
            return
        last = () if error is None else (partial(self.note, f"ended by {type(error).__name__}: {error}"),)
        for action in (*last, self._log.close, self._metrics.close):
            # If the disk is full, this fails too; the first error is the one that is raised.
            with nullcontext() if error is None else suppress(OSError):
                action()

    def about(self, facts: Mapping[str, Any]) -> None:
        """Write run.json: what is trained, how, on what."""
        if self.folder is None:
            return
        with _named(self.folder / ABOUT):
            write_json(self.folder / ABOUT, facts)

    def note(self, text: str) -> None:
        """A line of train.log, with the time."""
        if self.folder is None:
            return
        with _named(self.folder / LOG):
            self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
            self._log.flush()

    def metrics(self, numbers: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl."""
        if self.folder is None:
            return
        with _named(self.folder / METRICS):
            self._metrics.write(json.dumps(numbers) + "\n")
            self._metrics.flush()

    def forget_after(self, steps: int) -> None:
        """Remove the metrics of steps that a resumed training does again, and a line that was cut off."""
        if self.folder is None:
            return
        kept = []
        for line in (self.folder / METRICS).read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                if line.endswith("\n") and json.loads(line)["step"] <= steps:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue
        self._metrics.close()
        with _named(self.folder / METRICS), atomic_file(self.folder / METRICS) as file:
            file.write("".join(kept).encode())
        self._metrics = (self.folder / METRICS).open("a", encoding="utf-8")

    def commit(self) -> None:
        """Bring log and metrics to the disk, as is done for a checkpoint."""
        if self.folder is None:
            return
        for file in (self._log, self._metrics):
            with _named(Path(file.name)):
                file.flush()
                os.fsync(file.fileno())


def new_run_folder(source: str) -> Path:
    """A folder under runs/ that does not exist yet, named by the model and the time."""
    first = Path("runs") / f"{Path(source.split(' (')[0]).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder, number = first, 1
    while folder.exists():
        number += 1
        folder = first.with_name(f"{first.name}-{number}")
    return folder


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Add the path to the error of a failed write, which does not contain it."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise
