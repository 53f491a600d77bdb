"""Keys and values of the tokens seen so far, one `LayerCache` a layer.

Values may have another size than keys, also none.

Layout (b, k, h, slot): the new keys of a projection are laid out the same way, so appending copies whole
lines, and both products of attention read the slots in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Array = np.ndarray

_FIRST_CAPACITY = 256
_PADDING = 16
"""Lines are this many slots longer than asked: power-of-two strides would put all lines of a head in one
cache set."""


class LayerCache:
    """One layer's keys and values. With a window, a ring of the last `window` slots; else it grows
    geometrically.

    slack: how many tokens `truncate` can take back from the longest it was, also with a window, which then is
    no ring but a line of more slots that is moved up when it is full.
    """

    def __init__(self, window: int | None = None, capacity: int = 0, slack: int = 0) -> None:
        self.window = window
        self.slack = slack
        self.length = 0
        self._start = 0
        self._capacity = capacity
        self._keys: Array | None = None
        self._values: Array | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held (allocated)."""
        return sum(0 if a is None else a.nbytes for a in (self._keys, self._values))

    def append(self, k: Array, v: Array) -> tuple[Array, Array, Array]:
        """Add keys and values (b, t, k, h); returns (keys, values, index) that these queries may look at.

        keys, values: (b, s, k, h); index: (s,), the absolute position in the sequence of each.
        """
        new = k.shape[1]
        if self.window is not None and self.slack:
            return self._append_line(k, v, self.window)
        if self.window is not None and self.length + new > self.window:
            return self._append_ring(k, v)
        self._reserve(k, v, self.length + new)
        keys, values = self._store(self.length, k, v)
        self.length += new
        return keys, values, np.arange(self.length)

    def truncate(self, length: int) -> None:
        """Forget everything from position `length` on; a ring that has wrapped has lost what lay before."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a cache of {self.length} tokens to {length}")
        if self.window is not None and self.slack:
            if self._start and length - self.window + 1 < self._start:
                raise ValueError(f"a sliding-window cache with slack {self.slack} cannot go back to {length}")
        elif self.window is not None and length < self.length > self.window:
            raise ValueError("a sliding-window cache that has wrapped cannot go back")
        self.length = length

    def select(self, rows: Sequence[int] | Array) -> None:
        """Keep only these batch rows, in this order."""
        if self._keys is not None and self._values is not None:
            self._keys, self._values = self._keys[rows], self._values[rows]

    def _append_line(self, k: Array, v: Array, window: int) -> tuple[Array, Array, Array]:
        """In order from position `_start` on, at least as many as the window and the slack."""
        new, end = k.shape[1], self.length + k.shape[1]
        room = 0 if self._keys is None else self._keys.shape[-1]
        if end - self._start > room:
            first = max(self._start, self.length - window - self.slack)
            wanted = max(2 * (window + self.slack), end - first, min(_FIRST_CAPACITY, 2 * window))
            for name, fresh in (("_keys", k), ("_values", v)):
                b, _, heads, h = fresh.shape
                old = getattr(self, name)
                lines = np.empty_like(fresh, order="C", shape=(b, heads, h, wanted))
                if old is not None:
                    held = old[..., first - self._start : self.length - self._start]
                    lines[..., : self.length - first] = held
                setattr(self, name, lines)
            self._start = first
        keys, values = self._store(self.length - self._start, k, v)
        first = max(0, self.length - window + 1 - self._start)
        self.length += new
        return keys[:, first:], values[:, first:], np.arange(self._start + first, self.length)

    def _append_ring(self, k: Array, v: Array) -> tuple[Array, Array, Array]:
        window, new, old = self.window, k.shape[1], self.length
        assert window is not None
        self._reserve(k, v, window)
        assert self._keys is not None
        assert self._values is not None
        end = old + new
        if new == 1:
            slot = old % window
            self._keys[..., slot], self._values[..., slot] = k[:, 0], v[:, 0]
            self.length = end
            slots = np.arange(window)
            index = slots + (old - slot) - np.where(slots > slot, window, 0)
            return self._read(self._keys, window), self._read(self._values, window), index
        # A chunk still sees what it is about to overwrite: the last window - 1 keys before it, in order.
        index = np.arange(max(0, old - window + 1), end)
        held = index[: len(index) - new] % window
        keys = np.concatenate([self._keys[..., held], k.transpose(0, 2, 3, 1)], axis=-1)
        values = np.concatenate([self._values[..., held], v.transpose(0, 2, 3, 1)], axis=-1)
        kept = index[-window:]
        self._keys[..., kept % window] = keys[..., -len(kept) :]
        self._values[..., kept % window] = values[..., -len(kept) :]
        self.length = end
        return keys.transpose(0, 3, 1, 2), values.transpose(0, 3, 1, 2), index

    def _store(self, start: int, k: Array, v: Array) -> tuple[Array, Array]:
        assert self._keys is not None
        assert self._values is not None
        end = start + k.shape[1]
        self._keys[..., start:end] = k.transpose(0, 2, 3, 1)
        self._values[..., start:end] = v.transpose(0, 2, 3, 1)
        return self._read(self._keys, end), self._read(self._values, end)

    @staticmethod
    def _read(lines: Array, end: int) -> Array:
        return lines[..., :end].transpose(0, 3, 1, 2)

    def _reserve(self, k: Array, v: Array, needed: int) -> None:
        """Room for `needed` slots: at least double, so that appending is linear over all, but never beyond
        the window."""
        held = 0 if self._keys is None else self._keys.shape[-1]
        if needed <= held:
            return
        wanted = max(needed, 2 * held, self._capacity, _FIRST_CAPACITY)
        wanted = wanted + _PADDING if self.window is None else min(wanted, self.window)
        for name, new in (("_keys", k), ("_values", v)):
            b, _, heads, h = new.shape
            old, fresh = getattr(self, name), np.empty_like(new, order="C", shape=(b, heads, h, wanted))
            if old is not None:
                fresh[..., : self.length] = old[..., : self.length]
            setattr(self, name, fresh)


class KVCache:
    """The caches of all layers. `pads` (b,) counts the padding tokens at the left of each row.

    horizon: the length, padding included, that the text will have at least, for a RoPE that depends on it:
    keys in the cache keep the rotation they came with, so it has to be known before the first. slack: how
    many tokens can be taken back at any time (see `LayerCache`).
    """

    def __init__(
        self,
        windows: Sequence[int | None],
        capacity: int = 0,
        pads: Array | None = None,
        horizon: int = 0,
        slack: int = 0,
    ) -> None:
        self.layers = tuple(LayerCache(window, capacity, slack) for window in windows)
        self.slack = slack
        self.pads = pads
        self.horizon = horizon
        self._tokens: list[Array] = []

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
        self._tokens = [np.concatenate(self._tokens, axis=1)] if self._tokens else []
        return self._tokens[0] if self._tokens else np.empty((0, 0), np.int64)

    def remember(self, tokens: Array) -> None:
        """Note the tokens (b, t) whose keys and values come next."""
        self._tokens.append(tokens)

    def become(self, other: KVCache) -> None:
        """Hold what another cache of the same model holds, which is not to be used any more."""
        self.layers, self.pads, self.horizon, self._tokens = (
            other.layers,
            other.pads,
            other.horizon,
            other._tokens,
        )

    def truncate(self, length: int) -> None:
        for layer in self.layers:
            layer.truncate(length)
        self._tokens = [self.tokens[:, :length]] if self._tokens else []

    def select(self, rows: Sequence[int] | Array) -> None:
        for layer in self.layers:
            layer.select(rows)
        self._tokens = [self.tokens[rows]] if self._tokens else []
        if self.pads is not None:
            self.pads = self.pads[rows]
