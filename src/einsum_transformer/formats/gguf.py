"""The GGUF format, versions 2 and 3, little endian: a bounded header parser and a memory-mapped reader.

A file is a header (magic, version, counts), typed key-value pairs, tensor infos, and the tensors' bytes at
aligned offsets (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Every length and count is checked
against the remaining bytes before it is used.
"""

import math
import mmap
import re
import struct
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from einsum_transformer.errors import FormatError
from einsum_transformer.formats import Packed, TensorInfo, as_rows
from einsum_transformer.formats.dequantize import dequantize
from einsum_transformer.formats.encodings import Blocks
from einsum_transformer.formats.mapped import DTYPES, MappedFile, quoted
from einsum_transformer.formats.unsupported import instead

_MIN_PAIR, _MIN_TENSOR = 13, 24  # bytes of the shortest key-value pair and tensor info
_MAX_ARRAY = 1 << 24  # elements; the largest vocabularies have 2^18
_MAX_NESTING = 4
_MAX_DIMS = 4
_BAD_NAME = re.compile(r"[/\\\x00-\x1f\x7f-\x9f]|\.\.|^$")

# ggml type number -> name, elements per block, bytes per block
_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}
_BLOCKS = {name: (elements, nbytes) for name, elements, nbytes in _TYPES.values()}
ENCODINGS = frozenset(_BLOCKS) - DTYPES.keys()
"""The types of blocks, whose tensors can stay in their encoding (`read_packed`)."""

# Metadata type number -> NumPy type
_NUMBERS = {
    0: "u1",
    1: "i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
# general.architecture -> kind, for files that are not models and may lack general.type
_NOT_MODELS = {"clip": "mmproj", "mmproj": "mmproj", "controlvector": "control vector", "imatrix": "imatrix"}
# general.type of files that are not models, as the gguf package and older converters write it
_OTHER_KINDS = frozenset({"adapter", "lora", "mmproj", "imatrix", "control vector", "controlvector", "vocab"})
_EMBEDDING = "token_embd.weight"
_BOOL, _STRING, _ARRAY = 7, 8, 9
_MIN_VALUE = {code: np.dtype(dtype).itemsize for code, dtype in _NUMBERS.items()} | {_STRING: 8, _ARRAY: 12}


class GGUFFile(MappedFile):
    """A GGUF file as a TensorSource: plain types are read as views of the map, quantized types as float32.

    Shapes are in NumPy's order (reversed in the file). The values of `metadata` are str, int, float, bool and
    lists of them. Raises FormatError if the contents violate the format.
    """

    metadata: dict[str, Any]

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        try:
            header = _Header(self.path, self._map)
            self.metadata, self._tensors = header.metadata, header.tensors
        except BaseException:
            self.close()
            raise

    @property
    def purpose(self) -> str:
        """The kind of a file that is not a model ("adapter", "imatrix", "mmproj", ...), "" for a model."""
        kind, architecture = _declared_kind(self.metadata), self.metadata.get("general.architecture")
        if kind in _OTHER_KINDS:
            return kind
        if isinstance(architecture, str) and architecture in _NOT_MODELS:
            return _NOT_MODELS[architecture]
        # Like llama.cpp, accept any other type as a model if the file contains token embeddings.
        return "" if kind == "model" or _EMBEDDING in self.names() else kind[:40]

    def read(self, name: str) -> np.ndarray:
        info = self.info(name)
        if info.dtype in DTYPES:
            return self._view(info)
        return self._dequantized(info, self._stored(info)).reshape(info.shape)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        info = self.info(name)
        if info.dtype in DTYPES:
            return as_rows(self._view(info))[start:stop]
        if len(info.shape) < 2:
            return self.read(name)[start:stop]
        row_bytes = info.nbytes // math.prod(info.shape[:-1])  # whole blocks, checked in the header
        stored = self._stored(info)[start * row_bytes : stop * row_bytes]
        return self._dequantized(info, stored).reshape(-1, info.shape[-1])

    def read_packed(self, name: str) -> Packed | None:
        info = self.info(name)
        if info.dtype in DTYPES or len(info.shape) < 2:
            return None
        rows, (elements, nbytes) = math.prod(info.shape[:-1]), _BLOCKS[info.dtype]
        stored = self._stored(info)
        self._dequantized(info, stored[:nbytes])  # an unknown type is an error now
        parts, encoding = {"stored": stored.reshape(rows, -1)}, Blocks(info.dtype, elements, nbytes)
        return Packed(info.dtype, (rows, info.shape[-1]), parts, encoding=encoding)

    def _dequantized(self, info: TensorInfo, stored: np.ndarray) -> np.ndarray:
        elements, nbytes = _BLOCKS[info.dtype]
        out = np.empty(len(stored) // nbytes * elements, np.float32)
        try:
            dequantize(stored, info.dtype, _BLOCKS[info.dtype], out)
        except NotImplementedError:
            raise FormatError(
                f"{info.file}: tensor {quoted(info.name)} has type {info.dtype}, "
                "which cannot be dequantized; convert the file to another type"
            ) from None
        return out


def _declared_kind(metadata: dict[str, Any]) -> str:
    """Return the file type in the metadata, in lower case; LoRA files of older converters only have
    adapter.type."""
    declared = metadata.get("general.type", "adapter" if "adapter.type" in metadata else "model")
    return str(declared).strip().lower()


class _Header:
    """The parsed header of a GGUF file; during parsing, also a cursor that stays within the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.size, self.pos = path, data, len(data), 0
        tensor_count, pair_count = self._counts()
        self.metadata = self._pairs(pair_count)
        self.alignment = self._alignment()
        self.tensors = self._tensors(tensor_count)

    def _fail(self, reason: str) -> NoReturn:
        raise FormatError(f"{self.path}: {reason} (at byte {self.pos})")

    def _take(self, nbytes: int) -> bytes:
        if nbytes > self.size - self.pos:
            self._fail(f"expected {nbytes} bytes, but the file ends after {self.size - self.pos}")
        self.pos += nbytes
        return self.data[self.pos - nbytes : self.pos]

    def _uint(self, nbytes: int) -> int:
        return int.from_bytes(self._take(nbytes), "little")

    def _count(self, what: str, min_bytes: int) -> int:
        """Read a 64-bit count of items of at least `min_bytes` bytes each; raise if they exceed the file."""
        count = self._uint(8)
        if count * min_bytes > self.size - self.pos:
            self._fail(f"{count} {what} cannot fit into the {self.size - self.pos} bytes that are left")
        return count

    def _counts(self) -> tuple[int, int]:
        if self._take(4) != b"GGUF":
            is_it = instead(self.data[:4096], self.size, "GGUF") or "it does not start with GGUF"
            raise FormatError(f"{self.path}: not a GGUF file: {is_it}")
        version = self._uint(4)
        if version & 0xFFFF == 0:
            raise FormatError(
                f"{self.path}: big-endian GGUF files are not supported; convert it to little endian"
            )
        if version not in (2, 3):
            raise FormatError(
                f"{self.path}: GGUF version {version} is not supported, only 2 and 3; convert it again"
            )
        return self._count("tensors", _MIN_TENSOR), self._count("key-value pairs", _MIN_PAIR)

    def _pairs(self, count: int) -> dict[str, Any]:
        pairs: dict[str, Any] = {}
        for _ in range(count):
            key = self._string()
            if key in pairs:
                self._fail(f"the key {quoted(key)} occurs twice")
            pairs[key] = self._value(self._uint(4))
        return pairs

    def _value(self, code: int) -> Any:
        if code == _STRING:
            return self._string()
        if code == _ARRAY:
            return self._array(1)
        if code not in _NUMBERS:
            self._fail(f"metadata type {code} is unknown")
        return self._numbers(code, 1)[0]

    def _array(self, depth: int) -> list[Any]:
        code = self._uint(4)
        if code not in _MIN_VALUE:
            self._fail(f"metadata type {code} is unknown")
        count = self._count("array elements", _MIN_VALUE[code])
        if count > _MAX_ARRAY:
            self._fail(f"an array of {count} elements exceeds the limit of {_MAX_ARRAY}")
        if code == _STRING:
            return self._strings(count)
        if code != _ARRAY:
            return self._numbers(code, count)
        if depth == _MAX_NESTING:
            self._fail(f"arrays are nested more than {_MAX_NESTING} deep")
        return [self._array(depth + 1) for _ in range(count)]

    def _numbers(self, code: int, count: int) -> list[Any]:
        raw = self._take(count * _MIN_VALUE[code])
        if code == _BOOL and raw.strip(b"\0\1"):
            self._fail("a bool is neither 0 nor 1")
        return np.frombuffer(raw, _NUMBERS[code]).tolist()

    def _string(self) -> str:
        return self._strings(1)[0]

    def _strings(self, count: int) -> list[str]:
        # Vocabularies make this the hot loop of the header, so it does not use the methods above.
        data, size, pos = self.data, self.size, self.pos
        length_at = struct.Struct("<Q").unpack_from
        strings = []
        try:
            for _ in range(count):
                start = pos + 8
                pos = start + length_at(data, pos)[0]
                if pos > size:
                    self._fail(f"a string at byte {start - 8} is longer than the rest of the file")
                strings.append(data[start:pos].decode())
        except struct.error:
            self._fail("expected a string, but the file ends")
        except UnicodeDecodeError:
            self._fail(f"the string at byte {start - 8} is not UTF-8")
        self.pos = pos
        return strings

    def _alignment(self) -> int:
        part, kind = self.metadata.get("split.no"), _declared_kind(self.metadata)
        # Later parts of a split model may omit it, and importance matrices do.
        needed = kind not in _OTHER_KINDS and (type(part) is not int or part < 1)
        if not isinstance(self.metadata.get("general.architecture", None if needed else ""), str):
            raise FormatError(f"{self.path}: general.architecture must be present and a string")
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
            raise FormatError(f"{self.path}: general.alignment must be a power of two, not {alignment!r:.40}")
        return alignment

    def _tensors(self, count: int) -> dict[str, TensorInfo]:
        entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(count):
            name = self._string()
            if _BAD_NAME.search(name):
                self._fail(f"{quoted(name)} is not a valid tensor name")
            if name in entries:
                self._fail(f"the tensor {quoted(name)} occurs twice")
            dims = self._uint(4)
            if dims > _MAX_DIMS:
                self._fail(f"tensor {quoted(name)} has {dims} dimensions, more than {_MAX_DIMS}")
            shape = tuple(self._uint(8) for _ in range(dims))[::-1]
            entries[name] = shape, self._uint(4), self._uint(8)
        start = -(-self.pos // self.alignment) * self.alignment
        tensors = {name: self._tensor(name, *entry, start) for name, entry in entries.items()}
        end = start
        for info in sorted(tensors.values(), key=lambda info: info.offset):
            if info.offset < end:
                raise FormatError(f"{self.path}: tensor {quoted(info.name)} overlaps another tensor")
            end = info.offset + info.nbytes
        return tensors

    def _tensor(self, name: str, shape: tuple[int, ...], code: int, offset: int, start: int) -> TensorInfo:
        def fail(reason: str) -> NoReturn:
            raise FormatError(f"{self.path}: tensor {quoted(name)}: {reason}")

        if code not in _TYPES:
            fail(f"ggml type number {code} is unknown")
        dtype, elements, block_bytes = _TYPES[code]
        if 0 in shape:
            fail(f"shape {shape} has a dimension of 0")
        if elements > 1 and (not shape or shape[-1] % elements):
            fail(f"shape {shape} does not consist of whole {dtype} blocks of {elements} elements")
        if offset % self.alignment:
            fail(f"its offset {offset} is not a multiple of the alignment {self.alignment}")
        nbytes = math.prod(shape) // elements * block_bytes
        if start + offset + nbytes > self.size:
            fail(f"its {nbytes} bytes at offset {offset} of the data extend beyond the end of the file")
        return TensorInfo(name, shape, dtype, nbytes, self.path, start + offset)
