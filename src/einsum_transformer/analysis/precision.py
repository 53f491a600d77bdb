"""The error of each step of a model against float64, and where float32 depends on how a text is divided.

Every variant (float32, bfloat16, quantization schemes) runs on the same tokens and from the same weights as
the reference in float64. The error of a step is ||y - y64|| / ||y64||, over all elements of its output: it
contains the errors of all steps before it. Steps are those of `parity`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from einsum_transformer.analysis.evaluate import Selection
from einsum_transformer.arguments import checked
from einsum_transformer.engine import Leaf, Recorder
from einsum_transformer.errors import InputError
from einsum_transformer.leaves.watched import watched
from einsum_transformer.models.finite import is_finite
from einsum_transformer.models.model import Model
from einsum_transformer.models.quantization import Bfloat16, check_unquantized, quantized
from einsum_transformer.models.scheme import Quantization
from einsum_transformer.tables import as_text, terminal_table, with_lines
from einsum_transformer.tree import map_named

Array = np.ndarray
Progress = Callable[[int, int], object]
Values = dict[str, Array]
"""Name of a step -> its output (rows, tokens, elements)."""

DTYPES = ("float32", "bfloat16")
LOGITS = "logits"
_ROWS, _CHUNK = 4, 16
"""Rows of the batch and tokens of the chunks of `drift`."""
_DECODE = "one token at a time"


@dataclass(frozen=True, slots=True)
class StepError:
    """The error of one step."""

    name: str
    """As the recorder names it: "layers.3.mlp.up_proj"; "layers.3" is the output of the layer."""
    layer: int | None
    errors: dict[str, float]
    """Variant -> ||y - y64|| / ||y64||."""


@dataclass(frozen=True, slots=True)
class Drift:
    """The difference between two ways to compute the same values in float32."""

    run: str
    compared_with: str
    steps: int
    """The number of steps that are compared."""
    first: str | None
    """The first step that differs in any bit, or None."""
    first_difference: float
    """The largest difference in that step, relative to its largest value."""
    logits_difference: float
    """The largest difference of the logits."""
    logits_error: float
    """||a - b|| / ||b|| of the logits."""


@checked
@dataclass(frozen=True, slots=True)
class Precision:
    """The errors of all steps in all variants, and the drift of float32. `str()` is the table by layer."""

    model: str
    tokens: int
    variants: tuple[str, ...]
    steps: tuple[StepError, ...]
    """In program order."""
    drift: tuple[Drift, ...]

    @property
    def logits(self) -> dict[str, float]:
        """Variant -> the error of the logits."""
        return self.steps[-1].errors

    def to_dict(self) -> dict[str, Any]:
        """Return the fields in JSON types."""
        return asdict(self) | {"logits": self.logits}

    def table(self, every: bool = False) -> Any:
        """Return the errors by layer, or of every step, and the drift as rich tables."""
        errors = _every_step(self) if every else _by_layer(self)
        lines = ["", f"{self.model}: errors against float64, ||y - y64|| / ||y64||, on {self.tokens} tokens"]
        return with_lines([errors, "", _drift_table(self)], lines)

    def text(self, every: bool = False) -> str:
        """Return the tables as text; every: with every step."""
        return as_text(self.table(every))

    def __str__(self) -> str:
        return self.text()


def precision(
    model: Model,
    text: str | Path | None,
    schemes: Sequence[str],
    ctx_size: int,
    seed: int,
    progress: Progress,
) -> Precision:
    """Return the errors of a model; see `api.precision.precision`."""
    check_unquantized(model)
    quantizations = [_scheme(each) for each in schemes]
    tokens = _tokens(model, text, ctx_size, seed)
    single = model if model.decoder.embed_tokens.weight.dtype == np.float32 else _cast(model, np.float32)
    runs = [*_runs(single, tokens)]
    total = 1 + len(DTYPES) + len(quantizations) + len(runs)
    expected = _recorded(_cast(model, np.float64), [tokens])
    progress(1, total)
    errors: dict[str, dict[str, float]] = {name: {} for name in expected}
    made: list[tuple[str, Callable[[], Model]]] = [
        ("float32", lambda: single),
        ("bfloat16", lambda: _bfloat16(single)),
    ]
    made += [(str(each.scheme), lambda each=each: quantized(single, each)) for each in quantizations]
    for i, (variant, make) in enumerate(made):
        for name, error in _errors(make(), tokens, expected).items():
            errors[name][variant] = error
        progress(2 + i, total)
    steps = tuple(StepError(name, _layer(name), found) for name, found in errors.items())
    drift: list[Drift] = []
    kept: dict[str, Values] = {}
    for i, (run, compared_with, compute) in enumerate(runs):
        values = compute()
        if compared_with:
            drift.append(_compared(run, compared_with, values, kept[compared_with]))
        if any(other == run for _, other, _ in runs):
            kept[run] = values
        progress(1 + len(made) + i + 1, total)
    return Precision(model.source, tokens.size, tuple(name for name, _ in made), steps, tuple(drift))


def _scheme(text: str) -> Quantization:
    found = Quantization.of(text)
    if found is None:
        raise InputError("`schemes` contains 'none': expected schemes such as W8A16")
    return found


def _tokens(model: Model, text: str | Path | None, ctx_size: int, seed: int) -> Array:
    """The first chunk of the text, or random tokens, (1, ctx_size)."""
    if text is not None:
        window = Selection("llamacpp", ctx_size, chunks=1).windows(model, text).windows[0]
        return window.tokens[None]
    most = model.config.max_position_embeddings
    if ctx_size < 2 or ctx_size > most:
        raise InputError(f"`ctx_size` is {ctx_size}: expected 2 to the positions of the model, {most:,}")
    if seed < 0:
        raise InputError(f"`seed` is {seed}: expected 0 or more")
    return np.random.default_rng(seed).integers(0, model.config.vocab_size, (1, ctx_size))


def _cast(model: Model, dtype: Any) -> Model:
    """The model with all weights as arrays of this type."""

    def cast(path: str, weight: Any) -> Array:
        array: Array = weight.array() if isinstance(weight, Leaf) else weight
        return array.astype(dtype)

    return replace(model, decoder=map_named(cast, model.decoder))


def _bfloat16(model: Model) -> Model:
    """The model with its matrices rounded to bfloat16, as `load` stores them."""
    stored = Bfloat16(list(model.weights.values()))
    specs = model.weights
    return replace(model, decoder=map_named(lambda path, w: stored.leaf(specs[path], w), model.decoder))


def _recorded(model: Model, pieces: Sequence[Array], cache: Any = None) -> Values:
    """The values of all steps for consecutive pieces of the tokens (rows, t)."""
    found: dict[str, list[Array]] = {}

    def store(name: str, value: Array) -> None:
        rows, count = current.shape
        found.setdefault(name, []).append(np.array(value).reshape(rows, count, -1))

    decoder = watched(model.decoder)
    with Recorder(spans=False).on_value(store), np.errstate(over="ignore", invalid="ignore"):
        for current in pieces:
            decoder.forward(current, cache)
    values = {name: np.concatenate(own, axis=1) for name, own in found.items()}
    if not is_finite(values[LOGITS]):
        raise model.not_finite(np.concatenate(pieces, axis=1))
    return values


def _errors(model: Model, tokens: Array, expected: Values) -> dict[str, float]:
    """The error of each step."""
    found: dict[str, float] = {}

    def compare(name: str, value: Array) -> None:
        right = expected[name]
        error = value.reshape(right.shape).astype(np.float64) - right
        size = float(np.linalg.norm(right))
        found[name] = float(np.linalg.norm(error)) / size if size else float(np.linalg.norm(error))

    with Recorder(spans=False).on_value(compare), np.errstate(over="ignore", invalid="ignore"):
        logits = watched(model.decoder).forward(tokens)[0]
    if not is_finite(logits):
        raise model.not_finite(tokens)
    return found


def _runs(model: Model, tokens: Array) -> Iterator[tuple[str, str, Callable[[], Values]]]:
    """(name, name of the run to compare with or "", the computation) of ways to compute the same values."""
    count = tokens.shape[1]
    whole = "one row"
    yield whole, "", lambda: _recorded(model, [tokens])
    rows = np.concatenate([np.roll(tokens, i, axis=1) for i in range(_ROWS)])
    first_row = lambda: {name: each[:1] for name, each in _recorded(model, [rows]).items()}  # noqa: E731
    yield f"in a batch of {_ROWS}", whole, first_row
    in_chunks = [tokens[:, i : i + _CHUNK] for i in range(0, count, _CHUNK)]
    one_by_one = [tokens[:, i : i + 1] for i in range(count)]
    yield "through the KV cache", whole, lambda: _recorded(model, [tokens], model.cache(count))
    yield f"in chunks of {_CHUNK}", whole, lambda: _recorded(model, in_chunks, model.cache(count))
    yield _DECODE, whole, lambda: _recorded(model, one_by_one, model.cache(count))
    yield f"{_DECODE}, replayed", _DECODE, lambda: _replayed(model, one_by_one)


def _replayed(model: Model, pieces: Sequence[Array]) -> Values:
    """The logits without a recorder: decode steps are replayed, and products of one input are one product."""
    cache = model.cache(len(pieces))
    logits = [np.array(model.decoder.forward(piece, cache)[0]) for piece in pieces]
    return {LOGITS: np.concatenate(logits, axis=1)}


def _compared(run: str, compared_with: str, values: Values, others: Values) -> Drift:
    """The drift between two runs; steps are in the order of the second. A step that only some passes have
    (the norm of latents, which the absorbed form of latent attention does not expand) is not compared."""
    common = [name for name in others if name in values and values[name].shape == others[name].shape]
    first = next((name for name in common if not np.array_equal(values[name], others[name])), None)
    difference = 0.0
    if first is not None:
        scale = float(np.abs(others[first]).max())
        difference = float(np.abs(values[first] - others[first]).max()) / (scale or 1.0)
    error = values[LOGITS].astype(np.float64) - others[LOGITS]
    relative = float(np.linalg.norm(error) / np.linalg.norm(others[LOGITS].astype(np.float64)))
    largest = float(np.abs(error).max())
    return Drift(run, compared_with, len(common), first, difference, largest, relative)


def _layer(name: str) -> int | None:
    found = re.match(r"layers\.(\d+)", name)
    return None if found is None else int(found[1])


def _by_layer(found: Precision) -> Any:
    """The error of the output of each layer, and the step of the layer with the largest error in float32."""
    table = terminal_table(("output of", *found.variants, "largest in float32", ""), left=(0,))
    inside: list[StepError] = []
    for step in found.steps:
        is_output = step.layer is None or step.name == f"layers.{step.layer}"
        if not is_output:
            inside.append(step)
            continue
        worst = max(inside, key=lambda each: each.errors["float32"], default=None)
        cells = [f"{step.errors[variant]:.1e}" for variant in found.variants]
        more = ("", "")
        if worst is not None:
            more = worst.name.removeprefix(f"{step.name}."), f"{worst.errors['float32']:.1e}"
        table.add_row(step.name, *cells, *more)
        inside = []
    return table


def _every_step(found: Precision) -> Any:
    table = terminal_table(("step", *found.variants))
    for step in found.steps:
        table.add_row(step.name, *(f"{step.errors[variant]:.1e}" for variant in found.variants))
    return table


def _drift_table(found: Precision) -> Any:
    headings = (
        "the same in float32",
        "compared with",
        "first step that differs",
        "by",
        "logits by",
        "relative",
    )
    table = terminal_table(headings, left=(0, 1, 2))
    for each in found.drift:
        if each.first is None:
            table.add_row(each.run, each.compared_with, "none: equal in all bits", "", "", "")
            continue
        numbers = f"{each.first_difference:.1e}", f"{each.logits_difference:.1e}", f"{each.logits_error:.1e}"
        table.add_row(each.run, each.compared_with, each.first, *numbers)
    return table
