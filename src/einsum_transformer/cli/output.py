"""The output of the commands: results to stdout, everything else to stderr."""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Iterator, Mapping
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
