"""Weights that are read from their file when an equation uses them, within a memory budget."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

from einsum_transformer.engine import Leaf, phase
from einsum_transformer.formats import TensorSource
from einsum_transformer.leaves.resident import Stored, converted, fill, mapped

Array = np.ndarray


class Budget:
    """An LRU cache of loaded weights, of at most `limit` bytes.

    A single weight larger than the limit is still loaded: the product requires it.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held: int = 0
        self.peak: int = 0
        self._loaded: OrderedDict[str, Array] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, name: str, read: Callable[[], Array], nbytes: int) -> Array:
        """Return the weight `name`; if it is not cached, evict others until `nbytes` fit and read it."""
        with self._lock:  # experts run in parallel
            if name in self._loaded:
                self._loaded.move_to_end(name)
                return self._loaded[name]
            while self._loaded and self.held + nbytes > self.limit:
                _, evicted = self._loaded.popitem(last=False)
                self.held -= evicted.nbytes
            with phase("load"):
                array = read()
            self._loaded[name] = array
            self.held += array.nbytes
            self.peak = max(self.peak, self.held)
            return array

    def holds(self, name: str) -> bool:
        return name in self._loaded


class LazyTensor(Leaf):
    """A tensor of a file, viewed as `shape`, that is read when an equation uses it."""

    def __init__(
        self, tensors: TensorSource, stored: Stored, shape: tuple[int, ...], dtype: Any, budget: Budget
    ) -> None:
        self.name: str = stored.name
        self.shape: tuple[int, ...] = shape
        self.dtype: np.dtype = np.dtype(dtype)
        self._tensors, self._stored, self._budget = tensors, stored, budget
        self._key = f"{stored.name}[{stored.first_row}]"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def array(self) -> Array:
        return self._budget.get(self._key, self._read, self.nbytes).reshape(self.shape)

    def rows(self, indices: Array) -> Array:
        plain = len(self.shape) == 2 and self._stored.plain
        if not plain or self._budget.holds(self._key):
            return super().rows(indices)
        with phase("load"):
            file_rows = [self._stored.first_row + i for i in indices.ravel().tolist()]
            found = [self._tensors.read_rows(self.name, i, i + 1) for i in file_rows]
            return converted(np.concatenate(found), self.dtype).reshape(*indices.shape, self.shape[1])

    def _read(self) -> Array:
        array = mapped(self._tensors, self._stored, self.dtype)
        if array is None:
            array = np.empty(self._stored.shape, self.dtype)
            fill(self._tensors, [(self._stored, array)])
        return array
