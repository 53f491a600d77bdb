"""Adapter folders of mlx-lm: adapters.safetensors and mlx-lm's own kind of adapter_config.json.

Tensors are named `<module>.lora_a` [in, r] and `<module>.lora_b` [r, out], and y = W x + scale (x lora_a)
lora_b with scale = lora_parameters.scale (https://github.com/ml-explore/mlx-lm, tuner/lora.py).
"""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from einsum_transformer.errors import ConfigError, FormatError, InputError
from einsum_transformer.formats.mapped import quoted
from einsum_transformer.formats.safetensors import SafetensorsFile
from einsum_transformer.models.config import Keys, shown
from einsum_transformer.models.lora_config import LoRAConfig
from einsum_transformer.models.peft_config import CONFIG, read_raw
from einsum_transformer.models.peft_names import EMBEDDING, names_in
from einsum_transformer.models.stacked import Pair

TENSORS = "adapters.safetensors"
_KEYS = frozenset({"fine_tune_type", "lora_parameters", "num_layers", "lora_layers"})
"""Keys that only mlx-lm writes; the last is the name of num_layers in old versions."""
_TENSOR = re.compile(r"(?P<module>.+)\.lora_(?P<part>[ab])")


def is_mlx(folder: Path) -> bool:
    """Whether an adapter folder was written by mlx-lm."""
    raw = read_raw(folder / CONFIG)
    return "peft_type" not in raw and (not _KEYS.isdisjoint(raw))


def read(folder: Path, paths: Mapping[str, str], ignored: str = "(?!)") -> tuple[LoRAConfig, dict[str, Pair]]:
    """The settings, and path -> A (r, in) and B (out, r). paths: module name -> path of its matrix; ignored:
    the pattern of tensors that belong to other parts of a model."""
    path = folder / CONFIG
    raw = read_raw(path)
    if (kind := raw.get("fine_tune_type", "lora")) != "lora":
        raise ConfigError(f"{path}: fine_tune_type is {shown(kind)}: only mlx-lm's lora is supported")
    if raw.get("use_dora"):
        raise ConfigError(f"{path}: use_dora = {shown(raw['use_dora'])}: only mlx-lm's lora is supported")
    if "lora_parameters" not in raw:
        raise ConfigError(
            f"{path}: key 'lora_parameters' is missing (old version of mlx-lm): add "
            '"lora_parameters": {"rank": ..., "scale": ...} with the values of the training'
        )
    keys = Keys(Keys(raw, str(path)).get("lora_parameters", dict), f"{path}: lora_parameters")
    if keys.raw.get("alpha") is not None:
        raise ConfigError(
            f"{path}: lora_parameters.alpha: adapters of old versions of mlx-lm are not supported"
        )
    rank, scale = keys.get("rank", int), keys.get("scale", float)
    pairs = _pairs(folder, paths, ignored)
    targets = tuple(dict.fromkeys(target.rpartition(".")[2] for target in pairs))
    return LoRAConfig(rank, scale * rank, targets, keys.get("dropout", float, 0.0)), pairs


def _pairs(folder: Path, paths: Mapping[str, str], ignored: str) -> dict[str, Pair]:
    path = folder / TENSORS
    if not path.is_file():
        raise InputError(f"{folder}: does not contain {TENSORS}, mlx-lm's file of adapter weights")
    halves: dict[str, dict[str, np.ndarray]] = {}
    file = SafetensorsFile(path)
    try:
        for name in names_in(file, ignored):
            match = _TENSOR.fullmatch(name)
            if match is None or file.info(name).dtype not in ("F64", "F32", "F16", "BF16"):
                raise FormatError(f"{path}: tensor {quoted(name)} is not part of a supported adapter")
            if match["module"] not in paths or len(file.info(name).shape) != 2:
                raise FormatError(f"{path}: tensor {quoted(name)} does not match a matrix of this model")
            array = file.read(name).astype(np.float32)
            halves.setdefault(paths[match["module"]], {})[match["part"]] = array
    finally:
        file.close()
    if not halves or any(half.keys() != {"a", "b"} for half in halves.values()):
        raise FormatError(f"{path}: every module must have lora_a and lora_b")
    return {target: _pair(target, half["a"], half["b"]) for target, half in halves.items()}


def _pair(target: str, a: np.ndarray, b: np.ndarray) -> Pair:
    """lora_a has one row per input; for an embedding (v, d), where W += scale a b, one row per token."""
    if target == EMBEDDING:
        return b, a
    return np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)
