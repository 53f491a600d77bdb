"""A GGUF file as a model: whether it is one, and its config, from metadata, tensor names and RoPE factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from einsum_transformer.components.rope import RopeConfig, inverse_frequencies
from einsum_transformer.errors import ConfigError, FormatError, InputError
from einsum_transformer.formats import TensorSource
from einsum_transformer.formats.gguf import GGUFFile
from einsum_transformer.models.config import Keys, ModelConfig
from einsum_transformer.models.families import FAMILIES, gguf_reader
from einsum_transformer.models.families.family import Family, without_impossible_ids
from einsum_transformer.models.families.gguf_keys import check_unread, one_for_all_layers

Array = np.ndarray


_PURPOSES = {
    "adapter": "name the base model, and give the adapter as a PEFT folder (--adapter-path); GGUF "
    "adapters are not read",
    "mmproj": "a projector of images or sound; name the GGUF file of the language model",
    "imatrix": "an importance matrix, which serves to quantize a model; name the model's own GGUF file",
}


def whole_model(tensors: TensorSource) -> GGUFFile:
    """The GGUF file, if it holds a model, and no fewer tensors than layers: before anything is made for each
    layer."""
    path = tensors.path
    if not isinstance(tensors, GGUFFile):
        beside = path.with_name("config.json").exists()
        folder = f"its folder, {path.parent}" if beside else "the folder that holds config.json beside it"
        raise InputError(f"{path}: a lone weight file has no config; name {folder}")
    if tensors.purpose:
        way_out = _PURPOSES.get(tensors.purpose, "name the GGUF file of the model itself")
        raise FormatError(f"{path}: a GGUF file of kind {tensors.purpose!r}, not a model: {way_out}")
    key = f"{tensors.metadata.get('general.architecture')}.block_count"
    layers, count = tensors.metadata.get(key), len(tensors.names())
    if not count:
        raise FormatError(f"{path}: holds no tensors: a vocabulary alone is no model")
    if isinstance(layers, (int, float)) and layers > count:
        raise ConfigError(f"{path}: {key} is {layers!r:.40}, but the file has only {count} tensors")
    return tensors


def gguf_keys(file: GGUFFile) -> Mapping[str, Any]:
    """The metadata of a file's architecture, which describes the model."""
    own = ("general.architecture", f"{file.metadata.get('general.architecture')}.")
    return {key: value for key, value in file.metadata.items() if key.startswith(own)}


def gguf_config(file: GGUFFile) -> ModelConfig:
    """The config that a file's metadata and the names of its tensors describe."""
    architecture = file.metadata["general.architecture"]
    source = str(file.path)
    read = gguf_reader(
        architecture, source
    )  # before any tensor is asked for: other programs name them otherwise
    prefix = f"{architecture}."
    metadata = {
        key: value for key, value in file.metadata.items() if not key.startswith("tokenizer.ggml.merges")
    }
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
        defaulted, ignored = (
            [f"{prefix}{name}" for name in names] for names in (keys.defaulted, keys.left_over())
        )
        told = {"defaulted": tuple(defaulted), "ignored": tuple(ignored)}
        config = replace(config, rope=rope, tie_word_embeddings=tied, **changes, **told)
        return without_impossible_ids(config, source)
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
    if config.rope.rope_type not in ("default", "longrope") or config.rope.factor != 1:
        scaling = f"{config.rope.rope_type} by {config.rope.factor:g}"
        raise ConfigError(f"rope.scaling ({scaling}) beside the tensors rope_factors_* is not supported")
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
    if rope.rope_type != "default" or rope.attention_factor is not None:
        return replace(rope, frequency_factors=tuple(map(float, factors)))
    plain = rope
    for factor in (8.0, 32.0):
        named = replace(plain, rope_type="llama3", factor=factor, original_max_position_embeddings=8192)
        ratio = (
            inverse_frequencies(plain, config.head_dim)[0] / inverse_frequencies(named, config.head_dim)[0]
        )
        if ratio.shape == factors.shape and np.allclose(ratio, factors, rtol=1e-5):
            return named
    return replace(plain, frequency_factors=tuple(map(float, factors)))
