"""The names of the values that a pass through a model computes, and their aliases.

A value has up to three names: that of this package, which follows the modules of checkpoints
("layers.3.self_attn"), that of the checkpoint ("model.layers.3.self_attn"), and that of TransformerLens
("blocks.3.hook_attn_out"), whose arrays have its axes: the heads are one axis, and the axes of the scores are
(batch, head, query, key).
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from einsum_transformer.arguments import nearest
from einsum_transformer.components.attention import Attention, FusedAttention
from einsum_transformer.components.gated_mlp import FusedGatedMLP, GatedMLP
from einsum_transformer.components.latent_attention import LatentAttention, LatentQuery
from einsum_transformer.components.layernorm import LayerNorm
from einsum_transformer.components.mlp import MLP
from einsum_transformer.components.moe import MoE
from einsum_transformer.components.rmsnorm import RMSNorm
from einsum_transformer.engine import einsum
from einsum_transformer.errors import InputError
from einsum_transformer.leaves.watched import watched_paths
from einsum_transformer.models.blocks import AnyBlock, ParallelBlock, PostNormBlock
from einsum_transformer.models.model import Model

Array = np.ndarray
Letters = tuple[str, ...]
"""The letter of each axis; "kg" is the axis of all query heads."""

_OUTPUTS = {
    "self_attn.q_proj": "self_attn.q",
    "self_attn.k_proj": "self_attn.k",
    "self_attn.v_proj": "self_attn.v",
    "self_attn.o_proj": "self_attn",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp",
}
"""Matrix -> the value that is its product with the input, plus the bias. The products of other matrices are
recorded by replacing the matrix."""
_LETTERS = {
    "qkv_proj": "btj",
    "gate_up_proj": "btj",
    "q_a_proj": "btc",
    "q_b_proj": "btkh",
    "kv_a_proj": "btj",
    "kv_b_proj": "bskh",
}
"""Other matrix -> the letters of its product with the input."""


@dataclass(frozen=True, slots=True)
class Value:
    """A value under one of its names."""

    name: str
    """The name that was asked for."""
    own: str
    """The name in this package, which a recorder reads."""
    letters: Letters
    shown: Callable[[Array], Array] | None = None
    """Returns the array under this name from the array of the program; None: it is the same."""
    stored: Callable[[Array, Array], Array] | None = None
    """Returns an array of the program from one under this name, and the array that it replaces; None: it is
    the same. A value without it and with `shown` is computed from another one, and cannot be replaced."""
    output_of_matrix: bool = False
    """Whether it is the product of a matrix, which is recorded by replacing the matrix (`watched`)."""

    @property
    def is_computed(self) -> bool:
        """Whether it is computed from the value `own`, so that it cannot be replaced."""
        return self.shown is not None and self.stored is None

    def of_program(self, array: Array) -> Array:
        """Return the array under this name."""
        return array if self.shown is None else self.shown(array)


class Values:
    """All values of a model by all of their names."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.by_name: dict[str, Value] = {}
        for name, own, letters, is_output in _own(model):
            for each in (name, model.module(f"{name}.weight")):
                value = Value(each, own, tuple(letters), output_of_matrix=is_output)
                self.by_name.setdefault(each, value)
        for value in _of_transformer_lens(model, self.by_name):
            self.by_name[value.name] = value

    def find(self, patterns: str | Sequence[str]) -> list[Value]:
        """Return the values whose names match, in the order of the patterns. `*` matches any characters.

        Raises InputError for a pattern that no value matches; the message lists the nearest name.
        """
        found: dict[str, Value] = {}
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            names = [pattern] if pattern in self.by_name else fnmatch.filter(self.by_name, pattern)
            if not names:
                raise InputError(
                    f"`names`: {self.model.source} has no value {pattern!r}{nearest(pattern, self.by_name)}"
                )
            found |= {name: self.by_name[name] for name in names}
        return list(found.values())


def _own(model: Model) -> Iterator[tuple[str, str, str, bool]]:
    """Yield name, name of the value that a recorder reads, letters, and whether it is the product of a matrix
    that has to be replaced to record it."""
    decoder = model.decoder
    yield "embed_tokens", "embed_tokens", "btd", False
    if decoder.embed_positions is not None:
        yield "embed_positions", "embed_positions", "btd", False
    known: dict[str, str] = {}
    for i, block in enumerate(decoder.layers):
        for name, letters in _of_block(block):
            full = f"layers.{i}.{name}" if name else f"layers.{i}"
            known[full] = letters
            yield full, full, letters, False
    yield "norm", "norm", "btd", False
    yield "logits", "logits", "btv", False
    for path in watched_paths(decoder):
        layer, _, name = path.partition(".")[2].partition(".")
        value = f"layers.{layer}.{_OUTPUTS.get(name, '')}"
        if value in known:
            yield path, value, known[value], False
        else:
            yield path, path, _LETTERS.get(path.rpartition(".")[2], ""), True


def _of_block(block: AnyBlock) -> Iterator[tuple[str, str]]:
    """Yield name and letters of the values of a block; "" is its output."""
    yield "resid_pre", "btd"
    for field in fields(block):
        if isinstance(getattr(block, field.name), (RMSNorm, LayerNorm)):
            yield field.name, "btd"
    attention, mlp = block.self_attn, block.mlp
    if isinstance(attention, (Attention, FusedAttention)):
        yield from (("self_attn.q", "btkgh"), ("self_attn.k", "btkh"), ("self_attn.v", "btkh"))
        if attention.rope is not None:
            yield from (("self_attn.rot_q", "btkgh"), ("self_attn.rot_k", "btkh"))
        if isinstance(attention, Attention) and attention.q_norm is not None:
            yield from (("self_attn.q_norm", "btkgh"), ("self_attn.k_norm", "btkh"))
    if isinstance(attention, LatentAttention):
        if isinstance(attention.query, LatentQuery):
            yield "self_attn.query.q_a_layernorm", "btc"
        yield "self_attn.kv_a_layernorm", "btc"
    yield from (("self_attn.scores", "bkgts"), ("self_attn.pattern", "bkgts"), ("self_attn.z", "btkgh"))
    yield from (("self_attn", "btd"), ("attn_out", "btd"))
    if not isinstance(block, ParallelBlock):
        yield "resid_mid", "btd"
    if isinstance(mlp, MoE):
        routing = ("mlp.gate.chosen", "mlp.gate.weights", "mlp.gate.probabilities")
        yield from ((name, "bte") for name in routing)
        if mlp.shared_expert is not None:
            yield from _of_feed_forward("mlp.shared_expert", mlp.shared_expert)
            yield "mlp.shared_expert", "btd"
    else:
        yield from _of_feed_forward("mlp", mlp)
    yield from (("mlp", "btd"), ("mlp_out", "btd"), ("", "btd"))


def _of_feed_forward(scope: str, mlp: GatedMLP | FusedGatedMLP | MLP) -> Iterator[tuple[str, str]]:
    names = ("up", "hidden") if isinstance(mlp, MLP) else ("gate", "up", "hidden")
    yield from ((f"{scope}.{name}", "btf") for name in names)


def _of_transformer_lens(model: Model, known: Mapping[str, Value]) -> Iterator[Value]:
    """Yield the values that TransformerLens names, for those that the model has."""
    decoder = model.decoder
    names = {"hook_embed": "embed_tokens", "hook_pos_embed": "embed_positions"}
    names |= {"unembed.hook_in": "norm", "unembed.hook_out": "logits"}
    for i, block in enumerate(decoder.layers):
        yield from _of_lens_block(i, block, known)
    for name, own in names.items():
        if own in known:
            yield Value(name, own, known[own].letters)
    last = f"layers.{len(decoder.layers) - 1}"
    yield from _of_norm("ln_final", last, decoder.norm)


def _of_lens_block(i: int, block: AnyBlock, known: Mapping[str, Value]) -> Iterator[Value]:
    def own(name: str) -> str:
        return f"layers.{i}.{name}" if name else f"layers.{i}"

    gated = isinstance(block.mlp, (GatedMLP, FusedGatedMLP))
    same = {
        "hook_resid_pre": "resid_pre",
        "hook_attn_out": "attn_out",
        "hook_resid_mid": "resid_mid",
        "mlp.hook_pre": "mlp.gate" if gated else "mlp.up",
        "mlp.hook_pre_linear": "mlp.up" if gated else "(none)",
        "mlp.hook_post": "mlp.hidden",
        "hook_mlp_out": "mlp_out",
        "hook_resid_post": "",
        "attn.hook_k": "self_attn.k",
        "attn.hook_v": "self_attn.v",
        "attn.hook_rot_k": "self_attn.rot_k",
    }
    for name, value in same.items():
        if own(value) in known:
            yield Value(f"blocks.{i}.{name}", own(value), known[own(value)].letters)
    for name in ("q", "rot_q", "z"):
        if own(f"self_attn.{name}") in known:
            letters = ("b", "t", "kg", "h")
            yield Value(f"blocks.{i}.attn.hook_{name}", own(f"self_attn.{name}"), letters, _joined(2), _split)
    for name in ("scores", "pattern"):
        letters = ("b", "kg", "t", "s")
        lens = "hook_attn_scores" if name == "scores" else "hook_pattern"
        yield Value(f"blocks.{i}.attn.{lens}", own(f"self_attn.{name}"), letters, _joined(1), _split)
    yield from _of_norm(f"blocks.{i}.ln1", own("resid_pre"), block.input_layernorm)
    second = block.pre_feedforward_layernorm if isinstance(block, PostNormBlock) else None
    if not isinstance(block, PostNormBlock):
        second = block.post_attention_layernorm
    middle = own("resid_pre" if isinstance(block, ParallelBlock) else "resid_mid")
    yield from _of_norm(f"blocks.{i}.ln2", middle, second)
    attention = block.self_attn
    if isinstance(attention, (Attention, FusedAttention)):
        weight = attention.o_proj

        def result(z: Array) -> Array:
            y = einsum("btkgh,dkgh->btkgd", z, weight)
            return y.reshape(*z.shape[:2], -1, y.shape[-1])

        yield Value(f"blocks.{i}.attn.hook_result", own("self_attn.z"), ("b", "t", "kg", "d"), result)


def _joined(axis: int) -> Callable[[Array], Array]:
    """Return a function that joins an axis and the next one."""
    return lambda a: a.reshape(*a.shape[:axis], -1, *a.shape[axis + 2 :])


def _split(array: Array, like: Array) -> Array:
    return array.reshape(like.shape)


def _of_norm(name: str, source: str, norm: RMSNorm | LayerNorm | None) -> Iterator[Value]:
    """Yield the divisor of a norm and the normalized values before the weight, from the norm's input."""
    if norm is None:
        return

    def parts(x: Array) -> tuple[Array, Array]:
        if isinstance(norm, LayerNorm):
            x = x - x.mean(axis=-1, keepdims=True)
        scale = np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + norm.eps)
        return scale, x / scale

    yield Value(f"{name}.hook_scale", source, ("b", "t", ""), lambda x: parts(x)[0])
    yield Value(f"{name}.hook_normalized", source, ("b", "t", "d"), lambda x: parts(x)[1])


def layer_of(name: str) -> int | None:
    """Return the layer in the name of a value of this package, or None."""
    found = re.match(r"layers\.(\d+)(\.|$)", name)
    return int(found[1]) if found else None


def axes_error(name: str, letters: Letters, given: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """Return a message that names the axis in which two shapes differ."""
    if len(given) != len(expected):
        return f"{name} has {len(expected)} axes {letters}, but the given array has shape {given}"
    axis = next(i for i, sizes in enumerate(zip(given, expected)) if sizes[0] != sizes[1])
    letter = f"`{letters[axis]}` " if letters and letters[axis] else ""
    return f"{name}: axis {axis} {letter}has size {expected[axis]}, but {given[axis]} in the given array"


def as_array(given: Any, value: Value, like: Array) -> Array:
    """Return what replaces an array under a name: an array of its shape, or a number for all elements."""
    shown = value.of_program(like)
    array = np.asarray(given)
    if array.ndim == 0:
        array = np.full_like(shown, array)
    if array.shape != shown.shape:
        raise InputError(f"`values`: {axes_error(value.name, value.letters, array.shape, shown.shape)}")
    return array if value.stored is None else value.stored(array, like)
