"""LoRA on a model: adapters put on, merged into the weights, and what of a model is trained."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from einsum_transformer.engine import Leaf
from einsum_transformer.errors import FormatError, InputError
from einsum_transformer.formats.safetensors import atomic_file, float32_to_bf16, parse_json, sync
from einsum_transformer.leaves.frozen import Frozen
from einsum_transformer.leaves.lora import Dropout, LoRA
from einsum_transformer.models.lora_config import LoRAConfig
from einsum_transformer.models.model import EMBEDDING, HEAD, POSITIONS, Model
from einsum_transformer.tree import map_named, named_leaves

Array = np.ndarray
Pair = tuple[Array, Array]
"""A (r, inputs) and B (outputs, r)."""


def with_lora(
    model: Model, config: LoRAConfig, seed: int = 0, pairs: Mapping[str, Pair] | None = None
) -> Model:
    """The model with an adapter on each target and every other weight frozen.

    A has PEFT's start: uniform in +-1 / sqrt(inputs), for an embedding standard normal, each tensor from a
    stream of its own; B is zero, so that the model's output is the base's bit for bit. pairs: module name ->
    A and B to begin with instead; then exactly those modules get an adapter.

    Where one matrix serves as embedding and as head, an adapter is put on the role that is named and the
    other keeps the matrix as it is (as in PEFT).
    """

    def wanted(path: str) -> bool:
        module = model.module(path)
        if pairs is not None:
            return module in pairs
        return path != POSITIONS and config.targets(module, linear=path not in (EMBEDDING, HEAD))

    if any(isinstance(leaf, (Frozen, LoRA)) for _, leaf in named_leaves(model.decoder)):
        raise InputError(f"{model.source}: the model has an adapter already; merge it first")
    if model.decoder.lm_head is None and any(map(wanted, (EMBEDDING, HEAD))):
        model = replace(model, decoder=replace(model.decoder, lm_head=model.decoder.head))
    places = model.weights
    found: list[str] = []

    def leaf(path: str, weight: Any) -> Any:
        place, module = places[path], model.module(path)
        if len(place.stored) < 2 or not wanted(path):
            return Frozen(weight)
        found.append(module)
        rank, scaling = config.rank_and_scaling(module)
        outputs, inputs = place.shape[: place.out_axes], place.shape[place.out_axes :]
        if pairs is None:
            a = _start(path, rank, inputs, place.stored[1], seed)
            b = np.zeros((*outputs, rank))
        else:
            a, b = pairs[module]
            _check_pair(module, a, b, rank, place.stored)
        a = np.array(a, weight.dtype).reshape(rank, *inputs)
        b = np.array(b, weight.dtype).reshape(*outputs, rank)
        return LoRA(path, weight, a, b, scaling, len(outputs), Dropout(config.lora_dropout))

    decoder = map_named(leaf, model.decoder)
    missing = set(pairs or ()) - set(found)
    if missing or not found:
        modules = sorted(
            {model.module(path).split(".")[-1] for path, w in places.items() if len(w.stored) > 1}
        )
        names = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules
        names = sorted(missing)[:3] if missing else names
        raise InputError(
            f"{model.source}: LoRA target_modules {', '.join(map(repr, names))} name no matrix of this "
            f"model; it has {', '.join(modules)}"
        )
    return replace(model, decoder=decoder, lora=config)


def _start(path: str, rank: int, inputs: tuple[int, ...], width: int, seed: int) -> Array:
    rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
    if path == EMBEDDING:
        return rng.standard_normal((rank, *inputs))
    bound = 1 / math.sqrt(width)
    return rng.uniform(-bound, bound, (rank, *inputs))


def _check_pair(module: str, a: Array, b: Array, rank: int, stored: tuple[int, ...]) -> None:
    expected = (rank, stored[1]), (stored[0], rank)
    if (a.shape, b.shape) != expected:
        raise InputError(
            f"the adapter of {module} is {list(a.shape)} and {list(b.shape)}, its config and the model "
            f"ask for {list(expected[0])} and {list(expected[1])}: is it for another base model?"
        )


def trainable(decoder: Any) -> dict[str, Array]:
    """Name -> array of everything in a decoder that is trained: its arrays, and its adapters' matrices."""
    found: dict[str, Array] = {}
    for path, leaf in named_leaves(decoder):
        if isinstance(leaf, LoRA):
            found |= {f"{path}.lora_A": leaf.a, f"{path}.lora_B": leaf.b}
        elif not isinstance(leaf, Leaf):
            found[path] = leaf
    return found


def masked(decoder: Any, key: tuple[int, ...], first_row: int) -> Any:
    """The decoder on the same weights, whose adapters drop what `key` says of the rows from this one on."""
    if not any(isinstance(leaf, LoRA) and leaf.dropout.probability for _, leaf in named_leaves(decoder)):
        return decoder
    return map_named(lambda _, leaf: leaf.masked(key, first_row) if isinstance(leaf, LoRA) else leaf, decoder)


def gradients_by_name(gradient: Any) -> dict[str, Array]:
    """The gradient of a decoder by the names of `trainable`."""
    found: dict[str, Array] = {}
    for path, leaf in named_leaves(gradient):
        if isinstance(leaf, dict):
            found |= {f"{path}.{part}": array for part, array in leaf.items()}
        else:
            found[path] = leaf
    return found


@dataclass(frozen=True, slots=True)
class Merged:
    """What merging did to one weight. change: root mean square of scaling * B A; error: of what the stored
    number misses of the exact sum; relative: error / change."""

    name: str
    change: float
    error: float

    @property
    def relative(self) -> float:
        return self.error / self.change if self.change else 0.0


def merged(model: Model, dtype: str = "float32", sign: int = 1) -> tuple[Model, list[Merged]]:
    """The model with W + scaling * B A in the place of each adapter, and how exact each weight became.

    dtype: what the weights will be stored in ("float32", "float64", "bfloat16"); the arrays stay what they
    are computed in, with numbers that this type has. sign: -1 takes a merged adapter out again. A matrix
    that serves as embedding and head and has an adapter on one of the roles becomes two matrices.
    """
    report: list[Merged] = []

    def whole(path: str, leaf: Any) -> Any:
        if isinstance(leaf, Frozen):
            return leaf.weight
        if not isinstance(leaf, LoRA):
            return leaf
        exact = np.asarray(leaf.base).astype(np.float64)
        delta = leaf.delta().astype(np.float64)
        exact += sign * delta
        stored = rounded(exact.astype(leaf.dtype), dtype)
        change, error = (float(np.sqrt(np.mean(np.square(x)))) for x in (delta, stored - exact))
        report.append(Merged(model.family.checkpoint_name(path), change, error))
        return stored

    decoder = map_named(whole, model.decoder)
    if not report:
        raise InputError(f"{model.source}: there is no adapter to merge")
    tied = model.config.tie_word_embeddings and decoder.lm_head is None
    config = replace(model.config, tie_word_embeddings=tied)
    return replace(model, config=config, decoder=decoder, lora=None), report


def rounded(array: Array, dtype: str) -> Array:
    """The array with its numbers rounded to those of a storage type."""
    if dtype != "bfloat16":
        return array.astype(dtype).astype(array.dtype, copy=False)
    return float32_to_bf16(array.astype(np.float32)).astype(array.dtype)


_MERGED = "merged_adapters.json"


def read_merged(folder: Path) -> list[str]:
    """The digests of the adapters that were merged into the model in a folder; none for anything else."""
    path = folder / _MERGED
    if not path.is_file():
        return []
    if path.stat().st_size > 1 << 20:
        raise FormatError(f"{path}: larger than 1 MiB")
    held = parse_json(path, "the list of adapters", path.read_bytes()).get("sha256")
    if not isinstance(held, list) or not all(isinstance(digest, str) for digest in held):
        raise FormatError(f"{path}: sha256 must be a list of digests")
    return held


def write_merged(folder: Path, digests: list[str]) -> None:
    """Say beside a model's weights which adapters they hold."""
    if not digests:
        (folder / _MERGED).unlink(missing_ok=True)
        return
    with atomic_file(folder / _MERGED) as file:
        file.write((json.dumps({"sha256": digests}, indent=1) + "\n").encode())
        sync(file)
