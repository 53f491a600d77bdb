"""How a KV cache stores keys and values: as floats, as float16, or as integer codes with scales.

`encode` maps new values (b, k, h, t) to parts whose last axis is the token, `decode` maps parts to values.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from einsum_transformer.engine import ShapeArray
from einsum_transformer.engine.replay import recorded
from einsum_transformer.numerics.uniform import TINY, code_range, halves, pack_nibbles, rounded

Array = np.ndarray
Parts = tuple[Any, ...]

GROUP = 64
"""Elements of a head that share a scale; the last group may be smaller."""


class CacheType(Protocol):
    """A storage type of keys or values."""

    @property
    def name(self) -> str: ...

    def encode(self, new: Array) -> Parts:
        """Values (b, k, h, t) -> parts (b, k, ., t)."""
        ...

    def decode(self, parts: Parts, new: Array) -> Array:
        """Parts (b, k, ., s) -> values (b, k, h, s) in the type of `new`.

        new: values (b, k, h, t) that were encoded in the same step, so that a replay repeats the call.
        """
        ...


class Unchanged:
    """The values in the type of the computation, which are read in place."""

    name = "unchanged"

    def encode(self, new: Array) -> Parts:
        return (new,)

    def decode(self, parts: Parts, new: Array) -> Array:
        return parts[0]


class Half:
    """float16; values beyond its range become the largest float16."""

    name = "float16"

    def encode(self, new: Any) -> Parts:
        return (ShapeArray(new.shape, np.float16) if isinstance(new, ShapeArray) else recorded(_half, new),)

    def decode(self, parts: Parts, new: Any) -> Any:
        if isinstance(new, ShapeArray):
            return ShapeArray(parts[0].shape, new.dtype)
        return recorded(_float, new, parts[0])


class Codes:
    """Symmetric codes of 8 or 4 bits, two per byte, with a scale per token and group of `GROUP` elements."""

    def __init__(self, bits: int) -> None:
        self.bits: int = bits
        self.name: str = f"int{bits}"

    def encode(self, new: Array) -> Parts:
        b, k, h, t = new.shape
        if isinstance(new, ShapeArray):
            size = -(-h // 2) if self.bits == 4 else h
            return ShapeArray((b, k, size, t), np.int8), ShapeArray((b, k, -(-h // GROUP), t), np.float32)
        scales = recorded(_scales, new, self.bits)
        return recorded(_codes, new, scales, self.bits), scales

    def decode(self, parts: Parts, new: Any) -> Any:
        codes, scales = parts
        if isinstance(new, ShapeArray):
            return ShapeArray((*new.shape[:3], codes.shape[3]), new.dtype)
        return recorded(_values, new, codes, scales, self.bits)


class Simulated:
    """The values rounded as another type does, stored in the type of the computation."""

    def __init__(self, rounding: CacheType) -> None:
        self._rounding = rounding
        self.name: str = f"{rounding.name} (simulated)"

    def encode(self, new: Array) -> Parts:
        return (self._rounding.decode(self._rounding.encode(new), new),)

    def decode(self, parts: Parts, new: Array) -> Array:
        return parts[0]


def _half(new: Array, out: Array | None = None) -> Array:
    return _into(rounded(new, 16, ()).astype(np.float16), out)


def _float(new: Array, stored: Array, out: Array | None = None) -> Array:
    return _into(stored, np.empty(stored.shape, new.dtype) if out is None else out)


def _scales(new: Array, bits: int, out: Array | None = None) -> Array:
    largest = np.maximum.reduceat(np.abs(new), np.arange(0, new.shape[2], GROUP), axis=2)
    scales = np.maximum(largest / code_range(bits, True)[1], TINY).astype(np.float32)
    return _into(scales, out)


def _codes(new: Array, scales: Array, bits: int, out: Array | None = None) -> Array:
    codes = np.rint(new / _spread(scales, new.shape[2])).astype(np.int8)
    if bits > 4:
        return _into(codes, out)
    b, k, h, t = codes.shape
    if not h:
        return codes
    rows = pack_nibbles(codes.transpose(0, 1, 3, 2).reshape(-1, h)).view(np.int8)
    return _into(rows.reshape(b, k, t, -1).transpose(0, 1, 3, 2), out)


def _values(new: Array, codes: Array, scales: Array, bits: int, out: Array | None = None) -> Array:
    h = new.shape[2]
    y = np.empty((*codes.shape[:2], h, codes.shape[3]), new.dtype) if out is None else out
    if bits > 4:
        np.copyto(y, codes)
    else:
        low, high = halves(codes.view(np.uint8))
        y[:, :, : codes.shape[2]], y[:, :, codes.shape[2] :] = low, high[:, :, : h - codes.shape[2]]
    for group in range(scales.shape[2]):
        y[:, :, group * GROUP : (group + 1) * GROUP] *= scales[:, :, group : group + 1]
    return y


def _spread(scales: Array, size: int) -> Array:
    return np.repeat(scales, GROUP, axis=2)[:, :, :size]


def _into(a: Array, out: Array | None) -> Array:
    if out is None:
        return a
    np.copyto(out, a)
    return out


UNCHANGED: CacheType = Unchanged()
_TYPES: dict[Any, CacheType] = {None: UNCHANGED, 16: Half(), 8: Codes(8), 4: Codes(4)}


def cache_type(bits: int | None, simulated: bool = False) -> CacheType:
    """Return the type with 4, 8 or 16 bits, or that of the computation (None)."""
    found = _TYPES[bits]
    return Simulated(found) if simulated and found is not UNCHANGED else found
