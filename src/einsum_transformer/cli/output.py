"""The output of the commands: results to stdout, everything else to stderr."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from einsum_transformer.notes import LOGGER

if TYPE_CHECKING:
    from rich.console import Console


def silence(quiet: bool) -> bool:
    """Suppress the library's notes if `--quiet` is given."""
    LOGGER.setLevel(logging.ERROR if quiet else logging.WARNING)
    return quiet


def console() -> Console:
    """Return a console for stderr."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def note(text: str) -> None:
    """Write one line to stderr."""
    print(text, file=sys.stderr, flush=True)


def write(text: str) -> None:
    """Write a piece of the result and flush it."""
    sys.stdout.write(text)
    sys.stdout.flush()


def write_line(result: str | Mapping[str, Any]) -> None:
    """Write the result, as text or as one JSON object, and a line end."""
    write((result if isinstance(result, str) else json.dumps(result)) + "\n")


def progress(what: str, silent: bool) -> Callable[[int, int], None]:
    """Return a function of (done, total) that writes a line per second, after the first two seconds, with the
    time that is left."""
    started = last = time.monotonic()

    def write_progress(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if not silent and now - started > 2 and (now - last > 1 or done == total):
            last = now
            note(f"{done} of {total} {what}, {(now - started) / done * (total - done):.0f} s left")

    return write_progress


@contextmanager
def announced(text: str, quiet: bool) -> Iterator[None]:
    """Write the text if the body takes longer than two seconds."""
    if quiet:
        yield
        return
    timer = threading.Timer(2.0, note, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
