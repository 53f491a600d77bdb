"""Checkpoints of a training: each a folder that is whole or not there at all; and going on from one.

A checkpoint is what `model.save` writes, or with adapters a PEFT folder, so that it can be used at once; and
beside it optimizer.safetensors, state.json, and manifest.json with the size and sha256 of every file. All
randomness of a training is a function of seeds and step numbers, so that these say where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from contextlib import closing
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from einsum_transformer.engine import blas
from einsum_transformer.errors import FormatError, InputError
from einsum_transformer.formats import TensorSource
from einsum_transformer.formats.files import read_json, write_json
from einsum_transformer.formats.folder import open_tensors
from einsum_transformer.formats.safetensors import SafetensorsFile, write_safetensors
from einsum_transformer.models import peft
from einsum_transformer.models.config import ModelConfig
from einsum_transformer.models.lora_config import LoRAConfig
from einsum_transformer.training.loop import Trainer

Array = np.ndarray

MANIFEST, STATE, OPTIMIZER = "manifest.json", "state.json", "optimizer.safetensors"
_NAME = re.compile(r"step-\d{8}")
_LEFTOVER = re.compile(r"\.(step-\d{8}|run\.json|metrics\.jsonl)\.[0-9a-f]{12}\.tmp")
_COUNTS = ("steps_done", "bad_steps", "bad_in_a_row")
"""Of a trainer."""
_SUMS = {
    "data.sha256": "the data have other contents or other tokens",
    "frozen": "the frozen weights, which are not trained, are others",
}
"""Check sums of a description, and what it means that they differ."""


def save(trainer: Trainer, root: str | Path, keep: int | None = None) -> Path:
    """Write the state after `trainer.steps_done` steps as `root/step-00000042`, and return that folder.

    It is written beside its place, brought to the disk file by file, and renamed: whatever happens on the
    way, there is no half checkpoint. keep: remove all but so many of the newest, when the new one is there.
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    place = root / f"step-{trainer.steps_done:08d}"
    if not place.exists():
        temporary = root / f".{place.name}.{os.urandom(6).hex()}.tmp"
        temporary.mkdir()
        try:
            _write(trainer, temporary)
            os.rename(temporary, place)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, OSError):
                # A failed write names no file, and the temporary ones are gone.
                error.filename = str(place)
            raise
        sync_folder(root)
    for old in checkpoints(root)[:-keep] if keep else []:
        # Renamed first: removing takes a while, and what is cut off in between is no checkpoint any more.
        aside = root / f".{old.name}.{os.urandom(6).hex()}.tmp"
        os.rename(old, aside)
        shutil.rmtree(aside)
    return place


def checkpoints(root: str | Path) -> list[Path]:
    """The checkpoints in a folder, the oldest first."""
    root = Path(root)
    found = root.iterdir() if root.is_dir() else ()
    return sorted(path for path in found if _NAME.fullmatch(path.name))


def clean(root: str | Path) -> None:
    """Remove what a process that was killed left half written."""
    for path in list(Path(root).iterdir()):
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def restore(trainer: Trainer, folder: str | Path) -> list[str]:
    """Bring a trainer, made as the saved one was, to the state of a checkpoint.

    Returns what is different and does not change what is computed but may change its last bits. Errors:
    InputError for a file that is missing or is not what the manifest says, and for another training.
    """
    folder = Path(folder)
    verify(folder)
    state = read_json(folder / STATE, STATE)
    differing = _of_training(state.get("training"), description(trainer))
    if differing:
        adapter = (folder / peft.TENSORS).is_file()
        begin = f"--adapter-path {folder}" if adapter else f"give {folder} as the model"
        raise InputError(
            f"{folder}: is of another training: {'; '.join(differing)}; to begin a new one with its weights, "
            f"{begin} and another output folder (-o), without --resume{' and without --lora' * adapter}"
        )
    counts = {key: state.get(key) for key in _COUNTS}
    for key, count in counts.items():
        if type(count) is not int or count < 0:
            raise FormatError(f"{folder / STATE}: {key} is {count!r}, a count is expected")
    _read_weights(trainer, folder)
    moments = trainer.compute.moments()
    if moments:
        with closing(SafetensorsFile(folder / OPTIMIZER)) as file:
            read = {
                moment: {name: _tensor(file, f"{moment}.{name}", like) for name, like in arrays.items()}
                for moment, arrays in moments.items()
            }
        trainer.compute.restore(read)
    for key, count in counts.items():
        setattr(trainer, key, count)
    return _differences(state.get("machine"), _machine())


def verify(folder: Path) -> None:
    """Every file of the manifest is there, with its size and its sha256."""
    if not (folder / MANIFEST).is_file():
        raise InputError(f"{folder}: holds no {MANIFEST}; a checkpoint folder is expected")
    files = read_json(folder / MANIFEST, MANIFEST).get("files")
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        raise FormatError(f"{folder / MANIFEST}: has no list of files")
    for name, entry in files.items():
        path = folder / name
        if name != Path(name).name or name in (".", ".."):
            raise FormatError(f"{folder / MANIFEST}: {name!r} is not the plain name of a file in the folder")
        if not path.is_file() or path.is_symlink():
            raise FormatError(f"{path}: missing, although {MANIFEST} lists it; the checkpoint is damaged")
        if path.stat().st_size != entry.get("bytes") or digest(path) != entry.get("sha256"):
            raise FormatError(f"{path}: is not what {MANIFEST} says; the checkpoint is damaged")
    if STATE not in files:
        raise FormatError(f"{folder / MANIFEST}: lists no {STATE}")


def digest(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def description(trainer: Trainer) -> dict[str, Any]:
    """What decides the numbers of a training, in JSON types: two trainings that agree in it are the same."""
    settings, model = trainer.settings, trainer.model
    optimizer: Any = settings.optimizer  # a dataclass, which its protocol cannot say
    config, how = asdict(model.config), asdict(optimizer)
    if not how.get("decay_matrices_only"):
        how.pop("decay_matrices_only", None)  # checkpoints from before it have no such key
    schedule = asdict(settings.schedule)
    if settings.schedule.shape == "constant":
        # Then a training may go on for longer than was planned.
        del schedule["steps"], schedule["final_lr"]
    found = {
        "model": {name: config[name] for name in config if name not in ("defaulted", "ignored", "training")},
        "lora": None if model.lora is None else _adapter_settings(model.lora),
        "frozen": trainer.frozen_crc,
        "trained": {name: [str(w.dtype), *w.shape] for name, w in trainer.weights.items()},
        "optimizer": {"name": type(optimizer).__name__} | how,
        "schedule": schedule,
        "clip_norm": settings.clip_norm,
        "seed": settings.seed,
        "data": trainer.batches.description(),
    }
    return json.loads(json.dumps(found))


def _adapter_settings(config: LoRAConfig) -> dict[str, Any]:
    """LoRA's settings, target_parameters only where there are some: older checkpoints do not name them."""
    return {key: value for key, value in asdict(config).items() if key != "target_parameters" or value}


def _machine() -> dict[str, Any]:
    return {"blas": str(blas.current()), "threads": blas.get_threads(), "numpy": np.__version__}


def _write(trainer: Trainer, folder: Path) -> None:
    if trainer.model.lora is None:
        trainer.model.save(folder)
    else:
        peft.write_adapter(trainer.model, folder)
    moments = trainer.compute.moments()
    if moments:
        named = {f"{moment}.{name}": w for moment, arrays in moments.items() for name, w in arrays.items()}
        write_safetensors(folder / OPTIMIZER, named)
    counts = {key: getattr(trainer, key) for key in _COUNTS}
    state = counts | {"training": description(trainer), "machine": _machine()}
    write_json(folder / STATE, state)
    files = {path.name: path for path in sorted(folder.iterdir())}
    listed = {name: {"bytes": path.stat().st_size, "sha256": digest(path)} for name, path in files.items()}
    write_json(folder / MANIFEST, {"format": 1, "files": listed})
    for path in files.values():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    if os.name == "nt":
        return  # folders cannot be opened there, and their names are written with the files
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read_weights(trainer: Trainer, folder: Path) -> None:
    model = trainer.model
    if model.lora is None:
        own = {model.family.checkpoint_name(path): w for path, w in trainer.weights.items()}
        source: TensorSource = open_tensors(folder)
        prefix = ""
    else:
        own, prefix = model.adapter_parameters(), peft.PREFIX
        source = SafetensorsFile(folder / peft.TENSORS)
    with closing(source):
        read = {name: _tensor(source, prefix + name, w) for name, w in own.items()}
    if model.lora is not None:
        model.set_adapter_parameters(read)
        return
    for name, w in own.items():
        np.copyto(w, read[name])


def _tensor(source: TensorSource, name: str, like: Array) -> Array:
    tensor = source.read(name)
    if tensor.size != like.size or tensor.dtype != like.dtype:
        raise FormatError(
            f"{source.path}: {name} is {tensor.dtype} {list(tensor.shape)}, not as it was trained"
        )
    return tensor.reshape(like.shape)


def _with_neutral_fields(description: dict[str, Any]) -> dict[str, Any]:
    return {**description, "model": _NEUTRAL | description["model"]}


_NEUTRAL = {each.name: each.default for each in fields(ModelConfig) if each.default in (None, False, 0, 1)}
"""Fields of a config whose defaults change nothing."""


def _of_training(there: Any, here: dict[str, Any]) -> list[str]:
    """Where two descriptions of trainings differ. What is trained follows from whether there are adapters."""
    if not isinstance(there, dict):
        return ["it has no description"]
    if isinstance(there.get("model"), dict):
        # Checkpoints from before a field was added were trained with its default.
        there = _with_neutral_fields(there)
    if (there.get("lora") is None) == (here["lora"] is None):
        return _differences(there, here)
    hidden = ("lora", "frozen", "trained")
    old, new = ({key: value for key, value in each.items() if key not in hidden} for each in (there, here))
    first, second = (
        (lora := each["lora"]) and f"of rank {lora.get('r')}" for each in ({"lora": None} | there, here)
    )
    return [f"lora is {first} there and {second} here", *_differences(old, new)]


def _differences(there: Any, here: Any, name: str = "") -> list[str]:
    """Where two JSON values differ, by name: `seed is 1 there and 2 here`."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = dict.fromkeys([*there, *here])
        found = [
            each
            for key in keys
            for each in _differences(there.get(key), here.get(key), f"{name}.{key}" if name else key)
        ]
        return found if len(found) < 5 else [*found[:4], f"and {len(found) - 4} more"]
    if there == here:
        return []
    if name in _SUMS:
        return [_SUMS[name]]
    if isinstance(there, dict | list) or isinstance(here, dict | list):
        return [f"{name} differs"]
    return [f"{name} is {there!r} there and {here!r} here"]
