"""Bytes to arrays and back: safetensors and GGUF, with no knowledge of models."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file: shape in NumPy's order, type in the file ("BF16", "Q4_1"), place of its bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    file: Path
    offset: int


@dataclass(frozen=True, slots=True)
class Packed:
    """A quantized tensor as its file stores it."""

    dtype: str
    """The type in the file, which says what the parts mean."""
    shape: tuple[int, ...]
    """Of the numbers that it stands for, as a matrix."""
    parts: Mapping[str, np.ndarray]
    """Read-only views of the mapped file, such as codes and scales, each with a row for each row."""


class Names(list[str]):
    """Names in their order; `in` takes no longer for many of them. Not to be changed."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__(names)
        self._known = frozenset(self)

    def __contains__(self, name: object) -> bool:
        return name in self._known


def as_rows(array: np.ndarray) -> np.ndarray:
    """A tensor as a matrix, all its axes but the last joined; a vector as it is."""
    return array.reshape(-1, array.shape[-1]) if array.ndim > 2 else array


class TensorSource(Protocol):
    """The named tensors of a checkpoint on disk; an unknown name raises FormatError with the nearest one."""

    path: Path

    def names(self) -> list[str]:
        """The names of all tensors, in the file's order."""
        ...

    def info(self, name: str) -> TensorInfo:
        """Shape, type and place of a tensor, without reading it."""
        ...

    def read(self, name: str) -> np.ndarray:
        """The tensor: a read-only view of the mapped file, or a new float32 array if it is quantized."""
        ...

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows start to stop of the tensor as a matrix, all its axes but the last joined (of a vector: its
        numbers), without the rest."""
        ...

    def read_packed(self, name: str) -> Packed | None:
        """The tensor as it is stored, None for a type that is read as numbers only."""
        ...

    def release(self, name: str) -> None:
        """Give the tensor's whole pages back to the system, where it can; reading it again maps them anew."""
        ...

    def close(self) -> None:
        """Let go of the file; views that were read stay valid."""
        ...
