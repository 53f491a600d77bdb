"""Checkpoint folders: one safetensors file, or shards with an index; and `open_tensors` for any path."""

import json
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from einsum_transformer.errors import FormatError, InputError
from einsum_transformer.formats import Names, Packed, TensorInfo, TensorSource
from einsum_transformer.formats.files import atomic_file, read_json, sync
from einsum_transformer.formats.gguf import GGUFFile
from einsum_transformer.formats.links import BROKEN_LINK, inside, is_broken_link
from einsum_transformer.formats.mapped import quoted, refuse_unknown
from einsum_transformer.formats.safetensors import Entry, SafetensorsFile, describe, write_tensors
from einsum_transformer.formats.sniff import kind_of
from einsum_transformer.formats.split import first_parts, open_gguf
from einsum_transformer.formats.unsupported import (
    file_refused,
    folder_refused,
    is_pickle,
    is_piece,
    pickle_refused,
)
from einsum_transformer.notes import note
from einsum_transformer.tables import first_names

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_SHARD_NAME = re.compile(r"[^/\\:\x00-\x1f\x7f]+\.safetensors")
_MAX_INDEX = 100_000_000
_MAX_SNIFFED = 64


def open_tensors(path: str | Path, allow_links: bool = False) -> TensorSource:
    """Open a safetensors file, a GGUF file or a checkpoint folder; the contents determine the format.

    allow_links: follow links that lead out of the folder. Raises FormatError for pickle files, which run code
    when read, and for any other kind of file; the message names the kind.
    """
    path = Path(path)
    if path.is_dir():
        return SafetensorsFolder(path, allow_links)
    if is_pickle(path):
        raise pickle_refused(path)
    if not path.exists():
        raise InputError(f"{path}: there is no such file or folder")
    if is_piece(path):
        raise file_refused(path)
    suffix, kind = path.suffix.lower(), kind_of(path)
    if kind == "GGUF" or (suffix == ".gguf" and kind != "safetensors"):
        return open_gguf(path, allow_links)
    if kind == "safetensors" or suffix == ".safetensors":
        return SafetensorsFile(path)
    raise file_refused(path)


def single_gguf(folder: Path, allow_links: bool = False) -> Path | None:
    """Return the GGUF model of a folder without safetensors weights (a part of a split model), or None.

    If there are several files, those that are not models (adapters, projectors) are ignored. Raises
    FormatError if several models remain.
    """
    if (folder / SINGLE).is_file() or (folder / INDEX).is_file():
        return None
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    found = [path for path in files if path.suffix.lower() == ".gguf"]
    found = found or [path for path in files[:_MAX_SNIFFED] if kind_of(path) == "GGUF"]
    models = first_parts(found)
    if len(models) > 1:
        models = [path for path in models[:_MAX_SNIFFED] if _is_model(path, allow_links)] or models
    if len(models) > 1:
        names = first_names([path.name for path in models], 8)
        raise FormatError(f"{folder}: contains several GGUF models: choose one of {names}")
    return inside(folder, models[0].name, allow_links) if models else None


def _is_model(path: Path, allow_links: bool) -> bool:
    """Return whether a GGUF file is a model; True if it cannot be read."""
    try:
        file = GGUFFile(inside(path.parent, path.name, allow_links))
    except InputError:
        return True  # opening it raises the error
    file.close()
    return not file.purpose


class SafetensorsFolder:
    """A folder with `model.safetensors`, or shards and `model.safetensors.index.json`, as one TensorSource.

    A shard is opened when one of its tensors is first requested, and must contain the tensors that the index
    assigns to it; other tensors in it are ignored with a note. Without allow_links, only files in the folder
    and blobs of the Hugging Face cache around it are opened.
    """

    def __init__(self, folder: str | Path, allow_links: bool = False) -> None:
        self.path: Path = Path(folder)
        self._allow_links = allow_links
        self._open: dict[str, SafetensorsFile] = {}
        self._failed: dict[str, str] = {}  # shard -> error, so that an invalid shard is read only once
        self._index = self.path / INDEX
        if is_broken_link(self.path / SINGLE):
            raise FormatError(f"{self.path / SINGLE}: {BROKEN_LINK}")
        if (self.path / SINGLE).is_file():  # takes precedence over an index
            single = SafetensorsFile(inside(self.path, SINGLE, allow_links))
            self._open[SINGLE] = single
            self._shard_of = dict.fromkeys(single.names(), SINGLE)
        elif self._index.is_file():
            self._shard_of = read_index(self.path, allow_links)
            for shard in sorted(set(self._shard_of.values())):
                if not (path := inside(self.path, shard, allow_links)).is_file():
                    if is_broken_link(path):
                        raise FormatError(f"{path}: {BROKEN_LINK}")
                    raise FormatError(
                        f"{self.path / shard}: this shard is missing, although {self._index} lists it"
                    )
        elif not self.path.is_dir():
            raise InputError(f"{self.path}: there is no such folder")
        else:
            raise folder_refused(self.path, f"the folder contains neither {SINGLE} nor {INDEX}")
        self._names = Names(self._shard_of)
        self._expected: dict[str, set[str]] = {}
        for name, shard in self._shard_of.items():
            self._expected.setdefault(shard, set()).add(name)

    def names(self) -> list[str]:
        return self._names

    def info(self, name: str) -> TensorInfo:
        return self._file_of(name).info(name)

    def read(self, name: str) -> np.ndarray:
        return self._file_of(name).read(name)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._file_of(name).read_rows(name, start, stop)

    def read_packed(self, name: str) -> Packed | None:
        return self._file_of(name).read_packed(name)

    def release(self, name: str) -> None:
        self._file_of(name).release(name)

    def close(self) -> None:
        for shard in self._open.values():
            shard.close()

    def _file_of(self, name: str) -> SafetensorsFile:
        shard = self._shard_of.get(name)
        if shard is None:
            refuse_unknown(self.path, name, self.names())
        return self._shard(shard)

    def _shard(self, shard: str) -> SafetensorsFile:
        if shard in self._failed:
            raise FormatError(self._failed[shard])
        if shard not in self._open:
            try:
                self._open[shard] = self._opened(shard)
            except InputError as error:
                self._failed[shard] = str(error)
                raise
        return self._open[shard]

    def _opened(self, shard: str) -> SafetensorsFile:
        source = SafetensorsFile(inside(self.path, shard, self._allow_links))
        present, expected = set(source.names()), self._expected[shard]
        if missing := expected - present:
            source.close()
            raise FormatError(
                f"{self._index} lists tensor {quoted(min(missing))} for this shard, "
                f"but {source.path} does not contain it"
            )
        if extra := present - expected:
            note(
                f"{source.path}: {len(extra)} tensors, such as {quoted(min(extra))}, are ignored, because "
                f"{INDEX} does not list them for this shard"
            )
        return source


def read_index(folder: Path, allow_links: bool = False) -> dict[str, str]:
    """Return tensor -> shard from the index of a folder; every shard must be a plain file name."""
    path = inside(folder, INDEX, allow_links)
    shard_of = read_json(path, "the index", _MAX_INDEX).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise FormatError(f"{path}: the index has no weight_map that maps tensor names to files")
    plain: set[str] = set()
    for name, shard in shard_of.items():
        if isinstance(shard, str) and shard not in plain and _SHARD_NAME.fullmatch(shard):
            plain.add(shard)
        if not isinstance(shard, str) or shard not in plain:
            pickle = isinstance(shard, str) and is_pickle(Path(shard))
            why = (
                "a pickle file, which is not supported: convert it to safetensors"
                if pickle
                else "which is not the plain name of a .safetensors file in this folder"
            )
            raise FormatError(f"{path}: tensor {quoted(name)} is mapped to {quoted(str(shard))}, {why}")
    return shard_of


def write_safetensors_folder(
    folder: str | Path,
    tensors: Mapping[str, np.ndarray],
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write `model.safetensors`, or an index and shards with at most `max_shard_bytes` of tensors each.

    A larger tensor gets a shard of its own. The new files replace the old ones once all of them are on disk,
    the index last; then files of an earlier save that are no longer used are removed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    entries = describe(tensors)
    shards = _name_shards(_plan_shards(entries, max_shard_bytes))
    with ExitStack() as stack:  # exits in reverse order: the index is replaced last
        if SINGLE not in shards:
            index = stack.enter_context(atomic_file(folder / INDEX))
            index.write(json.dumps(_index_of(shards), indent=2).encode())
            sync(index)
        for shard, members in shards.items():
            file = stack.enter_context(atomic_file(folder / shard))
            write_tensors(file, tensors, members)
            sync(file)
    current = shards.keys() if SINGLE in shards else {*shards, INDEX}
    for path in list(folder.iterdir()):
        if path.name not in current and (path.name in {SINGLE, INDEX} or _SHARD.fullmatch(path.name)):
            path.unlink()


def _plan_shards(entries: Mapping[str, Entry], max_shard_bytes: int) -> list[dict[str, Entry]]:
    shards: list[dict[str, Entry]] = [{}]
    free_bytes = max_shard_bytes
    for name, entry in entries.items():
        if shards[-1] and entry.nbytes > free_bytes:
            shards.append({})
            free_bytes = max_shard_bytes
        shards[-1][name] = entry
        free_bytes -= entry.nbytes
    return shards


def _name_shards(shards: list[dict[str, Entry]]) -> dict[str, dict[str, Entry]]:
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _index_of(shards: Mapping[str, Mapping[str, Entry]]) -> dict[str, Any]:
    total = sum(entry.nbytes for members in shards.values() for entry in members.values())
    weight_map = {name: shard for shard, members in shards.items() for name in members}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
