"""Data files: what a path holds, decided by its content, as one text or as JSON records."""

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
_COMMENTS = 50  # lines in which a record is looked for
_LIKE_JSON = re.compile(r"""\s*[\[{][\s\[{]*(["']|\w+\s*:\s*["'\[{\d])""")
_SPACE = " \t\r\ufeff"
_LARGEST = 1 << 31  # bytes: their tokens alone take several times as much memory
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
    "safetensors": "a file of weights; text or JSONL is expected",
    "GGUF": "a file of weights; text or JSONL is expected",
    "GGML": "a file of weights; text or JSONL is expected",
    "PDF": "a PDF file; extract its text first (pdftotext)",
}


@dataclass(frozen=True, slots=True)
class Record:
    """A JSON object of a file."""

    values: dict[str, Any]
    place: str
    """Where it stands: `file: line 3`, or `file: record 3`."""


@dataclass(frozen=True, slots=True)
class Data:
    """A file's content: its records, or None where it is one text."""

    path: Path
    text: str
    records: list[Record] | None
    doubt: str = ""
    """Why it is read as a text, where it looks like JSON records."""


def read_data(path: str | Path, known: Callable[[dict[str, Any]], bool], part: str = "train") -> Data:
    """The content of a data file; of a folder (as mlx-lm has it), that of `<part>.jsonl` in it.

    JSON records are JSONL, an array of objects, or objects one after the other, over any number of lines. A
    file without a suffix of JSON is that too if its first record is `known`, a form to learn from; a note
    says so.
    Errors: InputError that names the file and says what to do, for what is neither text nor JSON.
    """
    path = Path(path)
    if path.is_dir():
        path = _in_folder(path, part)
    raw = _read(path)
    text = _decoded(raw, str(path))
    if path.suffix.lower() in _TABLES:
        raise InputError(
            f"{path}: {_TABLES[path.suffix.lower()]}; convert it to JSONL, or name it .txt if it is a text"
        )
    if not text.strip():
        raise InputError(f"{path}: holds no {'lines' if path.suffix.lower() in _LINES else 'text'}")
    if path.suffix.lower() in (".json", *_LINES):
        return Data(path, text, list(_records(path, text)))
    if text.lstrip()[:5].lower() == "{\\rtf":
        raise InputError(f"{path}: an RTF document; save it as plain text first")
    if text.lstrip()[:1] in ("{", "["):
        records, doubt = _sniffed(path, text, known)
    else:
        records, doubt = None, _record_inside(text, known)
    if doubt:
        note(f"{path}: {doubt}; it is learnt as a plain text")
    if records is not None or doubt:
        return Data(path, text, records, doubt)
    if path.suffix.lower() not in _MARKUP and text.lstrip()[:14].lower().startswith(
        ("<!doctype html", "<html")
    ):
        note(f"{path}: is an HTML page; its tags are learnt as text")
    return Data(path, text, None)


def _in_folder(path: Path, part: str) -> Path:
    found = path / f"{part}.jsonl"
    if found.is_file():
        return found
    if any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json")):
        raise InputError(
            f"{path}: a dataset in Arrow files; convert it to JSONL first (datasets: Dataset.to_json)"
        )
    raise InputError(f"{path}: a folder without {part}.jsonl; give the file itself")


def _read(path: Path) -> bytes:
    """All bytes of a file that may hold text, not more than a bound."""
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
        raise InputError(f"{path}: {max(size, len(raw))} bytes; at most {_LARGEST} are read, so split it")
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
        return  # what is not UTF-8 is said with its place
    if kind == "empty":
        raise InputError(f"{path}: holds no text: the file is empty")
    if kind in COMPRESSED:
        raise InputError(f"{path}: a compressed file ({kind}); unpack it first")
    found = "a binary file" if kind == "binary" else f"a file of the kind {kind}"
    raise InputError(f"{path}: {_CONVERT.get(kind, f'{found}; text or JSONL is expected')}")


def _decoded(raw: bytes, path: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # A byte order mark that was left out is no part of the place.
        skipped = 3 if raw.startswith(codecs.BOM_UTF8) else 0
        line = raw[: error.start + skipped].count(b"\n") + 1
        raise InputError(f"{path}: line {line}: byte {error.start + skipped} is not UTF-8 text") from None


def _sniffed(
    path: Path, text: str, known: Callable[[dict[str, Any]], bool]
) -> tuple[list[Record] | None, str]:
    """The records of a file with a name that does not promise any, or None and why it is taken as a text."""
    try:
        records = list(_records(path, text))
    except InputError as error:
        if re.match(r"[\[{\s]*'\w+'\s*:", text):
            return None, "begins like a Python dict, not like JSON (json.dumps writes that)"
        if not _LIKE_JSON.match(text):
            return None, ""
        found = str(error).removeprefix(f"{path}: ")
        return None, f"begins like JSON, but is not: {found}"
    if not known(records[0].values):
        return None, "holds JSON without a form to learn from"
    note(f"{path}: read as JSON records; name it .jsonl")
    return records, ""


def _record_inside(text: str, known: Callable[[dict[str, Any]], bool]) -> str:
    """Which of the first lines is a JSON record after all, such as that after a comment."""
    for n, line in enumerate(text[:_HEAD].split("\n")[:_COMMENTS], 1):
        part = line.strip(_SPACE)
        if part.startswith("{") and _is_json(part) and known(json.loads(part)):
            return f"line {n} is a JSON record, but the first line is not"
    return ""


def _records(path: Path, text: str) -> Iterator[Record]:
    """The JSON objects of a text."""
    # A file that was put together from others may have their byte order marks.
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
        raise InputError(f"{path}: holds no records")
    for n, part in enumerate(ends or [text], 1):
        yield Record(parse_json(path, f"record {n}", part.encode()), f"{path}: record {n}")


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _stream(text: str) -> list[str] | None:
    """The values of a JSON array, or of JSON values one after the other; None if it is neither."""
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
