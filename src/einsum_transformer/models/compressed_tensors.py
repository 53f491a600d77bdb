"""Quantized weights in the format compressed-tensors, which vLLM and transformers load.

Codes of 4 or 8 bits are packed into words of 32 bits along the inputs as code + 2^(bits - 1)
(pack-quantized); 8 bits with activations of 8 bits are int8 (int-quantized).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from einsum_transformer.engine import Leaf
from einsum_transformer.errors import InputError
from einsum_transformer.models.decoder import Decoder
from einsum_transformer.models.families.family import Family
from einsum_transformer.models.peft_names import EMBEDDING, HEAD, POSITIONS
from einsum_transformer.models.scheme import Quantization, Scheme
from einsum_transformer.numerics.uniform import unpack_nibbles
from einsum_transformer.tree import named_leaves

Array = np.ndarray


def compressed(
    decoder: Decoder, family: Family, quantization: Quantization | None, source: str
) -> tuple[dict[str, Array], set[str], dict[str, Any]]:
    """Return the tensors of the quantized matrices, the checkpoint names of these matrices, and the
    `quantization_config`; the embedding and the output head are not included. source: for messages.

    Raises InputError for a model that the format cannot describe.
    """
    if quantization is None:
        raise InputError(f"{source}: the model is not quantized: `save_format` has no effect")
    scheme = quantization.scheme
    if quantization.by_name:
        raise InputError("compressed-tensors: weights with schemes of their own are not supported")
    if scheme.weight_bits not in (4, 8) or scheme.activation_bits == 4:
        raise InputError(f"compressed-tensors: W4 and W8 with A8 and A16 are supported, not {scheme}")
    plain = scheme.weight_bits == 8 and scheme.activation_bits == 8
    if not plain and scheme.granularity == "tensor" and not scheme.symmetric:
        raise InputError(
            "compressed-tensors: packed weights with one zero point for a matrix are not supported"
        )
    arrays: dict[str, Array] = {}
    names: set[str] = set()
    ignored: list[str] = []
    for path, leaf in named_leaves(decoder):
        name = family.checkpoint_name(path)
        packed = leaf.packed() if isinstance(leaf, Leaf) else None
        if packed is None or path in (EMBEDDING, HEAD):
            if len(leaf.shape) > 1 and path not in (EMBEDDING, POSITIONS):
                ignored.append(name.removesuffix(".weight"))
            continue
        if family.is_transposed(path) or not name.endswith(".weight"):
            raise InputError(f"{source}: compressed-tensors cannot describe {name}")
        parts, (rows, width, bits, group) = packed
        if "divisor" in parts:
            raise InputError(
                f"{source}: compressed-tensors has no scales of columns, as those of {name} (awq)"
            )
        if scheme.granularity == "group" and width % group:
            raise InputError(f"{source}: the rows of {name} are not a multiple of {group} elements")
        codes = unpack_nibbles(parts["codes"], width) if bits <= 4 else parts["codes"]
        own = {"weight": codes} if plain else packed_tensors(codes, bits)
        own["weight_scale"] = parts["scales"]
        if "zeros" in parts:
            zeros = np.broadcast_to(
                parts["zeros"], (rows if plain else len(parts["zeros"]), parts["zeros"].shape[1])
            )
            own["weight_zero_point"] = zeros if plain else words(zeros.T, bits).T
        if scheme.granularity == "tensor":
            own = {key: each.reshape(1) if each.size == 1 else each for key, each in own.items()}
        names.add(name)
        arrays |= {name.removesuffix("weight") + key: np.ascontiguousarray(each) for key, each in own.items()}
    return arrays, names, settings(scheme, plain, ignored)


def packed_tensors(codes: Array, bits: int) -> dict[str, Array]:
    """The tensors `weight_packed` and `weight_shape` of codes int8 (rows, width)."""
    return {"weight_packed": words(codes, bits), "weight_shape": np.array(codes.shape, np.int64)}


def words(codes: Array, bits: int) -> Array:
    """Codes (rows, width) plus 2^(bits - 1) in words of 32 bits, int32 (rows, ceil(width * bits / 32))."""
    count = 32 // bits
    padded = np.zeros((len(codes), -(-codes.shape[1] // count) * count), np.uint32)
    padded[:, : codes.shape[1]] = codes.astype(np.int32) + (1 << (bits - 1))
    found = np.zeros((len(codes), padded.shape[1] // count), np.uint32)
    for i in range(count):
        found |= padded[:, i::count] << np.uint32(i * bits)
    return found.view(np.int32)


def settings(scheme: Scheme, plain: bool, ignored: list[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json."""
    weights: dict[str, Any] = {
        "num_bits": scheme.weight_bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": scheme.granularity,
        "group_size": scheme.group_size if scheme.granularity == "group" else None,
        "dynamic": False,
    }
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    kind = "int-quantized" if plain else "pack-quantized"
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs if scheme.activation_bits == 8 else None,
        "output_activations": None,
        "format": kind,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignored or ["lm_head"],
        "kv_cache_scheme": None,
    }
