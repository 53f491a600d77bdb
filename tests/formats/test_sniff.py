"""The kind of a file by its first bytes."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from einsum_transformer.errors import InputError
from einsum_transformer.formats.sniff import kind_of, kind_of_bytes


def npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(2))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "empty"),
        (b"GGUF\x03\0\0\0", "GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
        (gzip.compress(b"text", mtime=0), "gzip"),
        (b"PK\x03\x04rest", "zip"),
        (b"PAR1rest", "Parquet"),
        (save({"a": np.zeros(3, np.float32)}), "safetensors"),
        (save({}), "safetensors"),
        (npy(), "npy"),
        (b"\x80\x02}q\0.", "pickle"),
        (b'{"a": 1}', "JSON"),
        (b'\xef\xbb\xbf [{"a": 1}]', "JSON"),
        (b"once upon a time", "text"),
        ("Schöne Grüße".encode(), "text"),
        ("Grüße".encode("utf-16"), "binary"),
        (b"\xff\xfe\x00\x01", "binary"),
        (b"a\0b", "binary"),
    ],
)
def test_first_bytes_tell_the_kind(tmp_path: Path, content: bytes, kind: str) -> None:
    (tmp_path / "file.any").write_bytes(content)
    assert kind_of(tmp_path / "file.any") == kind


def test_a_character_that_the_head_cuts_is_no_reason_to_call_text_binary() -> None:
    text = ("x" * 4095 + "é").encode()
    assert kind_of_bytes(text[:4096], len(text)) == "text"
    assert kind_of_bytes(text[:4096], 4096) == "binary"


def test_a_file_that_is_not_there_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone: cannot be read"):
        kind_of(tmp_path / "gone")
