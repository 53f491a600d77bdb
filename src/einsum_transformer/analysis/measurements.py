"""Results of long evaluations, and files of JSON lines from which an interrupted run continues."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from einsum_transformer.engine import Leaf
from einsum_transformer.errors import FormatError, InputError
from einsum_transformer.formats.files import parse_json, sync
from einsum_transformer.models.model import Model
from einsum_transformer.text.windows import Window
from einsum_transformer.tree import named_leaves

Array = np.ndarray

_LARGEST = 1 << 28
"""Bytes of a file."""


class ResultFile:
    """A file of JSON lines: what its results have in common, then one line per result.

    path: the file, or None: nothing is stored. header: returns the first line. `records`: the results of an
    earlier run; a last line that was not written completely is removed. Raises InputError for a file with
    another header, and FormatError for other contents.
    """

    def __init__(self, path: Path | None, header: Callable[[], dict[str, Any]]) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        if path is None:
            return
        own = header()
        if not path.exists():
            self._append(own)
            return
        if path.stat().st_size > _LARGEST:
            raise FormatError(f"{path}: larger than {_LARGEST >> 20} MiB")
        raw = path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        first, *lines = whole.splitlines() or [raw]
        stored = parse_json(path, "line 1", first)
        if different := [name for name in own if stored.get(name) != own[name]]:
            raise InputError(f"{path}: contains results with other {', '.join(different)}: give another file")
        self.records = [parse_json(path, f"line {i}", line) for i, line in enumerate(lines, start=2)]
        if len(whole) < len(raw):
            with path.open("r+b") as file:
                file.truncate(len(whole))

    def add(self, record: dict[str, Any]) -> None:
        """Store a result."""
        self.records.append(record)
        if self.path is not None:
            self._append(record)

    def _append(self, record: dict[str, Any]) -> None:
        assert self.path is not None
        with self.path.open("ab") as file:
            file.write((json.dumps(record) + "\n").encode())
            sync(file)


def weights_digest(model: Model) -> str:
    """Return the sha256 of the names, types, shapes and values of the weights."""
    weights = hashlib.sha256()
    for path, weight in named_leaves(model.decoder):
        for name, array in (weight.parts() if isinstance(weight, Leaf) else {"": weight}).items():
            weights.update(f"{path}.{name} {array.dtype} {array.shape}".encode())
            in_order: Array = np.ascontiguousarray(array.T if array.flags.f_contiguous else array)
            weights.update(in_order.view(np.uint8).data)
    return weights.hexdigest()


def tokens_digest(windows: Sequence[Array]) -> str:
    """Return the sha256 of the tokens of windows."""
    return hashlib.sha256(np.concatenate(windows).view(np.uint8).data).hexdigest()


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
    """Measurements by part, scheme and chunk, stored in a ResultFile."""

    def __init__(self, file: ResultFile) -> None:
        self.file = file
        self._found: dict[tuple[str, str, int], _Measured] = {}
        for i, record in enumerate(file.records, start=2):
            try:
                each = _Measured(**record)
                numbers = each.tokens, each.kl, each.kl_squared, each.same, each.chunk
                known = all(math.isfinite(number) for number in numbers)
            except TypeError:
                known = False
            if not known:
                raise FormatError(f"{file.path}: line {i} is not a measurement")
            self._found[each.part, each.scheme, each.chunk] = each

    def has(self, part: str, scheme: str, chunk: int) -> bool:
        """Return whether a chunk is measured."""
        return (part, scheme, chunk) in self._found

    def add(self, part: str, scheme: str, chunk: int, kl: Array, same: Array) -> None:
        """Add the divergences of the tokens of a chunk."""
        sums = float(kl.sum()), float(np.square(kl).sum()), int(same.sum())
        found = self._found[part, scheme, chunk] = _Measured(part, scheme, chunk, kl.size, *sums)
        self.file.add(asdict(found))

    def mean(self, part: str, scheme: str, chunks: int) -> tuple[float, float, float]:
        """Return the mean divergence of the first `chunks` chunks, its standard error, and the share of
        tokens with the same most probable token."""
        found = [self._found[part, scheme, chunk] for chunk in range(chunks)]
        tokens = sum(each.tokens for each in found)
        mean = sum(each.kl for each in found) / tokens
        variance = max(0.0, sum(each.kl_squared for each in found) / tokens - mean**2)
        error = math.sqrt(variance / (tokens - 1))
        return mean, error, sum(each.same for each in found) / tokens


class Scores:
    """The scores (n, tokens) of each window, stored in a ResultFile as the same float64."""

    def __init__(self, file: ResultFile, rows: int, windows: Sequence[Window]) -> None:
        """rows: scores per token. Raises InputError for a file with scores of other windows."""
        self.file = file
        self._digests = [tokens_digest([window.tokens]) for window in windows]
        self._found: dict[int, Array] = {}
        for i, record in enumerate(file.records, start=2):
            try:
                chunk, tokens = int(record["chunk"]), str(record["tokens"])
                scores = np.array(record["scores"], np.float64)
                known = chunk >= 0 and scores.ndim == 2 and len(scores) == rows and np.isfinite(scores).all()
            except (KeyError, TypeError, ValueError):
                raise FormatError(f"{file.path}: line {i} does not contain the scores of a chunk") from None
            if not known:
                raise FormatError(f"{file.path}: line {i} does not contain the scores of a chunk")
            if chunk >= len(windows):
                continue  # of a run with more chunks
            if tokens != self._digests[chunk] or scores.shape[1] != windows[chunk].scored:
                raise InputError(
                    f"{file.path}: contains results of another text or other chunks: give another file"
                )
            self._found[chunk] = scores

    def get(self, chunk: int) -> Array | None:
        """Return the scores of a chunk, or None."""
        return self._found.get(chunk)

    def add(self, chunk: int, scores: Array) -> None:
        """Add the scores of a chunk."""
        self._found[chunk] = scores
        self.file.add({"chunk": chunk, "tokens": self._digests[chunk], "scores": scores.tolist()})
