"""explain(): the program of a model as data and as text, from a dry run on arrays that have only shapes."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from math import prod
from typing import Any

import numpy as np

from einsum_transformer.analysis.dry_run import DTYPE, config_of, decoder_of_shapes, distinct
from einsum_transformer.arguments import checked
from einsum_transformer.displays import as_html
from einsum_transformer.engine import Equation, Recorder, blas, phase
from einsum_transformer.engine.equation import LEGEND
from einsum_transformer.engine.recorder import Event
from einsum_transformer.errors import InputError
from einsum_transformer.models.builder import weights_of
from einsum_transformer.models.config import ModelConfig
from einsum_transformer.models.decoder import Decoder
from einsum_transformer.models.model import EMBEDDING, HEAD, Model
from einsum_transformer.models.parameters import trainable
from einsum_transformer.models.run_config import RunConfig
from einsum_transformer.tables import quantity
from einsum_transformer.tree import named_leaves

NOT_COUNTED = (
    "Look-ups and elementwise work (embedding, softmax, RoPE, activations, residuals) count no FLOPs."
)
_WIDTH = 100


@dataclass(frozen=True, slots=True)
class Step:
    """One equation of one layer (or of the embedding or head), summed over its calls there."""

    path: tuple[str, ...]
    """The phases that enclose it, from the outermost: ("forward", "layer", "attention", "qkv")."""
    role: str
    """The weight that it uses (`q_proj`; `dq_proj` for the gradient of that weight), else the inner phase."""
    equation: str
    sizes: dict[str, int]
    """Letter -> size; the largest if the calls differ."""
    layers: tuple[int, ...]
    """The layers that run this step with these sizes; empty outside of the layers."""
    calls: int
    """Calls in one layer: 1, or one for each tile of the attention."""
    flops: int
    """Sum over all calls in one layer, as for the bytes, which count each operand and each result once."""
    bytes_read: int
    bytes_written: int
    lowering: str
    """How the most expensive call is executed."""

    @property
    def times(self) -> int:
        """How often the step occurs in the whole program."""
        return max(1, len(self.layers))


@checked
@dataclass(frozen=True, slots=True)
class Program:
    """The equations of a model for `batch` rows of `tokens` tokens. str() is text, to_dict() is for JSON."""

    config: ModelConfig
    batch: int
    tokens: int
    backward: bool
    parameters: int
    steps: tuple[Step, ...]
    adapters: int = 0
    """Parameters of adapters, which `parameters` does not count; if not 0, all other weights are frozen."""

    @property
    def flops(self) -> int:
        """Floating-point operations of all equations, in all layers."""
        return sum(step.times * step.flops for step in self.steps)

    def totals(self, direction: str) -> dict[str, int]:
        """FLOPs and bytes of the "forward" or the "backward" part, in all layers."""
        steps = [step for step in self.steps if step.path[0] == direction]
        names = ("flops", "bytes_read", "bytes_written")
        return {name: sum(step.times * getattr(step, name) for step in steps) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """Return the program in JSON types."""
        return {
            "model": _model_summary(self.config),
            "batch": self.batch,
            "tokens": self.tokens,
            "parameters": self.parameters,
            "adapters": self.adapters,
            "letters": {letter: LEGEND.get(letter, "") for letter in self.letters()},
            "steps": [asdict(step) for step in self.steps],
            "totals": {direction: self.totals(direction) for direction in self._directions()},
            "note": NOT_COUNTED,
        }

    def letters(self) -> dict[str, int]:
        """The letters of the equations, in the order of the legend, with their largest sizes."""
        sizes: dict[str, int] = {}
        for step in self.steps:
            for letter, size in step.sizes.items():
                sizes[letter] = max(size, sizes.get(letter, 0))
        return dict(sorted(sizes.items(), key=lambda item: [*LEGEND, item[0]].index(item[0])))

    def _directions(self) -> list[str]:
        return ["forward", "backward"] if self.backward else ["forward"]

    def __str__(self) -> str:
        lines = [*_heading(self), ""]
        for direction in self._directions():
            steps = [step for step in self.steps if step.path[0] == direction]
            lines += [*_listing(direction, steps), ""]
        for direction in self._directions():
            lines.append(_total_line(direction, self.totals(direction)))
        return "\n".join([*lines, *textwrap.wrap(NOT_COUNTED, _WIDTH)])

    def _repr_html_(self) -> str:
        return as_html(str(self))


def explain(
    model: Model | ModelConfig | RunConfig, batch: int = 1, tokens: int = 128, backward: bool = False
) -> Program:
    """Return the program of a model for `batch` rows of `tokens` tokens: each equation and its cost.

    Weights are not read, so models of any size work. backward: also the gradient equations. Adapters count as
    in a real pass, both those of a model and those that a run config trains (use_lora); frozen weights have
    no gradient.
    """
    for name, value in (("batch", batch), ("tokens", tokens)):
        if not 1 <= value <= _MOST:
            raise InputError(f"`{name}` is {value}: expected 1 to {_MOST:,}")
    config = config_of(model)
    if config.learned_positions and tokens > config.max_position_embeddings:
        most = f"the {config.max_position_embeddings} learned positions of this {config.model_type} model"
        raise InputError(f"`tokens` is {tokens}: expected at most {most}")
    decoder = decoder_of_shapes(model, config)
    blocks, members = distinct(decoder)
    # One thread, so that the events of attention tiles come in program order.
    with Recorder(spans=False, events=True) as recorder, blas.one_thread():
        _dry_run(replace(decoder, layers=blocks), batch, tokens, backward)
    weights = weights_of(config)
    paths = {path for path, _ in named_leaves(decoder)}
    adapters = sum(prod(w.shape) for name, w in trainable(decoder).items() if name not in paths)
    steps = tuple(_steps(recorder.events, members, matrices_of(config)))
    parameters = sum(prod(weight.stored) for weight in weights)
    return Program(config, batch, tokens, backward, parameters, steps, adapters)


def role_of(event: Event, matrices: Collection[str]) -> str:
    """Return the matrix or adapter of an equation, `dq_proj` for its gradient; else the innermost phase."""
    if event.weight is None:
        return event.path[-1] if event.path else ""
    place, adapter, part = event.weight.partition(".lora_")
    if in_layer(place) not in matrices:
        return event.path[-1]
    name = place.removesuffix(".weight").rpartition(".")[2]
    return f"{'d' * event.gradient}{name}{adapter}{part}"


def matrices_of(config: ModelConfig) -> set[str]:
    """Return the paths of the matrices of a model, without the indices of layers (see `role_of`)."""
    matrices = {in_layer(weight.path) for weight in weights_of(config) if len(weight.stored) > 1}
    return matrices | {EMBEDDING, HEAD}


def in_layer(path: str) -> str:
    """Return the path of a weight without its layer index: the dry run has fewer layers."""
    return re.sub(r"^layers\.\d+\.", "", path)


def _dry_run(decoder: Decoder, batch: int, tokens: int, backward: bool) -> None:
    with phase("forward"):
        logits, saved = decoder.forward(np.zeros((batch, tokens), np.int64), keep=backward)
    if backward:
        with phase("backward"):
            decoder.backward(logits, saved)  # dlogits has the shape of the logits


def _steps(events: list[Event], members: list[tuple[int, ...]], matrices: Collection[str]) -> Iterator[Step]:
    """Yield the steps in program order; calls of an equation in one role within one pass of a component are
    one step."""
    for (layer, _), visit in groupby(events, key=lambda event: (event.layer, event.path[:3])):
        alike: dict[Any, list[Event]] = {}
        for event in visit:
            alike.setdefault((event.path, role_of(event, matrices), event.equation), []).append(event)
        for (path, role, equation), calls in alike.items():
            yield _step(path, role, equation, calls, () if layer is None else members[layer])


def _step(
    path: tuple[str, ...], role: str, equation: str, calls: list[Event], layers: tuple[int, ...]
) -> Step:
    return Step(
        path=path,
        role=role,
        equation=equation,
        sizes={
            letter: max(call.sizes[letter] for call in calls) for letter in Equation.parse(equation).letters
        },
        layers=layers,
        calls=len(calls),
        flops=sum(call.flops for call in calls),
        bytes_read=sum(call.bytes_read for call in calls),
        bytes_written=sum(call.bytes_written for call in calls),
        lowering=max(calls, key=lambda call: call.flops).how,
    )


def _model_summary(config: ModelConfig) -> dict[str, Any]:
    names = (
        "model_type",
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    )
    names += ("intermediate_size", "vocab_size", "tie_word_embeddings", "sliding_window", "attention_block")
    return {name: getattr(config, name) for name in names}


def _heading(program: Program) -> list[str]:
    config = program.config
    tied = ", one matrix for embedding and head" if config.tie_word_embeddings else ""
    queries, keys = config.num_attention_heads, config.num_key_value_heads
    shape = (
        f"{config.model_type}: {config.num_hidden_layers} layers, model {config.hidden_size}, "
        f"{queries} query and {keys} key/value heads of {config.head_dim}, "
        f"feed-forward {config.intermediate_size}, vocabulary {config.vocab_size}{tied}"
    )
    size = quantity(DTYPE.itemsize * program.parameters, "B")
    rows = f"batch {program.batch}, {program.tokens} tokens"
    run = f"{program.parameters:,} parameters ({size} in {DTYPE}); {rows}"
    if program.adapters:
        run += f"; LoRA adapters of {program.adapters:,} parameters, all other weights frozen"
    legend = ", ".join(
        f"{letter} = {size} {LEGEND.get(letter, '')}" for letter, size in program.letters().items()
    )
    return [*textwrap.wrap(shape, _WIDTH), *textwrap.wrap(run, _WIDTH), "", *textwrap.wrap(legend, _WIDTH)]


_MOST = 1 << 18
"""Maximum number of rows or tokens: counting the attention tiles of more takes minutes."""
_COLUMNS = "{:<16}{:<19}{:>6}{:>9}{:>9}{:>9}  {}"
_LOWERING_COLUMN = 70


def _listing(direction: str, steps: list[Step]) -> Iterator[str]:
    """Yield the lines of one direction, with headings for layers and components."""
    yield _COLUMNS.format(direction, "equation", "calls", "FLOPs", "read", "written", "runs as").rstrip()
    for layers, own in groupby(steps, key=lambda step: step.layers):
        inside = bool(layers)
        if inside:
            yield f"{_layer_names(layers)}:"
        for path, rows in groupby(own, key=lambda step: step.path[: 3 if inside else 2]):
            heading = f"{'  ' * inside}{path[-1]}"
            named = [("" if step.role == path[-1] else step.role, step) for step in rows]
            if any(role for role, _ in named):
                yield heading
                heading = ""
            for role, step in named:
                yield from _row(heading or f"{'  ' * (1 + inside)}{role}", step)
                heading = ""


def _row(label: str, step: Step) -> Iterator[str]:
    first, *more = textwrap.wrap(step.lowering, _WIDTH - _LOWERING_COLUMN)
    amounts = [quantity(amount) for amount in (step.flops, step.bytes_read, step.bytes_written)]
    calls = f"x{step.calls}" if step.calls > 1 else ""
    yield _COLUMNS.format(f"{label:<15} ", step.equation, calls, *amounts, first)
    for line in more:
        yield " " * _LOWERING_COLUMN + line


def _layer_names(layers: tuple[int, ...]) -> str:
    """Return `layer 3`, `layers 0-29, each of 30`, or `layers 0, 2, ... 24, each of 13`."""
    if len(layers) == 1:
        return f"layer {layers[0]}"
    consecutive = layers == tuple(range(layers[0], layers[-1] + 1))
    names = f"{layers[0]}-{layers[-1]}" if consecutive else f"{layers[0]}, {layers[1]}, ... {layers[-1]}"
    return f"layers {names}, each of {len(layers)}"


def _total_line(direction: str, totals: dict[str, int]) -> str:
    flops, read, written = (quantity(totals[name]) for name in ("flops", "bytes_read", "bytes_written"))
    return f"{direction}, all layers: {flops}FLOP, {read}B read, {written}B written"
