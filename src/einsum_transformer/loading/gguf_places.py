"""Where the weights of a model stand in a GGUF file: under other names, some with their rows rearranged."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from einsum_transformer.formats import TensorSource
from einsum_transformer.leaves.resident import Stored
from einsum_transformer.loading.places import EXPERT, Place, stacked
from einsum_transformer.models.config import ModelConfig
from einsum_transformer.models.decoder import Weight
from einsum_transformer.models.families.family import Family

Array = np.ndarray

_FIRST_EXPERTS = 8


def gguf_place(weight: Weight, family: Family, config: ModelConfig, tensors: TensorSource) -> Place:
    """In a GGUF file: under other names, and some of them rearranged for llama.cpp's kernels."""
    if (expert := EXPERT.fullmatch(weight.path)) and config.moe is not None:
        name = family.gguf_name(f"{expert['experts']}.{expert['part']}_proj")
        # Files from before experts were stacked have a tensor for each: blk.0.ffn_gate.7.weight
        alone = name.replace("_exps.weight", f".{expert['index']}.weight")
        if alone in tensors.names() or (name not in tensors.names() and _apart(name, tensors)):
            return Place(Stored(alone, weight.stored), {alone: weight.stored})
        shape = (config.moe.num_experts, *weight.stored)
        return stacked(weight, name, int(expert["index"]) * weight.stored[0], shape)
    name = family.gguf_name(weight.path)
    if weight.path.endswith(".kv_b_proj") and name not in tensors.names():
        return _latent_parts(weight, family, config)
    shape = weight.stored
    if weight.path.endswith(".shared_expert_gate") and name in tensors.names():
        shape = tensors.info(name).shape  # [1, d], or without the 1
        shape = shape if np.prod(shape) == np.prod(weight.stored) else weight.stored
    stored = Stored(name, weight.stored, _order(weight.path, family, config))
    if weight.path.endswith("norm.weight"):
        stored = replace(stored, minus=family.gguf_norm_offset)
    return Place(stored, {name: shape})


def _apart(name: str, tensors: TensorSource) -> bool:
    """Whether the first experts of a layer have tensors of their own; `name`: the stack of one matrix."""
    parts = [re.sub(r"(gate|up|down)_exps", each, name) for each in ("gate", "up", "down")]
    firsts = (part.replace(".weight", f".{i}.weight") for part in parts for i in range(_FIRST_EXPERTS))
    return any(each in tensors.names() for each in firsts)


def _order(path: str, family: Family, config: ModelConfig) -> Callable[[Array], Array] | None:
    """The view of a weight in the order of a GGUF file."""
    place = ".".join(path.split(".")[2:])
    if place in family.gguf_permuted:
        query = place.split(".")[1].startswith("q")
        return _paired_rows(config.num_attention_heads if query else config.num_key_value_heads)
    if config.fused_qkv == "head" and place.startswith("self_attn.qkv"):
        heads, size = config.num_key_value_heads, config.head_dim
        # The file has all queries, all keys, all values.
        return lambda rows: rows.reshape(heads, 3, size, *rows.shape[1:]).swapaxes(0, 1)
    return None


def _paired_rows(heads: int) -> Callable[[Array], Array]:
    """The rows in the order of GGUF, where RoPE turns rows (2i, 2i + 1) together and not (i, i + h/2)."""

    def view(rows: Array) -> Array:
        halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
        return halves.swapaxes(1, 2)

    return view


def _latent_parts(weight: Weight, family: Family, config: ModelConfig) -> Place:
    """Keys and values of latent attention in two tensors: attn_k_b (heads, latent, key), turned for the
    absorbed form, and attn_v_b (heads, value, latent)."""
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
