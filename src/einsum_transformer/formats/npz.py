"""NumPy's .npz as a TensorSource: a zip archive of .npy arrays, each read in full on request."""

import math
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from einsum_transformer.errors import FormatError, InputError
from einsum_transformer.formats import TensorInfo, as_rows
from einsum_transformer.formats.mapped import DTYPES, FILE_DTYPES, quoted, refuse_unknown

_MAX_MEMBERS = 100_000


class NpzFile:
    """The arrays of a .npz file by name.

    Raises FormatError for a file that is not an archive of arrays, for object arrays, which are pickles, and
    for a member whose size does not match its header; memory is allocated only after these checks.
    """

    def __init__(self, path: str | Path) -> None:
        self.path: Path = Path(path)
        try:
            self._zip = zipfile.ZipFile(self.path)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read: {error.strerror or error}") from None
        except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise FormatError(f"{self.path}: not a .npz file: {error}") from None
        members = self._zip.infolist()
        if len(members) > _MAX_MEMBERS:
            raise FormatError(f"{self.path}: {len(members):,} arrays; at most {_MAX_MEMBERS:,} are supported")
        self._members: dict[str, zipfile.ZipInfo] = {}
        for member in members:
            name = member.filename.removesuffix(".npy")
            if name in self._members:
                raise FormatError(f"{self.path}: array {quoted(name)} occurs twice")
            self._members[name] = member
        self._infos: dict[str, tuple[TensorInfo, bool]] = {}

    def names(self) -> list[str]:
        return list(self._members)

    def info(self, name: str) -> TensorInfo:
        return self._info(name)[0]

    def read(self, name: str) -> np.ndarray:
        info, fortran = self._info(name)
        with self._opened(name) as file:
            try:
                _header(file)
                raw = file.read(info.nbytes)
                longer = file.read(1)
            except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
                raise self._refusal(name, str(error)) from None
        if len(raw) != info.nbytes or longer:
            raise self._refusal(name, "its size does not match its header")
        array = np.frombuffer(raw, DTYPES[info.dtype][0])
        return array.reshape(info.shape, order="F" if fortran else "C")

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return as_rows(self.read(name))[start:stop]

    def read_packed(self, name: str) -> None:
        self.info(name)

    def release(self, name: str) -> None:
        """Do nothing: arrays are not cached."""

    def close(self) -> None:
        self._zip.close()

    def _info(self, name: str) -> tuple[TensorInfo, bool]:
        """Return shape, type and size of an array, and whether it is stored in Fortran order."""
        if name in self._infos:
            return self._infos[name]
        if name not in self._members:
            refuse_unknown(self.path, name, self.names())
        member = self._members[name]
        with self._opened(name) as file:
            try:
                shape, fortran, dtype = _header(file)
                start = file.tell()
            except Exception as error:  # NumPy's parser raises various types
                reason = f"its header cannot be read ({type(error).__name__})"
                raise self._refusal(name, reason) from None
        if not all(type(size) is int and size >= 0 for size in shape):
            raise self._refusal(name, f"{shape} is not a valid shape")
        if dtype.name not in FILE_DTYPES or not dtype.isnative:
            raise self._refusal(name, f"its type is {dtype}, not one of {', '.join(sorted(FILE_DTYPES))}")
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes != member.file_size - start:
            raise self._refusal(
                name, f"{shape} {dtype} takes {nbytes} bytes, but {member.file_size - start} are stored"
            )
        info = TensorInfo(name, shape, FILE_DTYPES[dtype.name], nbytes, self.path, member.header_offset)
        self._infos[name] = info, fortran
        return self._infos[name]

    def _opened(self, name: str) -> BinaryIO:
        try:
            return cast(BinaryIO, self._zip.open(self._members[name]))
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError) as error:
            raise self._refusal(name, str(error)) from None

    def _refusal(self, name: str, reason: str) -> FormatError:
        return FormatError(f"{self.path}: array {quoted(name)}: {reason}")


def _header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return (shape, Fortran order, type) of a .npy stream; NumPy limits the header's length."""
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read:
        raise ValueError(f"version {version} of the .npy format is not supported")
    return read[version](file)
