"""The encodings of quantized matrices in files: arrays with one row per row of the matrix, and their values.

Values are codes * scales + minimums with a scale for each group of consecutive elements of a row, where codes
are integers, numbers of 4 bits (E2M1) or float8 (E4M3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import ml_dtypes
import numpy as np

from einsum_transformer.formats.dequantize import E2M1, GROUPS, Groups, dequantize

Array = np.ndarray
Parts = Mapping[str, Array]

SHARED = ("columns",)
"""Parts that all rows share."""


class Encoding(Protocol):
    """How the rows of a matrix are stored."""

    @property
    def name(self) -> str:
        """The name for messages, such as Q4_K."""
        ...

    def groups(self, parts: Parts) -> Groups | None:
        """Return rows as codes (rows, groups, size), scales and minimums; None if they are not integers in
        groups. The last group is cut if the width is not a multiple of the size."""
        ...

    def values(self, parts: Parts, out: Array) -> None:
        """Write the values of rows to `out`, float32 (rows, width)."""
        ...


@dataclass(frozen=True, slots=True)
class Blocks:
    """Blocks of a GGUF file. Part: stored, uint8 (rows, bytes of a row). elements, nbytes: of a block."""

    name: str
    elements: int
    nbytes: int

    def groups(self, parts: Parts) -> Groups | None:
        if self.name not in GROUPS:
            return None
        stored = parts["stored"]
        codes, scales, minimums, subtracted = GROUPS[self.name](stored.reshape(-1))
        n, size = len(stored), codes.shape[-1]
        if minimums is not None:
            minimums = (-minimums if subtracted else minimums).reshape(n, -1)
        return Groups(codes.reshape(n, -1, size).view(np.int8), scales.reshape(n, -1), minimums)

    def values(self, parts: Parts, out: Array) -> None:
        dequantize(parts["stored"].reshape(-1), self.name, (self.elements, self.nbytes), out.reshape(-1))


@dataclass(frozen=True, slots=True)
class Integers:
    """Integers of `bits` bits, (codes - zeros) * scales + biases.

    Parts: codes, uint8 (rows, bytes of a row) with the lowest bits first, or int8 (rows, width). scales
    (rows, groups). zeros, int8 or int16 (rows, groups), or `zero` for all groups. biases (rows, groups),
    or 0. columns, int32 (width): the group of each column; without it, a group is `size` consecutive ones.
    """

    name: str
    bits: int
    width: int
    size: int
    zero: int = 0

    def codes(self, parts: Parts) -> Array:
        """Return the codes (rows, width), int8 or uint8."""
        return unpacked(parts["codes"], self.bits, self.width)

    def groups(self, parts: Parts) -> Groups | None:
        if "columns" in parts or self.width % self.size:
            return None
        codes = self.codes(parts).reshape(len(parts["codes"]), -1, self.size)
        zeros = parts["zeros"][..., None] if "zeros" in parts else np.int16(self.zero)
        short = self.bits < 8 or ("zeros" not in parts and (codes.dtype == np.int8 or self.zero == 128))
        codes = (codes - zeros).astype(np.int8 if short else np.int16)
        return Groups(
            codes, float32(parts["scales"]), float32(parts["biases"]) if "biases" in parts else None
        )

    def values(self, parts: Parts, out: Array) -> None:
        codes, scales = self.codes(parts), float32(parts["scales"])
        zeros = parts.get("zeros")
        biases = float32(parts["biases"]) if "biases" in parts else None
        if "columns" in parts:
            columns = parts["columns"]
            np.subtract(codes, np.int16(self.zero) if zeros is None else zeros[:, columns], out=out)
            out *= scales[:, columns]
            if biases is not None:
                out += biases[:, columns]
            return
        for rows, own, i in grouped(out, self.size):
            zero = np.int16(self.zero) if zeros is None else zeros[:, i, None]
            np.subtract(codes[:, own].reshape(rows.shape), zero, out=rows)
            rows *= scales[:, i, None]
            if biases is not None:
                rows += biases[:, i, None]


@dataclass(frozen=True, slots=True)
class Floats:
    """Floats of 8 or 4 bits times scales.

    Parts: codes, uint8 (rows, width) of E4M3, or (rows, width / 2) of E2M1, the low four bits first. scales
    (rows, groups): floats, uint8 as exponents of 2 with bias 127 (E8M0), or float8. factor, float32
    (rows, 1): of all scales, or 1.
    """

    name: str
    bits: int
    width: int
    size: int

    def scales(self, parts: Parts) -> Array:
        """Return the scales (rows, groups), float32."""
        scales = parts["scales"]
        if scales.dtype == np.uint8:
            scales = np.ldexp(np.float32(1), scales.astype(np.int32) - 127)
        return float32(scales) * parts["factor"] if "factor" in parts else float32(scales)

    def groups(self, parts: Parts) -> Groups | None:
        if self.bits == 8 or self.width % self.size:
            return None
        codes = E2M1.take(unpacked(parts["codes"], 4, self.width))
        return Groups(codes.reshape(len(codes), -1, self.size), self.scales(parts) / 2)

    def values(self, parts: Parts, out: Array) -> None:
        if self.bits == 8:
            np.take(_e4m3(), parts["codes"], out=out, mode="clip")  # "raise" would copy
        else:
            np.multiply(E2M1.take(unpacked(parts["codes"], 4, self.width)), np.float32(0.5), out=out)
        scales = self.scales(parts)
        for rows, _, i in grouped(out, self.size):
            rows *= scales[:, i, None]


@cache
def _e4m3() -> Array:
    """The values of all codes of float8 E4M3."""
    return np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def float32(scales: Array) -> Array:
    """Return scales as float32."""
    return scales.astype(np.float32, copy=False)


def grouped(matrix: Array, size: int) -> list[tuple[Array, slice, slice]]:
    """Views (rows, groups, size) of the groups of a matrix, and of the last one if it is cut, each with its
    columns and groups."""
    n, width = matrix.shape
    whole = width // size
    found = []
    if whole:
        found.append((slice(0, whole * size), slice(0, whole)))
    if width % size:
        found.append((slice(whole * size, width), slice(whole, whole + 1)))
    return [(matrix[:, own].reshape(n, each.stop - each.start, -1), own, each) for own, each in found]


def unpacked(codes: Array, bits: int, width: int) -> Array:
    """Return the first `width` codes of each row, stored without gaps and with the lowest bits first."""
    if bits == 8:
        return codes
    n = len(codes)
    if bits == 4:
        found = np.empty((n, 2 * codes.shape[1]), np.uint8)
        np.bitwise_and(codes, 15, out=found[:, ::2])
        np.right_shift(codes, 4, out=found[:, 1::2])
        return found[:, :width]
    # Eight codes in `bits` bytes.
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % bits))).reshape(n, -1, bits)
    words = np.zeros(padded.shape[:2], np.uint64)
    for i in range(bits):
        words |= padded[..., i].astype(np.uint64) << np.uint64(8 * i)
    found = np.empty((*words.shape, 8), np.uint8)
    for i in range(8):
        found[..., i] = words >> np.uint64(bits * i) & np.uint64((1 << bits) - 1)
    return found.reshape(n, -1)[:, :width]
