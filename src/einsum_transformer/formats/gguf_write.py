"""Write GGUF files with the `gguf` package: metadata, then one tensor after the other."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from einsum_transformer.errors import InputError
from einsum_transformer.formats.files import atomic_file
from einsum_transformer.formats.mapped import quoted

Array = np.ndarray

FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q4_0": 2, "Q4_1": 3}
"""Type of the matrices of a file -> its number in `general.file_type`."""
_CHARSMAP = "tokenizer.ggml.precompiled_charsmap"


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor to be written. dtype: a key of FILE_TYPES; read: returns its values as float32, in the order
    of the file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Array]


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Sequence[Planned],
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> None:
    """Write a GGUF file; an existing file is replaced once the new one is on disk.

    metadata: key -> bool, int, float, str, or a list of them; it contains general.architecture. Tensors are
    read and converted one at a time. progress: called with the number of written tensors and their total.
    Raises InputError for a value that its type cannot represent.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

    with atomic_file(path) as file, ExitStack() as opened:
        writer = GGUFWriter(file.name, metadata["general.architecture"])
        opened.callback(writer.close)
        for key, value in metadata.items():
            if key != "general.architecture":
                _add(writer, key, value)
        for tensor in tensors:
            code = GGMLQuantizationType[tensor.dtype]
            elements, nbytes = GGML_QUANT_SIZES[code]
            size = math.prod(tensor.shape) // elements * nbytes
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, code)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for i, tensor in enumerate(tensors, start=1):
            writer.write_tensor_data(converted(tensor))
            progress(i, len(tensors))


def converted(tensor: Planned) -> Array:
    """Read a tensor and convert it to its type, as ggml's reference quantization does."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    values = np.ascontiguousarray(tensor.read(), np.float32)
    if not np.isfinite(values).all():
        raise InputError(f"tensor {quoted(tensor.name)} contains nan or inf")
    # Scales of blocks are float16 too.
    if tensor.dtype not in ("F32", "BF16") and np.abs(values).max(initial=0) > np.finfo(np.float16).max:
        raise InputError(
            f"tensor {quoted(tensor.name)} contains values beyond the range of float16: use BF16 or F32"
        )
    return np.ascontiguousarray(quantize(values, GGMLQuantizationType[tensor.dtype]))


def _add(writer: Any, key: str, value: Any) -> None:
    """Add a key with the type that llama.cpp expects for such values."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        add = writer.add_uint32 if 0 <= value < 1 << 32 else writer.add_int64
        add(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value:  # the package rejects empty lists, which say nothing
        # Integers are otherwise int32.
        writer.add_array(key, bytes(value) if key == _CHARSMAP else list(value))
