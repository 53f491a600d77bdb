"""Files and folders that must be rejected, and values that are invalid in most config keys."""

from __future__ import annotations

import gzip
import io
import lzma
import math
import struct
import zipfile
from typing import Any

import numpy as np

NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 3, 1.5, -0.0, "x", "", [], {}, [1], {"a": 1}, 1 << 24, 1 << 31,
    (1 << 63) - 1, 1 << 63, 10**30, 10**400, math.nan, math.inf, -math.inf, 1e-320, 1e308,
]  # fmt: skip

INDEXES = [
    ("", "not valid JSON"),
    ("[]", "not a JSON object"),
    ("{}", "no weight_map"),
    ('{"weight_map": []}', "no weight_map"),
    ('{"weight_map": {}}', "no weight_map"),
    ('{"weight_map": {"w": "a.safetensors", "w": "b.safetensors"}}', "'w' occurs twice"),
    ('{"weight_map": {}, "weight_map": {}}', "'weight_map' occurs twice"),
]
"""(text of model.safetensors.index.json, part of the error message)."""

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 99\n"


def torch_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
    return buffer.getvalue()


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, w=np.zeros(2))
    return buffer.getvalue()


KINDS = [
    (LFS, "a Git LFS pointer, not the file itself: run `git lfs pull`"),
    (gzip.compress(b"weights" * 99, mtime=0), "compressed with gzip: unpack it first"),
    (lzma.compress(b"weights" * 99), "compressed with xz: unpack it first"),
    (b"\x28\xb5\x2f\xfd" + bytes(99), "compressed with zstd: unpack it first"),
    (torch_zip(), "unpickling runs code"),
    (npz(), "an archive of NumPy arrays"),
    (b"\x80\x04K\x01.", "unpickling runs code"),
    (b"tjgg" + bytes(99), "a GGML file (older than GGUF)"),
    (b"algg" + bytes(99), "a GGML file (older than GGUF)"),
    (b"<!DOCTYPE html><html>Log in</html>", "a web page"),
    (b"\x89HDF\r\n\x1a\n" + bytes(99), "an HDF5 file"),
    (b"PAR1" + bytes(99), "a Parquet file"),
    (b"", "empty"),
]


FOLDERS = {
    "pytorch_model.bin": "pytorch_model.bin: pickle checkpoints are not supported",
    "pytorch_model-00001-of-00002.bin tf_model.h5": "pickle checkpoints are not supported",
    "consolidated.safetensors params.json": "Mistral's own format",
    "consolidated.00.pth params.json": "Meta's original format",
    "weights.npz": "an old MLX model",
    "weights.00.npz": "an old MLX model",
    "tf_model.h5": "a TensorFlow model",
    "flax_model.msgpack": "a Flax model",
    "model.onnx": "an ONNX model",
    "rank0.engine": "a TensorRT-LLM model",
    "rank0.safetensors": "a TensorRT-LLM model",
    "openvino_model.xml": "an OpenVINO model",
    "model_index.json": "a diffusers pipeline",
    "modules.json": "a sentence-transformers model",
    "__0_0.distcp": "a sharded PyTorch (FSDP) checkpoint",
    "zero_to_fp32.py latest": "a DeepSpeed checkpoint",
    "latest_checkpointed_iteration.txt": "a Megatron-LM checkpoint",
    "model.bin shared_vocabulary.json": "a CTranslate2 model",
    "model-00001-of-00002.safetensors": "no model.safetensors.index.json",
    "pytorch.safetensors": "contains pytorch.safetensors, not model.safetensors: rename it",
    "adapter_model.safetensors": "an adapter, not a model: pass the base model and give the adapter as",
    "adapters.safetensors 0000100_adapters.safetensors": "an adapter, not a model",
    "model.safetensors.gz": "model.safetensors.gz: a file compressed with gz: unpack it first",
    "config.json m.gguf.zst": "m.gguf.zst: a file compressed with zst",
    "a/config.json b/config.json c/notes": "choose one of a, b",
    "snapshots/0123/config.json refs/main": "choose one of snapshots/0123",
    "notes.txt": "neither model.safetensors nor",
    "": "the folder is empty",
}


UINT8, UINT32, BOOL, STRING, ARRAY = 0, 4, 7, 8, 9
F32, Q8_0, Q8_1 = 0, 8, 9


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str | bytes, code: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", code) + value


def tensor(name: str, dims=(8,), code=F32, offset=0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, code, offset)


ARCHITECTURE = pair("general.architecture", STRING, text("llama"))


def raw_file(
    pairs=(ARCHITECTURE,), tensors=(), data=b"", version=3, pair_count=None, tensor_count=None, alignment=32
) -> bytes:
    header = b"GGUF" + struct.pack(
        "<IQQ",
        version,
        len(tensors) if tensor_count is None else tensor_count,
        len(pairs) if pair_count is None else pair_count,
    )
    header += b"".join(pairs) + b"".join(tensors)
    return header + b"\0" * (-len(header) % alignment) + data


def one_tensor(*args, data=b"\0" * 32, **kwargs) -> bytes:
    return raw_file(tensors=[tensor(*args, **kwargs)], data=data)


BOMB = (1 << 63).to_bytes(8, "little")
NESTED = struct.pack("<IQ", ARRAY, 1) * 4 + struct.pack("<IQB", UINT8, 1, 0)
HOSTILE_GGUF = {
    "49 bytes with an array of 2^63": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + pair("k", ARRAY, struct.pack("<I", UINT8) + BOMB),
        "9223372036854775808 array elements",
    ),
    "array of 2^63 strings": (
        raw_file([ARCHITECTURE, pair("k", ARRAY, struct.pack("<I", STRING) + BOMB)]),
        "array elements cannot fit",
    ),
    "string of 2^63 bytes": (raw_file([pair("general.architecture", STRING, BOMB)]), "longer than the rest"),
    "string of 2^64-1 bytes": (raw_file([pair("k", STRING, b"\xff" * 8)]), "longer than the rest"),
    "key of 2^63 bytes": (raw_file([BOMB + b"\0" * 9]), "longer than the rest"),
    "string in array too long": (
        raw_file([ARCHITECTURE, pair("k", ARRAY, struct.pack("<IQ", STRING, 1) + BOMB)]),
        "longer than the rest",
    ),
    "2^63 pairs": (raw_file(pair_count=1 << 63), "key-value pairs cannot fit"),
    "one pair more than there is room for": (raw_file(pair_count=6), "6 key-value pairs cannot fit"),
    "2^63 tensors": (raw_file(tensor_count=1 << 63), "tensors cannot fit"),
    "array over the limit": (
        raw_file(
            [ARCHITECTURE, pair("k", ARRAY, struct.pack("<IQ", UINT8, (1 << 24) + 1) + bytes((1 << 24) + 1))]
        ),
        "exceeds the limit",
    ),
    "arrays nested too deep": (raw_file([ARCHITECTURE, pair("k", ARRAY, NESTED)]), "nested more than 4"),
    "wrong magic": (b"GGML" + raw_file()[4:], "does not start with GGUF"),
    "version 1": (raw_file(version=1), "version 1 is not supported"),
    "version 4": (raw_file(version=4), "version 4 is not supported"),
    "big endian": (b"GGUF" + struct.pack(">I", 3) + raw_file()[8:], "big-endian"),
    "unknown value type": (raw_file([pair("k", 13, b"\0" * 8)]), "metadata type 13 is unknown"),
    "unknown element type": (
        raw_file([pair("k", ARRAY, struct.pack("<IQ", 13, 0))]),
        "metadata type 13 is unknown",
    ),
    "bool of 2": (raw_file([pair("k", BOOL, b"\2")]), "neither 0 nor 1"),
    "string not UTF-8": (raw_file([pair("k", STRING, text(b"\xff"))]), "not UTF-8"),
    "key not UTF-8": (raw_file([pair(b"\xff", UINT8, b"\0")]), "not UTF-8"),
    "key twice": (raw_file([ARCHITECTURE, ARCHITECTURE]), "'general.architecture' occurs twice"),
    "no architecture": (raw_file([pair("k", UINT8, b"\0")]), "general.architecture must"),
    "architecture not a string": (
        raw_file([pair("general.architecture", UINT8, b"\0")]),
        "general.architecture must",
    ),
    "alignment 0": (
        raw_file([ARCHITECTURE, pair("general.alignment", UINT32, b"\0" * 4)]),
        "power of two, not 0",
    ),
    "alignment 24": (
        raw_file([ARCHITECTURE, pair("general.alignment", UINT32, struct.pack("<I", 24))]),
        "power of two, not 24",
    ),
    "alignment a bool": (raw_file([ARCHITECTURE, pair("general.alignment", BOOL, b"\1")]), "not True"),
    "name that leaves": (one_tensor("../../x"), r"'\.\./\.\./x' is not a valid tensor name"),
    "name with two dots": (one_tensor("a..b"), "not a valid tensor name"),
    "name with a slash": (one_tensor("a/b"), "not a valid tensor name"),
    "name with a backslash": (one_tensor("a\\b"), "not a valid tensor name"),
    "name with a control character": (one_tensor("a\nb"), "not a valid tensor name"),
    "name with NUL": (one_tensor("a\0b"), "not a valid tensor name"),
    "empty name": (one_tensor(""), "not a valid tensor name"),
    "tensor twice": (
        raw_file(tensors=[tensor("x"), tensor("x", offset=32)], data=b"\0" * 64),
        "'x' occurs twice",
    ),
    "overlapping tensors": (
        raw_file(tensors=[tensor("x", (16,)), tensor("y", offset=32)], data=b"\0" * 64),
        "'y' overlaps",
    ),
    "tensors in one place": (raw_file(tensors=[tensor("x"), tensor("y")], data=b"\0" * 32), "overlaps"),
    "unaligned tensor": (one_tensor("x", offset=8, data=b"\0" * 64), "not a multiple of the alignment"),
    "tensor past the end": (one_tensor("x", offset=32), "beyond the end"),
    "tensor one byte too long": (one_tensor("x", data=b"\0" * 31), "beyond the end"),
    "offset 2^63": (one_tensor("x", offset=1 << 63), "beyond the end"),
    "five dimensions": (one_tensor("x", (1, 1, 1, 1, 8)), "has 5 dimensions"),
    "2^32-1 dimensions": (
        raw_file(tensors=[text("x") + b"\xff" * 4 + b"\0" * 32]),
        "has 4294967295 dimensions",
    ),
    "dimension of 0": (one_tensor("x", (8, 0)), "dimension of 0"),
    "product of 2^64": (one_tensor("x", (1 << 32, 1 << 32)), "beyond the end"),
    "product of 2^256": (one_tensor("x", (1 << 63,) * 4), "beyond the end"),
    "partial block": (one_tensor("x", (48,), Q8_0, data=b"\0" * 68), "whole Q8_0 blocks of 32"),
    "block without dimensions": (one_tensor("x", (), Q8_0, data=b"\0" * 68), "whole Q8_0 blocks of 32"),
    "unknown ggml type": (one_tensor("x", code=77), "ggml type number 77 is unknown"),
    "removed ggml type": (one_tensor("x", code=4), "ggml type number 4 is unknown"),
    "empty": (b"", "empty"),
}
