"""The config of a source: config.json, the metadata of a GGUF file, or a run config."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from einsum_transformer.errors import ConfigError, InputError
from einsum_transformer.formats.files import read_json
from einsum_transformer.formats.folder import open_tensors
from einsum_transformer.formats.unsupported import folder_refused, kind_of_folder
from einsum_transformer.loading.gguf import gguf_config, whole_model
from einsum_transformer.loading.sources import ConfigFile, Folder, Options, TensorFile, find
from einsum_transformer.models.config import Keys, ModelConfig
from einsum_transformer.models.families import family_of
from einsum_transformer.models.families.config_keys import check_unread
from einsum_transformer.models.families.family import without_impossible_ids
from einsum_transformer.models.run_config import RunConfig
from einsum_transformer.models.unsupported import (
    adapter_in,
    check_experts,
    check_layers,
    other_json,
    other_model,
    quantized,
)


def read_config(
    source: str | Path | RunConfig, offline: bool = False, allow_links: bool = False
) -> ModelConfig:
    """Return the config of any source that `load` accepts, without reading weights."""
    found = find(source, Options(offline=offline, allow_links=allow_links))
    if isinstance(found, TensorFile):
        tensors = open_tensors(found.path, allow_links)
        try:
            return bounded(gguf_config(whole_model(tensors)), str(found.path))
        finally:
            tensors.close()
    if isinstance(found, Folder):
        return bounded(folder_config(found.path, folder_keys(found.path)), str(found.path / "config.json"))
    return stated_config(found)


def stated_config(source: ConfigFile | RunConfig) -> ModelConfig:
    """Return the config of a source without tensors."""
    if isinstance(source, RunConfig):
        return bounded(source.model_config(), source.source)
    return bounded(_hf_config(source.keys, str(source.path)), str(source.path))


def bounded(config: ModelConfig, source: str) -> ModelConfig:
    """Return the config after checking that the total number of experts is not too large to process."""
    if config.moe is not None:
        layers = sum(config.has_experts(i) for i in range(config.num_hidden_layers))
        check_experts(layers, config.moe.num_experts, source)
    return config


def folder_keys(folder: Path) -> dict[str, Any]:
    """Return the contents of a folder's config.json; {} if the file does not exist."""
    path = folder / "config.json"
    return read_json(path) if path.exists() else {}


def folder_config(folder: Path, keys: Mapping[str, Any]) -> ModelConfig:
    """Return the config of a Hugging Face folder from its keys; InputError for another kind of folder."""
    path = folder / "config.json"
    if not path.exists():
        if found := adapter_in(folder):
            raise InputError(f"{folder}: {found}")
        raise folder_refused(
            folder, "contains no config.json; expected a Hugging Face model folder or a .gguf file"
        )
    if "model_type" not in keys and (found := other_json(keys) or kind_of_folder(folder)):
        raise InputError(f"{folder}: {found}")
    return _hf_config(keys, str(path))


def _hf_config(raw: Mapping[str, Any], source: str) -> ModelConfig:
    keys = Keys(raw, source)
    try:
        family = family_of(keys.get("model_type", str), source)
    except ConfigError as error:
        kind = other_model(raw)
        raise ConfigError(f"{error} ({raw['model_type']} is {kind})") if kind else error from None
    if found := quantized(raw):
        raise ConfigError(f"{source}: {found}")
    check_layers(raw, source)
    try:
        config = family.read_config(keys)
    except ConfigError as error:
        raise error if str(error).startswith(source) else ConfigError(f"{source}: {error}") from None
    seen = {"defaulted": tuple(keys.defaulted), "ignored": keys.left_over(), "training": check_unread(keys)}
    return without_impossible_ids(replace(config, **seen), source)
