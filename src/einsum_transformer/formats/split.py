"""GGUF models split into several files by llama.cpp's gguf-split: `NAME-00001-of-00003.gguf` and so on.

`split.no` (from 0), `split.count` and `split.tensors.count` (of all parts) relate the parts. The model's
metadata is in the first part, which may contain no tensors; later parts may lack other keys.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from einsum_transformer.errors import FormatError
from einsum_transformer.formats import TensorInfo
from einsum_transformer.formats.gguf import GGUFFile
from einsum_transformer.formats.links import BROKEN_LINK, inside, is_broken_link
from einsum_transformer.formats.mapped import quoted

_PART = re.compile(r"(?P<prefix>.+)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
_NO, _COUNT, _TENSORS = "split.no", "split.count", "split.tensors.count"


class SplitGGUF(GGUFFile):
    """All parts of a split GGUF as one TensorSource; each tensor's `info` names the file that contains it."""

    def __init__(self, parts: list[GGUFFile]) -> None:
        self.path: Path = parts[0].path
        self.metadata: dict[str, Any] = parts[0].metadata
        self._parts = parts
        self._part_of: dict[str, GGUFFile] = {}
        for part in parts:
            for name in part.names():
                if name in self._part_of:
                    other = self._part_of[name].path.name
                    raise FormatError(f"{part.path}: tensor {quoted(name)} is also in {other}")
                self._part_of[name] = part
        self._tensors = {name: part.info(name) for name, part in self._part_of.items()}
        for part in parts:
            if (total := part.metadata.get(_TENSORS, len(self._tensors))) != len(self._tensors):
                raise FormatError(
                    f"{part.path}: {_TENSORS} is {total!r:.40}, but the {len(parts)} parts contain "
                    f"{len(self._tensors)} tensors"
                )

    def release(self, name: str) -> None:
        self._part_of[self.info(name).name].release(name)

    def close(self) -> None:
        for part in self._parts:
            part.close()

    def _stored(self, info: TensorInfo) -> np.ndarray:
        return self._part_of[info.name]._stored(info)


def open_gguf(path: Path, allow_links: bool = False) -> GGUFFile:
    """Open a GGUF file; for a part of a split model, open all parts.

    The parts must be in one folder; with allow_links, they may be links out of it.
    Raises FormatError for a part that is missing, belongs to another model or has a wrong name.
    """
    file = GGUFFile(path)
    count = file.metadata.get(_COUNT, 0)
    if type(count) is int and 0 <= count <= 1:
        return file
    parts = [file]
    try:
        if type(count) is not int or not 1 < count < 1 << 16:
            raise FormatError(f"{path}: {_COUNT} is {count!r:.40}, expected a number of files")
        prefix = _prefix(file, count)
        parts.clear()
        for number in range(count):
            part = path.with_name(_name(prefix, number, count, path.suffix))
            parts.append(file if part == path else _part(part, path, number, count, allow_links))
            _check_architecture(parts[0], parts[-1])
        return SplitGGUF(parts)
    except BaseException:
        for part in {file, *parts}:
            part.close()
        raise


def first_parts(paths: Iterable[Path]) -> list[Path]:
    """Return the path of each model among GGUF files: for a split model, its first part in `paths`."""
    found: dict[tuple[str, str], Path] = {}
    for path in sorted(paths):
        split = _PART.fullmatch(path.name)
        found.setdefault((split["prefix"], split["count"]) if split else (path.name, ""), path)
    return list(found.values())


def part_names(name: str) -> list[str]:
    """Return the names of all parts of the model that a file of this name belongs to."""
    split = _PART.fullmatch(name)
    if split is None:
        return [name]
    count = int(split["count"])
    return [_name(split["prefix"], number, count, Path(name).suffix) for number in range(count)]


def _name(prefix: str, number: int, count: int, suffix: str) -> str:
    return f"{prefix}-{number + 1:05d}-of-{count:05d}{suffix}"


def _prefix(file: GGUFFile, count: int) -> str:
    """Return the common prefix of the parts' names from the name of one, which must match its metadata."""
    number = file.metadata.get(_NO)
    if type(number) is not int or not 0 <= number < count:
        raise FormatError(f"{file.path}: {_NO} is {number!r:.40}, but {_COUNT} is {count}: no such part")
    split = _PART.fullmatch(file.path.name)
    if split is None or (int(split["part"]), int(split["count"])) != (number + 1, count):
        expected = _name("NAME", number, count, ".gguf")
        raise FormatError(
            f"{file.path}: part {number + 1} of {count} of a split model: its name must end as in "
            f"{expected}, so that the other parts are found"
        )
    return split["prefix"]


def _part(path: Path, given: Path, number: int, count: int, allow_links: bool) -> GGUFFile:
    if not inside(path.parent, path.name, allow_links).is_file():
        if is_broken_link(path):
            raise FormatError(f"{path}: {BROKEN_LINK}")
        raise FormatError(f"{path}: this part is missing; {given.name} is one of {count} parts of a model")
    part = GGUFFile(path)
    for key, expected in ((_NO, number), (_COUNT, count)):
        found = part.metadata.get(key, expected if key == _COUNT else None)
        if found != expected:
            part.close()
            raise FormatError(f"{path}: {key} is {found!r:.40}, expected {expected} for a file of this name")
    return part


def _check_architecture(first: GGUFFile, part: GGUFFile) -> None:
    """Raise FormatError if a part declares another architecture than the first part."""
    key = "general.architecture"
    found = part.metadata.get(key)
    if found is not None and found != first.metadata.get(key):
        raise FormatError(
            f"{part.path}: {key} is {found!r:.40}, but {first.metadata.get(key)!r:.40} in {first.path.name}: "
            "a part of another model"
        )
