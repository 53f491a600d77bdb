"""Uniform quantization of matrices: x ~ (code - zero) * scale / divisor, with integer codes of a few bits.

A scale, and a zero point if the range is asymmetric, applies to a group of consecutive elements of a row, to
a row (channel), or to the whole matrix (tensor).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Array = np.ndarray

_FLOAT16_MAX = float(np.finfo(np.float16).max)
_LARGE = 1 << 14
"""Elements from which activations are rounded to float16 by their bits, in pieces of this size."""
_SMALLEST_HALF = float(np.finfo(np.float16).tiny)
TINY = np.finfo(np.float32).tiny
_PIECE = 1 << 18  # elements that are quantized at once


@dataclass(frozen=True, slots=True)
class Quantized:
    """A quantized matrix (r, d).

    codes: int8 (r, d). scales: (r, groups), or (1, 1) for the whole matrix, float32; those of several groups
    per row are float16 if all are in its range. zeros: the codes of 0, int8 of the same shape, or None if
    they are all 0. group: elements per group; the last group of a row may be shorter. divisor: float32 (d,),
    by which columns are divided, or None.
    """

    codes: Array
    scales: Array
    zeros: Array | None
    group: int
    divisor: Array | None = None


def code_range(bits: int, symmetric: bool) -> tuple[int, int]:
    """The smallest and the largest code."""
    half = 1 << bits - 1
    return 1 - half if symmetric else -half, half - 1


def quantize(x: Array, bits: int, group: int | None, symmetric: bool = True) -> Quantized:
    """Round a matrix (r, d) to the nearest codes of `bits` bits, 2 to 8.

    group: elements per group; None: one group for the whole matrix.
    symmetric: scale = max |x| / (2^(bits-1) - 1) and zero = 0; else the codes, -2^(bits-1) to
    2^(bits-1) - 1, cover the range of the values and 0. The error is at most half a scale, and 0 is exact.
    """
    per_group = x.reshape(1, -1) if group is None else x
    size = per_group.shape[1] if group is None else group
    starts = np.arange(0, per_group.shape[1], size)
    lowest, highest = code_range(bits, symmetric)
    low = np.minimum(np.minimum.reduceat(per_group, starts, axis=1), 0).astype(np.float64)
    high = np.maximum(np.maximum.reduceat(per_group, starts, axis=1), 0).astype(np.float64)
    scales = np.maximum(high, -low) / highest if symmetric else (high - low) / (highest - lowest)
    # A subnormal scale would not be precise; that of a group of zeros is arbitrary.
    scales = np.where(scales == 0, 1, np.maximum(scales, TINY)).astype(np.float32)
    scales = short(scales) if size < x.shape[1] else scales
    zeros = None if symmetric else np.clip(np.rint(lowest - low / scales), lowest, highest).astype(np.int8)
    found = Quantized(np.empty(x.shape, np.int8), scales, zeros, group or x.shape[1])
    step = max(1, _PIECE // x.shape[1])
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        # In float64, so that the codes do not depend on the type of x.
        codes = x[rows] / _of_rows(scales, rows, found).astype(np.float64)
        np.rint(codes, out=codes)
        if zeros is not None:
            codes += _of_rows(zeros, rows, found)
        np.clip(codes, lowest, highest, out=codes)
        found.codes[rows] = codes
    return found


def short(scales: Array) -> Array:
    """Return the scales rounded up to float16, so that the codes still cover the range of the values, or
    unchanged if one is outside of the range of its normal numbers."""
    if scales.min() < _SMALLEST_HALF or scales.max() >= _FLOAT16_MAX:
        return scales
    found = scales.astype(np.float16)
    return np.where(found < scales, np.nextafter(found, np.float16(np.inf)), found)


def _of_rows(of_groups: Array, rows: slice, quantized: Quantized) -> Array:
    """The scales or zeros of the elements of these rows, broadcastable over them."""
    own = of_groups if len(of_groups) == 1 else of_groups[rows]
    return spread(own, quantized.group, quantized.codes.shape[1])


def dequantize(quantized: Quantized, dtype: np.dtype | type = np.float32, out: Array | None = None) -> Array:
    """(codes - zeros) * scales / divisor, (r, d); out: the array for the result, in C order."""
    y = np.empty(quantized.codes.shape, dtype) if out is None else out
    np.copyto(y, quantized.codes)
    scales, zeros, values = quantized.scales, quantized.zeros, y
    width, groups = quantized.codes.shape[1], scales.shape[1]
    if groups > 1 and width == groups * quantized.group:
        # A view in groups, if all have the same size, is faster than repeated scales.
        values = y.reshape(len(y), groups, quantized.group)
        scales, zeros = scales[..., None], None if zeros is None else zeros[..., None]
    else:
        scales = spread(scales, quantized.group, width)
        zeros = None if zeros is None else spread(zeros, quantized.group, width)
    if zeros is not None:
        values -= zeros
    values *= scales
    if quantized.divisor is not None:
        y /= quantized.divisor
    return y


def spread(of_groups: Array, group: int, width: int) -> Array:
    """Repeat each group's value for its elements: (r, groups) -> (r, width); unchanged if rows have one."""
    if of_groups.shape[1] == 1:
        return of_groups
    return np.repeat(of_groups, group, axis=1)[:, :width]


def pack_nibbles(codes: Array) -> Array:
    """Store codes of -8 to 7, (r, d), plus 8 as two per byte: uint8 (r, ceil(d / 2)).

    The low nibbles are the first half of the columns, so that unpacking writes two contiguous halves.
    """
    half = -(-codes.shape[1] // 2)
    nibbles = (codes + 8).astype(np.uint8)
    packed = nibbles[:, :half].copy()
    packed[:, : codes.shape[1] - half] |= nibbles[:, half:] << 4
    return packed


def unpack_nibbles(packed: Array, width: int) -> Array:
    """The codes int8 (r, width) that `pack_nibbles` stored."""
    codes = np.empty((len(packed), width), np.int8)
    half = packed.shape[1]
    codes[:, :half], codes[:, half:] = (part[:, : width - i * half] for i, part in enumerate(halves(packed)))
    return codes


def halves(packed: Array) -> tuple[Array, Array]:
    """The codes of both halves of the columns that `pack_nibbles` stored, int8 with the shape of `packed`."""
    low, high = packed & 15, packed >> 4
    low -= 8
    high -= 8
    return low.view(np.int8), high.view(np.int8)


def rounded(x: Array, bits: int, axes: tuple[int, ...]) -> Array:
    """Round activations to symmetric codes of 4 or 8 bits, with one scale for all elements along `axes` (one
    per token), or to float16 if `bits` is 16; values beyond its range become the largest float16. With more
    bits they are unchanged."""
    if bits > 16:
        return x
    if bits == 16:
        if x.dtype == np.float32 and x.size >= _LARGE:
            return _float16_values(x)
        with np.errstate(over="ignore"):
            y = x.astype(np.float16)
        y = y.astype(x.dtype)
        return y if np.isfinite(y).all() else np.clip(y, -_FLOAT16_MAX, _FLOAT16_MAX)
    codes, scale = _activation_codes(x, bits, axes)
    codes *= scale
    return codes


def _float16_values(x: Array) -> Array:
    """Round float32 to the values of float16, in a quarter of the time of two conversions."""
    if not x.transpose(np.argsort(x.strides, kind="stable")[::-1]).flags.c_contiguous:
        x = np.ascontiguousarray(x)
    y = np.empty_like(x)
    flat, source = y.ravel("K"), x.ravel("K")  # views in the order of memory
    for start in range(0, x.size, _LARGE):
        own, out = source[start : start + _LARGE], flat[start : start + _LARGE]
        # To nearest even at bit 13: float16 has 10 of the 23 bits of the mantissa.
        bits, rounded_bits = own.view(np.uint32), out.view(np.uint32)
        np.right_shift(bits, 13, out=rounded_bits)
        rounded_bits &= 1
        rounded_bits += bits
        rounded_bits += np.uint32(0x0FFF)
        rounded_bits &= np.uint32(0xFFFFE000)
        size = np.abs(own)
        small = size < 2.0**-14
        if small.any():  # subnormal numbers of float16 are multiples of 2^-24, the step of float32 at 0.75
            np.copyto(out, (own + np.float32(0.75)) - np.float32(0.75), where=small)
        if not size.max() < _FLOAT16_MAX:
            np.clip(out, -_FLOAT16_MAX, _FLOAT16_MAX, out=out)
            np.copyto(out, own, where=np.isnan(own))
    return y


def _activation_codes(x: Array, bits: int, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """Symmetric codes in the type of x, and the scales, one for all elements along `axes`."""
    scale = np.maximum.reduce(np.abs(x), axis=axes, keepdims=True)
    scale /= code_range(bits, True)[1]
    # A subnormal scale would not be precise; that of zeros is arbitrary.
    np.maximum(scale, TINY, out=scale)
    codes = x / scale
    np.rint(codes, out=codes)
    return codes, scale


DIGIT_BASE = 256
_DIGITS = 3
_LARGEST = 127 * DIGIT_BASE**2
"""Largest sum of three digits of -128 to 127 whose negative is one too."""


def digits(x: Array, bits: int) -> tuple[Array, Array]:
    """Return rows x (m, d) as integers for exact products: (digits int8 (i, m, d), scales (m,)).

    x is the sum over i of digits[i] * 256^i * scales. With up to 8 bits there is one digit, and the values
    are those of `rounded`. With more there are three: the integers are up to 2^23, as precise as float32 is
    for the largest element of a row; with 16 bits, x is rounded to float16 before.
    """
    if bits <= 8:
        codes, scale = _activation_codes(x, bits, (-1,))
        # Both at once would take three times as long, if x is in column order.
        return np.ascontiguousarray(codes.astype(np.int8))[None], scale[:, 0]
    codes = rounded(x, bits, (-1,))
    scale = np.abs(codes).max(axis=-1, keepdims=True)
    scale /= _LARGEST
    np.maximum(scale, TINY, out=scale)
    codes = codes / scale
    np.rint(codes, out=codes)
    # The digits of the codes are the bytes of the codes + 128 (1 + 256 + 256^2), minus 128.
    shifted = codes.astype("<i4", order="C")
    shifted += 0x808080
    parts = shifted.view(np.uint8).reshape(*x.shape, 4)[..., :_DIGITS] ^ 0x80
    return np.ascontiguousarray(np.moveaxis(parts.view(np.int8), -1, 0)), scale[:, 0]
