"""What a source holds, and why it would not load: `load` raises the first problem, `inspect` lists all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from einsum_transformer.errors import ConfigError, FormatError, InputError
from einsum_transformer.formats import TensorInfo, TensorSource
from einsum_transformer.formats.files import read_json
from einsum_transformer.formats.folder import open_tensors
from einsum_transformer.formats.gguf import GGUFFile
from einsum_transformer.loading.checks import check_beside, places_of, tensor_problems
from einsum_transformer.loading.configs import folder_config, stated_config
from einsum_transformer.loading.gguf import gguf_config, whole_model
from einsum_transformer.loading.places import Place
from einsum_transformer.loading.sources import Folder, Options, Source, TensorFile, find
from einsum_transformer.models.config import ModelConfig
from einsum_transformer.models.families.gguf_keys import sampling_settings
from einsum_transformer.models.run_config import RunConfig
from einsum_transformer.models.unsupported import adapter_in
from einsum_transformer.text.tokenizer import Tokenizer

_MOST_TOLD = 3


class Mismatch(FormatError):
    """Tensors that are not those of the config: the message gives the first reasons, `sentences` all."""

    def __init__(self, path: Path, sentences: Sequence[str]) -> None:
        super().__init__(f"{path}: {'; '.join(sentences[:_MOST_TOLD])}")
        self.sentences = sentences


@dataclass(slots=True)
class Contents:
    """All of a source but the numbers of its weights, as far as it can be read."""

    source: Source
    options: Options
    problems: list[str] | None = None
    """Where the reasons go why it would not load, a sentence each; None: the first one is raised."""
    config: ModelConfig | None = None
    """Of the whole model, whatever `max_layers` is."""
    tensors: TensorSource | None = None
    infos: dict[str, TensorInfo] = field(default_factory=dict)
    """Of every tensor that can be looked at."""
    places: Mapping[str, Place] | None = None
    """Where each weight stands, by its path."""
    tokenizer: Tokenizer | None = None
    generation_config: Mapping[str, Any] | None = None
    base: Contents | None = None
    """What a run takes its weights from; None for random ones."""

    def close(self) -> None:
        """Let go of the files."""
        for held in (self.tensors, self.base):
            if held is not None:
                held.close()

    @contextmanager
    def problem(self) -> Iterator[None]:
        """Put an InputError on the list of problems, if there is one."""
        try:
            yield
        except InputError as error:
            if self.problems is None:
                raise
            told = error.sentences if isinstance(error, Mismatch) else (str(error),)
            # A shard that cannot be read is one problem, however many tensors it holds.
            self.problems += [each for each in told if each not in self.problems]


def look(source: Source, options: Options, problems: list[str] | None = None) -> Contents:
    """Look into a source. Raises InputError for its first problem, unless they are listed in `problems`.

    No tensor is read, save a head that a tied model does not use: it must be the embedding. A repository of
    the hub that a run names is fetched only if problems are raised.
    """
    found = Contents(source, options, problems)
    if isinstance(source, Folder):
        _look_into_folder(found, source.path)
    elif isinstance(source, TensorFile):
        _look_into_file(found, source.path)
    else:
        if isinstance(source, RunConfig):
            with found.problem():
                _check_run(source)
        with found.problem():
            found.config = stated_config(source)
        if isinstance(source, RunConfig):
            _look_into_base(found, source)
    return found


def _look_into_folder(found: Contents, folder: Path) -> None:
    with found.problem():
        found.config = folder_config(folder)
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
    with found.problem():
        found.tensors = tensors = open_tensors(path, found.options.allow_links)
        with found.problem():
            found.config = gguf_config(whole_model(tensors))
        _look_at_tensors(found, tensors)
        if isinstance(tensors, GGUFFile):
            found.tokenizer = Tokenizer.in_gguf(tensors.metadata, path)
            found.generation_config = sampling_settings(tensors.metadata, str(path))


def _look_at_tensors(found: Contents, tensors: TensorSource) -> None:
    family = None
    with found.problem():
        if found.config is not None:
            family, found.places = places_of(found.config, tensors)
    for name in tensors.names():
        with found.problem():
            found.infos[name] = tensors.info(name)
    with found.problem():
        if found.config is not None and family is not None and found.places is not None:
            told = tensor_problems(found.config, family, found.places, tensors, found.infos)
            if told:
                raise Mismatch(tensors.path, told)


def _look_into_base(found: Contents, run: RunConfig) -> None:
    """Look into what a run takes its weights from, if anything, and compare it with what its config says."""
    if run.weight_file is None and (run.hf_repo_id is None or found.problems is not None):
        return
    with found.problem():
        local = None if run.weight_file is None else Path(run.source).parent / run.weight_file
        named = f"weight_file {run.weight_file!r}" if local else f"hf_repo_id {run.hf_repo_id!r}"
        refused = ConfigError(f"{run.source}: {named}: a model folder or a .gguf file is expected")
        if local is not None and local.suffix == ".json":
            raise refused
        source = find(local or str(run.hf_repo_id), found.options)
        if not isinstance(source, Folder | TensorFile):
            raise refused
        found.base = base = look(source, found.options, found.problems)
        if found.config is None or base.config is None:
            return
        stated, held = (found.options.cut(each) for each in (found.config, base.config))
        if differing := _contradictions(stated, held):
            raise ConfigError(f"{run.source}: contradicts {source.path}: {'; '.join(differing)}")


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
    "max_position_embeddings",
}


def _contradictions(stated: ModelConfig, found: ModelConfig) -> list[str]:
    """What a run's config says about the model and its checkpoint denies; what belongs to a run is left
    out."""
    names = [
        each.name
        for each in fields(ModelConfig)
        if each.name not in _OF_A_RUN and "token_id" not in each.name
    ]
    pairs = [(name, getattr(stated, name), getattr(found, name)) for name in names]
    return [f"{name} is {here} here and {there} there" for name, here, there in pairs if here != there]
