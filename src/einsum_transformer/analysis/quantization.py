"""Bytes of a quantized model by operation, and the error of each quantized weight."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from einsum_transformer.arguments import checked
from einsum_transformer.components.cache_types import UNCHANGED
from einsum_transformer.engine import Leaf
from einsum_transformer.errors import InputError
from einsum_transformer.models.model import EMBEDDING, HEAD, Model
from einsum_transformer.tables import as_text, quantity, terminal_table, with_lines
from einsum_transformer.tree import named_leaves

Array = np.ndarray

OPERATIONS = ("embedding", "norms", "attention", "feed-forward", "output head")
_BOUNDARIES = {"embedding": 1, "attention": 0, "feed-forward": 0}
"""Operations with activations that are rounded; 0: one per layer."""


@dataclass(frozen=True, slots=True)
class OperationBytes:
    """The bytes of an operation in all layers."""

    operation: str
    source: str
    """The type of the weights before."""
    target: str
    """The type of the weights, such as "4 bits", or "4 bits, float32" for matrices and biases."""
    weights_before: int
    weights_formula: int
    """elements * bits / 8, without scales."""
    weights_held: int
    """The bytes of all arrays: codes, scales, zero points, and what is not quantized."""
    activations_before: int
    """Per token: the input that is rounded (the output of the embedding)."""
    activations_formula: int
    activations_held: int
    """The rounded activations exist as floats between the products, and as codes inside of them."""


@dataclass(frozen=True, slots=True)
class TensorError:
    """The error of a quantized weight."""

    name: str
    bits: int
    relative: float
    """RMS of the change, relative to the RMS of the weight."""
    largest: float
    """The largest change of an element."""


@checked
@dataclass(frozen=True, slots=True)
class QuantizationReport:
    """The bytes of a quantized model by operation, and the error of each weight. `str()` is the table."""

    model: str
    quantization: str
    operations: tuple[OperationBytes, ...]
    """The last one is the total."""
    tensors: tuple[TensorError, ...]
    """Empty without the original model."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields in JSON types."""
        found = asdict(self)
        return found | {"operations": list(found["operations"]), "tensors": list(found["tensors"])}

    def table(self) -> Any:
        """Return the operations as a rich table, and the weights with the largest errors."""
        columns = ("operation", "weights", "before", "formula", "held", "saved")
        table = terminal_table((*columns, "activations per token", "formula", "held"), left=(0, 1))
        for row in self.operations:
            saved = 1 - row.weights_held / row.weights_before if row.weights_before else 0
            table.add_row(
                row.operation,
                f"{row.source} -> {row.target}" if row.source else "",
                *(quantity(n, "B") for n in (row.weights_before, row.weights_formula, row.weights_held)),
                f"{saved:.1%}",
                *_bytes(row),
            )
        lines = [f"{self.model}: quantized to {self.quantization}", ""]
        worst = sorted(self.tensors, key=lambda row: -row.relative)[:5]
        errors = terminal_table(("largest relative errors", "bits", "rms", "largest change"))
        for row in worst:
            errors.add_row(row.name, str(row.bits), f"{row.relative:.2%}", f"{row.largest:.3g}")
        return with_lines([*map(_text, lines), table, *([_text(""), errors] if worst else [])], [])

    def __str__(self) -> str:
        return as_text(self.table())


def _text(line: str) -> Any:
    from rich.text import Text

    return Text(line)


def _bytes(row: OperationBytes) -> tuple[str, str, str]:
    numbers = row.activations_before, row.activations_formula, row.activations_held
    before, formula, held = (quantity(n, "B") if n else "" for n in numbers)
    return before, formula, held


def stored_types(model: Model) -> tuple[str | None, tuple[str, str]]:
    """Return the quantization of the weights, or None, and the types of cached keys and values."""
    keys, values = model.cache_types
    quantization = None if model.quantization is None else str(model.quantization)
    leaves = [leaf for _, leaf in named_leaves(model.decoder) if isinstance(leaf, Leaf)]
    if encodings := sorted({leaf.encoding for leaf in leaves} - {""}):
        quantization = f"{', '.join(encodings)}, as in the file"
    return quantization, (keys.name, values.name)


def lines_of_types(quantization: str | None, kv_cache: tuple[str, str]) -> list[str]:
    """Describe `stored_types` as far as they are not those of the computation, one line each."""
    lines = [] if quantization is None else [f"weights quantized to {quantization}"]
    if set(kv_cache) != {UNCHANGED.name}:
        lines.append(f"KV cache: keys {kv_cache[0]}, values {kv_cache[1]}")
    return lines


def quantization_report(model: Model, reference: Model | None) -> QuantizationReport:
    """Return the bytes and errors of a quantized model; see `api.quantize.quantization_report`."""
    quantization = model.quantization
    if quantization is None:
        raise InputError(f"{model.source}: the model is not quantized")
    weights = dict(named_leaves(model.decoder))
    before = weights if reference is None else dict(named_leaves(reference.decoder))
    rows = [_operation(name, model, weights, before) for name in OPERATIONS]
    rows = [row for row in rows if row.weights_before or row.activations_before]
    numbers = {
        name: sum(getattr(row, name) for row in rows)
        for name in OperationBytes.__dataclass_fields__
        if name not in ("operation", "source", "target")
    }
    rows.append(OperationBytes("total", "", "", **numbers))
    errors = () if reference is None else tuple(_errors(model, reference))
    return QuantizationReport(model.source, str(quantization), tuple(rows), errors)


def _operation(name: str, model: Model, weights: dict[str, Any], originals: dict[str, Any]) -> OperationBytes:
    """The bytes of an operation; originals: the weights before, or the same ones if they are not known."""
    own = {path: weight for path, weight in weights.items() if operation_of(path) == name}
    dtype = next(iter(weights.values())).dtype
    types: dict[str, None] = {}
    sources: dict[str, None] = {}
    before = formula = held = 0
    for path, weight in own.items():
        bits = weight.bits_per_element() if isinstance(weight, Leaf) else None
        size = math.prod(weight.shape)
        types[str(dtype) if bits is None else f"{bits} bits"] = None
        original = originals[path]
        stored = next(iter(original.parts().values()), original) if isinstance(original, Leaf) else original
        known = original is not weight
        sources[str(stored.dtype) if known else str(dtype)] = None
        before += original.nbytes if known else size * dtype.itemsize
        formula += size * dtype.itemsize if bits is None else -(-size * bits // 8)
        held += weight.nbytes
    scheme = model.quantization.scheme if model.quantization is not None else None
    values = 0
    if name in _BOUNDARIES and scheme is not None:
        values = model.config.hidden_size * (_BOUNDARIES[name] or model.config.num_hidden_layers)
    bits = 32 if scheme is None else scheme.activation_bits
    as_floats = values * dtype.itemsize
    target = ", ".join(sorted(types)) or str(dtype)
    source = ", ".join(sorted(sources))
    return OperationBytes(
        name, source, target if own else "", before, formula, held, as_floats, values * bits // 8, as_floats
    )


def operation_of(path: str) -> str:
    """The operation that a weight belongs to."""
    parts = path.split(".")
    if path == HEAD or parts[0] == "lm_head":
        return "output head"
    if path == EMBEDDING or parts[0].startswith("embed"):
        return "embedding"
    if any("norm" in part for part in parts):
        return "norms"
    return "attention" if "self_attn" in parts else "feed-forward"


def _errors(model: Model, reference: Model) -> list[TensorError]:
    before = dict(named_leaves(reference.decoder))
    found: list[TensorError] = []
    for path, weight in named_leaves(model.decoder):
        bits = weight.bits_per_element() if isinstance(weight, Leaf) else None
        if bits is None:
            continue
        own = before[path]
        original = own.array() if isinstance(own, Leaf) else own
        change = weight.array() - original
        size = float(np.sqrt(np.mean(np.square(original, dtype=np.float64))))
        error = float(np.sqrt(np.mean(np.square(change, dtype=np.float64))))
        largest = float(np.abs(change).max())
        found.append(TensorError(model.module(path), bits, error / size if size else 0.0, largest))
    return found
