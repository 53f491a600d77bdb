"""Adapter folders as PEFT writes and reads them: adapter_config.json and adapter_model.safetensors.

Tensors are named `base_model.model.<module>.lora_A.weight` [r, in] and `.lora_B.weight` [out, r], those of an
embedding `.lora_embedding_A` [r, in] and `.lora_embedding_B` [out, r] (https://github.com/huggingface/peft).
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from einsum_transformer.errors import ConfigError, FormatError, InputError
from einsum_transformer.formats.mapped import quoted
from einsum_transformer.formats.safetensors import (
    SafetensorsFile,
    atomic_file,
    parse_json,
    sync,
    write_safetensors,
)
from einsum_transformer.leaves.lora import LoRA
from einsum_transformer.models.adapters import Pair, with_lora
from einsum_transformer.models.config import Keys
from einsum_transformer.models.lora_config import LoRAConfig
from einsum_transformer.models.model import EMBEDDING, Model
from einsum_transformer.tree import named_leaves

Array = np.ndarray

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_LARGEST_CONFIG = 16 << 20
_TENSOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<part>[AB])(\.weight)?")
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
# What other settings a config may have only where they say nothing: the function they describe is another.
_NOTHING = {
    "bias": ("none",),
    "use_dora": (False,),
    "lora_bias": (False,),
    "modules_to_save": (),
    "trainable_token_indices": (),
    "target_parameters": (),
    "alora_invocation_tokens": (),
    "megatron_config": (),
    "use_qalora": (False,),
    "use_bdlora": (False,),
    "arrow_config": (),
    "layer_replication": (),
    "kasa_config": (),
    "monteclora_config": (),
    "ensure_weight_tying": (False,),
    # The other ways to begin (pissa, olora, corda, lora_ga, loftq) change the base's weights as well.
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva", "mica"),
}


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter."""
    return (folder / CONFIG).is_file()


def adapter_digest(folder: Path) -> str:
    """The sha256 of an adapter: of its tensors and of what scales them."""
    read_config(folder)
    found = hashlib.sha256()
    for name in (TENSORS, CONFIG):
        path = folder / name
        if not path.is_file():
            raise InputError(f"{folder}: holds no {name}")
        found.update(path.read_bytes())
    return found.hexdigest()


def with_adapter(model: Model, folder: str | Path) -> Model:
    """The model with the adapter of a PEFT folder on it, its matrices in the model's type.

    Errors: InputError for a config of another method, an adapter of another base model, damaged files.
    """
    folder = Path(folder)
    config = read_config(folder)
    pairs = _read_pairs(folder, model)
    try:
        return with_lora(model, config, pairs=pairs)
    except ConfigError:
        raise
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None


def read_config(folder: Path) -> LoRAConfig:
    """The settings in adapter_config.json."""
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(
            f"{folder}: holds no {CONFIG}; a folder written by PEFT or by `etx train` is expected"
        )
    if path.stat().st_size > _LARGEST_CONFIG:
        raise FormatError(f"{path}: larger than {_LARGEST_CONFIG >> 20} MiB, no config is")
    raw = parse_json(path, "the adapter's config", path.read_bytes())
    keys = Keys(raw, str(path))
    if (kind := raw.get("peft_type")) != "LORA":
        raise ConfigError(f"{path}: peft_type is {kind!r}: only LORA adapters are supported")
    for name, meanings in _NOTHING.items():
        if (value := raw.get(name)) and value not in meanings:
            raise ConfigError(f"{path}: {name} = {value!r} is not supported")
    targets = raw.get("target_modules")
    if isinstance(targets, list) and all(isinstance(target, str) for target in targets):
        targets = tuple(targets)
    elif not isinstance(targets, str):
        raise ConfigError(
            f"{path}: target_modules is {targets!r}: names, or one regular expression, expected"
        )
    try:
        return LoRAConfig(
            keys.get("r", int, 8),
            keys.get("lora_alpha", float, 8.0),
            targets,
            keys.get("lora_dropout", float, 0.0),
            keys.get("use_rslora", bool, False),
            _patterns(raw, "rank_pattern", path, int),
            _patterns(raw, "alpha_pattern", path, float),
        )
    except ConfigError:
        raise
    except InputError as error:
        raise ConfigError(f"{path}: {error}") from None


def _patterns(raw: dict[str, Any], name: str, path: Path, kind: type) -> dict[str, Any]:
    found = raw.get(name) or {}
    kinds = (int, float) if kind is float else (int,)
    if not isinstance(found, dict) or not all(type(value) in kinds for value in found.values()):
        raise ConfigError(f"{path}: {name} must map patterns to numbers")
    try:
        return {pattern: kind(value) for pattern, value in found.items()}
    except OverflowError:
        raise ConfigError(f"{path}: {name} holds a number that is too large") from None


def _read_pairs(folder: Path, model: Model) -> dict[str, Pair]:
    """Module -> its matrices as W + scaling * B A uses them: A (r, in), B (out, r)."""
    path = folder / TENSORS
    if not path.is_file():
        hint = (
            " (a pickle, adapter_model.bin, is not read)" if (folder / "adapter_model.bin").exists() else ""
        )
        raise InputError(f"{folder}: holds no {TENSORS}{hint}")
    file = SafetensorsFile(path)
    try:
        halves: dict[str, dict[str, Array]] = {}
        for name in file.names():
            plain = name.removeprefix(PREFIX)
            match = _TENSOR.fullmatch(plain)
            # Only an embedding's have names of their own; peft knows no other.
            if match is None or bool(match["embedding"]) != (match["module"] == model.module(EMBEDDING)):
                _check_copy(file, name, plain, model)
                continue
            if file.info(name).dtype not in _FLOATS:
                raise FormatError(f"{path}: tensor {quoted(name)} is {file.info(name).dtype}, not a float")
            array = file.read(name).astype(np.float64 if file.info(name).dtype == "F64" else np.float32)
            if array.ndim != 2:
                raise FormatError(
                    f"{path}: tensor {quoted(name)} has {array.ndim} axes, a matrix is expected"
                )
            # An embedding's A is the one with a column for each token, which here is B's row.
            part = match["part"] if not match["embedding"] else "BA"["AB".index(match["part"])]
            half = halves.setdefault(match["module"], {})
            if part in half:
                raise FormatError(f"{path}: tensor {quoted(name)} is there twice, under two names")
            half[part] = array.T if match["embedding"] else array
    finally:
        file.close()
    for module, half in halves.items():
        if half.keys() != {"A", "B"}:
            raise FormatError(f"{path}: {quoted(module)} has only one of lora_A and lora_B")
    if not halves:
        raise FormatError(f"{path}: holds no LoRA matrices")
    return {module: (half["A"], half["B"]) for module, half in halves.items()}


def _check_copy(file: SafetensorsFile, name: str, plain: str, model: Model) -> None:
    """PEFT writes the whole embedding beside an adapter on it; it must be the one the model has."""
    own = {
        f"{model.module(path)}{part}.weight": path
        for path in (EMBEDDING, "lm_head.weight")
        for part in ("", ".base_layer")
    }
    if plain not in own:
        raise FormatError(
            f"{file.path}: tensor {quoted(name)} is no part of a LoRA adapter that is supported"
        )
    parameters = model.named_parameters()
    weight = parameters.get(
        model.family.checkpoint_name(own[plain]), parameters[f"{model.module(EMBEDDING)}.weight"]
    )
    saved = file.read(name)
    if saved.shape != weight.shape or not np.array_equal(saved.astype(weight.dtype), weight):
        raise FormatError(f"{file.path}: tensor {quoted(name)} differs from the base model's; merge it there")


def write_adapter(model: Model, folder: str | Path) -> None:
    """Write the adapters of a model as a folder that `peft` loads; each file takes its place when it is
    whole."""
    folder = Path(folder)
    if model.lora is None:
        raise InputError(f"{folder}: the model has no adapter to write")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{PREFIX}{name}": array for name, array in model.adapter_parameters().items()}
    write_safetensors(folder / TENSORS, tensors)
    with atomic_file(folder / CONFIG) as file:
        file.write((json.dumps(config_dict(model), indent=2) + "\n").encode())
        sync(file)


def config_dict(model: Model) -> dict[str, Any]:
    """adapter_config.json of a model: target_modules are the names that the adapters really are on."""
    config = model.lora
    assert config is not None
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.source,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "target_modules": _targets(model, config),
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "bias": "none",
        "use_dora": False,
        "fan_in_fan_out": bool(model.family.transposed),
        "modules_to_save": None,
        "inference_mode": True,
    }


def _targets(model: Model, config: LoRAConfig) -> list[str]:
    """What says the same to PEFT: short names, or else the modules' whole ones.

    A regular expression and "all-linear" mean the same there, but depend on what else a model has; and an
    adapter that was read may be on fewer modules than its short names say (layers_to_transform).
    """
    modules = [model.module(path) for path, leaf in named_leaves(model.decoder) if isinstance(leaf, LoRA)]
    matrices = [model.module(path) for path, weight in model.weights.items() if len(weight.stored) > 1]
    short = not isinstance(config.target_modules, str)
    if short and [module for module in matrices if config.targets(module)] == modules:
        return list(config.target_modules)
    return modules
