# pyright: reportUnnecessaryIsInstance=false
"""LoRA on a model: adding adapters, and merging them into the weights."""

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from einsum_transformer.arguments import checked
from einsum_transformer.engine import Leaf
from einsum_transformer.errors import FormatError, InputError
from einsum_transformer.formats.files import read_json, write_json
from einsum_transformer.formats.safetensors import float32_to_bf16
from einsum_transformer.leaves.frozen import Frozen
from einsum_transformer.leaves.lora import Dropout, LoRA
from einsum_transformer.models.builder import WeightSpec, weights_of
from einsum_transformer.models.lora_config import LoRAConfig
from einsum_transformer.models.model import EMBEDDING, HEAD, POSITIONS, Model
from einsum_transformer.models.peft_names import stack_name
from einsum_transformer.models.stacked import Pair, Stack, stacks_of
from einsum_transformer.tree import map_named

Array = np.ndarray

Draw = Callable[[str, "Planned", WeightSpec], tuple[Array, Array]]
"""(path, planned adapter, spec of the weight) -> A and B."""


@dataclass(frozen=True, slots=True)
class Planned:
    """The planned adapter of one matrix. stack: the path of the stacked parameter that contains the matrix;
    owner: the path of the matrix whose A it shares."""

    rank: int
    scaling: float
    stack: str = ""
    owner: str = ""


@checked
def with_lora(model: Model, config: LoRAConfig, seed: int = 0) -> Model:
    """Return the model with a LoRA adapter on each target and every other weight frozen.

    config: targets, ranks and scaling. seed: seed of A, which is initialized as in PEFT: uniform in +-1 /
    sqrt(inputs), standard normal for an embedding, with a separate random stream per tensor. B is zero, so
    the model's output equals the base model's bit for bit.

    With tied embeddings, an adapter applies to the targeted role only, embedding or head; the other role uses
    the unchanged matrix (as in PEFT). If transformers stores the experts of a layer as stacked parameters and
    all of them are targets, the stack gets the adapter: gate and up share one A, whose rank is the sum of
    both ranks (as in PEFT).
    """

    def draw(path: str, planned: Planned, spec: WeightSpec) -> Pair:
        a = _initial_a(path, planned.rank, spec.stored[1], seed)
        return a, np.zeros((spec.stored[0], planned.rank))

    return add_adapters(model, config, plan(model, config.for_training()), draw)


def plan(model: Model, config: LoRAConfig) -> dict[str, Planned]:
    """Path -> planned adapter of every matrix that the config targets."""
    matrices = matrices_of(model)
    found: dict[str, Planned] = {}
    ranks: dict[str, tuple[int, float]] = {}
    for path in matrices:
        names = tuple(dict.fromkeys((model.module(path), model.family.module_name(path))))
        parameters = tuple(f"{name}.weight" for name in names)
        if any(config.targets(name, path not in (EMBEDDING, HEAD)) for name in names):
            ranks[path] = config.rank_and_alpha(*names)
        elif any(map(config.targets_parameter, parameters)) and path != EMBEDDING:
            ranks[path] = config.rank_and_alpha(*parameters)
        else:
            continue
        found[path] = Planned(ranks[path][0], config.scaling(*ranks[path]))
    if model.family.stacked_experts:
        for stack in stacks_of(matrices).values():
            found |= _plan_of_stack(model, config, stack, ranks)
    if not found:
        targets = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules
        raise no_matrix(model, [*targets, *config.target_parameters])
    return found


def _plan_of_stack(
    model: Model, config: LoRAConfig, stack: Stack, ranks: Mapping[str, tuple[int, float]]
) -> dict[str, Planned]:
    """The adapters of a stacked parameter: a target, or with all matrices targets of equal rank and alpha."""
    name = stack_name(model.family, stack.path)
    if config.targets_parameter(name):
        return planned_stack(stack, config, *config.rank_and_alpha(name))
    different = {ranks.get(path) for path in stack.paths}
    if len(different) > 1 or (common := different.pop()) is None:
        return {}
    parts = len(stack.experts[0])
    return planned_stack(stack, config, parts * common[0], parts * common[1])


def planned_stack(stack: Stack, config: LoRAConfig, rank: int, alpha: float) -> dict[str, Planned]:
    """The adapters of all matrices of a stacked parameter; the first matrix of each expert owns A."""
    scaling = config.scaling(rank, alpha)
    return {
        path: Planned(rank, scaling, stack.path, "" if path == expert[0] else expert[0])
        for expert in stack.experts
        for path in expert
    }


def matrices_of(model: Model) -> dict[str, WeightSpec]:
    """Path -> spec of every matrix that may have an adapter; tied embeddings occur in both roles."""
    weights = weights_of(replace(model.config, tie_word_embeddings=False))
    return {w.path: w for w in weights if len(w.stored) > 1 and w.path != POSITIONS}


def no_matrix(model: Model, names: list[str]) -> InputError:
    """The error for targets that a model does not contain."""
    available = sorted({model.family.module_name(path).split(".")[-1] for path in matrices_of(model)})
    return InputError(
        f"{model.source}: LoRA target_modules {', '.join(map(repr, names[:3]))} match no matrix of this "
        f"model; it has {', '.join(available)}"
    )


def add_adapters(model: Model, config: LoRAConfig, planned: Mapping[str, Planned], draw: Draw) -> Model:
    """The model with the planned adapters, with A and B from `draw`, and every other weight frozen."""
    if model.lora is not None:
        raise InputError(f"{model.source}: the model already has an adapter; merge it first")
    if model.decoder.lm_head is None and planned.keys() & {EMBEDDING, HEAD}:
        model = replace(model, decoder=replace(model.decoder, lm_head=model.decoder.head))
    specs = model.weights
    owned: dict[str, Any] = {}

    def leaf(path: str, weight: Any) -> Any:
        if path not in planned:
            return Frozen(weight)
        own, spec = planned[path], specs[path]
        outputs, inputs = spec.shape[: spec.out_axes], spec.shape[spec.out_axes :]
        a, b = draw(path, own, spec)
        if isinstance(a, Array):
            a = np.array(a, weight.dtype).reshape(own.rank, *inputs)
            b = np.array(b, weight.dtype).reshape(*outputs, own.rank)
        owned[path] = a = owned[own.owner] if own.owner else a
        dropout = Dropout(config.lora_dropout)
        return LoRA(path, weight, a, b, own.scaling, len(outputs), dropout, own.stack, own.owner)

    return replace(model, decoder=map_named(leaf, model.decoder), lora=config)


def _initial_a(path: str, rank: int, width: int, seed: int) -> Array:
    rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
    if path == EMBEDDING:
        return rng.standard_normal((rank, width))
    bound = 1 / math.sqrt(width)
    return rng.uniform(-bound, bound, (rank, width))


@dataclass(frozen=True, slots=True)
class Merged:
    """The effect of merging on one weight. change: root mean square of scaling * B A; error: root mean square
    of the stored values minus the exact sum; relative: error / change."""

    name: str
    change: float
    error: float

    @property
    def relative(self) -> float:
        return self.error / self.change if self.change else 0.0


def merged(
    model: Model, dtype: str = "float32", sign: int = 1, dequantize: bool = False
) -> tuple[Model, list[Merged]]:
    """The model with W + scaling * B A in place of each adapter, and the rounding error of each weight.

    dtype: storage dtype ("float32", "float64", "bfloat16") that values are rounded to; the arrays keep the
    computation dtype. sign: -1 removes a merged adapter. Tied embeddings with an adapter on one of the roles
    become two matrices. dequantize: the result has the values of quantized weights as floats; without it,
    quantized weights are an error.
    """
    if model.quantization is not None and not dequantize:
        raise InputError(
            f"{model.source}: adapters cannot be merged into weights that are quantized to "
            f"{model.quantization}: load the model without quantization, or merge into its dequantized "
            "weights (`dequantize`)"
        )
    report: list[Merged] = []

    def whole(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, Leaf):
            return leaf
        delta = leaf.delta()
        if delta is None:
            base = leaf.base_weight()
            return base.array() if dequantize and isinstance(base, Leaf) else base
        exact = np.asarray(leaf.base_weight()).astype(np.float64)
        delta = delta.astype(np.float64)
        exact += sign * delta
        stored = rounded(exact.astype(leaf.dtype), dtype)
        change, error = (float(np.sqrt(np.mean(np.square(x)))) for x in (delta, stored - exact))
        report.append(Merged(model.family.checkpoint_name(path), change, error))
        return stored

    decoder = map_named(whole, model.decoder)
    if not report:
        raise InputError(f"{model.source}: the model has no adapter to merge")
    tied = model.config.tie_word_embeddings and decoder.lm_head is None
    config = replace(model.config, tie_word_embeddings=tied)
    quantization = None if dequantize else model.quantization
    return replace(model, config=config, decoder=decoder, lora=None, quantization=quantization), report


def rounded(array: Array, dtype: str) -> Array:
    """The array with its values rounded to a storage dtype."""
    if dtype != "bfloat16":
        return array.astype(dtype).astype(array.dtype, copy=False)
    return float32_to_bf16(array.astype(np.float32)).astype(array.dtype)


_MERGED = "merged_adapters.json"


def read_merged(folder: Path) -> list[str]:
    """The digests of the adapters that were merged into the model in a folder; [] if there is no list."""
    path = folder / _MERGED
    if not path.is_file():
        return []
    digests: list[Any] | None = read_json(path, "the list of adapters", 1 << 20).get("sha256")
    if not isinstance(digests, list) or not all(isinstance(digest, str) for digest in digests):
        raise FormatError(f"{path}: sha256 must be a list of digests")
    return digests


def write_merged(folder: Path, digests: list[str]) -> None:
    """Write the list of merged adapters to a model's folder; delete it if `digests` is empty."""
    if not digests:
        (folder / _MERGED).unlink(missing_ok=True)
        return
    write_json(folder / _MERGED, {"sha256": digests})
