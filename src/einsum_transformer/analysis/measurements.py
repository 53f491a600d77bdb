"""Measured divergences, in memory and in a file of JSON lines from which an interrupted run continues."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from einsum_transformer.errors import FormatError, InputError
from einsum_transformer.formats.files import atomic_file, parse_json

Array = np.ndarray

_LARGEST = 1 << 28
"""Bytes of a file."""


@dataclass(frozen=True, slots=True)
class _Measured:
    """The divergences of the scored tokens of a chunk."""

    part: str
    scheme: str
    chunk: int
    tokens: int
    kl: float
    """Their sum."""
    kl_squared: float
    """The sum of their squares."""
    same: int
    """The number of tokens for which the most probable token is the same."""


class Measurements:
    """Measurements by part, scheme and chunk.

    path: a file of JSON lines, or None. header: returns what its measurements have in common, the first line.
    Raises InputError for a file with another header, and FormatError for other contents.
    """

    def __init__(self, path: Path | None, header: Callable[[], dict[str, Any]]) -> None:
        self.path = path
        self._found: dict[tuple[str, str, int], _Measured] = {}
        self._header: dict[str, Any] = {}
        if path is not None:
            self._header = header()
            if path.exists():
                self._read(path)

    def _read(self, path: Path) -> None:
        if path.stat().st_size > _LARGEST:
            raise FormatError(f"{path}: larger than {_LARGEST >> 20} MiB")
        first, *lines = path.read_bytes().splitlines() or [b""]
        stored = parse_json(path, "line 1", first)
        if different := [name for name in self._header if stored.get(name) != self._header[name]]:
            raise InputError(
                f"{path}: contains measurements with other {', '.join(different)}: give another file"
            )
        for i, line in enumerate(lines):
            what = f"line {i + 2}"
            try:
                each = _Measured(**parse_json(path, what, line))
                numbers = each.tokens, each.kl, each.kl_squared, each.same, each.chunk
                known = all(math.isfinite(number) for number in numbers)
            except TypeError:
                known = False
            if not known:
                raise FormatError(f"{path}: {what} is not a measurement")
            self._found[each.part, each.scheme, each.chunk] = each

    def has(self, part: str, scheme: str, chunk: int) -> bool:
        """Return whether a chunk is measured."""
        return (part, scheme, chunk) in self._found

    def add(self, part: str, scheme: str, chunk: int, kl: Array, same: Array) -> None:
        """Add the divergences of the tokens of a chunk, and write the file, which is replaced at once."""
        sums = float(kl.sum()), float(np.square(kl).sum()), int(same.sum())
        self._found[part, scheme, chunk] = _Measured(part, scheme, chunk, kl.size, *sums)
        if self.path is not None:
            lines = [self._header, *map(asdict, self._found.values())]
            with atomic_file(self.path) as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines).encode())

    def mean(self, part: str, scheme: str, chunks: int) -> tuple[float, float, float]:
        """Return the mean divergence of the first `chunks` chunks, its standard error, and the share of
        tokens with the same most probable token."""
        found = [self._found[part, scheme, chunk] for chunk in range(chunks)]
        tokens = sum(each.tokens for each in found)
        mean = sum(each.kl for each in found) / tokens
        variance = max(0.0, sum(each.kl_squared for each in found) / tokens - mean**2)
        error = math.sqrt(variance / (tokens - 1))
        return mean, error, sum(each.same for each in found) / tokens
