"""Calls into the native library `tokenizers`: its errors and panics become one-line InputErrors."""

import atexit
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TypeVar

from einsum_transformer.errors import InputError

T = TypeVar("T")

_STDERR = 2
_LOCK = threading.RLock()


def checked(problem: str, run: Callable[[], T]) -> T:
    """Run a call into `tokenizers`; raises InputError that begins with `problem` if the call fails.

    A panic of the library is not an Exception, and the library prints it to stderr before Python sees it.
    That output is dropped, because the InputError contains the same text.
    """
    with _captured_stderr() as captured:
        try:
            return run()
        except BaseException as error:
            panic = type(error).__name__ == "PanicException"
            if panic:
                captured.clear()
            if panic or isinstance(error, Exception):
                raise InputError(f"{problem}: {' '.join(str(error).split())}") from None
            raise


class _Captured:
    """A temporary file that replaces stderr during a call."""

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (lives as long as the process)
        atexit.register(self.file.close)

    def clear(self) -> None:
        self.file.seek(0)
        self.file.truncate()

    def release(self) -> None:
        """Write what other threads printed during the call to the real stderr."""
        if os.lseek(self.file.fileno(), 0, os.SEEK_CUR):
            self.file.seek(0)
            text = self.file.read()
            self.clear()
            os.write(_STDERR, text)


@lru_cache(maxsize=1)
def _capture() -> _Captured:
    return _Captured()


@contextmanager
def _captured_stderr() -> Iterator[_Captured]:
    """Redirect file descriptor 2 to a file and restore it, for one thread at a time: all threads share it."""
    with _LOCK:
        captured = _capture()
        try:
            saved = os.dup(_STDERR)
        except OSError:  # the program has no stderr
            yield captured
            return
        if sys.stderr is not None:
            sys.stderr.flush()
        try:
            os.dup2(captured.file.fileno(), _STDERR)
            yield captured
        finally:
            os.dup2(saved, _STDERR)
            os.close(saved)
            captured.release()
