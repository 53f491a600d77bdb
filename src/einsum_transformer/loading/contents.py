"""What a source holds, and why it would not load: `load` raises the first problem, `inspect` lists all."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from einsum_transformer.errors import ConfigError, FormatError, InputError
from einsum_transformer.formats import TensorInfo, TensorSource
from einsum_transformer.formats.files import read_json
from einsum_transformer.formats.folder import open_tensors
from einsum_transformer.formats.gguf import GGUFFile
from einsum_transformer.loading.checks import check_beside, places_of, tensor_problems
from einsum_transformer.loading.configs import folder_config, folder_keys, stated_config
from einsum_transformer.loading.gguf import gguf_config, gguf_keys, whole_model
from einsum_transformer.loading.places import Place
from einsum_transformer.loading.sources import ConfigFile, Folder, Options, Source, TensorFile, find
from einsum_transformer.models.config import ModelConfig
from einsum_transformer.models.families.gguf_keys import sampling_settings
from einsum_transformer.models.run_config import RunConfig
from einsum_transformer.models.unsupported import adapter_in
from einsum_transformer.text.tokenizer import Tokenizer

_MOST_TOLD = 3


@dataclass(slots=True)
class Contents:
    """All of a source but the numbers of its weights, as far as it can be read."""

    options: Options
    problems: list[str] | None = None
    """Where the reasons go why it would not load, a sentence each; None: the first one is raised."""
    keys: Mapping[str, Any] = field(default_factory=dict)
    """What the config says where it lies."""
    config: ModelConfig | None = None
    """Of the whole model, whatever `max_layers` is."""
    tensors: TensorSource | None = None
    infos: dict[str, TensorInfo] = field(default_factory=dict)
    """Of every tensor that can be looked at."""
    places: Mapping[str, Place] | None = None
    """Where each weight stands, by its path."""
    tokenizer: Tokenizer | None = None
    generation_config: Mapping[str, Any] | None = None

    def tell(self, error: InputError) -> None:
        """Put an error on the list of problems, or raise it if there is no list."""
        if self.problems is None:
            raise error
        if str(error) not in self.problems:  # a shard that cannot be read is one problem
            self.problems.append(str(error))

    @contextmanager
    def problem(self) -> Iterator[None]:
        """Tell an InputError, if there is one."""
        try:
            yield
        except InputError as error:
            self.tell(error)


def look(source: Source, options: Options, problems: list[str] | None = None) -> Contents:
    """Look into a source. Raises InputError for its first problem, unless they are listed in `problems`, and
    always where there are no keys of a config to be read.

    No tensor is read, save a head that a tied model does not use: it must be the embedding. A repository of
    the hub that a run names is fetched only if problems are raised.
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
        return  # of an adapter alone the config's problem says it all
    with found.problem():
        found.tensors = open_tensors(folder, found.options.allow_links)
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
    family, told = None, []
    with found.problem():
        if found.config is not None:
            family, found.places = places_of(found.config, tensors)
    for name in tensors.names():
        try:
            found.infos[name] = tensors.info(name)
        except InputError as error:
            found.tell(error)
    with found.problem():
        if found.config is not None and family is not None and found.places is not None:
            told = tensor_problems(found.config, family, found.places, tensors, found.infos)
    if found.problems is not None:
        found.problems += told
    elif told:
        raise FormatError(f"{tensors.path}: {'; '.join(told[:_MOST_TOLD])}")


def _look_into_run(found: Contents, run: RunConfig) -> None:
    """Look into a run's config and what it takes its weights from, if anything; the two must agree."""
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
            cut = found.options.cut
            if differing := _contradictions(cut(stated), cut(found.config)):
                raise ConfigError(f"{run.source}: contradicts {source.path}: {'; '.join(differing)}")
            found.config = replace(found.config, attention_block=run.block_size)


def _weights_of(run: RunConfig, options: Options) -> Folder | TensorFile:
    """What a run's config names as the place of its weights."""
    local = None if run.weight_file is None else Path(run.source).parent / run.weight_file
    source = find(local or str(run.hf_repo_id), options) if local is None or local.suffix != ".json" else run
    if isinstance(source, Folder | TensorFile):
        return source
    named = f"weight_file {run.weight_file!r}" if local else f"hf_repo_id {run.hf_repo_id!r}"
    raise ConfigError(f"{run.source}: {named}: a model folder or a .gguf file is expected")


def _check_run(run: RunConfig) -> None:
    """Refuse what a run's config asks for and no loading does."""
    if run.quantization is not None:
        raise InputError(
            f"{run.source}: quantization {run.quantization!r} is not available; use --set quantization=null"
        )
    if run.use_lora and run.lora_rank < 1:
        raise ConfigError(f"{run.source}: lora_rank is {run.lora_rank}, expected 1 or more")


_OF_A_RUN = {
    *("defaulted", "ignored", "training", "attention_block", "initializer_range", "model_type"),
    *("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
}


def _contradictions(stated: ModelConfig, found: ModelConfig) -> list[str]:
    """What a run's config says about the model and its checkpoint denies; what belongs to a run is left
    out."""
    names = [each.name for each in fields(ModelConfig) if each.name not in _OF_A_RUN]
    pairs = [(name, getattr(stated, name), getattr(found, name)) for name in names]
    return [f"{name} is {here} here and {there} there" for name, here, there in pairs if here != there]
