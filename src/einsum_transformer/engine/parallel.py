"""Coarse tasks side by side on threads, with BLAS at one thread inside each."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any


def for_each(task: Callable[..., None], arguments: Sequence[tuple[Any, ...]]) -> None:
    """task(*arguments[i]) for every i."""
    for given in arguments:
        task(*given)
