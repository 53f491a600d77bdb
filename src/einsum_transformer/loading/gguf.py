"""A GGUF file as a model: check that it is a model, read its config, and locate its weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from einsum_transformer.components.rope import RopeConfig, inverse_frequencies
from einsum_transformer.errors import ConfigError, FormatError, InputError
from einsum_transformer.formats import TensorInfo, TensorSource
from einsum_transformer.formats.gguf import GGUFFile
from einsum_transformer.leaves.resident import Stored
from einsum_transformer.loading.places import EXPERT, Place, stacked
from einsum_transformer.models.builder import WeightSpec
from einsum_transformer.models.config import Keys, ModelConfig
from einsum_transformer.models.families import FAMILIES, gguf_reader
from einsum_transformer.models.families.family import Family, without_impossible_ids
from einsum_transformer.models.families.gguf_keys import check_unread, one_for_all_layers

Array = np.ndarray

_FIRST_EXPERTS = 8


_PURPOSES = {
    "adapter": "give the base model, and the adapter as a PEFT folder (`adapter`); GGUF adapters are "
    "not supported",
    "mmproj": "a projector of images or sound; give the GGUF file of the language model",
    "imatrix": "an importance matrix for quantizing a model; give the GGUF file of the model itself",
}


def whole_model(tensors: TensorSource) -> GGUFFile:
    """Return the GGUF file after checking that it contains a model with at least as many tensors as layers,
    before anything is allocated per layer."""
    path = tensors.path
    if not isinstance(tensors, GGUFFile):
        has_config = path.with_name("config.json").exists()
        folder = f"its folder, {path.parent}" if has_config else "a folder that also contains its config.json"
        raise InputError(f"{path}: a single weight file has no config; give {folder}")
    if tensors.purpose:
        advice = _PURPOSES.get(tensors.purpose, "give the GGUF file of the model itself")
        raise FormatError(f"{path}: a GGUF file of type {tensors.purpose!r}, not a model: {advice}")
    key = f"{tensors.metadata.get('general.architecture')}.block_count"
    layers, count = tensors.metadata.get(key), len(tensors.names())
    if not count:
        raise FormatError(f"{path}: contains no tensors: a vocabulary alone is not a model")
    if isinstance(layers, (int, float)) and layers > count:
        raise ConfigError(f"{path}: {key} is {layers!r:.40}, but the file has only {count} tensors")
    return tensors


def gguf_keys(file: GGUFFile) -> Mapping[str, Any]:
    """Return the metadata of the architecture, which describes the model."""
    own = ("general.architecture", f"{file.metadata.get('general.architecture')}.")
    return {key: value for key, value in file.metadata.items() if key.startswith(own)}


class Described(Protocol):
    """What describes a model: metadata, the names and shapes of tensors, and the values of a few. It is a
    file, or the plan of one."""

    @property
    def path(self) -> Path: ...
    @property
    def metadata(self) -> Mapping[str, Any]: ...
    def names(self) -> Collection[str]: ...
    def info(self, name: str) -> TensorInfo: ...
    def read(self, name: str) -> Array: ...


def gguf_config(file: Described) -> ModelConfig:
    """Build the config from a file's metadata and the names of its tensors."""
    architecture = file.metadata["general.architecture"]
    source = str(file.path)
    read = gguf_reader(architecture, source)  # before a tensor is read: names differ in other architectures
    prefix = f"{architecture}."
    metadata = {key: each for key, each in file.metadata.items() if key != "tokenizer.ggml.merges"}
    own = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    if "vocab_size" not in own and "tokenizer.ggml.tokens" not in metadata:
        own["vocab_size"] = next(iter(file.info("token_embd.weight").shape), 0)
    try:
        keys = Keys(one_for_all_layers(own, source), source)
        config = read(keys, metadata)
        family = FAMILIES[config.model_type]
        check_unread(keys, architecture, config)
        held = set(file.names())
        tied = family.gguf_name("lm_head.weight") not in held
        changes = _gguf_biases(config, family, held)
        rope = _with_factors(config, file)
        seen = {"defaulted": keys.defaulted, "ignored": keys.left_over()}
        seen = {kind: tuple(f"{prefix}{name}" for name in names) for kind, names in seen.items()}
        config = replace(config, rope=rope, tie_word_embeddings=tied, **changes, **seen)
        return without_impossible_ids(config, source)
    except ConfigError as error:
        raise error if str(error).startswith(source) else ConfigError(f"{source}: {error}") from None


def _gguf_biases(config: ModelConfig, family: Family, held: set[str]) -> dict[str, bool]:
    """Return which biases a file has, for the settings that are missing in GGUF metadata."""
    if config.qkv_bias or config.norm != "rms" or config.fused_qkv is not None:
        return {}
    query = "q_bias" if config.latent is None else "kv_a_bias"
    kinds = {"attention_bias": f"self_attn.{query}"}
    if config.mlp == "gated":
        kinds["mlp_bias"] = "mlp.up_bias"
    return {kind: family.gguf_name(f"layers.0.{path}") in held for kind, path in kinds.items()}


def _with_factors(config: ModelConfig, file: Described) -> RopeConfig | None:
    """Return the config's RoPE with the factors that the file stores as tensors."""
    found = {name: file.read(f"{name}.weight") for name in _FACTORS if f"{name}.weight" in file.names()}
    if not found:
        return config.rope
    if config.rope is None:
        raise ConfigError(f"tensor {next(iter(found))}.weight is for RoPE, but this model does not use RoPE")
    if "rope_freqs" in found:
        return _named_factors(config, config.rope, found["rope_freqs"])
    if len(found) != 2:
        raise ConfigError("one of the tensors rope_factors_long and rope_factors_short is missing")
    if config.rope.rope_type not in ("default", "longrope") or config.rope.factor != 1:
        scaling = f"{config.rope.rope_type} by {config.rope.factor:g}"
        raise ConfigError(f"rope.scaling ({scaling}) with the tensors rope_factors_* is not supported")
    long, short = (tuple(map(float, found[name].ravel())) for name in _FACTORS[1:])
    return replace(config.rope, rope_type="longrope", long_factor=long, short_factor=short)


_FACTORS = ("rope_freqs", "rope_factors_long", "rope_factors_short")


def _named_factors(config: ModelConfig, rope: RopeConfig, factors: Array) -> RopeConfig:
    """Return llama3 scaling if it yields the file's divisors, so that a saved config.json can contain it."""
    pairs = (int(config.head_dim * rope.partial_rotary_factor) // 2,)
    if factors.shape != pairs:
        raise ConfigError(f"tensor rope_freqs.weight is {list(factors.shape)}, the config expects {[*pairs]}")
    if rope.rope_type != "default" or rope.attention_factor is not None:
        return replace(rope, frequency_factors=tuple(map(float, factors)))
    plain = inverse_frequencies(rope, config.head_dim)[0]
    for factor in (8.0, 32.0):
        named = replace(rope, rope_type="llama3", factor=factor, original_max_position_embeddings=8192)
        ratio = plain / inverse_frequencies(named, config.head_dim)[0]
        if ratio.shape == factors.shape and np.allclose(ratio, factors, rtol=1e-5):
            return named
    return replace(rope, frequency_factors=tuple(map(float, factors)))


def gguf_place(
    weight: WeightSpec, family: Family, config: ModelConfig, tensors: TensorSource | None
) -> Place:
    """Locate a weight in a GGUF file: names differ, and some weights are permuted for llama.cpp's kernels.

    tensors: the file; None: a file as current converters write it."""
    held = () if tensors is None else tensors.names()
    if (expert := EXPERT.fullmatch(weight.path)) and config.moe is not None:
        name = family.gguf_name(f"{expert['experts']}.{expert['part']}_proj")
        # Older files have one tensor per expert: blk.0.ffn_gate.7.weight
        single = name.replace("_exps.weight", f".{expert['index']}.weight")
        if single in held or (name not in held and _unstacked(name, held)):
            return Place(Stored(single, weight.stored), {single: weight.stored})
        shape = (config.moe.num_experts, *weight.stored)
        return stacked(weight, name, int(expert["index"]) * weight.stored[0], shape)
    name = family.gguf_name(weight.path)
    if weight.path.endswith(".kv_b_proj") and name not in held:
        return _latent_parts(weight, family, config)
    shape = weight.stored
    if weight.path.endswith(".shared_expert_gate") and tensors is not None and name in held:
        shape = tensors.info(name).shape  # [1, d] or [d]
        shape = shape if np.prod(shape) == np.prod(weight.stored) else weight.stored
    stored = Stored(name, weight.stored, _order(weight.path, family, config))
    if weight.path.endswith("norm.weight"):
        stored = replace(stored, minus=family.gguf_norm_offset)
    return Place(stored, {name: shape})


def _unstacked(name: str, held: Collection[str]) -> bool:
    """Whether the first experts of a layer have one tensor each; `name`: the stacked tensor of one matrix."""
    parts = [re.sub(r"(gate|up|down)_exps", each, name) for each in ("gate", "up", "down")]
    firsts = (part.replace(".weight", f".{i}.weight") for part in parts for i in range(_FIRST_EXPERTS))
    return any(each in held for each in firsts)


def _order(path: str, family: Family, config: ModelConfig) -> Callable[[Array], Array] | None:
    """Return the view of a weight in the order of a GGUF file; None if the order is the same."""
    name = ".".join(path.split(".")[2:])
    if name in family.gguf_permuted:
        query = name.split(".")[1].startswith("q")
        return _paired_rows(config.num_attention_heads if query else config.num_key_value_heads)
    if config.fused_qkv == "head" and name.startswith("self_attn.qkv"):
        heads, size = config.num_key_value_heads, config.head_dim
        # The file stores all queries, then all keys, then all values.
        return lambda rows: rows.reshape(heads, 3, size, *rows.shape[1:]).swapaxes(0, 1)
    return None


def _paired_rows(heads: int) -> Callable[[Array], Array]:
    """Return the view of rows in GGUF order, where RoPE rotates rows (2i, 2i + 1) and not (i, i + h/2)."""

    def view(rows: Array) -> Array:
        halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
        return halves.swapaxes(1, 2)

    return view


def _latent_parts(weight: WeightSpec, family: Family, config: ModelConfig) -> Place:
    """Locate keys and values of latent attention in two tensors: attn_k_b (heads, latent, key), transposed
    for the absorbed form, and attn_v_b (heads, value, latent)."""
    latent = config.latent
    assert latent is not None
    heads, plain, rank = config.num_attention_heads, latent.qk_nope_head_dim, latent.kv_lora_rank
    names = [family.gguf_name(weight.path.replace(".kv_b_proj", f".{part}_b_proj")) for part in "kv"]

    def keys(rows: Array) -> Array:
        return rows.reshape(heads, -1, rank)[:, :plain].transpose(0, 2, 1)

    def values(rows: Array) -> Array:
        return rows.reshape(heads, -1, rank)[:, plain:]

    second = Stored(names[1], weight.stored, values)
    shapes = {names[0]: (heads, rank, plain), names[1]: (heads, latent.v_head_dim, rank)}
    return Place(Stored(names[0], weight.stored, keys, others=(second,)), shapes)
