"""Reading of data files as plain text or JSON records; the content of a file decides which."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from einsum_transformer.errors import InputError
from einsum_transformer.formats.files import parse_json
from einsum_transformer.formats.sniff import COMPRESSED, kind_of_bytes
from einsum_transformer.notes import note

_HEAD = 4096
_COMMENTS = 50  # lines that are searched for a JSON record
_LIKE_JSON = re.compile(r"""\s*[\[{][\s\[{]*(["']|\w+\s*:\s*["'\[{\d])""")
_SPACE = " \t\r\ufeff"
_LARGEST = 1 << 31  # bytes; the token ids of such a file take several times this memory
_LINES = (".jsonl", ".ndjson", ".jsonlines")
_MARKUP = (".html", ".htm", ".xml", ".xhtml", ".svg")
_UNICODE = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_TABLES = {".csv": "comma-separated values", ".tsv": "tab-separated values"}
_CONVERT = {
    "Parquet": "a Parquet file; convert it to JSONL first (datasets: Dataset.to_json)",
    "Arrow": "an Arrow file; convert it to JSONL first (datasets: Dataset.to_json)",
    "Git LFS pointer": "a Git LFS pointer, not the data itself; get it with git lfs pull",
    "safetensors": "a weights file; expected text or JSONL",
    "GGUF": "a weights file; expected text or JSONL",
    "GGML": "a weights file; expected text or JSONL",
    "PDF": "a PDF file; extract its text first (pdftotext)",
}


@dataclass(frozen=True, slots=True)
class Record:
    """A JSON object of a file."""

    values: dict[str, Any]
    place: str
    """Its location for messages: `file: line 3`, or `file: record 3`."""


@dataclass(frozen=True, slots=True)
class Data:
    """The content of a file: its text, and its JSON records (None for plain text)."""

    path: Path
    text: str
    records: list[Record] | None
    doubt: str = ""
    """Why a file that looks like JSON records is read as plain text."""


def read_data(path: str | Path, known: Callable[[dict[str, Any]], bool], part: str = "train") -> Data:
    """Read a data file; for a folder (the layout of mlx-lm), read its `<part>.jsonl`.

    JSON records are JSONL, an array of objects, or concatenated objects over any number of lines. A file
    without a JSON suffix is read as records too, with a note, if `known` accepts its first record.
    Errors: InputError that names the file and the remedy, for a file that is neither text nor JSON.
    """
    path = Path(path)
    if path.is_dir():
        path = _in_folder(path, part)
    raw = _read(path)
    text = _decoded(raw, str(path))
    if path.suffix.lower() in _TABLES:
        raise InputError(
            f"{path}: {_TABLES[path.suffix.lower()]}; convert it to JSONL, or name it .txt for plain text"
        )
    if not text.strip():
        raise InputError(f"{path}: contains no {'lines' if path.suffix.lower() in _LINES else 'text'}")
    if path.suffix.lower() in (".json", *_LINES):
        return Data(path, text, list(_records(path, text)))
    if text.lstrip()[:5].lower() == "{\\rtf":
        raise InputError(f"{path}: an RTF document; save it as plain text first")
    if text.lstrip()[:1] in ("{", "["):
        records, doubt = _sniffed(path, text, known)
    else:
        records, doubt = None, _record_inside(text, known)
    if doubt:
        note(f"{path}: {doubt}; it is read as plain text")
    if records is not None or doubt:
        return Data(path, text, records, doubt)
    if path.suffix.lower() not in _MARKUP and text.lstrip()[:14].lower().startswith(
        ("<!doctype html", "<html")
    ):
        note(f"{path}: an HTML page; its tags are part of the text")
    return Data(path, text, None)


def _in_folder(path: Path, part: str) -> Path:
    found = path / f"{part}.jsonl"
    if found.is_file():
        return found
    if any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json")):
        raise InputError(
            f"{path}: a dataset of Arrow files; convert it to JSONL first (datasets: Dataset.to_json)"
        )
    raise InputError(f"{path}: a folder without {part}.jsonl; pass the file itself")


def _read(path: Path) -> bytes:
    """The bytes of a file that may be text; InputError for other kinds and for files over `_LARGEST`."""
    try:
        with path.open("rb") as file:
            raw = file.read(_HEAD)
            size = max(path.stat().st_size, len(raw))
            _check_kind(path, raw, size)
            if size <= _LARGEST:
                raw += file.read(_LARGEST + 1 - len(raw))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if max(size, len(raw)) > _LARGEST:
        raise InputError(f"{path}: {max(size, len(raw))} bytes; the maximum is {_LARGEST}: split it")
    return raw


def _check_kind(path: Path, head: bytes, size: int) -> None:
    for mark, name in _UNICODE:
        if head.startswith(mark):
            raise InputError(f"{path}: {name} text; save it as UTF-8 (iconv -f {name} -t UTF-8)")
    for name, letters, zeros in (("UTF-16LE", head[::2], head[1::2]), ("UTF-16BE", head[1::2], head[::2])):
        if b"\x00" not in letters and zeros.count(0) > 0.7 * len(letters) and len(head) >= 8:
            raise InputError(
                f"{path}: {name} text without a byte order mark; save it as UTF-8 (iconv -f {name} -t UTF-8)"
            )
    kind = kind_of_bytes(head, size)
    if kind in ("JSON", "text") or (kind == "binary" and b"\x00" not in head):
        return  # `_decoded` reports the position of a byte that is not UTF-8
    if kind == "empty":
        raise InputError(f"{path}: contains no text: the file is empty")
    if kind in COMPRESSED:
        raise InputError(f"{path}: a compressed file ({kind}); unpack it first")
    found = "a binary file" if kind == "binary" else f"a {kind} file"
    raise InputError(f"{path}: {_CONVERT.get(kind, f'{found}; expected text or JSONL')}")


def _decoded(raw: bytes, path: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # error.start does not count a byte order mark.
        skipped = 3 if raw.startswith(codecs.BOM_UTF8) else 0
        line = raw[: error.start + skipped].count(b"\n") + 1
        raise InputError(f"{path}: line {line}: byte {error.start + skipped} is not UTF-8 text") from None


def _sniffed(
    path: Path, text: str, known: Callable[[dict[str, Any]], bool]
) -> tuple[list[Record] | None, str]:
    """The records of a file without a JSON suffix, or None and the reason why it is read as plain text."""
    try:
        records = list(_records(path, text))
    except InputError as error:
        if re.match(r"[\[{\s]*'\w+'\s*:", text):
            return None, "begins like a Python dict, not like JSON (write it with json.dumps)"
        if not _LIKE_JSON.match(text):
            return None, ""
        reason = str(error).removeprefix(f"{path}: ")
        return None, f"begins like JSON, but is not valid JSON: {reason}"
    if not known(records[0].values):
        return None, "contains JSON, but not in a form of training records"
    note(f"{path}: read as JSON records; name it .jsonl")
    return records, ""


def _record_inside(text: str, known: Callable[[dict[str, Any]], bool]) -> str:
    """A message that names the first line with a JSON record, such as one after a comment; else empty."""
    for n, line in enumerate(text[:_HEAD].split("\n")[:_COMMENTS], 1):
        part = line.strip(_SPACE)
        if part.startswith("{") and _is_json(part) and known(json.loads(part)):
            return f"line {n} is a JSON record, but the first line is not"
    return ""


def _records(path: Path, text: str) -> Iterator[Record]:
    """The JSON objects of a text."""
    # A concatenation of files may contain their byte order marks.
    lines = [(n, line.lstrip("\ufeff")) for n, line in enumerate(text.split("\n"), 1) if line.strip(_SPACE)]
    if not text.lstrip().startswith("[") and _is_json(lines[0][1]):
        for n, line in lines:
            yield Record(parse_json(path, f"line {n}", line.encode()), f"{path}: line {n}")
        return
    ends = _stream(text)
    if ends is None and path.suffix.lower() in _LINES:
        n, line = lines[0]
        parse_json(path, f"line {n}", line.encode())
    if ends == []:
        raise InputError(f"{path}: contains no records")
    for n, part in enumerate(ends or [text], 1):
        yield Record(parse_json(path, f"record {n}", part.encode()), f"{path}: record {n}")


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _stream(text: str) -> list[str] | None:
    """The texts of the values of a JSON array, or of concatenated JSON values; None if it is neither."""
    decoder, found, position = json.JSONDecoder(), list[str](), 0
    array = text.lstrip().startswith("[")
    position = text.index("[") + 1 if array else 0

    def skip(position: int) -> int:
        while position < len(text) and text[position] in " \t\r\n":
            position += 1
        return position

    try:
        while (position := skip(position)) < len(text) and not (array and text[position] == "]"):
            begin, (_, position) = position, decoder.raw_decode(text, position)
            found.append(text[begin:position])
            position = skip(position)
            if array and text[position : position + 1] == ",":
                position = skip(position + 1)
                if text[position : position + 1] == "]":
                    return None
            elif array and text[position : position + 1] != "]":
                return None
    except (ValueError, RecursionError):
        return None
    complete = not array or (position < len(text) and not text[position + 1 :].strip())
    return found if complete else None
