"""Load and save: where formats, families and text meet."""

from __future__ import annotations

import math
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from einsum_transformer import hub
from einsum_transformer.components.rope import RopeConfig, inverse_frequencies
from einsum_transformer.errors import ConfigError, FormatError, InputError
from einsum_transformer.formats import TensorSource
from einsum_transformer.formats.folder import open_tensors
from einsum_transformer.formats.gguf import GGUFFile
from einsum_transformer.formats.mapped import quoted
from einsum_transformer.leaves.lazy import Budget, LazyTensor
from einsum_transformer.leaves.resident import read_all, rooms
from einsum_transformer.models.config import Keys, ModelConfig
from einsum_transformer.models.decoder import Decoder, Weight, build, weights_of
from einsum_transformer.models.families import FAMILIES, family_of, gguf, gguf_reader
from einsum_transformer.models.families.family import Family
from einsum_transformer.models.model import Model
from einsum_transformer.models.peft import with_adapter
from einsum_transformer.models.places import Place, folder_place, gguf_place
from einsum_transformer.models.run_config import RunConfig, parse_run_config, read_json
from einsum_transformer.text.tokenizer import Tokenizer

Array = np.ndarray

DTYPES = ("float32", "float64")
_NO_WEIGHTS = frozenset({"I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64", "BOOL"})


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
) -> Model:
    """A model from a Hugging Face folder, a hub id, a .gguf file, a config JSON (random weights), or the
    default model.

    dtype: float32 or float64, what is computed in. max_layers: keep only the first layers. seed: for random
    weights.
    weight_budget: bytes of weights held in memory; the rest is read from the file whenever an equation needs
    it. adapter: a PEFT folder, whose adapters are put on the weights (unmerged; see `merged`).
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
    options = _Options(np.dtype(dtype), max_layers, seed, weight_budget)
    model = _load(source, options, revision, offline)
    return model if adapter is None else with_adapter(model, adapter)


def _load(source: str | Path | RunConfig, options: _Options, revision: str | None, offline: bool) -> Model:
    if isinstance(source, RunConfig):
        return _from_run_config(source, options, revision, offline)
    path = resolve(source, revision, offline)
    if path.is_dir():
        return _from_folder(path, options)
    if path.suffix == ".json":
        return _from_json(path, options, revision, offline)
    with_reason = open_tensors(path)
    if not isinstance(with_reason, GGUFFile):
        with_reason.close()
        raise InputError(
            f"{path}: a lone weight file has no config; name the folder that holds config.json beside it"
        )
    return _from_gguf(with_reason, options)


def resolve(source: str | Path, revision: str | None = None, offline: bool = False) -> Path:
    """The file or folder that `source` names, fetched from the hub if it is a repository that is not here."""
    if str(source).lower() == hub.DEFAULT_MODEL:
        return hub.default_model(offline)
    try:
        path = Path(source).expanduser()
        if path.exists():
            return path
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(
            f"{str(source)[:100]!r}: no such file or folder ({error.__class__.__name__})"
        ) from None
    if path.suffix in (".json", ".gguf", ".safetensors") or str(source).startswith((".", "/", "~")):
        raise InputError(f"{source}: no such file or folder")
    return hub.download(str(source), revision, offline)


def read_config(source: str | Path | RunConfig, offline: bool = False) -> ModelConfig:
    """The config alone of anything `load` takes, without reading a weight."""
    if isinstance(source, RunConfig):
        return source.model_config()
    path = resolve(source, offline=offline)
    if path.is_dir():
        return _folder_config(path)
    if path.suffix == ".json":
        raw = read_json(path)
        return (
            _hf_config(raw, str(path))
            if "model_type" in raw
            else parse_run_config(raw, str(path)).model_config()
        )
    tensors = open_tensors(path)
    try:
        if not isinstance(tensors, GGUFFile):
            raise InputError(f"{path}: a lone weight file has no config")
        return _gguf_config(tensors)[1]
    finally:
        tensors.close()


def config_keys(path: Path) -> Mapping[str, Any]:
    """The keys that a config has where it lies: in config.json, a JSON file, or a GGUF file's metadata (those
    of its architecture)."""
    if path.is_dir():
        path = path / "config.json"
        return read_json(path) if path.exists() else {}
    if path.suffix == ".json":
        return {key: value for key, value in read_json(path).items() if not key.startswith("//")}
    tensors = open_tensors(path)
    try:
        if not isinstance(tensors, GGUFFile):
            return {}
        own = ("general.architecture", f"{tensors.metadata['general.architecture']}.")
        return {key: value for key, value in tensors.metadata.items() if key.startswith(own)}
    finally:
        tensors.close()


@dataclass(frozen=True, slots=True)
class _Options:
    dtype: np.dtype
    max_layers: int | None
    seed: int | None
    weight_budget: int | None

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
    path = resolve(base / run.weight_file if run.weight_file else str(run.hf_repo_id), revision, offline)
    model = load(path, str(options.dtype), max_layers=options.max_layers, weight_budget=options.weight_budget)
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
    tensors = open_tensors(folder)
    family = FAMILIES[config.model_type].found_in(tensors.names())
    weights = weights_of(full)
    places = {weight.path: folder_place(weight, family, full, tensors) for weight in weights}
    tied = config.tie_word_embeddings
    spare = family.checkpoint_name("lm_head.weight") if tied else ""
    _check_names(tensors, places, family.ignored_tensors, spare)
    if tied and spare in tensors.names():
        embedding = places["embed_tokens.weight"].stored.name
        same_kind = tensors.info(spare).shape == tensors.info(embedding).shape
        if not same_kind or not np.array_equal(_bits(tensors.read(spare)), _bits(tensors.read(embedding))):
            raise FormatError(f"{folder}: tie_word_embeddings is true, but {spare} differs from {embedding}")
        tensors.release(spare)
    tokenizer = Tokenizer.in_folder(folder)
    decoder = _leaves(tensors, config, places, options)
    generation = folder / "generation_config.json"
    settings = read_json(generation) if generation.exists() else None
    return Model(config, decoder, tokenizer, settings, str(folder))


def _folder_config(folder: Path) -> ModelConfig:
    path = folder / "config.json"
    if not path.exists():
        raise InputError(
            f"{folder}: holds no config.json; a Hugging Face model folder or a .gguf file is expected"
        )
    return _hf_config(read_json(path), str(path))


def _hf_config(raw: Mapping[str, Any], source: str) -> ModelConfig:
    keys = Keys(raw, source)
    family = family_of(keys.get("model_type", str), source)
    if raw.get("quantization_config") is not None:
        method = raw["quantization_config"]
        name = method.get("quant_method") if isinstance(method, dict) else method
        raise ConfigError(
            f"{source}: quantization_config: {name!r} checkpoints are not supported; use the unquantized one"
        )
    try:
        config = family.read_config(keys)
    except ConfigError as error:
        raise error if str(error).startswith(source) else ConfigError(f"{source}: {error}") from None
    return replace(config, defaulted=tuple(keys.defaulted), ignored=keys.left_over())


def _check_names(tensors: TensorSource, places: Mapping[str, Place], ignored: str, spare: str) -> None:
    """Every weight is in the file with its shape and nothing else is, or an error that lists both sides."""
    stored = {name: shape for place in places.values() for name, shape in place.shapes.items()}
    found = {name for name in tensors.names() if not re.fullmatch(ignored, name)}
    missing = [name for name in stored if name not in found]
    unexpected = sorted(name for name in found if name not in stored and name != spare)
    if missing or unexpected:
        sides = [("missing from the file", missing), ("in the file but not in the model", unexpected)]
        told = "; ".join(f"{what}: {_list([*map(quoted, names)])}" for what, names in sides if names)
        raise FormatError(f"{tensors.path}: {told}")
    if packed := [name for name in stored if tensors.info(name).dtype in _NO_WEIGHTS]:
        kind = tensors.info(packed[0]).dtype
        raise FormatError(
            f"{tensors.path}: tensor {packed[0]} is {kind}: a weight is a floating-point tensor"
        )
    shapes = {name: tensors.info(name).shape for name in stored}
    wrong = [
        f"{name} is {list(shapes[name])} in the file, {list(expected)} by the config"
        for name, expected in stored.items()
        if shapes[name] != expected
    ]
    if wrong:
        raise FormatError(f"{tensors.path}: {_list(wrong, '; ')}")


def _list(names: list[str], separator: str = ", ") -> str:
    return separator.join(names[:8]) + (f"{separator}and {len(names) - 8} more" if len(names) > 8 else "")


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


def _bits(a: Array) -> Array:
    return a.view(np.uint8)


def _from_gguf(file: GGUFFile, options: _Options) -> Model:
    family, full = _gguf_config(file)
    config = options.cut(full)
    places = {weight.path: gguf_place(weight, family, full, file) for weight in weights_of(full)}
    _check_names(file, places, gguf.FACTORS, "")
    # Before the weights: what building it takes is free again when they come.
    tokenizer = (
        Tokenizer.from_gguf(file.metadata, file.path) if "tokenizer.ggml.model" in file.metadata else None
    )
    decoder = _leaves(file, config, places, options)
    return Model(config, decoder, tokenizer, None, str(file.path))


def _gguf_config(file: GGUFFile) -> tuple[Family, ModelConfig]:
    architecture = file.metadata["general.architecture"]
    source = str(file.path)
    prefix = f"{architecture}."
    metadata = {
        key: value for key, value in file.metadata.items() if not key.startswith("tokenizer.ggml.merges")
    }
    own = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    if "vocab_size" not in own and "tokenizer.ggml.tokens" not in metadata:
        own["vocab_size"] = file.info("token_embd.weight").shape[0]
    try:
        keys = Keys(own, source)
        config = gguf_reader(architecture, source)(keys, metadata)
        family = FAMILIES[config.model_type]
        if own.get("expert_count") and config.moe is None:
            count = own["expert_count"]
            raise ConfigError(f"{prefix}expert_count is {count}: experts are not supported here")
        held = set(file.names())
        tied = family.gguf_name("lm_head.weight") not in held
        changes = _gguf_biases(config, family, held)
        rope = _with_factors(config, file)
        defaulted, ignored = (
            [f"{prefix}{name}" for name in names] for names in (keys.defaulted, keys.left_over())
        )
        told = {"defaulted": tuple(defaulted), "ignored": tuple(ignored)}
        return family, replace(config, rope=rope, tie_word_embeddings=tied, **changes, **told)
    except ConfigError as error:
        raise error if str(error).startswith(source) else ConfigError(f"{source}: {error}") from None


def _gguf_biases(config: ModelConfig, family: Family, held: set[str]) -> dict[str, bool]:
    """Which biases a file has, of the kinds that its metadata does not tell."""
    if config.qkv_bias or config.norm != "rms" or config.fused_qkv is not None:
        return {}
    query = "q_bias" if config.latent is None else "kv_a_bias"
    kinds = {"attention_bias": f"self_attn.{query}"}
    if config.mlp == "gated":
        kinds["mlp_bias"] = "mlp.up_bias"
    return {kind: family.gguf_name(f"layers.0.{place}") in held for kind, place in kinds.items()}


def _with_factors(config: ModelConfig, file: GGUFFile) -> RopeConfig | None:
    """The config's RoPE with the factors that the file holds as tensors."""
    found = {name: file.read(f"{name}.weight") for name in _FACTORS if f"{name}.weight" in file.names()}
    if not found:
        return config.rope
    if config.rope is None:
        raise ConfigError(f"tensor {next(iter(found))}.weight belongs to RoPE, which this model has not")
    if "rope_freqs" in found:
        return _named_factors(config, config.rope, found["rope_freqs"])
    if len(found) != 2:
        raise ConfigError("only one of the tensors rope_factors_long and rope_factors_short is there")
    long, short = (tuple(map(float, found[name].ravel())) for name in _FACTORS[1:])
    return replace(config.rope, rope_type="longrope", long_factor=long, short_factor=short)


_FACTORS = ("rope_freqs", "rope_factors_long", "rope_factors_short")


def _named_factors(config: ModelConfig, rope: RopeConfig, factors: Array) -> RopeConfig:
    """llama3 scaling if the file's divisors are the ones it gives, so that a saved config.json can say it."""
    pairs = (int(config.head_dim * rope.partial_rotary_factor) // 2,)
    if factors.shape != pairs:
        raise ConfigError(
            f"tensor rope_freqs.weight is {list(factors.shape)}, the config needs {list(pairs)}"
        )
    plain = replace(rope, rope_type="default")
    for factor in (8.0, 32.0):
        named = replace(plain, rope_type="llama3", factor=factor, original_max_position_embeddings=8192)
        ratio = (
            inverse_frequencies(plain, config.head_dim)[0] / inverse_frequencies(named, config.head_dim)[0]
        )
        if ratio.shape == factors.shape and np.allclose(ratio, factors, rtol=1e-5):
            return named
    return replace(plain, frequency_factors=tuple(map(float, factors)))
