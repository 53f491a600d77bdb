"""Read everything of a source but its weights: `load` raises the first problem, `inspect` lists all."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from einsum_transformer.errors import ConfigError, FormatError, InputError
from einsum_transformer.formats import TensorInfo, TensorSource
from einsum_transformer.formats.codes import CodesFolder
from einsum_transformer.formats.files import read_json
from einsum_transformer.formats.folder import open_tensors
from einsum_transformer.formats.gguf import GGUFFile
from einsum_transformer.formats.quantized_folder import QuantizedFolder
from einsum_transformer.formats.quantized_methods import METHODS, method_name
from einsum_transformer.loading.checks import check_beside, places_of, tensor_problems
from einsum_transformer.loading.configs import folder_config, folder_keys, stated_config
from einsum_transformer.loading.gguf import gguf_config, gguf_keys, whole_model
from einsum_transformer.loading.places import Place
from einsum_transformer.loading.sources import ConfigFile, Folder, Options, Source, TensorFile, find
from einsum_transformer.models.config import ModelConfig
from einsum_transformer.models.families.gguf_keys import sampling_settings
from einsum_transformer.models.run_config import RunConfig
from einsum_transformer.models.scheme import Quantization
from einsum_transformer.models.unsupported import adapter_in, is_own, quantization_settings
from einsum_transformer.text.tokenizer import Tokenizer

_MOST_SHOWN = 3


@dataclass(slots=True)
class Contents:
    """The contents of a source except the values of its weights, as far as they can be read."""

    options: Options
    problems: list[str] | None = None
    """List of the problems that prevent loading, one sentence each; None: raise the first one."""
    keys: Mapping[str, Any] = field(default_factory=dict)
    """The config as written in the source."""
    config: ModelConfig | None = None
    """Config of the whole model, regardless of `max_layers`."""
    tensors: TensorSource | None = None
    infos: dict[str, TensorInfo] = field(default_factory=dict)
    """Information on every tensor that can be read."""
    places: Mapping[str, Place] | None = None
    """Location of each weight, by its path."""
    tokenizer: Tokenizer | None = None
    generation_config: Mapping[str, Any] | None = None
    quantization: Quantization | None = None
    """How the weights in the source are quantized; None: they are not."""

    def add(self, error: InputError) -> None:
        """Append an error to the list of problems, or raise it if there is no list."""
        if self.problems is None:
            raise error
        if str(error) not in self.problems:  # an unreadable shard is one problem
            self.problems.append(str(error))

    @contextmanager
    def problem(self) -> Iterator[None]:
        """Add an InputError of the `with` block to the problems."""
        try:
            yield
        except InputError as error:
            self.add(error)


def look(source: Source, options: Options, problems: list[str] | None = None) -> Contents:
    """Read and check a source. Raises InputError for the first problem, unless problems are appended to
    `problems`; always raises if there are no config keys to read.

    No tensor is read, except an unused head of a tied model, which must equal the embedding. The hub
    repository of a run config is downloaded only if `problems` is None.
    """
    found = Contents(options, problems)
    if isinstance(source, Folder):
        _look_into_folder(found, source.path)
    elif isinstance(source, TensorFile):
        _look_into_file(found, source.path)
    elif isinstance(source, ConfigFile):
        found.keys = source.keys
        with found.problem():
            found.config = stated_config(source)
    else:
        _look_into_run(found, source)
    return found


def _look_into_folder(found: Contents, folder: Path) -> None:
    found.keys = folder_keys(folder)
    with found.problem():
        found.config = folder_config(folder, found.keys)
    if not (folder / "config.json").exists() and adapter_in(folder):
        return  # for an adapter alone, the problem of the config is sufficient
    with found.problem():
        found.tensors = open_tensors(folder, found.options.allow_links)
        settings = quantization_settings(found.keys)
        if is_own(settings):
            found.tensors = CodesFolder(found.tensors, settings)
            found.quantization = Quantization.saved(settings, str(folder / "config.json"))
        elif method_name(settings) in METHODS:
            found.tensors = QuantizedFolder(found.tensors, settings)
        _look_at_tensors(found, found.tensors)
    with found.problem():
        check_beside(folder)
        with found.problem():
            found.tokenizer = Tokenizer.in_folder(folder)
        with found.problem():
            generation = folder / "generation_config.json"
            found.generation_config = read_json(generation) if generation.exists() else None


def _look_into_file(found: Contents, path: Path) -> None:
    found.tensors = tensors = open_tensors(path, found.options.allow_links)
    with found.problem():
        found.config = gguf_config(whole_model(tensors))
    _look_at_tensors(found, tensors)
    if isinstance(tensors, GGUFFile):
        found.keys = gguf_keys(tensors)
        with found.problem():
            found.tokenizer = Tokenizer.in_gguf(tensors.metadata, path)
        found.generation_config = sampling_settings(tensors.metadata, str(path))


def _look_at_tensors(found: Contents, tensors: TensorSource) -> None:
    family, problems = None, []
    with found.problem():
        if found.config is not None:
            family, found.places = places_of(found.config, tensors)
    for name in tensors.names():
        try:
            found.infos[name] = tensors.info(name)
        except InputError as error:
            found.add(error)
    with found.problem():
        if found.config is not None and family is not None and found.places is not None:
            problems = tensor_problems(found.config, family, found.places, tensors, found.infos)
    if found.problems is not None:
        found.problems += problems
    elif problems:
        raise FormatError(f"{tensors.path}: {'; '.join(problems[:_MOST_SHOWN])}")


def _look_into_run(found: Contents, run: RunConfig) -> None:
    """Read a run config and the source of its weights, if any; the two must agree."""
    with found.problem():
        _check_run(run)
    with found.problem():
        found.config = stated_config(run)
    stated = found.config
    if stated is None or (run.weight_file is None and (run.hf_repo_id is None or found.problems is not None)):
        return
    with found.problem():
        source, found.config = _weights_of(run, found.options), None
        look_into = _look_into_folder if isinstance(source, Folder) else _look_into_file
        look_into(found, source.path)
        if found.config is not None:
            truncated = found.options.truncated
            if differing := _contradictions(truncated(stated), truncated(found.config)):
                raise ConfigError(f"{run.source}: contradicts {source.path}: {'; '.join(differing)}")
            found.config = replace(found.config, attention_block=run.block_size)


def _weights_of(run: RunConfig, options: Options) -> Folder | TensorFile:
    """Return the source of the weights of a run config."""
    local = None if run.weight_file is None else Path(run.source).parent / run.weight_file
    source = find(local or str(run.hf_repo_id), options) if local is None or local.suffix != ".json" else run
    if isinstance(source, Folder | TensorFile):
        return source
    named = f"weight_file {run.weight_file!r}" if local else f"hf_repo_id {run.hf_repo_id!r}"
    raise ConfigError(f"{run.source}: {named}: expected a model folder or a .gguf file")


def _check_run(run: RunConfig) -> None:
    """Raise InputError for settings of a run config that are not supported."""
    try:
        Quantization.of(run.quantization)
    except InputError as error:
        raise ConfigError(f"{run.source}: {error}") from None
    if run.use_lora and run.lora_rank < 1:
        raise ConfigError(f"{run.source}: lora_rank is {run.lora_rank}, expected 1 or more")


_RUN_FIELDS = {
    *("defaulted", "ignored", "training", "attention_block", "initializer_range", "model_type"),
    *("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
}


def _contradictions(stated: ModelConfig, found: ModelConfig) -> list[str]:
    """Describe the model settings in which a run config and its checkpoint differ, except `_RUN_FIELDS`."""
    names = [each.name for each in fields(ModelConfig) if each.name not in _RUN_FIELDS]
    pairs = [(name, getattr(stated, name), getattr(found, name)) for name in names]
    return [f"{name} is {here} here, {there} in the model" for name, here, there in pairs if here != there]
