"""Find a model source on disk or on the hub, and determine its type from its contents."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from einsum_transformer.errors import InputError
from einsum_transformer.formats.files import read_json
from einsum_transformer.formats.folder import single_gguf
from einsum_transformer.formats.links import BROKEN_LINK, is_broken_link
from einsum_transformer.formats.sniff import is_json
from einsum_transformer.loading import hub
from einsum_transformer.models.config import ModelConfig
from einsum_transformer.models.ready import available_configs, ready_config
from einsum_transformer.models.run_config import RunConfig, parse_run_config
from einsum_transformer.models.scheme import Quantization

DTYPES = ("float32", "float64", "bfloat16")
"""bfloat16: of the matrices in memory; computations are in float32."""


@dataclass(frozen=True, slots=True)
class Options:
    """The arguments of `load`. Raises InputError for invalid values."""

    dtype: str = "float32"
    max_layers: int | None = None
    seed: int | None = None
    weight_budget: int | None = None
    revision: str | None = None
    offline: bool = False
    allow_links: bool = False
    quantization: Quantization | None = None
    packed: bool | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(f"`dtype` is {self.dtype!r}: expected {', '.join(DTYPES)}")
        if self.weight_budget is not None and self.weight_budget < 0:
            raise InputError(
                f"`weight_budget` is {self.weight_budget}: expected a number of bytes, 0 or more"
            )
        if self.max_layers is not None and self.max_layers < 1:
            raise InputError(f"`max_layers` is {self.max_layers}: expected 1 or more")

    @property
    def computed_in(self) -> np.dtype:
        """The type of the computation."""
        return np.dtype(np.float32 if self.dtype == "bfloat16" else self.dtype)

    def truncated(self, config: ModelConfig) -> ModelConfig:
        """Return the config truncated to its first `max_layers` layers."""
        if self.max_layers is None or self.max_layers >= config.num_hidden_layers:
            return config
        return config.truncated(self.max_layers)


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder in Hugging Face format: config.json, safetensors weights, tokenizer."""

    path: Path


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A GGUF model, or another file that is not JSON: opening it raises the error."""

    path: Path


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """A Hugging Face config.json without weights, and its keys; the weights are random."""

    path: Path
    keys: Mapping[str, Any]


Source = Folder | TensorFile | ConfigFile | RunConfig


def name_of(source: Source) -> str:
    """Return the path of a source for messages."""
    return source.source if isinstance(source, RunConfig) else str(source.path)


def find(source: str | Path | RunConfig, options: Options) -> Source:
    """Find `source` and determine its type. Raises InputError if it is missing or an invalid JSON config."""
    if isinstance(source, RunConfig):
        return source
    if (ready := ready_config(source)) is not None:
        return ready
    path = resolve(source, options)
    if path.is_dir():
        return Folder(path)
    if not is_json(path):
        return TensorFile(path)
    keys = read_json(path)
    return ConfigFile(path, keys) if "model_type" in keys else parse_run_config(keys, str(path))


def resolve(source: str | Path, options: Options) -> Path:
    """Return the path of the file or folder `source`; a hub repository that is not cached is downloaded.

    For a folder with one GGUF model and no safetensors weights, return that file.
    """
    named = str(source)
    if named.lower() == hub.DEFAULT_MODEL:
        return hub.default_model(options.offline)
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            return single_gguf(path, options.allow_links) or path
        if path.exists():
            return path
        if is_broken_link(path):
            raise InputError(f"{path}: {BROKEN_LINK}")
    except InputError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{named[:100]!r}: no such file or folder ({error.__class__.__name__})") from None
    one_of_several = ":" in named and hub.is_repository(named)
    local = path.suffix in (".json", ".gguf", ".safetensors") or named.startswith((".", "/", "~"))
    if local and not one_of_several:
        raise InputError(f"{source}: no such file or folder")
    if "/" not in named:
        raise InputError(
            f"{named!r}: no such file or folder, and a hub repository is written owner/name; "
            f"packaged configs: {', '.join(available_configs())}"
        )
    path = hub.download(named, options.revision, options.offline)
    return (path.is_dir() and single_gguf(path, options.allow_links)) or path
