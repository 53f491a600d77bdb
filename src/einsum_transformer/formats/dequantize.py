"""Dequantize the blocks of GGUF files to float32.

In most types, a block is a few groups of values = codes * scales + minimums (`Groups`). They are unpacked
here, eight bytes of codes at once; the values are bit-identical to `gguf.quants`. All other types use
`gguf.quants`, which is imported on demand.

Layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Array = np.ndarray

_PIECE = 1 << 18  # output elements per piece: 1 MB, a multiple of every block size
_BYTES = 0x0101010101010101
"""A one in each byte of eight."""
_IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
"""The values of the codes of IQ4_NL and IQ4_XS."""
E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)
"""Twice the values of the numbers of 4 bits with 2 bits of exponent and 1 of mantissa."""


class Groups(NamedTuple):
    """Blocks as groups of values with one scale each: codes * scales + minimums, or - if `subtracted`."""

    codes: Array
    """int8 or uint8 (blocks, groups, size)."""
    scales: Array
    """float32 (blocks, groups), as `minimums`."""
    minimums: Array | None = None
    subtracted: bool = False


def dequantize(stored: Array, dtype: str, block: tuple[int, int], out: Array) -> None:
    """Dequantize `stored`, the bytes of blocks of type `dtype`, into the flat float32 array `out`.

    `block` is (elements, bytes) of one block. Raises NotImplementedError for an unknown type.
    """
    elements, nbytes = block
    blocks = _PIECE // elements
    unpack = _values if dtype in GROUPS else _values_of_gguf
    with np.errstate(invalid="ignore", over="ignore"):  # scales in a malformed file may be inf or NaN
        for start in range(0, len(stored) // nbytes, blocks):
            piece = stored[start * nbytes : (start + blocks) * nbytes]
            unpack(piece, dtype, out[start * elements : (start + blocks) * elements])


def _values(stored: Array, dtype: str, out: Array) -> None:
    codes, scales, minimums, subtracted = GROUPS[dtype](stored)
    values = out.reshape(codes.shape)
    values[...] = codes
    values *= scales[..., None]
    if minimums is not None:
        (np.subtract if subtracted else np.add)(values, minimums[..., None], out=values)


def _values_of_gguf(stored: Array, dtype: str, out: Array) -> None:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize as gguf_dequantize

    if dtype not in GGMLQuantizationType.__members__:
        raise NotImplementedError(dtype)
    # One long row: gguf processes sixteen rows at a time, which is slow for short rows.
    out[...] = gguf_dequantize(stored.reshape(1, -1), GGMLQuantizationType[dtype]).reshape(out.shape)


def _blocks(stored: Array, *fields: tuple[str, str]) -> tuple[Array, ...]:
    """The fields of blocks, each (blocks,), contiguous."""
    blocks = stored.view(np.dtype(list(fields)))
    return tuple(blocks[name].copy() for name, _ in fields)


def _planes(packed: Array, size: int, bits: int) -> Array:
    """Split each byte into its codes of `bits` bits, the lowest first: uint8 (-1, 8 / bits, size), where
    [i, j] are codes j of `size` consecutive bytes."""
    words, count = packed.view(np.uint64), 8 // bits
    planes = np.empty((words.nbytes // size, count), f"V{size}")  # elements are copied as a whole
    for j in range(count):
        codes = words >> np.uint64(j * bits)
        codes &= np.uint64(((1 << bits) - 1) * _BYTES)
        planes[:, j] = codes.view(planes.dtype)
    return planes.view(np.uint8).reshape(-1, count, size)


def _single(values: Array) -> Array:
    """float16 per block -> float32 (blocks, 1)."""
    return values.astype(np.float32)[:, None]


def _q4_0(stored: Array) -> Groups:
    d, q = _blocks(stored, ("d", "<f2"), ("q", "V16"))
    codes = _planes(q, 16, 4).view(np.int8).reshape(-1, 1, 32)
    codes -= np.int8(8)
    return Groups(codes, _single(d))


def _q4_1(stored: Array) -> Groups:
    d, m, q = _blocks(stored, ("d", "<f2"), ("m", "<f2"), ("q", "V16"))
    return Groups(_planes(q, 16, 4).reshape(-1, 1, 32), _single(d), _single(m))


def _fifth_bits(high: Array) -> Array:
    """The bits of uint32 (blocks,) as 0 or 16, (blocks, 1, 32)."""
    return np.unpackbits(high.view(np.uint8), bitorder="little").reshape(-1, 1, 32) << np.uint8(4)


def _q5_0(stored: Array) -> Groups:
    d, high, q = _blocks(stored, ("d", "<f2"), ("high", "<u4"), ("q", "V16"))
    codes = _planes(q, 16, 4).reshape(-1, 1, 32)
    codes |= _fifth_bits(high)
    return Groups(codes.view(np.int8) - np.int8(16), _single(d))


def _q5_1(stored: Array) -> Groups:
    d, m, high, q = _blocks(stored, ("d", "<f2"), ("m", "<f2"), ("high", "<u4"), ("q", "V16"))
    codes = _planes(q, 16, 4).reshape(-1, 1, 32)
    codes |= _fifth_bits(high)
    return Groups(codes, _single(d), _single(m))


def _q8_0(stored: Array) -> Groups:
    d, q = _blocks(stored, ("d", "<f2"), ("q", "V32"))
    return Groups(q.view(np.int8).reshape(-1, 1, 32), _single(d))


def _q2_k(stored: Array) -> Groups:
    scales, q, d, m = _blocks(stored, ("scales", "V16"), ("q", "V64"), ("d", "<f2"), ("m", "<f2"))
    scales = scales.view(np.uint8).reshape(-1, 16)
    codes = _planes(q, 32, 2).reshape(-1, 16, 16)
    return Groups(codes, _single(d) * (scales & 15), _single(m) * (scales >> 4), subtracted=True)


def _q3_k(stored: Array) -> Groups:
    high, q, scales, d = _blocks(stored, ("high", "V32"), ("q", "V64"), ("scales", "V12"), ("d", "<f2"))
    codes = _planes(q, 32, 2).reshape(-1, 16, 16)
    codes |= _planes(high, 32, 1).reshape(-1, 16, 16) << np.uint8(2)
    # Six bits per scale: four in the first 8 bytes, two in the last 4.
    packed = scales.view(np.uint8).reshape(-1, 12)
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    upper = np.concatenate([packed[:, 8:] >> shift & 3 for shift in (0, 2, 4, 6)], axis=1)
    of_groups = (low | upper << 4).astype(np.int8) - np.int8(32)
    return Groups(codes.view(np.int8) - np.int8(4), _single(d) * of_groups)


def _scales_and_minimums(packed: Array) -> tuple[Array, Array]:
    """Unpack 12 bytes to 8 scales and 8 minimums of six bits, (blocks, 8)."""
    a, b, c = packed.view(np.uint8).reshape(-1, 3, 4).swapaxes(0, 1)
    scales = np.concatenate([a & 63, c & 15 | a >> 2 & 48], axis=1)
    return scales, np.concatenate([b & 63, c >> 4 | b >> 2 & 48], axis=1)


def _q4_k(stored: Array) -> Groups:
    d, m, packed, q = _blocks(stored, ("d", "<f2"), ("m", "<f2"), ("packed", "V12"), ("q", "V128"))
    scales, minimums = _scales_and_minimums(packed)
    codes = _planes(q, 32, 4).reshape(-1, 8, 32)
    return Groups(codes, _single(d) * scales, _single(m) * minimums, subtracted=True)


def _q5_k(stored: Array) -> Groups:
    fields = ("d", "<f2"), ("m", "<f2"), ("packed", "V12"), ("high", "V32"), ("q", "V128")
    d, m, packed, high, q = _blocks(stored, *fields)
    scales, minimums = _scales_and_minimums(packed)
    codes = _planes(q, 32, 4).reshape(-1, 8, 32)
    codes |= _planes(high, 32, 1) << np.uint8(4)
    return Groups(codes, _single(d) * scales, _single(m) * minimums, subtracted=True)


def _q6_k(stored: Array) -> Groups:
    low, high, scales, d = _blocks(stored, ("low", "V128"), ("high", "V64"), ("scales", "V16"), ("d", "<f2"))
    codes = _planes(low, 64, 4).reshape(-1, 8, 32)
    codes |= _planes(high, 32, 2).reshape(-1, 8, 32) << np.uint8(4)
    codes = (codes.view(np.int8) - np.int8(32)).reshape(-1, 16, 16)
    return Groups(codes, _single(d) * scales.view(np.int8).reshape(-1, 16))


def _iq4_nl(stored: Array) -> Groups:
    d, q = _blocks(stored, ("d", "<f2"), ("q", "V16"))
    return Groups(_IQ4.take(_planes(q, 16, 4).reshape(-1, 1, 32)), _single(d))


def _iq4_xs(stored: Array) -> Groups:
    d, high, low, q = _blocks(stored, ("d", "<f2"), ("high", "<u2"), ("low", "V4"), ("q", "V128"))
    packed = low.view(np.uint8).reshape(-1, 4, 1)
    four = np.concatenate([packed & 15, packed >> 4], axis=2).reshape(-1, 8)
    two = (high[:, None] >> np.arange(0, 16, 2, dtype=np.uint16) & 3).astype(np.uint8)
    scales = (four | two << 4).astype(np.int8) - np.int8(32)
    return Groups(_IQ4.take(_planes(q, 16, 4).reshape(-1, 8, 32)), _single(d) * scales)


def _mxfp4(stored: Array) -> Groups:
    exponent, q = _blocks(stored, ("exponent", "u1"), ("q", "V16"))
    # Half of 2^(exponent - 127), since codes are doubled; the two smallest are subnormal numbers.
    bits = exponent.astype(np.uint32)
    bits = np.where(bits < 2, np.uint32(1 << 21) << bits, bits - np.uint32(1) << np.uint32(23))
    scales = bits.astype(np.uint32).view(np.float32)[:, None]
    return Groups(E2M1.take(_planes(q, 16, 4).reshape(-1, 1, 32)), scales)


GROUPS: dict[str, Callable[[Array], Groups]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
}
"""Type -> function of the bytes of blocks that returns their groups."""
