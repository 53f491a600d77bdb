"""The safetensors format: a memory-mapped reader, an atomic writer, and exact conversion to bfloat16.

A file is an 8-byte little-endian header length, a JSON header `{name: {dtype, shape, data_offsets}}`, and the
tensors' bytes without gaps (https://github.com/huggingface/safetensors).
"""

import json
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from einsum_transformer.errors import FormatError, InputError
from einsum_transformer.formats import TensorInfo, as_rows
from einsum_transformer.formats.files import atomic_file, parse_json
from einsum_transformer.formats.mapped import DTYPES, FILE_DTYPES, MappedFile, quoted
from einsum_transformer.formats.unsupported import instead

_MAX_HEADER = 100_000_000
_MAX_DIMS = 64  # NumPy's own limit


class SafetensorsFile(MappedFile):
    """A safetensors file as a TensorSource; its arrays are views of the mapped file, in the file's types.

    Raises FormatError if the contents violate the format.
    """

    metadata: dict[str, str]

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        try:
            self._tensors, self.metadata = _read_header(self.path, self._map)
        except BaseException:
            self.close()
            raise

    def read(self, name: str) -> np.ndarray:
        info = self.info(name)
        if info.dtype == "BOOL" and self._stored(info).max(initial=0) > 1:
            raise FormatError(f"{self.path}: tensor {quoted(name)} is BOOL but has a byte other than 0 and 1")
        return self._view(info)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return as_rows(self.read(name))[start:stop]


def _read_header(path: Path, data: mmap.mmap) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    if len(data) < 8:
        is_it = instead(data[:], len(data), "safetensors")
        raise FormatError(
            f"{path}: {len(data)} bytes are too few for a safetensors file{is_it and f': {is_it}'}"
        )
    length = int.from_bytes(data[:8], "little")
    if length > min(_MAX_HEADER, len(data) - 8):
        if is_it := instead(data[:4096], len(data), "safetensors"):
            raise FormatError(f"{path}: not a safetensors file: {is_it}")
        raise FormatError(
            f"{path}: a header of {length} bytes does not fit into this file of {len(data)} bytes "
            f"(or exceeds {_MAX_HEADER}); the file is truncated or is not safetensors"
        )
    raw = data[8 : 8 + length].rstrip(b" ")
    if not (raw.startswith(b"{") and raw.endswith(b"}")):
        raise FormatError(f"{path}: the safetensors header does not start with {{ and end with }} and spaces")
    header = parse_json(path, "the safetensors header", raw)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError(f"{path}: __metadata__ must map strings to strings")
    start = 8 + length
    tensors = {name: _tensor_info(path, name, entry, start, len(data)) for name, entry in header.items()}
    _check_no_gaps(path, tensors, start, len(data))
    return tensors, metadata


def _tensor_info(path: Path, name: str, entry: Any, start: int, size: int) -> TensorInfo:
    def fail(reason: str) -> FormatError:
        return FormatError(f"{path}: tensor {quoted(name)}: {reason}")

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise fail("its header entry must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise fail(f"dtype {quoted(str(dtype))} is not one of {', '.join(DTYPES)}")
    if not _are_counts(shape) or len(shape) > _MAX_DIMS:
        raise fail(f"shape must be a list of at most {_MAX_DIMS} integers in 0 ... 2^63-1")
    if not _are_counts(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= size - start:
        raise fail(f"data_offsets must be [begin, end] inside the {size - start} bytes of data")
    itemsize = DTYPES[dtype][1]
    if math.prod(max(size, 1) for size in shape) * itemsize >= 1 << 63:
        raise fail(f"shape {shape} is too large for an array")
    nbytes = math.prod(shape) * itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise fail(
            f"{dtype} {shape} takes {nbytes} bytes, but its data_offsets span {offsets[1] - offsets[0]}"
        )
    return TensorInfo(name, tuple(shape), dtype, nbytes, path, start + offsets[0])


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _check_no_gaps(path: Path, tensors: Mapping[str, TensorInfo], start: int, size: int) -> None:
    end = start
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes)):
        if info.offset != end:
            problem = "overlaps another tensor" if info.offset < end else "has unused bytes before it"
            raise FormatError(
                f"{path}: tensor {quoted(info.name)} {problem} (byte {info.offset - start} of the data)"
            )
        end += info.nbytes
    if end != size:
        raise FormatError(f"{path}: the last {size - end} bytes do not belong to any tensor")


@dataclass(frozen=True, slots=True)
class Entry:
    """The header entry of a tensor to be written."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def describe(tensors: Mapping[str, np.ndarray]) -> dict[str, Entry]:
    """Return the header entries of `tensors`; raise InputError for an unsupported name or type."""
    entries = {}
    for name in tensors:
        tensor = tensors[name]
        if not isinstance(name, str) or name == "__metadata__":
            raise InputError(f"{name!r} is not a valid tensor name in a safetensors file")
        if not isinstance(tensor, np.ndarray) or tensor.dtype.name not in FILE_DTYPES:
            kind = tensor.dtype.name if isinstance(tensor, np.ndarray) else type(tensor).__name__
            raise InputError(f"tensor {quoted(name)}: safetensors does not support {kind}; convert it first")
        entries[name] = Entry(FILE_DTYPES[tensor.dtype.name], tensor.shape, tensor.nbytes)
    return entries


def write_safetensors(path: str | Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write `tensors` to `path` one by one; an existing file is replaced once the new one is on disk.

    Each tensor is accessed twice (for its shape, then for its data), so that a mapping that creates arrays on
    access holds one at a time. Raises InputError for a name or type that the format does not support.
    """
    entries = describe(tensors)
    with atomic_file(Path(path)) as file:
        write_tensors(file, tensors, entries)


def write_tensors(file: BinaryIO, tensors: Mapping[str, np.ndarray], entries: Mapping[str, Entry]) -> None:
    """Write the header and the data of the `tensors` that `entries` describes."""
    # Writing wide types first aligns every tensor to its type.
    order = sorted(entries, key=lambda name: (-DTYPES[entries[name].dtype][1], name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        entry = entries[name]
        begin, end = end, end + entry.nbytes
        header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [begin, end]}
    raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    if len(raw) > _MAX_HEADER:
        raise InputError(
            f"the safetensors header would take {len(raw)} bytes; at most {_MAX_HEADER} are allowed"
        )
    file.write(len(raw).to_bytes(8, "little") + raw)
    for name in order:
        tensor = tensors[name]
        flat = np.ascontiguousarray(tensor, tensor.dtype.newbyteorder("<")).reshape(-1)
        file.write(flat.view(np.uint8).data)


def float32_to_bf16(x: np.ndarray) -> np.ndarray:
    """Convert float32 to ml_dtypes.bfloat16: round to nearest even, preserve the upper bits of NaN payloads.

    ml_dtypes alone replaces every NaN by one quiet NaN; here only a payload without upper bits becomes it.
    """
    import ml_dtypes

    with np.errstate(invalid="ignore", over="ignore"):
        rounded = x.astype(ml_dtypes.bfloat16)
    nan = np.isnan(x)
    if nan.any():
        upper = (x[nan].view(np.uint32) >> 16).astype(np.uint16)
        rounded.view(np.uint16)[nan] = np.where(upper & 0x7F, upper, upper | 0x40)
    return rounded
