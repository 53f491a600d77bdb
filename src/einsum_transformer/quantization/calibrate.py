"""Quantize the blocks of a model one after the other, with the activations of a calibration text.

The inputs of a block are the outputs of the quantized blocks before it, so that a block can correct what they
changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from einsum_transformer.engine import Leaf
from einsum_transformer.errors import InputError
from einsum_transformer.leaves.calibrated import Calibrated
from einsum_transformer.models.model import Model
from einsum_transformer.models.quantization import Quantizer, check_unquantized, with_quantized
from einsum_transformer.models.scheme import Quantization
from einsum_transformer.notes import note
from einsum_transformer.numerics.uniform import Quantized, quantize
from einsum_transformer.quantization.awq import awq
from einsum_transformer.quantization.gptq import gptq, inverse_factor
from einsum_transformer.tree import map_named

Array = np.ndarray

METHODS = ("rtn", "gptq", "awq")
"""rtn: round to nearest, without calibration."""


def calibrated(
    model: Model,
    quantization: Quantization,
    method: str,
    batches: Sequence[Array],
    progress: Callable[[int, int], object],
) -> Model:
    """Return the model with the matrices of its blocks quantized by `method`, gptq or awq, and the others
    rounded to nearest. batches: token ids (b, t) of the calibration text; progress: of (done, total) blocks.
    """
    check_unquantized(model)
    specs = model.weights
    quantizer = Quantizer(quantization, model.family, list(specs.values()))
    uncounted: list[str] = []
    count = model.config.num_hidden_layers

    def rebuild(i: int, block: Any, run: Callable[[Any], None]) -> Any:
        prefix = f"layers.{i}"

        leaves: dict[str, Calibrated] = {}

        def watch(path: str, weight: Any) -> Any:
            spec = specs[path]
            if quantizer.bits(spec) is None:
                return weight
            leaves[path] = Calibrated(weight, spec.out_axes)
            return leaves[path]

        run(map_named(watch, block, prefix))
        found = _quantized(leaves, quantizer, specs, method)
        uncounted.extend(path for path, leaf in leaves.items() if not leaf.count)

        def packed(path: str, weight: Any) -> Any:
            if path in found:
                return quantizer.packed(specs[path], found[path], leaves[path].dtype)
            return quantizer.leaf(specs[path], weight)

        rebuilt = map_named(packed, block, prefix)
        progress(i + 1, count)
        return rebuilt

    def outside(path: str, weight: Any) -> Any:
        return weight if path.startswith("layers.") else quantizer.leaf(specs[path], weight)

    decoder = map_named(outside, model.decoder).rebuilt(batches, rebuild)
    if uncounted:
        note(
            f"{model.source}: {len(uncounted)} matrices got no calibration token and are rounded to nearest, "
            f"such as {model.module(uncounted[0])}"
        )
    return with_quantized(model, decoder, quantizer)


def _quantized(
    leaves: dict[str, Calibrated], quantizer: Quantizer, specs: dict[str, Any], method: str
) -> dict[str, Quantized]:
    """Quantize the matrices of a block; those with the same inputs share what is computed of them."""
    found: dict[str, Quantized] = {}
    for paths in _with_same_inputs(leaves, quantizer, specs):
        hessian = leaves[paths[0]].hessian
        matrices = {}
        for path in paths:
            weight = leaves[path].weight
            array = weight.array() if isinstance(weight, Leaf) else weight
            matrices[path] = quantizer.matrix(specs[path], array)
        first = specs[paths[0]]
        settings = quantizer.bits(first) or 8, quantizer.group(first), quantizer.scheme(first).symmetric
        if hessian is None or not hessian.diagonal().any():
            found |= {path: quantize(matrix, *settings) for path, matrix in matrices.items()}
        elif not np.isfinite(hessian).all():
            raise InputError("the activations of the calibration text contain nan or inf")
        elif method == "awq":
            weights = [matrix.astype(np.float32, copy=False) for matrix in matrices.values()]
            found |= dict(zip(paths, awq(weights, hessian, *settings)))
        else:
            factor = inverse_factor(hessian)
            found |= {path: gptq(matrix, factor, *settings) for path, matrix in matrices.items()}
    return found


def _with_same_inputs(
    leaves: dict[str, Calibrated], quantizer: Quantizer, specs: dict[str, Any]
) -> list[list[str]]:
    """Group the paths of matrices of a component that had the same inputs and have the same scheme."""
    groups: list[list[str]] = []
    scheme = {path: quantizer.scheme(specs[path]) for path in leaves}
    for path in leaves:
        alike = [group for group in groups if scheme[group[0]] == scheme[path]]
        same = [group for group in alike if _same_inputs(group[0], path, leaves)]
        if same:
            same[0].append(path)
        else:
            groups.append([path])
    return groups


def _same_inputs(a: str, b: str, leaves: dict[str, Calibrated]) -> bool:
    first, second = leaves[a].hessian, leaves[b].hessian
    if a.rpartition(".")[0] != b.rpartition(".")[0] or first is None or second is None:
        return False
    return np.array_equal(first, second)
