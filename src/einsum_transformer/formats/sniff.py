"""Detect the kind of a file from its first bytes, independent of its name."""

import codecs
from pathlib import Path

from einsum_transformer.errors import InputError

_HEAD = 4096
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"GGUF", "GGUF"),
    (b"version https://git-lfs.github.com/spec/", "Git LFS pointer"),
    (b"version https://hawser.github.com/spec/", "Git LFS pointer"),
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"7z\xbc\xaf\x27\x1c", "7-Zip"),
    (b"PK\x03\x04", "zip"),
    (b"PK\x05\x06", "zip"),
    (b"PAR1", "Parquet"),
    (b"ARROW1", "Arrow"),
    (b"FEA1", "Arrow"),
    (b"\x89HDF\r\n\x1a\n", "HDF5"),
    (b"\x93NUMPY", "npy"),
    (b"SQLite format 3\x00", "SQLite"),
    (b"%PDF-", "PDF"),
    (b"\x89PNG", "PNG"),
    (b"\x7fELF", "ELF"),
    (b"lmgg", "GGML"),
    (b"fmgg", "GGML"),
    (b"tjgg", "GGML"),
    (b"algg", "GGML"),
    *((b"\x80" + bytes([protocol]), "pickle") for protocol in range(2, 6)),
)
COMPRESSED = frozenset({"gzip", "bzip2", "xz", "zstd", "7-Zip", "zip"})
"""Kinds that must be decompressed first. Checkpoints of torch.save are zip files too."""


def kind_of(path: Path) -> str:
    """Return the kind of a file: a name in `_MAGIC`, "safetensors", "JSON", "text", "binary" or "empty".

    "JSON" is UTF-8 text that begins with { or [, "text" any other UTF-8 text, "binary" anything else.
    Raises InputError if the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
        size = path.stat().st_size
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    return kind_of_bytes(head, size)


def is_json(path: Path) -> bool:
    """Return whether a file is JSON: by its contents, or by its suffix unless it contains tensors."""
    try:
        if not path.is_file():
            return False
        kind = kind_of(path)
        return kind == "JSON" or (path.suffix.lower() == ".json" and kind not in ("GGUF", "safetensors"))
    except (OSError, ValueError):  # not a valid path, or not readable
        return False


def kind_of_bytes(head: bytes, size: int) -> str:
    """Return the kind of a file of `size` bytes that begins with `head`."""
    if not head:
        return "empty"
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    if _is_safetensors(head, size):
        return "safetensors"
    text = _text(head, size)
    if text is None:
        return "binary"
    return "JSON" if text.lstrip()[:1] in ("{", "[") else "text"


def _is_safetensors(head: bytes, size: int) -> bool:
    """Return whether an 8-byte header length is followed by the JSON object of a safetensors header."""
    length = int.from_bytes(head[:8], "little")
    return len(head) > 9 and 2 <= length <= size - 8 and head[8:9] == b"{" and b"\x00" in head[:8]


def _text(head: bytes, size: int) -> str | None:
    """Return the head as UTF-8 text, or None; a character truncated at the end is dropped."""
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head, final=len(head) == size)
    except UnicodeDecodeError:
        return None
    return None if "\x00" in text else text
