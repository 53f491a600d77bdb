"""The .npz reader gives what NumPy wrote and refuses what contradicts itself before it allocates."""

from __future__ import annotations

import io
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from einsum_transformer.errors import FormatError, InputError
from einsum_transformer.formats.npz import NpzFile

ARRAYS = {
    "a": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "columns first": np.asfortranarray(np.arange(6, dtype=np.int64).reshape(2, 3)),
    "none": np.zeros((0, 5), np.float16),
    "one": np.float64(2.5),
    "flags": np.array([True, False]),
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_come_back(save: Any, tmp_path: Path) -> None:
    save(tmp_path / "x.npz", **ARRAYS)
    file = NpzFile(tmp_path / "x.npz")
    assert file.names() == list(ARRAYS)
    for name, array in ARRAYS.items():
        read = file.read(name)
        np.testing.assert_array_equal(read, array)
        assert (read.dtype, read.shape, file.info(name).nbytes) == (array.dtype, array.shape, array.nbytes)
    np.testing.assert_array_equal(file.read_rows("a", 1, 3), ARRAYS["a"].reshape(6, 4)[1:3])
    file.close()


def npy(header: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    """A .npy stream of this header, padded as NumPy does."""
    text = header.encode() + b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text + data


def archive(path: Path, members: list[tuple[str, bytes]]) -> NpzFile:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, raw in members:
            file.writestr(name, raw)
    return NpzFile(path)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,)}"),
            "4398046511104 bytes, but 0 are stored",
        ),
        (
            npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}", bytes(9)),
            "takes 8 bytes, but 9 are stored",
        ),
        (npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", bytes(8)), "its type is object"),
        (npy("{'descr': '>f4', 'fortran_order': False, 'shape': (1,)}", bytes(4)), "its type is >f4"),
        (
            npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-2,)}", bytes(4)),
            r"\(-2,\) is not a valid shape",
        ),
        (npy("__import__('os')", b""), r"its header cannot be read \(ValueError\)"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1,)}", bytes(4), b"\x09\x00"), "its header"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (True, False)}"), "is not a valid shape"),
        (b"no array", "its header"),
        (b"", "its header"),
    ],
)
def test_members_that_lie_are_refused(raw: bytes, message: str, tmp_path: Path) -> None:
    file = archive(tmp_path / "x.npz", [("a.npy", raw)])
    with pytest.raises(FormatError, match=rf"x\.npz: array 'a': .*({message})"):
        file.read("a")


def test_archives_that_lie_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(FormatError, match=r"text\.npz: not a \.npz file"):
        NpzFile(tmp_path / "text.npz")
    with pytest.raises(InputError, match=r"gone\.npz: cannot be read: No such file"):
        NpzFile(tmp_path / "gone.npz")
    with pytest.warns(UserWarning, match="Duplicate"), pytest.raises(FormatError, match="'a' occurs twice"):
        archive(tmp_path / "twice.npz", [("a.npy", b"1"), ("a.npy", b"2")])
    with pytest.raises(FormatError, match="there is no tensor 'b'; the nearest name is 'a'"):
        archive(tmp_path / "one.npz", [("a.npy", b"1")]).read("b")


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(place=st.integers(0, 700), byte=st.integers(0, 255))
def test_a_damaged_byte_gives_the_arrays_or_one_line(place: int, byte: int, tmp_path: Path) -> None:
    stream = io.BytesIO()
    np.savez_compressed(stream, a=np.arange(9.0), b=np.arange(4))
    raw = bytearray(stream.getvalue())
    raw[place % len(raw)] = byte
    (tmp_path / "x.npz").write_bytes(raw)
    with suppress(InputError):
        file = NpzFile(tmp_path / "x.npz")
        for name in file.names():
            file.read(name)
