"""Checkpoint folders: one safetensors file, or shards under an index; and `open_tensors` for any path."""

import json
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from einsum_transformer.errors import FormatError, InputError
from einsum_transformer.formats import TensorInfo, TensorSource
from einsum_transformer.formats.mapped import quoted, refuse_unknown
from einsum_transformer.formats.safetensors import (
    Entry,
    SafetensorsFile,
    atomic_file,
    describe,
    parse_json,
    sync,
    write_tensors,
)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_MAX_INDEX = 100_000_000
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


def open_tensors(path: str | Path) -> TensorSource:
    """The tensors of a .safetensors file, a .gguf file or a checkpoint folder, by what `path` is.

    Raises FormatError for pickle files, which run code when read, and for any other kind of file.
    """
    path = Path(path)
    if path.is_dir():
        return SafetensorsFolder(path)
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        return SafetensorsFile(path)
    if suffix == ".gguf":
        from einsum_transformer.formats.gguf import GGUFFile

        return GGUFFile(path)
    if suffix in _PICKLES:
        raise _pickle_refused(path)
    if not path.exists():
        raise InputError(f"{path}: there is no such file or folder")
    raise FormatError(f"{path}: not a .safetensors file, a .gguf file or a checkpoint folder")


class SafetensorsFolder:
    """A folder with `model.safetensors`, or shards and `model.safetensors.index.json`, as one TensorSource.

    A shard is opened when one of its tensors is first asked for, and must hold exactly the names that the
    index gives it. Nothing outside the folder is opened, save the blobs of the Hugging Face cache it lies in.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder)
        self._open: dict[str, SafetensorsFile] = {}
        self._index = self.path / INDEX
        if (self.path / SINGLE).is_file():  # where both are, it is the whole one
            single = SafetensorsFile(_inside(self.path, SINGLE))
            self._open[SINGLE] = single
            self._shard_of = dict.fromkeys(single.names(), SINGLE)
        elif self._index.is_file():
            self._shard_of = _read_index(self.path)
        else:
            raise _nothing_to_read(self.path)

    def names(self) -> list[str]:
        return list(self._shard_of)

    def info(self, name: str) -> TensorInfo:
        return self._holder(name).info(name)

    def read(self, name: str) -> np.ndarray:
        return self._holder(name).read(name)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._holder(name).read_rows(name, start, stop)

    def release(self, name: str) -> None:
        self._holder(name).release(name)

    def close(self) -> None:
        for shard in self._open.values():
            shard.close()

    def _holder(self, name: str) -> SafetensorsFile:
        shard = self._shard_of.get(name)
        if shard is None:
            refuse_unknown(self.path, name, self.names())
        return self._shard(shard)

    def _shard(self, shard: str) -> SafetensorsFile:
        if shard not in self._open:
            source = SafetensorsFile(_inside(self.path, shard))
            held = set(source.names())
            promised = {name for name, holder in self._shard_of.items() if holder == shard}
            if held != promised:
                source.close()
                name = min(held ^ promised)
                has, lacks = (source.path, self._index) if name in held else (self._index, source.path)
                raise FormatError(f"{has} lists tensor {quoted(name)} for this shard, but {lacks} does not")
            self._open[shard] = source
        return self._open[shard]


def _read_index(folder: Path) -> dict[str, str]:
    path = _inside(folder, INDEX)
    if path.stat().st_size > _MAX_INDEX:
        raise FormatError(f"{path}: the index is larger than {_MAX_INDEX} bytes")
    shard_of = parse_json(path, "the index", path.read_bytes()).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise FormatError(f"{path}: the index has no weight_map that maps tensor names to files")
    for name, shard in shard_of.items():
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\:\x00-\x1f\x7f]+\.safetensors", shard):
            raise FormatError(
                f"{path}: tensor {quoted(name)} is said to be in {quoted(str(shard))}, "
                "which is not the plain name of a .safetensors file in this folder"
            )
    for shard in sorted(set(shard_of.values())):
        if not _inside(folder, shard).is_file():
            raise FormatError(f"{folder / shard}: this shard is missing, although {path} lists it")
    return shard_of


def _inside(folder: Path, name: str) -> Path:
    """The path of a member of `folder`, unless it is a link that leads out of it.

    In a Hugging Face cache `<repo>/snapshots/<revision>/<name>` is a link to `<repo>/blobs/<hash>`, which may
    be one to `<cache>/blobs/<prefix>/<hash>`, where repositories share files.
    """
    path = folder / name
    try:
        home, real = folder.resolve(), path.resolve()
    except (OSError, RuntimeError):  # links in a circle
        raise FormatError(f"{path}: a link that leads nowhere") from None
    allowed = real.is_relative_to(home)
    if home.parent.name == "snapshots":
        repo = home.parent.parent
        allowed |= real.parent == repo / "blobs" or real.parent.parent == repo.parent / "blobs"
    if not allowed:
        raise FormatError(f"{path}: a link out of the folder, to {real}; put the file itself there")
    return path


def _nothing_to_read(folder: Path) -> InputError:
    if not folder.is_dir():
        return InputError(f"{folder}: there is no such folder")
    pickles = sorted(path for path in folder.iterdir() if path.suffix.lower() in _PICKLES)
    if pickles:
        return _pickle_refused(pickles[0])
    return FormatError(f"{folder}: the folder holds neither {SINGLE} nor {INDEX}")


def _pickle_refused(path: Path) -> FormatError:
    return FormatError(
        f"{path}: pickle checkpoints are refused, because unpickling runs code from the file; "
        "convert it to safetensors first"
    )


def write_safetensors_folder(
    folder: str | Path,
    tensors: Mapping[str, np.ndarray],
    max_shard_bytes: int = 5_000_000_000,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write `model.safetensors`, or an index and shards of at most `max_shard_bytes` of tensors.

    A larger tensor has a shard of its own. The new files take their places when all of them are on the disk,
    the index last; after that, files of an earlier save that no longer belong are removed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    entries = describe(tensors)
    shards = _name_shards(_plan_shards(entries, max_shard_bytes))
    with ExitStack() as stack:  # leaves in reverse order: the index takes its place last
        if SINGLE not in shards:
            index = stack.enter_context(atomic_file(folder / INDEX))
            index.write(json.dumps(_index_of(shards), indent=2).encode())
            sync(index)
        for shard, members in shards.items():
            file = stack.enter_context(atomic_file(folder / shard))
            write_tensors(file, tensors, members, metadata)
            sync(file)
    current = shards.keys() if SINGLE in shards else {*shards, INDEX}
    for path in list(folder.iterdir()):
        if path.name not in current and (path.name in {SINGLE, INDEX} or _SHARD.fullmatch(path.name)):
            path.unlink()


def _plan_shards(entries: Mapping[str, Entry], max_shard_bytes: int) -> list[dict[str, Entry]]:
    shards: list[dict[str, Entry]] = [{}]
    room = max_shard_bytes
    for name, entry in entries.items():
        if shards[-1] and entry.nbytes > room:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = entry
        room -= entry.nbytes
    return shards


def _name_shards(shards: list[dict[str, Entry]]) -> dict[str, dict[str, Entry]]:
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _index_of(shards: Mapping[str, Mapping[str, Entry]]) -> dict[str, Any]:
    total = sum(entry.nbytes for members in shards.values() for entry in members.values())
    weight_map = {name: shard for shard, members in shards.items() for name in members}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
