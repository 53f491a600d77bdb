"""Dry runs: the program of a model on arrays that have only shapes.

A dry run executes the code of a real run, so its equations, elementwise operations and allocations are those
of a real run. It has one block of each kind of layer, since equal blocks cost the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from einsum_transformer.engine import Leaf, Recorder, ShapeArray, blas
from einsum_transformer.engine.recorder import Event, Path, Span, position
from einsum_transformer.engine.shapes import Observer
from einsum_transformer.errors import InputError
from einsum_transformer.leaves.bfloat16 import Bfloat16Weight
from einsum_transformer.models.adapters import Planned, add_adapters
from einsum_transformer.models.adapters import plan as plan_adapters
from einsum_transformer.models.builder import WeightSpec, build, weights_of
from einsum_transformer.models.config import ModelConfig
from einsum_transformer.models.decoder import Decoder
from einsum_transformer.models.families import FAMILIES
from einsum_transformer.models.lora_config import LoRAConfig
from einsum_transformer.models.model import Model
from einsum_transformer.models.parameters import with_arrays
from einsum_transformer.models.quantization import Quantizer
from einsum_transformer.models.run_config import RunConfig
from einsum_transformer.models.scheme import Quantization
from einsum_transformer.tree import tree_map

DTYPE = np.dtype(np.float32)


@dataclass(frozen=True, slots=True)
class Passes:
    """The elementwise operations of one NumPy function in a phase of one layer."""

    path: Path
    layer: int | None
    function: str
    dtype: str
    calls: int
    elements: int
    """Read or written, the larger number."""


@dataclass(frozen=True, slots=True)
class Mark:
    """The memory of the arrays of a dry run at the end of an outer phase."""

    path: Path
    layer: int | None
    live: int
    """Bytes that are allocated."""
    peak: int
    """Most bytes since the mark before."""


@dataclass(slots=True)
class Counts:
    """What a dry run counted."""

    events: list[Event] = field(default_factory=list[Event])
    passes: list[Passes] = field(default_factory=list[Passes])
    marks: list[Mark] = field(default_factory=list[Mark])


def config_of(model: Any) -> ModelConfig:
    """Return the config of a model or of a run config."""
    if isinstance(model, Model):
        return model.config
    if isinstance(model, RunConfig):
        return model.model_config()
    if not isinstance(model, ModelConfig):
        raise InputError(
            f"explain: expected a model or a config, got {type(model).__name__}; for a file use `etx explain`"
        )
    return model


def without_weights(config: ModelConfig, source: str) -> Model:
    """Return a model whose weights have only shapes, to which an adapter can be added."""
    return Model(config, build(config, _stand_in), source=source)


def decoder_of_shapes(model: Model | ModelConfig | RunConfig, config: ModelConfig) -> Decoder:
    """Return the decoder with weights and adapters that have only shapes, in float32."""
    if isinstance(model, Model):
        return with_arrays(model.decoder, lambda _, weight: ShapeArray(tuple(weight.shape), DTYPE))
    decoder = build(config, _stand_in)
    if not isinstance(model, RunConfig) or (lora := model.lora) is None:
        return decoder
    return with_lora(without_weights(config, model.source), lora)


def stored_decoder(config: ModelConfig, quantization: Quantization | None, bfloat16: bool = False) -> Decoder:
    """Return the decoder whose weights have only shapes, in the types in which they are stored."""
    if bfloat16:
        return build(config, _in_bfloat16)
    if quantization is None:
        return build(config, _stand_in)
    quantizer = Quantizer(quantization, FAMILIES[config.model_type], weights_of(config))
    return build(config, quantizer.leaf_of_shapes)


def _in_bfloat16(weight: WeightSpec) -> Any:
    if len(weight.stored) < 2:
        return _stand_in(weight)
    stored: Any = ShapeArray(weight.stored, ml_dtypes.bfloat16)
    return Bfloat16Weight(stored, weight.shape, weight.out_axes)


def with_lora(model: Model, lora: LoRAConfig) -> Decoder:
    """Return the decoder of a model without weights, with adapters that have only shapes."""
    return add_adapters(model, lora, plan_adapters(model, lora), _dry_pair).decoder


def _dry_pair(path: str, planned: Planned, place: WeightSpec) -> tuple[Any, Any]:
    outputs, inputs = place.shape[: place.out_axes], place.shape[place.out_axes :]
    return ShapeArray((planned.rank, *inputs), DTYPE), ShapeArray((*outputs, planned.rank), DTYPE)


def _stand_in(weight: WeightSpec) -> Any:
    return ShapeArray(weight.shape, DTYPE)


def distinct(decoder: Decoder) -> tuple[tuple[Any, ...], list[tuple[int, ...]]]:
    """Return one block of each kind and the layers of that kind: equal shapes and settings."""
    kinds: dict[Any, list[int]] = {}
    for i, block in enumerate(decoder.layers):
        kinds.setdefault(tree_map(_kind, block), []).append(i)
    layers = [tuple(members) for members in kinds.values()]
    return tuple(decoder.layers[members[0]] for members in layers), layers


def _kind(leaf: Any) -> tuple[Any, ...]:
    """Return the properties of a leaf that determine its equations."""
    parts = leaf.parts() if isinstance(leaf, Leaf) else {}
    inside = tuple((name, type(part).__name__, part.shape) for name, part in parts.items())
    return leaf.shape, str(leaf.dtype), type(leaf).__name__, inside


def counted(run: Callable[[], Any]) -> Counts:
    """Return what a dry run counts. The marks do not contain arrays that exist before it, such as weights."""
    found = Counts()
    passes: dict[tuple[Path, int | None, str, str], list[int]] = {}

    def on_pass(function: str, elements: int, dtype: np.dtype) -> None:
        counts = passes.setdefault((*position(), function, str(dtype)), [0, 0])
        counts[0] += 1
        counts[1] += elements

    def on_span(span: Span) -> None:
        if len(span.path) > 2:
            return
        found.marks.append(Mark(span.path, span.layer, observer.live, observer.peak()))

    observer = Observer(on_pass)
    recorder = Recorder(spans=False, events=True).on_span(on_span)
    # One thread, so that the events of attention tiles come in program order.
    with observer, recorder, blas.one_thread():
        kept = run()
        del kept
    found.events = recorder.events
    found.passes = [Passes(*key, *counts) for key, counts in passes.items()]
    return found
