"""Load and save: where formats, families and text meet."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from einsum_transformer import hub
from einsum_transformer.errors import ConfigError, FormatError, InputError
from einsum_transformer.formats import TensorSource
from einsum_transformer.formats.files import read_json
from einsum_transformer.formats.folder import open_tensors, single_gguf
from einsum_transformer.formats.gguf import GGUFFile
from einsum_transformer.formats.links import LEADS_NOWHERE, leads_nowhere
from einsum_transformer.formats.sniff import is_json
from einsum_transformer.formats.unsupported import folder_refused, kind_of_folder
from einsum_transformer.leaves.lazy import Budget, LazyTensor
from einsum_transformer.leaves.resident import read_all, rooms
from einsum_transformer.models.adapter_text import with_own_text
from einsum_transformer.models.checks import check_beside, places_of, problems
from einsum_transformer.models.config import Keys, ModelConfig
from einsum_transformer.models.decoder import Decoder, Weight, build, weights_of
from einsum_transformer.models.families import family_of
from einsum_transformer.models.families.config_keys import check_unread as check_keys
from einsum_transformer.models.families.family import Family, without_impossible_ids
from einsum_transformer.models.families.gguf_keys import sampling_settings
from einsum_transformer.models.gguf_config import gguf_config
from einsum_transformer.models.model import Model
from einsum_transformer.models.peft import with_adapter
from einsum_transformer.models.places import Place
from einsum_transformer.models.run_config import RunConfig, parse_run_config
from einsum_transformer.models.unsupported import (
    adapter_in,
    check_experts,
    check_layers,
    other_json,
    other_model,
    quantized,
)
from einsum_transformer.notes import note
from einsum_transformer.text.tokenizer import Tokenizer

Array = np.ndarray

DTYPES = ("float32", "float64")
_MOST_PROBLEMS = 3


def load(
    source: str | Path | RunConfig = hub.DEFAULT_MODEL,
    dtype: str = "float32",
    quantization: str | None = None,
    adapter: str | Path | None = None,
    max_layers: int | None = None,
    seed: int | None = None,
    weight_budget: int | None = None,
    revision: str | None = None,
    offline: bool = False,
    allow_links: bool = False,
) -> Model:
    """A model from a Hugging Face folder, a hub id, a .gguf file, a config JSON (random weights), or the
    default model.

    Files are recognized by what is in them. Of a split GGUF any part names the model; so does a folder with
    one GGUF model in it, and `owner/name:Q4_K_M` for one of several in a hub repository.

    dtype: float32 or float64, what is computed in. max_layers: keep only the first layers. seed: for random
    weights.
    weight_budget: bytes of weights held in memory; the rest is read from the file whenever an equation needs
    it. adapter: a PEFT or mlx-lm folder, whose adapters are put on the weights (unmerged; see `merged`); the
    tokenizer and chat template in it come before the base's.
    allow_links: read weights through links that lead out of the model's folder, as shared stores have them.
    Errors: InputError in one line; a tensor that is missing, unexpected or misshapen is never replaced by
    anything.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r}: choose {' or '.join(DTYPES)}")
    if quantization is not None:
        raise InputError(
            f"quantization {quantization!r} is not available; load without it (--set quantization=null)"
        )
    if weight_budget is not None and weight_budget < 0:
        raise InputError(f"weight_budget is {weight_budget}: a number of bytes is expected")
    if max_layers is not None and max_layers < 1:
        raise InputError(f"max_layers is {max_layers}: at least 1")
    options = _Options(np.dtype(dtype), max_layers, seed, weight_budget, allow_links)
    model = _load(source, options, revision, offline)
    return model if adapter is None else with_own_text(with_adapter(model, adapter), adapter)


def _load(source: str | Path | RunConfig, options: _Options, revision: str | None, offline: bool) -> Model:
    if isinstance(source, RunConfig):
        return _from_run_config(source, options, revision, offline)
    path = resolve(source, revision, offline, options.allow_links)
    if path.is_dir():
        return _from_folder(path, options)
    if is_json(path):
        return _from_json(path, options, revision, offline)
    return _from_gguf(_open_gguf(path, options.allow_links), options)


def resolve(
    source: str | Path, revision: str | None = None, offline: bool = False, allow_links: bool = False
) -> Path:
    """The file or folder that `source` names, fetched from the hub if it is a repository that is not here.

    A folder that holds one GGUF model and no safetensors weights stands for that file.
    """
    if str(source).lower() == hub.DEFAULT_MODEL:
        return hub.default_model(offline)
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            return single_gguf(path, allow_links) or path
        if path.exists():
            return path
        if leads_nowhere(path):
            raise InputError(f"{path}: {LEADS_NOWHERE}")
    except InputError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(
            f"{str(source)[:100]!r}: no such file or folder ({error.__class__.__name__})"
        ) from None
    named = str(source)
    one_of_several = ":" in named and hub.is_repository(named)
    local = path.suffix in (".json", ".gguf", ".safetensors") or named.startswith((".", "/", "~"))
    if local and not one_of_several:
        raise InputError(f"{source}: no such file or folder")
    path = hub.download(named, revision, offline)
    return (single_gguf(path, allow_links) or path) if path.is_dir() else path


def read_config(
    source: str | Path | RunConfig, offline: bool = False, allow_links: bool = False
) -> ModelConfig:
    """The config alone of anything `load` takes, without reading a weight."""
    if isinstance(source, RunConfig):
        return _bounded(source.model_config(), source.source)
    path = resolve(source, offline=offline, allow_links=allow_links)
    if path.is_dir():
        return _bounded(_folder_config(path), str(path / "config.json"))
    if is_json(path):
        raw = read_json(path)
        stated = "model_type" in raw
        config = _hf_config(raw, str(path)) if stated else parse_run_config(raw, str(path)).model_config()
        return _bounded(config, str(path))
    tensors = _open_gguf(path, allow_links)
    try:
        return _bounded(gguf_config(tensors)[1], str(path))
    finally:
        tensors.close()


def _bounded(config: ModelConfig, source: str) -> ModelConfig:
    """The config, unless it has more experts in all than any program over them could go through."""
    if config.moe is not None:
        layers = sum(config.has_experts(i) for i in range(config.num_hidden_layers))
        check_experts(layers, config.moe.num_experts, source)
    return config


def _open_gguf(path: Path, allow_links: bool) -> GGUFFile:
    """A GGUF file that holds a model."""
    file = open_tensors(path, allow_links)
    try:
        if not isinstance(file, GGUFFile):
            beside = path.with_name("config.json").exists()
            folder = f"its folder, {path.parent}" if beside else "the folder that holds config.json beside it"
            raise InputError(f"{path}: a lone weight file has no config; name {folder}")
        if file.purpose:
            way_out = _PURPOSES.get(file.purpose, "name the GGUF file of the model itself")
            raise FormatError(f"{path}: a GGUF file of kind {file.purpose!r}, not a model: {way_out}")
        _check_blocks(file)
    except BaseException:
        file.close()
        raise
    return file


_PURPOSES = {
    "adapter": "name the base model, and give the adapter as a PEFT folder (--adapter-path); GGUF "
    "adapters are not read",
    "mmproj": "a projector of images or sound; name the GGUF file of the language model",
    "imatrix": "an importance matrix, which serves to quantize a model; name the model's own GGUF file",
}


def _check_blocks(file: GGUFFile) -> None:
    """Refuse a file that has fewer tensors than layers, before anything is made for each layer."""
    key = f"{file.metadata.get('general.architecture')}.block_count"
    layers, count = file.metadata.get(key), len(file.names())
    if not count:
        raise FormatError(f"{file.path}: holds no tensors: a vocabulary alone is no model")
    if isinstance(layers, (int, float)) and layers > count:
        raise ConfigError(f"{file.path}: {key} is {layers!r:.40}, but the file has only {count} tensors")


def config_keys(path: Path) -> Mapping[str, Any]:
    """The keys that a config has where it lies: in config.json, a JSON file, or a GGUF file's metadata (those
    of its architecture)."""
    if path.is_dir():
        path = path / "config.json"
        return read_json(path) if path.exists() else {}
    if is_json(path):
        return {key: value for key, value in read_json(path).items() if not key.startswith("//")}
    tensors = open_tensors(path)
    try:
        if not isinstance(tensors, GGUFFile):
            return {}
        own = ("general.architecture", f"{tensors.metadata.get('general.architecture')}.")
        return {key: value for key, value in tensors.metadata.items() if key.startswith(own)}
    finally:
        tensors.close()


@dataclass(frozen=True, slots=True)
class _Options:
    dtype: np.dtype
    max_layers: int | None
    seed: int | None
    weight_budget: int | None
    allow_links: bool = False

    def cut(self, config: ModelConfig) -> ModelConfig:
        """The config with only the first `max_layers` layers."""
        if self.max_layers is None or self.max_layers >= config.num_hidden_layers:
            return config
        return config.cut(self.max_layers)


def _from_run_config(run: RunConfig, options: _Options, revision: str | None, offline: bool) -> Model:
    if run.quantization is not None:
        raise InputError(
            f"{run.source}: quantization {run.quantization!r} is not available; use --set quantization=null"
        )
    if run.use_lora and run.lora_rank < 1:
        raise ConfigError(f"{run.source}: lora_rank is {run.lora_rank}, expected 1 or more")
    config = run.model_config()
    if run.weight_file is None and run.hf_repo_id is None:
        return _random(options.cut(config), options, run.source)
    if run.weight_file is not None and run.weight_file.endswith(".json"):
        raise ConfigError(
            f"{run.source}: weight_file {run.weight_file!r}: a model folder or a .gguf file is expected"
        )
    base = Path(run.source).parent
    source = base / run.weight_file if run.weight_file else str(run.hf_repo_id)
    path = resolve(source, revision, offline, options.allow_links)
    model = _load(path, replace(options, seed=None), revision, offline)
    if differing := _contradictions(options.cut(config), model.config):
        raise ConfigError(f"{run.source}: contradicts {path}: {'; '.join(differing)}")
    blocks = replace(model.config, attention_block=run.block_size)
    return replace(model, config=blocks, decoder=_with_tiles(model.decoder, run.block_size))


def _with_tiles(decoder: Decoder, query_block: int) -> Decoder:
    """The decoder whose attention takes so many queries at a time."""

    def tiled(block: Any) -> Any:
        mixing = replace(block.self_attn.mixing, query_block=query_block)
        return replace(block, self_attn=replace(block.self_attn, mixing=mixing))

    return replace(decoder, layers=tuple(map(tiled, decoder.layers)))


def _contradictions(stated: ModelConfig, found: ModelConfig) -> list[str]:
    """What a run's config says about the model and its checkpoint denies; what belongs to a run is left
    out."""
    aside = {
        "defaulted",
        "ignored",
        "training",
        "attention_block",
        "initializer_range",
        "model_type",
        "max_position_embeddings",
    }
    names = [
        each.name for each in fields(ModelConfig) if each.name not in aside and "token_id" not in each.name
    ]
    pairs = [(name, getattr(stated, name), getattr(found, name)) for name in names]
    return [f"{name} is {here} here and {there} there" for name, here, there in pairs if here != there]


def _from_json(path: Path, options: _Options, revision: str | None, offline: bool) -> Model:
    raw = read_json(path)
    if "model_type" in raw:
        return _random(options.cut(_hf_config(raw, str(path))), options, str(path))
    return _from_run_config(parse_run_config(raw, str(path)), options, revision, offline)


def _random(config: ModelConfig, options: _Options, source: str) -> Model:
    """Normal weights with the config's initializer_range, norms that scale by 1, biases 0; each tensor has a
    stream of its own."""
    _bounded(config, source)
    seed = 0 if options.seed is None else options.seed
    if seed < 0:
        raise InputError(f"seed is {seed}: it must be at least 0")
    weights = weights_of(config)
    needed = sum(math.prod(weight.stored) for weight in weights) * options.dtype.itemsize
    if needed > (present := memory()):
        sizes = f"{needed / 2**30:,.1f} GiB of random weights, the machine has {present / 2**30:,.1f}"
        raise InputError(f"{source}: {sizes}; `etx explain` works without weights")

    arrays = rooms([weight.stored for weight in weights], options.dtype)
    places = {weight.path: array for weight, array in zip(weights, arrays)}

    def leaf(weight: Weight) -> Array:
        if weight.path.endswith("norm.weight"):
            return np.full(weight.shape, 1 - config.norm_offset, options.dtype)
        if weight.path.endswith("bias"):
            return np.zeros(weight.shape, options.dtype)
        rng = np.random.default_rng([seed, zlib.crc32(weight.path.encode())])
        values = rng.standard_normal(weight.shape, dtype=np.float32).astype(options.dtype, copy=False)
        values *= config.initializer_range
        places[weight.path][...] = values.reshape(weight.stored)
        return places[weight.path].reshape(weight.shape)

    return Model(config, build(config, leaf), source=f"{source} (random weights, seed {seed})")


def memory() -> int:
    """Bytes of memory of this machine."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not told on this system
        return 1 << 62


def _from_folder(folder: Path, options: _Options) -> Model:
    full = _folder_config(folder)
    config = options.cut(full)
    if found := adapter_in(folder):
        note(f"{folder / 'adapter_config.json'}: not used: {found}")
    tensors = open_tensors(folder, options.allow_links)
    _, places = _checked_places(full, tensors)
    check_beside(folder)
    tokenizer = Tokenizer.in_folder(folder)
    decoder = _leaves(tensors, config, places, options)
    generation = folder / "generation_config.json"
    settings = read_json(generation) if generation.exists() else None
    return Model(config, decoder, tokenizer, settings, str(folder))


def _folder_config(folder: Path) -> ModelConfig:
    path = folder / "config.json"
    if not path.exists():
        if found := adapter_in(folder):
            raise InputError(f"{folder}: {found}")
        raise folder_refused(
            folder, "holds no config.json; a Hugging Face model folder or a .gguf file is expected"
        )
    raw = read_json(path)
    if "model_type" not in raw and (found := other_json(raw) or kind_of_folder(folder)):
        raise InputError(f"{folder}: {found}")
    return _hf_config(raw, str(path))


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
    seen = {"defaulted": tuple(keys.defaulted), "ignored": keys.left_over(), "training": check_keys(keys)}
    return without_impossible_ids(replace(config, **seen), source)


def _checked_places(config: ModelConfig, tensors: TensorSource) -> tuple[Family, dict[str, Place]]:
    """Where the weights stand, if every one is in the file with its shape and nothing else is."""
    family, places = places_of(config, tensors)
    infos = {name: tensors.info(name) for name in tensors.names()}
    if found := problems(config, family, places, tensors, infos):
        raise FormatError(f"{tensors.path}: {'; '.join(found[:_MOST_PROBLEMS])}")
    return family, places


def _leaves(
    tensors: TensorSource, config: ModelConfig, places: Mapping[str, Place], options: _Options
) -> Decoder:
    """The decoder with its weights in memory, or under a budget with matrices that stay in the file."""
    weights = weights_of(config)
    budget = options.weight_budget
    # Norms and biases are small, and take part in sums rather than products: they are never lazy.
    held = [weight for weight in weights if budget is None or len(weight.stored) == 1]
    arrays = read_all(tensors, [places[weight.path].stored for weight in held], options.dtype)
    loaded = {weight.path: array.reshape(weight.shape) for weight, array in zip(held, arrays)}
    room = Budget(budget or 0)

    def leaf(weight: Weight) -> Any:
        array = loaded.get(weight.path)
        if array is not None:
            return array
        return LazyTensor(tensors, places[weight.path].stored, weight.shape, options.dtype, room)

    return build(config, leaf)


def _from_gguf(file: GGUFFile, options: _Options) -> Model:
    _, full = gguf_config(file)
    config = options.cut(full)
    _, places = _checked_places(full, file)
    # Before the weights: what building it takes is free again when they come.
    tokenizer = Tokenizer.in_gguf(file.metadata, file.path)
    decoder = _leaves(file, config, places, options)
    settings = sampling_settings(file.metadata, str(file.path))
    return Model(config, decoder, tokenizer, settings, str(file.path))
