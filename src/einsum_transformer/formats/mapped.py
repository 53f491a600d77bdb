"""Read-only memory maps of tensor files."""

import mmap
import sys
from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path
from typing import NoReturn

import numpy as np

from einsum_transformer.errors import FormatError, InputError
from einsum_transformer.formats import Names, Packed, TensorInfo

# Type name in files -> type name in NumPy or ml_dtypes, bytes per element
DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U64": ("uint64", 8),
    "U32": ("uint32", 4),
    "U16": ("uint16", 2),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}

FILE_DTYPES = {name: dtype for dtype, (name, _) in DTYPES.items()}
"""Type name in NumPy or ml_dtypes -> type name in files."""


def quoted(name: str) -> str:
    """Quote a name from a file for a one-line message, truncated to 80 characters."""
    return repr(name if len(name) <= 80 else name[:77] + "...")


def refuse_unknown(path: Path, name: str, known: list[str]) -> NoReturn:
    """Raise FormatError for a tensor that `path` does not contain; the message suggests the nearest name."""

    def shared(pairs: Iterable[tuple[str, str]]) -> int:
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    def similarity(other: str) -> int:
        return shared(zip(name, other)) + shared(zip(reversed(name), reversed(other)))

    hint = f"the nearest name is {quoted(max(known, key=similarity))}" if known else "it contains no tensors"
    raise FormatError(f"{path}: there is no tensor {quoted(name)}; {hint}")


def numpy_dtype(dtype: str) -> np.dtype:
    """Return the NumPy dtype of a type in a file: "F32" -> float32, "BF16" -> ml_dtypes.bfloat16."""
    name, _ = DTYPES[dtype]
    if name.startswith(("bfloat", "float8")):
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, name))
    return np.dtype(name)


class MappedFile:
    """Base class of the single-file TensorSources: the memory map and the table of tensors."""

    path: Path
    _tensors: dict[str, TensorInfo]
    _names: list[str] | None = None

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(f"{self.path}: there is no such file")
        try:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise FormatError(f"{self.path}: the file is empty") from None
        except OSError as error:
            raise InputError(f"{self.path}: the file cannot be read ({error.strerror})") from None
        self._bytes: np.ndarray | None = np.frombuffer(self._map, np.uint8)

    def names(self) -> list[str]:
        if self._names is None:
            self._names = Names(self._tensors)
        return self._names

    def info(self, name: str) -> TensorInfo:
        info = self._tensors.get(name)
        if info is None:
            refuse_unknown(self.path, name, self.names())
        return info

    def read_packed(self, name: str) -> Packed | None:
        self.info(name)
        return None

    def release(self, name: str) -> None:
        if sys.platform == "win32":
            return
        info = self.info(name)
        start = -(-info.offset // mmap.PAGESIZE) * mmap.PAGESIZE
        stop = (info.offset + info.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if stop > start and self._bytes is not None:
            self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def close(self) -> None:
        if self._bytes is None:
            return
        self._bytes = None
        try:
            self._map.close()
        except BufferError:  # views are still alive; the map is closed with the last one
            del self._map

    def _stored(self, info: TensorInfo) -> np.ndarray:
        """Return the tensor's bytes: a flat read-only view of the map."""
        if self._bytes is None:
            raise ValueError(f"{self.path} is closed")
        return self._bytes[info.offset : info.offset + info.nbytes]

    def _view(self, info: TensorInfo) -> np.ndarray:
        """Return a tensor whose type NumPy or ml_dtypes supports: a read-only view of the map."""
        return self._stored(info).view(numpy_dtype(info.dtype)).reshape(info.shape)
