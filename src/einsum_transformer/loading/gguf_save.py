"""A model as a GGUF file: its metadata, and the tensor, order and type of each weight.

The metadata and names are read back with the functions that read files before anything is written, so that a
setting that a file cannot describe is an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from einsum_transformer.components.rope import inverse_frequencies
from einsum_transformer.engine import Leaf
from einsum_transformer.errors import InputError
from einsum_transformer.formats import TensorInfo
from einsum_transformer.formats.folder import open_tensors
from einsum_transformer.formats.gguf import GGUFFile
from einsum_transformer.formats.gguf_write import FILE_TYPES, Planned, write_gguf
from einsum_transformer.formats.sniff import kind_of
from einsum_transformer.leaves.resident import Stored
from einsum_transformer.loading.gguf import gguf_config, gguf_place
from einsum_transformer.models.config import ModelConfig, MoEConfig
from einsum_transformer.models.model import Model
from einsum_transformer.notes import note
from einsum_transformer.tables import first_names
from einsum_transformer.tree import named_leaves

Array = np.ndarray

_BLOCK = 32  # elements of a block of Q8_0, Q4_0 and Q4_1
_FLOAT32 = (
    "norm.weight",
    ".bias",
    "ffn_gate_inp.weight",
    "ffn_gate_inp_shexp.weight",
    "position_embd.weight",
)
_VOCABULARY = ("token_embd.weight", "output.weight")
_NOT_COPIED = (
    "general.architecture",
    "general.file_type",
    "general.quantization_version",
    "general.alignment",
)


@dataclass(frozen=True, slots=True)
class Plan:
    """A file before it is written: as much of a TensorSource as `gguf_config` reads."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Planned]

    def names(self) -> Collection[str]:
        return self.tensors.keys()

    def info(self, name: str) -> TensorInfo:
        tensor = self.tensors[name]
        return TensorInfo(name, tensor.shape, tensor.dtype, 0, self.path, 0)

    def read(self, name: str) -> Array:
        return self.tensors[name].read()


def save_gguf(
    model: Model,
    path: Path,
    outtype: str,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> None:
    """Write a model as a GGUF file whose matrices have the type `outtype`, a key of FILE_TYPES.

    Norms, biases, routers and learned positions are F32, as in the files of llama.cpp's converter. In files
    of Q4_0 and Q4_1, embedding and output head are Q8_0. Raises InputError for a model that the format cannot
    describe."""
    plan = planned(model, path, outtype)
    write_gguf(path, plan.metadata, list(plan.tensors.values()), progress)


def planned(model: Model, path: Path, outtype: str) -> Plan:
    """Return the metadata and tensors of a model's file. Raises InputError for a model that the format cannot
    describe; notes name what the file does not contain."""
    family, source = model.family, model.source
    if outtype not in FILE_TYPES:
        raise InputError(f"`outtype` is {outtype!r}: expected {', '.join(FILE_TYPES)}")
    if model.lora is not None:
        raise InputError(f"{source}: the model has an adapter: merge it first")
    if family.write_gguf is None:
        raise InputError(f"{source}: GGUF files cannot describe models of type {model.config.model_type}")
    if model.quantization is not None:
        scheme = model.quantization.scheme
        note(f"{source}: the weights are dequantized; the file does not contain the scheme {scheme}")
    architecture = family.gguf_architecture or model.config.model_type
    own = {f"{architecture}.{key}": value for key, value in family.write_gguf(model.config).items()}
    own = {key: float(value) if isinstance(value, np.floating) else value for key, value in own.items()}
    general = {
        "general.architecture": architecture,
        "general.type": "model",
        "general.name": Path(source).name,
        "general.file_type": FILE_TYPES[outtype],
        "general.quantization_version": 2,
    }
    metadata = general | own | _described(model)
    plan = Plan(path, metadata, _rope_tensors(model.config) | _tensors(model, outtype))
    # Files store 32 bits of a float.
    stored = {key: float(np.float32(v)) if isinstance(v, float) else v for key, v in metadata.items()}
    read = gguf_config(replace(plan, metadata=stored))
    if setting := _different(model.config, read):
        raise InputError(f"{source}: GGUF files of {architecture} cannot represent {setting}")
    if ignored := _ignored_by_llama_cpp(model):
        note(f"{source}: the file contains what llama.cpp ignores for {architecture}: {ignored}")
    return plan


def _ignored_by_llama_cpp(model: Model) -> str:
    """The settings in a model's file that llama.cpp does not apply, or ""."""
    config, found = model.config, list[str]()
    if config.sliding_window is not None and not model.family.llama_cpp_windows:
        found.append(f"the sliding window of {config.sliding_window} tokens")
    if any(rope.rope_type == "yarn" and (rope.beta_fast, rope.beta_slow) != (32, 1) for rope in config.ropes):
        found.append("beta_fast and beta_slow of yarn")
    return " and ".join(found)


def _described(model: Model) -> dict[str, Any]:
    """Return the tokenizer and the description of the model: from its GGUF file, or else from its folder."""
    path = Path(model.source)
    if path.is_file() and kind_of(path) == "GGUF":
        file = open_tensors(path)
        assert isinstance(file, GGUFFile)
        kept = ("general.", "tokenizer.")
        return {
            key: value
            for key, value in file.metadata.items()
            if key.startswith(kept) and key not in _NOT_COPIED
        }
    if model.tokenizer is not None:
        return model.tokenizer.to_gguf(model.config.vocab_size)
    note(f"{model.source}: no tokenizer, so programs that load the file accept token ids only")
    ids = {"bos": model.config.bos_token_id, "padding": model.config.pad_token_id}
    ids["eos"] = next(iter(model.config.eos_token_id), None)
    named = {f"tokenizer.ggml.{name}_token_id": token for name, token in ids.items() if token is not None}
    return {"tokenizer.ggml.model": "none"} | named


def _rope_tensors(config: ModelConfig) -> dict[str, Planned]:
    """The tensors with the divisors of RoPE's frequencies."""
    rope = config.rope
    found: dict[str, Sequence[float] | Array] = {}
    if rope is not None and rope.rope_type == "longrope":
        found = {"rope_factors_long": rope.long_factor, "rope_factors_short": rope.short_factor}
    elif rope is not None and (rope.rope_type == "llama3" or rope.frequency_factors is not None):
        plain = replace(rope, rope_type="default", factor=1.0, frequency_factors=None)
        scaled, unscaled = (inverse_frequencies(each, config.head_dim)[0] for each in (rope, plain))
        found = {"rope_freqs": unscaled / scaled}
    arrays = {f"{name}.weight": np.asarray(value, np.float32) for name, value in found.items()}
    return {
        name: Planned(name, array.shape, "F32", lambda array=array: array) for name, array in arrays.items()
    }


def _tensors(model: Model, outtype: str) -> dict[str, Planned]:
    """The tensors of all weights; experts of a layer are parts of one tensor."""
    leaves = dict(named_leaves(model.decoder))
    shapes: dict[str, tuple[int, ...]] = {}
    parts: dict[str, list[tuple[Stored, Any]]] = {}
    for path, spec in model.weights.items():
        place = gguf_place(spec, model.family, model.config, None)
        shapes |= place.shapes
        for stored in (place.stored, *place.stored.others):
            parts.setdefault(stored.name, []).append((stored, leaves[path]))
    types = {name: _type(name, shape, outtype) for name, shape in shapes.items()}
    if other := [name for name, kind in types.items() if kind == "F16" != outtype]:
        note(
            f"{model.source}: F16 instead of {outtype}, since their rows are not a multiple of {_BLOCK} "
            f"elements: {first_names(other, 4)}"
        )
    return {
        name: Planned(name, shape, types[name], _reader(shape, parts[name])) for name, shape in shapes.items()
    }


def _type(name: str, shape: tuple[int, ...], outtype: str) -> str:
    if len(shape) == 1 or name.endswith(_FLOAT32):
        return "F32"
    if outtype not in ("F32", "F16", "BF16"):
        if shape[-1] % _BLOCK:
            return "F16"
        return "Q8_0" if name in _VOCABULARY else outtype
    return outtype


def _reader(shape: tuple[int, ...], parts: Sequence[tuple[Stored, Any]]) -> Callable[[], Array]:
    """Return the function that reads a tensor: the parts of its weights, in the order of the file."""

    def read() -> Array:
        values = np.empty(shape, np.float32)
        rows = values.reshape(-1, shape[-1]) if len(parts) > 1 else values
        for stored, leaf in parts:
            weight = np.asarray(leaf.array() if isinstance(leaf, Leaf) else leaf, np.float32)
            weight = weight.reshape(stored.shape)
            ordered = weight if stored.in_file_order is None else stored.in_file_order(weight)
            target = values
            if len(parts) > 1:
                target = rows[stored.first_row : stored.first_row + stored.shape[0]]
            target[...] = ordered.reshape(target.shape)
            target += np.float32(stored.minus)
        return values

    return read


_NOT_COMPARED = frozenset(
    {
        "model_type",  # an architecture of GGUF files may be one of several
        *("initializer_range", "attention_block", "training", "defaulted", "ignored"),
        *("bos_token_id", "eos_token_id", "pad_token_id"),  # those of the tokenizer
        *("rope", "local_rope", "rope_layers", "attention_scale", "scale_by_layer"),  # compared by layer
        *("sliding_window", "layer_types", "moe"),
    }
)


def _different(config: ModelConfig, other: ModelConfig) -> str:
    """The first setting of the arithmetic in which two configs differ, with its value, or ""."""
    for field in fields(ModelConfig):
        compared = field.name not in _NOT_COMPARED
        if compared and not _equal(getattr(config, field.name), getattr(other, field.name)):
            return f"{field.name} = {getattr(config, field.name)}"
    for layer in range(config.num_hidden_layers):
        if config.windows[layer] != other.windows[layer]:
            return f"the sliding window of layer {layer}: {config.windows[layer]}"
        if not _equal(config.scale_of(layer), other.scale_of(layer)):
            return f"the attention scale of layer {layer}: {config.scale_of(layer):.6g}"
        if config.has_experts(layer) != other.has_experts(layer):
            return f"which layers have experts (layer {layer})"
        if not _same_rope(config, other, layer):
            return f"the RoPE of layer {layer}{_rope_type(config, layer)}"
    for field in fields(MoEConfig) if config.moe is not None else ():
        own, found = (getattr(each.moe, field.name) for each in (config, other))
        if field.name != "layers" and not _equal(own, found):
            return f"{field.name} = {own}"
    return ""


def _rope_type(config: ModelConfig, layer: int) -> str:
    index = config.rope_of(layer)
    return "" if index is None else f", rope_type {config.ropes[index].rope_type}"


def _equal(one: Any, other: Any) -> bool:
    """Whether two settings are equal in the precision of float32."""
    if isinstance(one, float) and isinstance(other, (int, float)):
        return math.isclose(one, other, rel_tol=1e-6)
    return one == other


def _same_rope(config: ModelConfig, other: ModelConfig, layer: int) -> bool:
    """Whether a layer rotates by the same angles, at the first position and beyond the longest."""
    indices = config.rope_of(layer), other.rope_of(layer)
    if indices[0] is None or indices[1] is None:
        return indices == (None, None)
    ropes = config.ropes[indices[0]], other.ropes[indices[1]]
    if ropes[0].interleaved != ropes[1].interleaved:
        return False
    for length in (1, 4 * config.max_position_embeddings):
        (one, factor), (two, another) = (inverse_frequencies(r, config.head_dim, length) for r in ropes)
        if (
            one.shape != two.shape
            or not np.allclose(one, two, rtol=1e-5, atol=0)
            or not _equal(factor, another)
        ):
            return False
    return True
