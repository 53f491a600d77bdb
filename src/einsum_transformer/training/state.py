"""Training checkpoints, which are written atomically, and resuming from them.

A checkpoint is a folder as `model.save` writes it, or a PEFT folder for adapters, so that it can be loaded
directly. It also contains optimizer.safetensors, state.json, and manifest.json with the size and sha256 of
every file. All randomness of a training depends on seeds and step numbers only, so no RNG state is saved.
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
"""Counters of a `Trainer` in state.json."""
_SUMS = {
    "data.sha256": "the data or their token ids differ",
    "frozen": "the frozen weights differ",
}
"""Checksums of a description, and the message if they differ."""


def save(trainer: Trainer, root: str | Path, keep: int | None = None) -> Path:
    """Write the state after `trainer.steps_done` steps to `root/step-00000042` and return this folder.

    The files are written to a temporary folder, synced to disk, and the folder is renamed, so an interruption
    never leaves a partial checkpoint. keep: the number of newest checkpoints to keep; older ones are removed.
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    folder = root / f"step-{trainer.steps_done:08d}"
    if not folder.exists():
        temporary = root / f".{folder.name}.{os.urandom(6).hex()}.tmp"
        temporary.mkdir()
        try:
            _write(trainer, temporary)
            os.rename(temporary, folder)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, OSError):
                # The error of a failed write has no file name, and the temporary files are removed.
                error.filename = str(folder)
            raise
        sync_folder(root)
    for old in checkpoints(root)[:-keep] if keep else []:
        # Renamed first, so that an interrupted removal does not leave a partial checkpoint.
        removed = root / f".{old.name}.{os.urandom(6).hex()}.tmp"
        os.rename(old, removed)
        shutil.rmtree(removed)
    return folder


def checkpoints(root: str | Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    root = Path(root)
    found = root.iterdir() if root.is_dir() else ()
    return sorted(path for path in found if _NAME.fullmatch(path.name))


def clean(root: str | Path) -> None:
    """Remove the temporary files of a process that was killed."""
    for path in list(Path(root).iterdir()):
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def restore(trainer: Trainer, folder: str | Path) -> list[str]:
    """Load a checkpoint into a trainer that has the settings of the saved one.

    Returns the differences of the machine (BLAS, threads, NumPy), which may change the last bits of results.
    Errors: InputError for a missing file, a file that differs from the manifest, or other settings.
    """
    folder = Path(folder)
    verify(folder)
    state = read_json(folder / STATE, STATE)
    differing = _training_differences(state.get("training"), description(trainer))
    if differing:
        adapter = (folder / peft.TENSORS).is_file()
        start = f"pass {folder} as `adapter`" if adapter else f"pass {folder} as the model"
        raise InputError(
            f"{folder}: checkpoint of another training: {'; '.join(differing)}; to start a new training with "
            f"its weights, {start} and another folder as `output`, without `resume`"
            f"{' and `lora`' * adapter}"
        )
    counts = {key: state.get(key) for key in _COUNTS}
    for key, count in counts.items():
        if type(count) is not int or count < 0:
            raise FormatError(f"{folder / STATE}: {key} is {count!r}, expected an integer, 0 or more")
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
    """Check the presence, size and sha256 of every file in the manifest; raises InputError."""
    if not (folder / MANIFEST).is_file():
        raise InputError(f"{folder}: does not contain {MANIFEST}; expected the folder of a checkpoint")
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
            raise FormatError(f"{path}: size or sha256 differs from {MANIFEST}; the checkpoint is damaged")
    if STATE not in files:
        raise FormatError(f"{folder / MANIFEST}: does not list {STATE}")


def digest(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def description(trainer: Trainer) -> dict[str, Any]:
    """Return everything that determines the result of a training, in JSON types."""
    settings, model = trainer.settings, trainer.model
    optimizer: Any = settings.optimizer  # always a dataclass, which the base class does not express
    config, options = asdict(model.config), asdict(optimizer)
    if not options.get("decay_matrices_only"):
        options.pop("decay_matrices_only", None)  # older checkpoints do not have this key
    schedule = asdict(settings.schedule)
    if settings.schedule.shape == "constant":
        # A constant schedule may be resumed for more steps than planned.
        del schedule["steps"], schedule["final_lr"]
    found = {
        "model": {name: config[name] for name in config if name not in ("defaulted", "ignored", "training")},
        "lora": None if model.lora is None else _adapter_settings(model.lora),
        "frozen": trainer.frozen_crc,
        "trained": {name: [str(w.dtype), *w.shape] for name, w in trainer.weights.items()},
        "optimizer": {"name": type(optimizer).__name__} | options,
        "schedule": schedule,
        "clip_norm": settings.clip_norm,
        "seed": settings.seed,
        "data": trainer.batches.description(),
    }
    return json.loads(json.dumps(found))


def _adapter_settings(config: LoRAConfig) -> dict[str, Any]:
    """LoRA's settings, without an empty target_parameters, which older checkpoints do not have."""
    return {key: value for key, value in asdict(config).items() if key != "target_parameters" or value}


def _machine() -> dict[str, Any]:
    return {"blas": blas.description(), "threads": blas.get_threads(), "numpy": np.__version__}


def _write(trainer: Trainer, folder: Path) -> None:
    if trainer.model.lora is None:
        trainer.model.save(folder)
    else:
        peft.save_adapter(trainer.model, folder)
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
    """Sync the entries of a folder to disk."""
    if os.name == "nt":
        return  # Windows cannot open folders, and syncs their entries with the files
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
            f"{source.path}: {name} is {tensor.dtype} {list(tensor.shape)}, "
            f"expected {like.dtype} {list(like.shape)}"
        )
    return tensor.reshape(like.shape)


def _with_default_fields(description: dict[str, Any]) -> dict[str, Any]:
    return {**description, "model": _DEFAULTS | description["model"]}


_DEFAULTS = {each.name: each.default for each in fields(ModelConfig) if each.default in (None, False, 0, 1)}
"""Fields of a config whose defaults have no effect."""


def _training_differences(saved: Any, current: dict[str, Any]) -> list[str]:
    """The differences of two training descriptions, without those that follow from the use of adapters."""
    if not isinstance(saved, dict):
        return ["it has no description"]
    if isinstance(saved.get("model"), dict):
        # A checkpoint without a newer field was trained with the default of the field.
        saved = _with_default_fields(saved)
    if (saved.get("lora") is None) == (current["lora"] is None):
        return _differences(saved, current)
    skip = ("lora", "frozen", "trained")
    old, new = ({key: value for key, value in each.items() if key not in skip} for each in (saved, current))
    first, second = (
        (lora := each["lora"]) and f"of rank {lora.get('r')}" for each in ({"lora": None} | saved, current)
    )
    return [f"lora is {first} in the checkpoint and {second} now", *_differences(old, new)]


def _differences(saved: Any, current: Any, name: str = "") -> list[str]:
    """The differences of two JSON values, by name: `seed is 1 in the checkpoint and 2 now`."""
    if isinstance(saved, dict) and isinstance(current, dict):
        keys = dict.fromkeys([*saved, *current])
        found = [
            each
            for key in keys
            for each in _differences(saved.get(key), current.get(key), f"{name}.{key}" if name else key)
        ]
        return found if len(found) < 5 else [*found[:4], f"and {len(found) - 4} more"]
    if saved == current:
        return []
    if name in _SUMS:
        return [_SUMS[name]]
    if isinstance(saved, dict | list) or isinstance(current, dict | list):
        return [f"{name} differs"]
    return [f"{name} is {saved!r} in the checkpoint and {current!r} now"]
