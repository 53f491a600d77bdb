"""A TensorSource over arrays in memory that records its reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from einsum_transformer.formats import TensorInfo
from einsum_transformer.formats.mapped import DTYPES

FILE_TYPE = {name: dtype for dtype, (name, _) in DTYPES.items()}


class MemorySource:
    """`reads` lists every read: (name, rows or None for the whole tensor)."""

    def __init__(self, **tensors: np.ndarray) -> None:
        self.path = Path("memory")
        self.tensors = tensors
        self.reads: list[tuple[str, tuple[int, int] | None]] = []

    def names(self) -> list[str]:
        return list(self.tensors)

    def info(self, name: str) -> TensorInfo:
        tensor = self.tensors[name]
        return TensorInfo(name, tensor.shape, FILE_TYPE[tensor.dtype.name], tensor.nbytes, self.path, 0)

    def read(self, name: str) -> np.ndarray:
        self.reads.append((name, None))
        return self.tensors[name]

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        self.reads.append((name, (start, stop)))
        tensor = self.tensors[name]
        rows = tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim > 2 else tensor
        return rows[start:stop]

    def read_packed(self, name: str) -> None:
        return None

    def release(self, name: str) -> None:
        pass

    def close(self) -> None:
        pass
