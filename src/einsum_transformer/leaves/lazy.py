"""A weight that stays in its file until an equation needs it, under a budget of bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

from einsum_transformer.engine import Leaf, phase

Array = np.ndarray


class Budget:
    """Loaded weights, the least recently used dropped first, so that at most `limit` bytes are held.

    One weight larger than the limit is still loaded, alone: without it there is no product.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self.peak = 0
        self._loaded: OrderedDict[str, Array] = OrderedDict()

    def get(self, name: str, read: Callable[[], Array]) -> Array:
        """The weight `name`, from memory or read again."""
        if name in self._loaded:
            self._loaded.move_to_end(name)
            return self._loaded[name]
        with phase("load"):
            array = read()
        while self._loaded and self.held + array.nbytes > self.limit:
            _, dropped = self._loaded.popitem(last=False)
            self.held -= dropped.nbytes
        self._loaded[name] = array
        self.held += array.nbytes
        self.peak = max(self.peak, self.held)
        return array


class LazyTensor(Leaf):
    """A tensor of a file, viewed as `shape`; read(None) gives all of it, read(rows) these rows of its first
    axis."""

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: Any,
        read: Callable[[Array | None], Array],
        budget: Budget,
    ) -> None:
        self.name, self.shape, self.dtype = name, shape, np.dtype(dtype)
        self._read, self._budget = read, budget

    def array(self) -> Array:
        return self._budget.get(self.name, lambda: self._read(None)).reshape(self.shape)

    def rows(self, indices: Array) -> Array:
        if len(self.shape) != 2 or self.name in self._budget._loaded:
            return super().rows(indices)
        with phase("load"):
            return self._read(indices)
