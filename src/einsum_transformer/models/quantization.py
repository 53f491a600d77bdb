"""Quantization of the weights of a model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np

from einsum_transformer.engine import Leaf, ShapeArray
from einsum_transformer.errors import InputError
from einsum_transformer.formats import Packed
from einsum_transformer.formats.safetensors import float32_to_bf16
from einsum_transformer.leaves.bfloat16 import Bfloat16Weight
from einsum_transformer.leaves.quantized import PackedWeight, SimulatedWeight
from einsum_transformer.leaves.resident import allocate, copied_together
from einsum_transformer.models.builder import WeightSpec
from einsum_transformer.models.decoder import Decoder
from einsum_transformer.models.families.family import Family
from einsum_transformer.models.model import EMBEDDING, HEAD, POSITIONS, Model
from einsum_transformer.models.scheme import Quantization, Scheme
from einsum_transformer.notes import note
from einsum_transformer.numerics.uniform import Quantized, dequantize, quantize
from einsum_transformer.tables import quantity
from einsum_transformer.tree import map_named, named_leaves

Array = np.ndarray

_ROUTERS = ("gate", "shared_expert_gate")
"""Last names of the paths of routers; the gate of a feed-forward is `gate_proj`."""
_END_BITS = 8
"""Least bits of the embedding and the output head."""


@dataclass(slots=True)
class Quantizer:
    """Quantizes the weights of a model one by one.

    Norms, biases, learned positions and routers keep their type. Embedding and output head have one scale per
    row and at least 8 bits. family: the names of the weights in checkpoints.
    """

    quantization: Quantization
    family: Family
    specs: Sequence[WeightSpec]
    """All weights of the model, in order."""
    uneven: dict[str, int] = field(default_factory=dict[str, int])
    """Name of a weight whose rows are not a multiple of the group size -> the group size."""
    counts: Counter[int] = field(default_factory=Counter[int])
    """Bits -> number of weights that were quantized."""
    _memory: dict[str, dict[str, Array]] = field(default_factory=dict[str, "dict[str, Array]"])
    """Path of a weight -> the memory of its codes, scales and zero points."""

    def __post_init__(self) -> None:
        self.quantization.check_names([self._name(spec) for spec in self.specs if len(spec.stored) > 1])
        if not any(self.bits(spec) is not None for spec in self.specs):
            raise InputError("`quantization_exclude` excludes all matrices: nothing is left to quantize")

    def bits(self, spec: WeightSpec) -> int | None:
        """The bits of a weight; None if it keeps its type."""
        last = spec.path.removesuffix(".weight").split(".")[-1]
        if len(spec.stored) < 2 or spec.path == POSITIONS or last in _ROUTERS:
            return None
        if self.quantization.excludes(self._name(spec)):
            return None
        bits = self.scheme(spec).weight_bits
        return max(bits, _END_BITS) if spec.path in (EMBEDDING, HEAD) else bits

    def scheme(self, spec: WeightSpec) -> Scheme:
        """The scheme of a weight."""
        return self.quantization.scheme_of(self._name(spec))

    def leaf(self, spec: WeightSpec, weight: Any) -> Any:
        """The weight rounded to nearest, from an array or a leaf. Errors: InputError for nan and inf."""
        bits = self.bits(spec)
        array = weight.array() if isinstance(weight, Leaf) else weight
        if bits is None:
            return array
        settings = bits, self.group(spec), self.scheme(spec).symmetric
        return self.packed(spec, quantize(self.matrix(spec, array), *settings), array.dtype)

    def leaf_of_shapes(self, spec: WeightSpec) -> Any:
        """The leaf of a weight for dry runs, whose codes and scales have only shapes."""
        bits, dtype = self.bits(spec), np.dtype(np.float32)
        form = spec.out_axes, self.quantization.scheme.activation_bits
        if bits is None:
            return ShapeArray(spec.shape, dtype)
        if self.quantization.simulated:
            return SimulatedWeight(ShapeArray(spec.shape, dtype), bits, *form)  # type: ignore[arg-type]
        (rows, width), group = spec.stored, self.group(spec)
        codes: Any = ShapeArray((rows, -(-width // 2) if bits <= 4 else width), np.int8)
        shape = (1, 1) if group is None else (rows, -(-width // group))
        scales: Any = ShapeArray(shape, _scale_type(shape))
        zeros: Any = None if self.scheme(spec).symmetric else ShapeArray(shape, np.int8)
        return PackedWeight(codes, scales, zeros, group or width, bits, spec.shape, dtype, *form)

    def matrix(self, spec: WeightSpec, array: Array) -> Array:
        """The weight as a matrix. Errors: InputError for nan and inf."""
        matrix = array.reshape(spec.stored)
        if not np.isfinite(matrix).all():
            raise InputError(f"{self._name(spec)} contains nan or inf, which cannot be quantized")
        return matrix

    def packed(self, spec: WeightSpec, quantized: Quantized, dtype: np.dtype) -> Any:
        """The leaf of a quantized matrix."""
        bits, group = self.bits(spec) or 8, self.group(spec)
        self.counts[bits] += 1
        if group is not None and spec.stored[1] % group:
            self.uneven[self._name(spec)] = group
        form = spec.out_axes, self.quantization.scheme.activation_bits
        if self.quantization.simulated:
            values = dequantize(quantized, dtype).reshape(spec.shape)
            return SimulatedWeight(values, bits, *form, quantized.divisor)
        packed = PackedWeight.of(quantized, bits, spec.shape, dtype, *form)
        memory = self._memory or self._allocate()
        parts = memory[spec.path]
        for name, part in packed.parts().items():
            if name in parts and parts[name].dtype == part.dtype:
                parts[name][...] = part
            else:
                parts[name] = part
        return packed.with_parts(parts)

    def _allocate(self) -> dict[str, dict[str, Array]]:
        """Allocate the parts of all weights; those of the matrices of a component are consecutive, so that
        they have one product (`Leaf.joined`)."""
        specs = [spec for spec in self.specs if self.bits(spec) is not None]
        groups = [spec.component for spec in specs]
        codes, scales = [], []
        for spec in specs:
            (rows, width), group, bits = spec.stored, self.group(spec), self.bits(spec) or 8
            codes.append((rows, -(-width // 2) if bits <= 4 else width))
            scales.append((1, 1) if group is None else (rows, -(-width // group)))
        int8 = np.dtype(np.int8)
        arrays = zip(specs, allocate(codes, int8, groups, transpose=False), self._scales(scales, groups))
        for spec, own, own_scales in arrays:
            own = own.view(np.uint8) if (self.bits(spec) or 8) <= 4 else own
            self._memory[spec.path] = {"codes": own, "scales": own_scales}
        chosen = [i for i, spec in enumerate(specs) if not self.scheme(spec).symmetric]
        shapes, own_groups = [scales[i] for i in chosen], [groups[i] for i in chosen]
        for i, zeros in zip(chosen, allocate(shapes, int8, own_groups, transpose=False)):
            self._memory[specs[i].path]["zeros"] = zeros
        return self._memory

    def nbytes(self, spec: WeightSpec) -> float:
        """Bytes of a weight in its new form, without its scales."""
        bits = None if self.quantization.simulated else self.bits(spec)
        return math.prod(spec.stored) * (4 if bits is None else bits / 8)

    def _scales(self, shapes: Sequence[tuple[int, ...]], groups: Sequence[str]) -> list[Array]:
        """Memory for scales: float16 if a row has several (see `Quantized`)."""
        kinds = [_scale_type(shape) for shape in shapes]
        found: list[Any] = [None] * len(shapes)
        for kind in set(kinds):
            own = [i for i, each in enumerate(kinds) if each == kind]
            arrays = allocate([shapes[i] for i in own], kind, [groups[i] for i in own], transpose=False)
            for i, array in zip(own, arrays):
                found[i] = array
        return found

    def finish(self, source: str, decoder: Any) -> None:
        """Log what was quantized, and what was not."""
        self._tell_groups(source)
        weights = dict(named_leaves(decoder))
        counts = ", ".join(f"{count} at {bits} bits" for bits, count in sorted(self.counts.items()))
        others = sum(len(weight.shape) > 1 for weight in weights.values() if not isinstance(weight, Leaf))
        kept = "norms and biases" + (f" and {others} matrices" if others else "")
        held = sum(weight.nbytes for weight in weights.values())
        full = sum(math.prod(weight.shape) * weight.dtype.itemsize for weight in weights.values())
        dtype = next(iter(weights.values())).dtype
        note(
            f"{source}: quantized to {self.quantization}: matrices: {counts}; {kept} stay {dtype}; "
            f"{quantity(held, 'B')} of weights instead of {quantity(full, 'B')}"
        )

    def _tell_groups(self, source: str) -> None:
        if self.uneven:
            (first, size), others = next(iter(self.uneven.items())), len(self.uneven) - 1
            more = f" and {others} others" if others else ""
            note(
                f"{source}: the rows of {first}{more} are not a multiple of {size} elements: "
                "the last group of each row is shorter"
            )

    def _name(self, spec: WeightSpec) -> str:
        """Checkpoint name of the module of a weight."""
        return self.family.checkpoint_name(spec.path).removesuffix(".weight")

    def group(self, spec: WeightSpec) -> int | None:
        """The group size of a weight; None: one group for the tensor."""
        scheme, width = self.scheme(spec), spec.stored[1]
        if scheme.granularity == "tensor":
            return None
        if scheme.granularity == "channel" or spec.path in (EMBEDDING, HEAD):
            return width
        return min(width, scheme.group_size)


def _scale_type(shape: tuple[int, ...]) -> np.dtype:
    """The type of scales: float16 if a row has several (see `Quantized`)."""
    return np.dtype(np.float16 if shape[1] > 1 else np.float32)


def quantized(model: Model, quantization: Quantization) -> Model:
    """The model with quantized weights, which have no gradient."""
    check_unquantized(model)
    specs = model.weights
    quantizer = Quantizer(quantization, model.family, list(specs.values()))
    decoder = map_named(lambda path, weight: quantizer.leaf(specs[path], weight), model.decoder)
    return with_quantized(model, decoder, quantizer)


def with_quantized(model: Model, decoder: Decoder, quantizer: Quantizer) -> Model:
    """The model with the decoder that a quantizer made, which a note describes."""
    quantizer.finish(model.source, decoder)
    quantization = quantizer.quantization
    types = model.cache_types if quantization.scheme.kv_bits is None else quantization.cache_types
    return replace(model, decoder=decoder, quantization=quantization, cache_types=types)


class Bfloat16:
    """Stores the matrices of a model in bfloat16, one by one; norms and biases stay float32."""

    def __init__(self, specs: Sequence[WeightSpec]) -> None:
        own = [spec for spec in specs if len(spec.stored) > 1]
        shapes, groups = [spec.stored for spec in own], [spec.component for spec in own]
        memory = allocate(shapes, np.dtype(np.uint16), groups, transpose=False)
        self._memory = {spec.path: array.view(ml_dtypes.bfloat16) for spec, array in zip(own, memory)}

    def leaf(self, spec: WeightSpec, weight: Any) -> Any:
        """The weight in its new form, from an array or a leaf."""
        array = weight.array() if isinstance(weight, Leaf) else weight
        if spec.path not in self._memory:
            return array
        stored = self._memory[spec.path]
        stored[...] = float32_to_bf16(array.reshape(spec.stored).astype(np.float32, copy=False))
        return Bfloat16Weight(stored, spec.shape, spec.out_axes, array.dtype)

    def nbytes(self, spec: WeightSpec) -> float:
        """Bytes of a weight in its new form."""
        return math.prod(spec.stored) * (2 if spec.path in self._memory else 4)

    def finish(self, source: str, decoder: Any) -> None:
        """Nothing is noted: the type was asked for."""


def packed_weight(packed: Packed, spec: WeightSpec, dtype: np.dtype) -> Leaf:
    """The leaf of a quantized matrix in a file (`formats.codes`)."""
    parts, settings = packed.parts, packed.settings
    own = parts["codes"], parts["scales"], parts.get("zeros"), settings["group"], settings["bits"]
    form = spec.shape, dtype, spec.out_axes, settings["activation_bits"]
    return PackedWeight(*own, *form, parts.get("divisor"))


def together(weights: Mapping[str, Any], specs: Sequence[WeightSpec]) -> dict[str, Any]:
    """The weights, path -> array or leaf, with the parts of leaves copied from their file into memory; the
    matrices of a component are consecutive, so that they have one product (`Leaf.joined`)."""
    own = [spec for spec in specs if isinstance(weights[spec.path], Leaf) and weights[spec.path].parts()]
    parts = copied_together([weights[spec.path].parts() for spec in own], [spec.component for spec in own])
    copied = {spec.path: weights[spec.path].with_parts(each) for spec, each in zip(own, parts)}
    return {**weights, **copied}


def check_unquantized(model: Model) -> None:
    """Raise InputError for a model with an adapter, or one that is already quantized."""
    if model.lora is not None:
        raise InputError(
            f"{model.source}: the model has an adapter: merge it before quantizing, or quantize first"
        )
    if model.quantization is not None:
        raise InputError(f"{model.source}: the model is already quantized to {model.quantization}")
