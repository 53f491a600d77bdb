"""Read and write tensor files (safetensors, GGUF, npz), independent of any model."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor in a file: shape in NumPy's order, type in the file ("BF16", "Q4_1"), location of its data."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    file: Path
    offset: int


@dataclass(frozen=True, slots=True)
class Packed:
    """A quantized tensor in the encoding of its file."""

    dtype: str
    """The type in the file, which defines the meaning of the parts."""
    shape: tuple[int, ...]
    """Shape of the dequantized values, as a matrix."""
    parts: Mapping[str, np.ndarray]
    """Read-only views of the mapped file, such as codes and scales, each with one row per matrix row."""
    settings: Mapping[str, int] = field(default_factory=dict[str, int])
    """What else the type needs, such as bits and group size."""
    encoding: Any = None
    """How the parts are encoded (`encodings.Encoding`), or None."""


class Names(list[str]):
    """An ordered list of names with a constant-time `in`. It must not be modified."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__(names)
        self._known = frozenset(self)

    def __contains__(self, name: object) -> bool:
        return name in self._known


def as_rows(array: np.ndarray) -> np.ndarray:
    """Return a tensor as a matrix by joining all axes but the last; a vector is returned unchanged."""
    return array.reshape(-1, array.shape[-1]) if array.ndim > 2 else array


class TensorSource(Protocol):
    """The named tensors of a checkpoint on disk; an unknown name raises FormatError with the nearest name."""

    path: Path

    def names(self) -> list[str]:
        """Return the names of all tensors, in the file's order."""
        ...

    def info(self, name: str) -> TensorInfo:
        """Return the shape, type and location of a tensor without reading it."""
        ...

    def read(self, name: str) -> np.ndarray:
        """Return the tensor: a read-only view of the mapped file; if quantized, a new float32 array."""
        ...

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return rows start to stop of the tensor, seen as a matrix (see `as_rows`; elements of a vector),
        without reading the other rows."""
        ...

    def read_packed(self, name: str) -> Packed | None:
        """Return the tensor in its stored encoding, or None if its type has no packed form."""
        ...

    def release(self, name: str) -> None:
        """Release the tensor's memory pages to the system if possible; a later read maps them again."""
        ...

    def close(self) -> None:
        """Close the file; views that were read stay valid."""
        ...
