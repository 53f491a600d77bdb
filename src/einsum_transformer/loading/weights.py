"""The weights of a model: read from a checkpoint, completely or under a memory budget, or random."""

import math
import os
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from einsum_transformer.engine import Leaf
from einsum_transformer.errors import InputError
from einsum_transformer.formats import Packed, TensorSource
from einsum_transformer.formats.codes import DTYPE
from einsum_transformer.formats.encodings import SHARED
from einsum_transformer.formats.gguf import ENCODINGS as GGUF_ENCODINGS
from einsum_transformer.formats.quantized_methods import METHODS
from einsum_transformer.leaves.encoded import EncodedWeight
from einsum_transformer.leaves.lazy import Budget, LazyTensor
from einsum_transformer.leaves.resident import Stored, allocate, read_all
from einsum_transformer.loading.places import Place
from einsum_transformer.loading.sources import Options
from einsum_transformer.models.builder import WeightSpec, build, weights_of
from einsum_transformer.models.config import ModelConfig
from einsum_transformer.models.decoder import Decoder
from einsum_transformer.models.quantization import Bfloat16, Quantizer, packed_weight, together

Array = np.ndarray

ENCODINGS = GGUF_ENCODINGS | {method.label for method in METHODS.values()}
"""Types of tensors that can stay in the encoding of their file."""


def encoded_weight(packed: Packed, spec: WeightSpec, dtype: np.dtype) -> Leaf:
    """The leaf of a matrix that stays in the encoding of its file."""
    return EncodedWeight(packed.parts, packed.encoding, spec.shape, dtype, spec.out_axes)


PACKED: dict[str, Callable[[Packed, WeightSpec, np.dtype], Leaf]] = {
    DTYPE: packed_weight,
    **dict.fromkeys(ENCODINGS, encoded_weight),
}
"""Type of a tensor in its file -> constructor of the leaf that stores it packed: (the tensor, the weight, the
type of the computation). Tensors of other types are converted to floating-point arrays."""


def read_weights(
    tensors: TensorSource,
    config: ModelConfig,
    places: Mapping[str, Place],
    options: Options,
    quantizer: Quantizer | Bfloat16 | None = None,
) -> Decoder:
    """Return the decoder. Each weight is the first of these that applies:

    1. a leaf of `PACKED`, which stores the tensor as in its file; those of `ENCODINGS` if `options.packed`;
    2. under a budget, a matrix that stays in the file until an equation needs it;
    3. an array in memory, or a view of the memory-mapped file.

    With a quantizer, the weights are read and converted one by one.
    """
    budget, dtype = options.weight_budget, options.computed_in
    if quantizer is not None:
        budget = 0
    leaves, resident = {}, []
    shared = Budget(budget or 0)
    for weight in weights_of(config):
        stored = places[weight.path].stored
        encoding = tensors.info(stored.name).dtype
        kind = PACKED.get(encoding) if options.packed or encoding not in ENCODINGS else None
        packed = None if kind is None else _packed(tensors, stored)
        if kind is not None and packed is not None:
            leaves[weight.path] = kind(packed, weight, dtype)
        # Norms and biases are small and not used in matrix products: they are never lazy.
        elif budget is not None and len(weight.stored) > 1:
            leaves[weight.path] = LazyTensor(tensors, stored, weight.shape, dtype, shared)
        else:
            resident.append(weight)
    groups = [weight.component for weight in resident]
    arrays = read_all(tensors, [places[weight.path].stored for weight in resident], dtype, groups)
    leaves |= {weight.path: array.reshape(weight.shape) for weight, array in zip(resident, arrays)}
    if quantizer is None:
        found = together(leaves, weights_of(config))
        for weight in weights_of(config):
            if leaves[weight.path] is not found[weight.path]:  # copied
                tensors.release(places[weight.path].stored.name)
        return build(config, lambda weight: found[weight.path])
    return build(config, lambda weight: quantizer.leaf(weight, leaves[weight.path]))


def _packed(tensors: TensorSource, stored: Stored) -> Packed | None:
    """The rows of a matrix in the encoding of their file, or None if it has values in another order."""
    if stored.minus or stored.others:
        return None
    packed = tensors.read_packed(stored.name)
    rows, width = stored.shape[0], stored.shape[-1]
    if packed is None or len(stored.shape) != 2 or packed.shape[1] != width:
        return None
    if packed.shape[0] == rows and stored.in_file_order in (None, np.transpose):
        return packed
    chosen: Any = slice(stored.first_row, stored.first_row + rows)
    if stored.in_file_order is not None:
        chosen = stored.first_row + np.argsort(stored.in_file_order(np.arange(rows)).ravel())
    parts = {name: part if name in SHARED else part[chosen] for name, part in packed.parts.items()}
    return Packed(packed.dtype, stored.shape, parts, packed.settings, packed.encoding)


def random_weights(
    config: ModelConfig,
    dtype: np.dtype,
    seed: int,
    source: str,
    quantizer: Quantizer | Bfloat16 | None = None,
) -> Decoder:
    """Return normally distributed weights (std: initializer_range), norms that scale by 1 and zero biases;
    each tensor has a separate random stream. With a quantizer, they are quantized one by one."""
    if seed < 0:
        raise InputError(f"`seed` is {seed}: expected 0 or more")
    weights = weights_of(config)
    needed = sum(
        math.prod(weight.stored) * dtype.itemsize if quantizer is None else quantizer.nbytes(weight)
        for weight in weights
    )
    if needed > (present := memory()):
        sizes = f"{needed / 2**30:,.1f} GiB of random weights, the machine has {present / 2**30:,.1f} GiB"
        raise InputError(f"{source}: {sizes}; `etx explain` works without weights")

    places: dict[str, Array] = {}
    if quantizer is None:
        groups = [weight.component for weight in weights]
        arrays = allocate([weight.stored for weight in weights], dtype, groups)
        places = {weight.path: array for weight, array in zip(weights, arrays)}

    def leaf(weight: WeightSpec) -> Any:
        if weight.path.endswith("norm.weight"):
            return np.full(weight.shape, 1 - config.norm_offset, dtype)
        if weight.path.endswith("bias"):
            return np.zeros(weight.shape, dtype)
        rng = np.random.default_rng([seed, zlib.crc32(weight.path.encode())])
        values = rng.standard_normal(weight.shape, dtype=np.float32).astype(dtype, copy=False)
        values *= config.initializer_range
        if quantizer is not None:
            return quantizer.leaf(weight, values)
        places[weight.path][...] = values.reshape(weight.stored)
        return places[weight.path].reshape(weight.shape)

    return build(config, leaf)


def memory() -> int:
    """Return the bytes of memory of this machine."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not available on this system
        return 1 << 62
