"""Read JSON files of limited size, and replace files atomically."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from einsum_transformer.errors import FormatError, InputError
from einsum_transformer.formats.mapped import quoted
from einsum_transformer.formats.sniff import kind_of_bytes
from einsum_transformer.formats.unsupported import instead

_LARGEST = 16 << 20


def read_json(path: Path, what: str = "config", most: int = _LARGEST) -> dict[str, Any]:
    """Return the JSON object in a file of at most `most` bytes; `what`: the name of the content in messages.

    Raises InputError if the file cannot be read, is larger, or does not contain a JSON object.
    """
    try:
        if path.stat().st_size > most:
            raise FormatError(f"{path}: {what} is larger than {most} bytes")
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    return parse_json(path, what, raw)


def parse_json(path: Path, what: str, raw: bytes) -> dict[str, Any]:
    """Parse an untrusted JSON object: UTF-8, no duplicate keys at any level, no lone surrogates in keys."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        parsed: dict[str, Any] = {}
        for key, value in pairs:
            if key in parsed:
                raise ValueError(f"the key {quoted(key)} occurs twice")
            key.encode()  # raises for lone surrogates
            parsed[key] = value
        return parsed

    try:
        parsed = json.loads(raw.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        is_it = "" if kind_of_bytes(raw[:4096], len(raw)) == "text" else instead(raw, len(raw), "JSON")
        raise FormatError(f"{path}: {what} is not valid JSON: {is_it or error}") from None
    if not isinstance(parsed, dict):
        raise FormatError(f"{path}: {what} is not a JSON object")
    return parsed


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object; an existing file is replaced once the new one is on disk."""
    with atomic_file(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a new file that replaces `path` once it is on disk, and is deleted upon failure."""
    temporary = path.with_name(f".{path.name}.{os.urandom(6).hex()}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            sync(file)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_writable(path: Path, name: str) -> None:
    """Raise InputError if `path` is a folder or cannot be written; called before a long computation.

    name: the argument that gives the path, for the message.
    """
    if path.is_dir():
        raise InputError(f"`{name}` {path}: is a folder, expected a file")
    try:
        # Permissions do not describe a read-only file system, so a file is written and removed.
        temporary = path.with_name(f".{path.name}.{os.urandom(6).hex()}.tmp")
        temporary.open("xb").close()
        temporary.unlink()
    except OSError as error:
        raise InputError(f"`{name}` {path}: cannot be written: {error.strerror}") from None


def sync(file: BinaryIO) -> None:
    """Flush everything written to `file` to disk."""
    file.flush()
    os.fsync(file.fileno())
