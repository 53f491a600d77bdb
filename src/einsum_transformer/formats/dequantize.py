"""Dequantize GGUF blocks to float32, in pieces that fit into the CPU cache.

Q8_0, Q4_0 and Q4_1 are unpacked here, with 16 bytes of nibbles as one NumPy element; the results are
bit-identical to `gguf.quants`. All other types use `gguf.quants`, which is imported on demand.
"""

from collections.abc import Callable

import numpy as np

_PIECE = 1 << 18  # output elements per piece: 1 MB, a multiple of every block size
_NIBBLES = np.uint64(0x0F0F0F0F0F0F0F0F)
_Q4_0 = np.dtype([("d", "<f2"), ("q", "V16")])
_Q4_1 = np.dtype([("d", "<f2"), ("m", "<f2"), ("q", "V16")])
_Q8_0 = np.dtype([("d", "<f2"), ("q", "V32")])

PACKED = {
    "Q8_0": np.dtype([("scales", "<f2"), ("codes", "i1", 32)]),
    "Q4_0": np.dtype([("scales", "<f2"), ("nibbles", "u1", 16)]),
    "Q4_1": np.dtype([("scales", "<f2"), ("minimums", "<f2"), ("nibbles", "u1", 16)]),
}
"""Type -> layout of a block of 32 values, for the types that can be used in their stored encoding. The low
nibbles are the first 16 values."""


def dequantize(stored: np.ndarray, dtype: str, block: tuple[int, int], out: np.ndarray) -> None:
    """Dequantize `stored`, the bytes of blocks of type `dtype`, into the flat float32 array `out`.

    `block` is (elements, bytes) of one block. Raises NotImplementedError for an unknown type.
    """
    elements, nbytes = block
    blocks = _PIECE // elements
    unpack = _UNPACK.get(dtype) or _unpack_with_gguf(dtype)
    with np.errstate(invalid="ignore", over="ignore"):  # scales in a malformed file may be inf or NaN
        for start in range(0, len(stored) // nbytes, blocks):
            piece = stored[start * nbytes : (start + blocks) * nbytes]
            unpack(piece, out[start * elements : (start + blocks) * elements].reshape(-1, elements))


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """Unpack 16-byte elements to rows of 32 bytes: the low nibbles of the 16 bytes, then the high ones."""
    rows = np.empty((len(packed), 2), "V16")
    words = packed.copy().view(np.uint64)
    rows[:, 0] = (words & _NIBBLES).view("V16")
    words >>= 4
    words &= _NIBBLES
    rows[:, 1] = words.view("V16")
    return rows.view(np.uint8)


def _unpack_q4_0(stored: np.ndarray, out: np.ndarray) -> None:
    blocks = stored.view(_Q4_0)
    out[...] = _nibbles(blocks["q"]).view(np.int8) - np.int8(8)
    out *= blocks["d"].astype(np.float32)[:, None]


def _unpack_q4_1(stored: np.ndarray, out: np.ndarray) -> None:
    blocks = stored.view(_Q4_1)
    out[...] = _nibbles(blocks["q"])
    out *= blocks["d"].astype(np.float32)[:, None]
    out += blocks["m"].astype(np.float32)[:, None]


def _unpack_q8_0(stored: np.ndarray, out: np.ndarray) -> None:
    blocks = stored.view(_Q8_0)
    out[...] = blocks["q"].copy().view(np.int8).reshape(out.shape)
    out *= blocks["d"].astype(np.float32)[:, None]


_UNPACK: dict[str, Callable[[np.ndarray, np.ndarray], None]] = {
    "Q4_0": _unpack_q4_0,
    "Q4_1": _unpack_q4_1,
    "Q8_0": _unpack_q8_0,
}


def _unpack_with_gguf(dtype: str) -> Callable[[np.ndarray, np.ndarray], None]:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize as gguf_dequantize

    if dtype not in GGMLQuantizationType.__members__:
        raise NotImplementedError(dtype)

    def unpack(stored: np.ndarray, out: np.ndarray) -> None:
        # One long row: gguf processes sixteen rows at a time, which is slow for short rows.
        out[...] = gguf_dequantize(stored.reshape(1, -1), GGMLQuantizationType[dtype]).reshape(out.shape)

    return unpack
