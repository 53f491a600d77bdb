"""KV cache: one `LayerCache` per layer, whose class depends on the layer's sliding window.

Values may have another head dimension than keys, also 0.

Layout (b, k, h, slot), as in projected keys: appending copies contiguous lines, and both attention products
read the slots in place. Keys and values may be stored in other types (`cache_types`); then all that are
attended to are decoded at every step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from einsum_transformer.components.cache_types import UNCHANGED, CacheType, Parts
from einsum_transformer.engine.replay import Steps

Array = np.ndarray
Seen = tuple[Array, Array, Array]
"""(keys, values, index): keys and values (b, s, k, h), and their positions in the sequence (s,)."""

_FIRST_CAPACITY = 256
_PADDING = 16
"""Extra slots per line: with power-of-two strides, all lines of a head would share one CPU cache set."""


class LayerCache(ABC):
    """The KV cache of one layer."""

    def __init__(self) -> None:
        self.length: int = 0
        """Number of tokens appended so far, padding included."""
        self.allocations: int = 0
        """Number of times that memory was allocated."""
        self.types: tuple[CacheType, CacheType] = UNCHANGED, UNCHANGED
        """The types of keys and values."""
        self._stored: tuple[Parts, Parts] = (), ()
        """The parts of keys and values, with slots as the last axis."""

    @property
    def nbytes(self) -> int:
        """Allocated bytes."""
        return sum(part.nbytes for parts in self._stored for part in parts)

    @abstractmethod
    def append(self, k: Array, v: Array) -> Seen:
        """Append keys and values (b, t, k, h); return all that the queries of these tokens may attend to."""

    @abstractmethod
    def truncate(self, length: int) -> None:
        """Remove the tokens from position `length` on. Errors: ValueError if earlier ones are lost."""

    @abstractmethod
    def steps_left(self) -> int:
        """Number of tokens that can be appended one by one with the same memory, each one slot further."""

    def select(self, rows: Sequence[int] | Array) -> None:
        """Keep only these batch rows, in this order."""
        keys, values = self._stored
        self._stored = tuple(part[rows] for part in keys), tuple(part[rows] for part in values)

    @property
    def token_bytes(self) -> int:
        """Bytes that a token of all rows takes."""
        return self.nbytes // self._slots

    @property
    def _slots(self) -> int:
        return self._stored[0][0].shape[-1] if self._stored[0] else 0

    def _encode(self, *new: Array) -> tuple[Parts, Parts]:
        """The parts of keys and values (b, t, k, h), with tokens as the last axis."""
        keys, values = (kind.encode(a.transpose(0, 2, 3, 1)) for kind, a in zip(self.types, new))
        return keys, values

    def _decode(self, parts: tuple[Parts, Parts], new: tuple[Array, Array]) -> tuple[Array, Array]:
        """Keys and values (b, s, k, h) of their parts; new: those of this step."""
        keys, values = (
            kind.decode(each, a.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
            for kind, each, a in zip(self.types, parts, new)
        )
        return keys, values

    def _allocate(self, new: tuple[Parts, Parts], slots: int, copied: slice = slice(0)) -> None:
        """Allocate lines of `slots` slots and copy the slots `copied` to their beginning."""
        self.allocations += 1
        keys, values = self._stored
        self._stored = _moved(keys, new[0], slots, copied), _moved(values, new[1], slots, copied)

    def _store(self, start: int, new: tuple[Parts, Parts]) -> tuple[Parts, Parts]:
        """Write parts from slot `start` on; return all slots up to their end."""
        end = start + new[0][0].shape[-1]
        for lines, parts in zip(self._stored, new):
            for line, part in zip(lines, parts):
                np.copyto(line[..., start:end], part)
        return self._at(slice(end))

    def _at(self, slots: slice | Array) -> tuple[Parts, Parts]:
        """The parts in these slots."""
        keys, values = self._stored
        return tuple(part[..., slots] for part in keys), tuple(part[..., slots] for part in values)

    def _check_length(self, length: int) -> None:
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a cache of {self.length} tokens to {length}")


class GrowingCache(LayerCache):
    """Stores all tokens; starts with `capacity` slots and grows geometrically."""

    def __init__(self, capacity: int = 0) -> None:
        super().__init__()
        self._capacity = capacity

    def append(self, k: Array, v: Array) -> Seen:
        end, new = self.length + k.shape[1], self._encode(k, v)
        if end > self._slots:
            # At least doubled, so that the amortized cost of appending a token is constant.
            slots = max(end, 2 * self._slots, self._capacity, _FIRST_CAPACITY)
            self._allocate(new, slots + _PADDING, slice(0, self.length))
        seen = self._store(self.length, new)
        self.length: int = end
        return *self._decode(seen, (k, v)), np.arange(end)

    def steps_left(self) -> int:
        return self._slots - self.length

    def truncate(self, length: int) -> None:
        self._check_length(length)
        self.length = length


class RingCache(LayerCache):
    """Stores the last `window` tokens, position p in slot p mod window. `truncate` fails after wrapping."""

    def __init__(self, window: int, capacity: int = 0) -> None:
        super().__init__()
        self.window = window
        self._capacity = capacity

    def append(self, k: Array, v: Array) -> Seen:
        count, old, window = k.shape[1], self.length, self.window
        end, new = old + count, self._encode(k, v)
        self._reserve(new, min(end, window))
        self.length: int = end
        if end <= window:
            return *self._decode(self._store(old, new), (k, v)), np.arange(end)
        if count == 1:
            slot = old % window
            self._store(slot, new)
            slots = np.arange(window)
            index = slots + (old - slot) - np.where(slots > slot, window, 0)
            return *self._decode(self._at(slice(window)), (k, v)), index
        # The chunk also attends to the keys that it overwrites: the last window - 1 before it, in order.
        index = np.arange(max(0, old - window + 1), end)
        before = self._at(index[: len(index) - count] % window)
        keys, values = (
            tuple(np.concatenate(pair, axis=-1) for pair in zip(*each)) for each in zip(before, new)
        )
        stored = index[-window:]
        for lines, parts in zip(self._stored, (keys, values)):
            for line, part in zip(lines, parts):
                line[..., stored % window] = part[..., -len(stored) :]
        return *self._decode((keys, values), (k, v)), index

    def truncate(self, length: int) -> None:
        self._check_length(length)
        if length < self.length > self.window:
            raise ValueError("a sliding-window cache that has wrapped cannot be truncated")
        self.length = length

    def steps_left(self) -> int:
        slot = self.length % self.window if self._slots == self.window else self.length
        return self._slots - slot

    def _reserve(self, new: tuple[Parts, Parts], needed: int) -> None:
        if needed > self._slots:
            slots = max(needed, 2 * self._slots, self._capacity, _FIRST_CAPACITY)
            self._allocate(new, min(slots, self.window), slice(0, self.length))


class LineCache(LayerCache):
    """Stores at least the last `window + slack` tokens, in order; `slack` of them can be removed at any time.

    When its slots are full, the last `window + slack` tokens are moved to the beginning.
    """

    def __init__(self, window: int, slack: int) -> None:
        super().__init__()
        self.window: int = window
        self.slack: int = slack
        self._start = 0
        """Position of the first slot."""

    def append(self, k: Array, v: Array) -> Seen:
        end, required = self.length + k.shape[1], self.window + self.slack
        new = self._encode(k, v)
        if end - self._start > self._slots:
            first = max(self._start, self.length - required)
            slots = max(2 * required, end - first, min(_FIRST_CAPACITY, 2 * self.window))
            self._allocate(new, slots, slice(first - self._start, self.length - self._start))
            self._start = first
        self._store(self.length - self._start, new)
        first = max(0, self.length - self.window + 1 - self._start)
        seen = self._at(slice(first, end - self._start))
        self.length: int = end
        return *self._decode(seen, (k, v)), np.arange(self._start + first, end)

    def steps_left(self) -> int:
        free = self._slots - (self.length - self._start)
        # From this length on, the first key that is read moves too.
        full = self._start + self.window - 1
        return min(free, full - self.length) if self.length < full else free

    def truncate(self, length: int) -> None:
        self._check_length(length)
        if self._start and length - self.window + 1 < self._start:
            raise ValueError(
                f"a sliding-window cache with slack {self.slack} cannot be truncated to {length}"
            )
        self.length = length


def layer_cache(
    window: int | None,
    capacity: int = 0,
    slack: int = 0,
    types: tuple[CacheType, CacheType] = (UNCHANGED, UNCHANGED),
) -> LayerCache:
    """Return a cache for a layer. slack: tokens that `truncate` can remove, counted from the maximum; types:
    of keys and values."""
    if window is None:
        cache: LayerCache = GrowingCache(capacity)
    else:
        cache = LineCache(window, slack) if slack else RingCache(window, capacity)
    cache.types = types
    return cache


def _moved(old: Parts, new: Parts, slots: int, copied: slice) -> Parts:
    """Allocate lines (b, k, ., slots) for parts like `new`, and copy `old[..., copied]`."""
    lines = tuple(np.empty_like(part, order="C", shape=(*part.shape[:3], slots)) for part in new)
    for line, part in zip(lines, old):
        kept = part[..., copied]
        line[..., : kept.shape[-1]] = kept
    return lines


class KVCache:
    """The caches of all layers. pads: (b,) number of left-padding tokens of each row.

    horizon: minimum final length of the sequence, padding included. RoPE types that depend on the length need
    it before the first token, because cached keys are already rotated. slack: number of tokens that can be
    removed at any time (see `layer_cache`). types: of keys and values.
    """

    def __init__(
        self,
        windows: Sequence[int | None],
        capacity: int = 0,
        pads: Array | None = None,
        horizon: int = 0,
        slack: int = 0,
        types: tuple[CacheType, CacheType] = (UNCHANGED, UNCHANGED),
    ) -> None:
        self.layers: tuple[LayerCache, ...] = tuple(
            layer_cache(window, capacity, slack, types) for window in windows
        )
        self.slack = slack
        self.pads = pads
        self.horizon: int = horizon
        self._tokens = np.empty((0, 0), np.int64)
        """(b, slots), of which the first `_used` contain tokens."""
        self._used = 0
        self.steps: Steps = Steps()
        """The decode steps with this cache."""

    @property
    def length(self) -> int:
        """Number of tokens appended so far, padding included."""
        return self.layers[0].length

    @property
    def nbytes(self) -> int:
        """Allocated bytes of keys and values."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def tokens(self) -> Array:
        """The token ids so far, (b, length), padding included."""
        return self._tokens[:, : self._used]

    @property
    def before(self) -> Array:
        """Number of tokens of each row so far, without padding: (b,), or (1,) if no row is padded."""
        return self.length - (np.zeros(1, int) if self.pads is None else self.pads)

    def add_tokens(self, tokens: Array) -> None:
        """Store the token ids (b, t) whose keys and values are appended next."""
        end = self._used + tokens.shape[1]
        if end > self._tokens.shape[1]:
            grown = np.empty((len(tokens), max(end, 2 * self._used, _FIRST_CAPACITY)), np.int64)
            grown[:, : self._used] = self.tokens if self._used else 0
            self._tokens = grown
        self._tokens[:, self._used : end] = tokens
        self._used = end

    @property
    def allocations(self) -> int:
        """Number of times that memory was allocated for the keys and values of a layer."""
        return sum(layer.allocations for layer in self.layers)

    def steps_left(self) -> int:
        """Number of tokens that can be appended one by one with the same memory, each one slot further."""
        return min(layer.steps_left() for layer in self.layers)

    def advance(self) -> None:
        """Count one token, whose keys and values were written by a replay of `append`."""
        for layer in self.layers:
            layer.length += 1

    def expect(self, length: int) -> None:
        """Raise `horizon`, the minimum final length of the sequence, to at least `length`."""
        self.horizon = max(self.horizon, length)

    def replace_by(self, other: KVCache) -> None:
        """Take over the contents of another cache of the same model, which must not be used afterwards."""
        self.layers, self.pads, self.horizon = other.layers, other.pads, other.horizon
        self._tokens, self._used = other._tokens, other._used
        self.steps = Steps()

    def truncate(self, length: int) -> None:
        """Remove the tokens from position `length` on."""
        for layer in self.layers:
            layer.truncate(length)
        self._used = min(self._used, length)

    def select(self, rows: Sequence[int] | Array) -> None:
        """Keep only these batch rows, in this order."""
        self.steps = Steps()
        for layer in self.layers:
            layer.select(rows)
        self._tokens = self._tokens[rows] if self._used else self._tokens
        if self.pads is not None:
            self.pads = self.pads[rows]
