"""Keys and values of the tokens seen so far: one `LayerCache` a layer, of a kind that fits its window.

Values may have another size than keys, also none.

Layout (b, k, h, slot): the new keys of a projection are laid out the same way, so appending copies whole
lines, and both products of attention read the slots in place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

Array = np.ndarray
Seen = tuple[Array, Array, Array]
"""(keys, values, index): keys, values (b, s, k, h), and (s,) the position in the sequence of each."""

_FIRST_CAPACITY = 256
_PADDING = 16
"""Lines are this many slots longer than asked: power-of-two strides would put all lines of a head in one
cache set."""


class LayerCache(ABC):
    """One layer's keys and values."""

    def __init__(self) -> None:
        self.length = 0
        """Tokens seen, padding included."""
        self._keys: Array | None = None
        self._values: Array | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held (allocated)."""
        return sum(0 if a is None else a.nbytes for a in (self._keys, self._values))

    @abstractmethod
    def append(self, k: Array, v: Array) -> Seen:
        """Add keys and values (b, t, k, h); returns those that these queries may look at."""

    @abstractmethod
    def truncate(self, length: int) -> None:
        """Forget everything from position `length` on. Errors: ValueError where that is not held any more."""

    def select(self, rows: Sequence[int] | Array) -> None:
        """Keep only these batch rows, in this order."""
        if self._keys is not None and self._values is not None:
            self._keys, self._values = self._keys[rows], self._values[rows]

    @property
    def _slots(self) -> int:
        return 0 if self._keys is None else self._keys.shape[-1]

    def _allocate(self, k: Array, v: Array, slots: int, held: slice = slice(0)) -> None:
        """Lines of so many slots, which begin with those that were held."""
        self._keys, self._values = _moved(self._keys, k, slots, held), _moved(self._values, v, slots, held)

    def _store(self, start: int, k: Array, v: Array) -> tuple[Array, Array]:
        """Write keys and values from slot `start` on; returns all up to their end, (b, s, k, h)."""
        assert self._keys is not None
        assert self._values is not None
        end = start + k.shape[1]
        self._keys[..., start:end] = k.transpose(0, 2, 3, 1)
        self._values[..., start:end] = v.transpose(0, 2, 3, 1)
        return _read(self._keys, end), _read(self._values, end)

    def _check_length(self, length: int) -> None:
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a cache of {self.length} tokens to {length}")


class GrowingCache(LayerCache):
    """All tokens; it grows geometrically, from `capacity` slots on."""

    def __init__(self, capacity: int = 0) -> None:
        super().__init__()
        self._capacity = capacity

    def append(self, k: Array, v: Array) -> Seen:
        end = self.length + k.shape[1]
        if end > self._slots:
            # At least double, so that appending is linear over all.
            wanted = max(end, 2 * self._slots, self._capacity, _FIRST_CAPACITY)
            self._allocate(k, v, wanted + _PADDING, slice(0, self.length))
        keys, values = self._store(self.length, k, v)
        self.length = end
        return keys, values, np.arange(end)

    def truncate(self, length: int) -> None:
        self._check_length(length)
        self.length = length


class RingCache(LayerCache):
    """The last `window` tokens, position p in slot p mod window. One that has wrapped cannot go back."""

    def __init__(self, window: int, capacity: int = 0) -> None:
        super().__init__()
        self.window = window
        self._capacity = capacity

    def append(self, k: Array, v: Array) -> Seen:
        new, old, window = k.shape[1], self.length, self.window
        end = old + new
        self._reserve(k, v, min(end, window))
        self.length = end
        if end <= window:
            return *self._store(old, k, v), np.arange(end)
        assert self._keys is not None
        assert self._values is not None
        if new == 1:
            slot = old % window
            self._store(slot, k, v)
            slots = np.arange(window)
            index = slots + (old - slot) - np.where(slots > slot, window, 0)
            return _read(self._keys, window), _read(self._values, window), index
        # A chunk still sees what it is about to overwrite: the last window - 1 keys before it, in order.
        index = np.arange(max(0, old - window + 1), end)
        held = index[: len(index) - new] % window
        keys = np.concatenate([self._keys[..., held], k.transpose(0, 2, 3, 1)], axis=-1)
        values = np.concatenate([self._values[..., held], v.transpose(0, 2, 3, 1)], axis=-1)
        kept = index[-window:]
        self._keys[..., kept % window] = keys[..., -len(kept) :]
        self._values[..., kept % window] = values[..., -len(kept) :]
        return keys.transpose(0, 3, 1, 2), values.transpose(0, 3, 1, 2), index

    def truncate(self, length: int) -> None:
        self._check_length(length)
        if length < self.length > self.window:
            raise ValueError("a sliding-window cache that has wrapped cannot go back")
        self.length = length

    def _reserve(self, k: Array, v: Array, needed: int) -> None:
        if needed > self._slots:
            wanted = max(needed, 2 * self._slots, self._capacity, _FIRST_CAPACITY)
            self._allocate(k, v, min(wanted, self.window), slice(0, self.length))


class LineCache(LayerCache):
    """In order, at least the last `window + slack` tokens: `slack` of them can be taken back at any time.

    It is a line of more slots, which is moved up when it is full.
    """

    def __init__(self, window: int, slack: int) -> None:
        super().__init__()
        self.window, self.slack = window, slack
        self._start = 0
        """Position of the first slot."""

    def append(self, k: Array, v: Array) -> Seen:
        end, held = self.length + k.shape[1], self.window + self.slack
        if end - self._start > self._slots:
            first = max(self._start, self.length - held)
            wanted = max(2 * held, end - first, min(_FIRST_CAPACITY, 2 * self.window))
            self._allocate(k, v, wanted, slice(first - self._start, self.length - self._start))
            self._start = first
        keys, values = self._store(self.length - self._start, k, v)
        first = max(0, self.length - self.window + 1 - self._start)
        self.length = end
        return keys[:, first:], values[:, first:], np.arange(self._start + first, end)

    def truncate(self, length: int) -> None:
        self._check_length(length)
        if self._start and length - self.window + 1 < self._start:
            raise ValueError(f"a sliding-window cache with slack {self.slack} cannot go back to {length}")
        self.length = length


def layer_cache(window: int | None, capacity: int = 0, slack: int = 0) -> LayerCache:
    """The cache of a layer. slack: how many tokens `truncate` can take back from the longest it was."""
    if window is None:
        return GrowingCache(capacity)
    return LineCache(window, slack) if slack else RingCache(window, capacity)


def _read(lines: Array, end: int) -> Array:
    return lines[..., :end].transpose(0, 3, 1, 2)


def _moved(old: Array | None, like: Array, slots: int, held: slice) -> Array:
    """Lines (b, k, h, slots) for arrays such as `like` (b, t, k, h), which begin with the held slots of the
    old ones."""
    b, _, heads, h = like.shape
    lines = np.empty_like(like, order="C", shape=(b, heads, h, slots))
    if old is not None:
        kept = old[..., held]
        lines[..., : kept.shape[-1]] = kept
    return lines


class KVCache:
    """The caches of all layers. `pads` (b,) counts the padding tokens at the left of each row.

    horizon: the length, padding included, that the text will have at least, for a RoPE that depends on it:
    keys in the cache keep the rotation they came with, so it has to be known before the first. slack: how
    many tokens can be taken back at any time (see `layer_cache`).
    """

    def __init__(
        self,
        windows: Sequence[int | None],
        capacity: int = 0,
        pads: Array | None = None,
        horizon: int = 0,
        slack: int = 0,
    ) -> None:
        self.layers = tuple(layer_cache(window, capacity, slack) for window in windows)
        self.slack = slack
        self.pads = pads
        self.horizon = horizon
        self._tokens = np.empty((0, 0), np.int64)
        """(b, slots), of which `_noted` are used."""
        self._noted = 0

    @property
    def length(self) -> int:
        """Tokens seen, padding included."""
        return self.layers[0].length

    @property
    def nbytes(self) -> int:
        """Bytes held for keys and values (allocated)."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def tokens(self) -> Array:
        """The tokens seen, (b, length), padding included."""
        return self._tokens[:, : self._noted]

    @property
    def before(self) -> Array:
        """The tokens seen of each row, without padding: (b,), or (1,) where no row is padded."""
        return self.length - (np.zeros(1, int) if self.pads is None else self.pads)

    def add_tokens(self, tokens: Array) -> None:
        """Note the tokens (b, t) whose keys and values come next."""
        end = self._noted + tokens.shape[1]
        if end > self._tokens.shape[1]:
            grown = np.empty((len(tokens), max(end, 2 * self._noted, _FIRST_CAPACITY)), np.int64)
            grown[:, : self._noted] = self.tokens if self._noted else 0
            self._tokens = grown
        self._tokens[:, self._noted : end] = tokens
        self._noted = end

    def expect(self, length: int) -> None:
        """The text will have at least this length, padding included."""
        self.horizon = max(self.horizon, length)

    def replace_by(self, other: KVCache) -> None:
        """Hold what another cache of the same model holds, which is not to be used any more."""
        self.layers, self.pads, self.horizon = other.layers, other.pads, other.horizon
        self._tokens, self._noted = other._tokens, other._noted

    def truncate(self, length: int) -> None:
        """Forget everything from position `length` on."""
        for layer in self.layers:
            layer.truncate(length)
        self._noted = min(self._noted, length)

    def select(self, rows: Sequence[int] | Array) -> None:
        """Keep only these batch rows, in this order."""
        for layer in self.layers:
            layer.select(rows)
        self._tokens = self._tokens[rows] if self._noted else self._tokens
        if self.pads is not None:
            self.pads = self.pads[rows]
