"""Models and configs from any kind of source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from einsum_transformer.analysis.dry_run import without_weights
from einsum_transformer.formats.files import check_writable
from einsum_transformer.loading.configs import folder_keys, read_config
from einsum_transformer.loading.load import load
from einsum_transformer.loading.sources import Folder, Options, find, name_of
from einsum_transformer.models.config import ModelConfig
from einsum_transformer.models.model import Model
from einsum_transformer.models.peft import with_adapter
from einsum_transformer.models.run_config import RunConfig
from einsum_transformer.models.unsupported import is_own
from einsum_transformer.notes import note

AnySource = Model | str | Path | RunConfig
"""A model, or a source that `load` takes: a folder, a hub id, a .gguf file, a JSON config, or the name of a
packaged config."""


def model_of(source: AnySource, **settings: Any) -> Model:
    """Return the source if it is a model, else load it with these settings."""
    return source if isinstance(source, Model) else load(source, **settings)


def results_path(results: str | Path | None) -> Path | None:
    """Return the file of results. Raises InputError, before a model is loaded, if it cannot be written."""
    if results is not None:
        check_writable(Path(results), "results")
    return None if results is None else Path(results)


def described(
    source: AnySource | ModelConfig, adapter: str | Path | None, offline: bool, allow_links: bool
) -> Model | ModelConfig | RunConfig:
    """Return the model or config of a source for `explain`, without reading weights.

    A run config is returned as it is, because its adapters are part of the program."""
    if isinstance(source, (Model, ModelConfig)) and adapter is None:
        return source
    if isinstance(source, (str, Path, RunConfig)):
        where = Options(offline=offline, allow_links=allow_links)
        found = find(source, where)
        if isinstance(found, RunConfig):
            source = found
        config, name = read_config(source, offline, allow_links), name_of(found)
        if isinstance(found, Folder) and is_own(folder_keys(found.path).get("quantization_config")):
            note(f"{name}: costs are those of the weights without quantization")
        if adapter is None:
            return source if isinstance(source, RunConfig) else config
    elif isinstance(source, Model):
        config, name = source.config, source.source
    else:
        config, name = source, source.model_type
    return with_adapter(without_weights(config, name), str(adapter))
