"""How much each part of a model suffers from quantization, and a mixed scheme within a number of bytes.

A part is a tensor, the matrices of a layer, or all matrices of a kind. Each part is quantized alone, and its
sensitivity is the KL divergence KL(p || q) of the predictions q of that model from those of the model without
quantization, p, as in `divergence`. Codes are made once per scheme; a measurement replaces leaves.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from einsum_transformer.analysis.evaluate import Selection, log_probabilities, row_divergences, scored_logits
from einsum_transformer.analysis.measurements import Measurements, ResultFile, tokens_digest, weights_digest
from einsum_transformer.analysis.plots import new_figure, write_figure
from einsum_transformer.arguments import checked
from einsum_transformer.engine import Leaf
from einsum_transformer.errors import InputError
from einsum_transformer.models.model import Model
from einsum_transformer.models.quantization import Quantizer, check_unquantized
from einsum_transformer.models.scheme import Quantization
from einsum_transformer.tables import as_text, quantity, terminal_table, with_lines
from einsum_transformer.text.windows import Window
from einsum_transformer.tree import map_named, named_leaves

Array = np.ndarray
Progress = Callable[[int, int], object]

BY = ("tensor", "layer", "kind")
_SHOWN = 20
"""Rows of the table, unless all are asked for."""
_LABELS = 8
"""Parts that the plot names."""
_APART = 0.12
"""The distance of labels in powers of ten, so that they do not overlap."""
_LEAST = 1e-9
"""The least divergence of the plot, whose axis is logarithmic."""
_WHOLE = "model"
"""The part of a measurement of the whole model."""


@dataclass(frozen=True, slots=True)
class PartSensitivity:
    """The divergence with one part quantized, and the rest unchanged."""

    part: str
    """The name of a module, such as "model.layers.0.mlp.down_proj", of a layer, or of a kind."""
    scheme: str
    elements: int
    bytes_before: int
    bytes: int
    kl_mean: float
    kl_standard_error: float
    same_top: float
    """Share of tokens for which the most probable token is the same."""


@dataclass(frozen=True, slots=True)
class QuantizedWhole:
    """The divergence with the whole model quantized."""

    scheme: str
    by_name: dict[str, str]
    """The schemes of the parts that do not have `scheme`: the argument `by_name` of `quantize`."""
    bytes: int
    """The bytes of all weights."""
    kl_sum: float
    """The sum of the divergences of the parts quantized alone."""
    kl_mean: float
    """The measured divergence."""
    kl_standard_error: float
    same_top: float


@checked
@dataclass(frozen=True, slots=True)
class Sensitivity:
    """The divergence of a model with one part quantized, of the whole model in each scheme, and of a mixed
    scheme. `str()` is the table."""

    model: str
    by: str
    """What a part is: "tensor", "layer" or "kind"."""
    schemes: tuple[str, ...]
    ctx_size: int
    chunks: int
    tokens: int
    """The number of scored tokens."""
    bytes_before: int
    """The bytes of all weights without quantization."""
    parts: tuple[PartSensitivity, ...]
    """Each part in each scheme; the largest divergence of a part first."""
    uniform: tuple[QuantizedWhole, ...]
    """The whole model in each scheme."""
    budget: int | None
    mixed: QuantizedWhole | None
    """The scheme that was chosen for at most `budget` bytes."""
    curve: tuple[tuple[int, float], ...]
    """(bytes, sum of the divergences of the parts) of the mixed schemes from the smallest to the largest."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields in JSON types."""
        return asdict(self)

    @property
    def rival(self) -> QuantizedWhole | None:
        """The best whole model in one scheme with at most as many bytes as the budget."""
        fitting = [each for each in self.uniform if self.budget is not None and each.bytes <= self.budget]
        return min(fitting, key=lambda each: each.kl_mean, default=None)

    def table(self, every: bool = False) -> Any:
        """Return the parts and the whole models as rich tables; every: all parts, not only the first 20."""
        return with_lines([_parts_table(self, every), "", _wholes_table(self)], _lines(self))

    def text(self, every: bool = False) -> str:
        """Return the tables as text; every: with all parts."""
        return as_text(self.table(every))

    def plot(self, path: str | Path) -> None:
        """Plot bytes against divergence to a PNG file (needs matplotlib)."""
        plot(self, path)

    def __str__(self) -> str:
        return self.text()


@dataclass(frozen=True, slots=True)
class _Part:
    name: str
    pattern: str
    """The name or regular expression that matches its modules."""
    paths: tuple[str, ...]


class _Scheme:
    """The leaves of a model in one scheme."""

    def __init__(self, model: Model, quantization: Quantization) -> None:
        specs = model.weights
        quantizer = Quantizer(quantization, model.family, list(specs.values()))
        self.quantization = quantization
        self.forms: dict[str, tuple[Any, ...]] = {}
        self.leaves: dict[str, Leaf] = {}
        for path, weight in named_leaves(model.decoder):
            spec = specs[path]
            if (bits := quantizer.bits(spec)) is not None:
                self.forms[path] = bits, quantizer.group(spec), quantizer.scheme(spec).symmetric
                self.leaves[path] = quantizer.leaf(spec, weight)

    def __str__(self) -> str:
        return str(self.quantization.scheme)

    def form(self, part: _Part) -> tuple[Any, ...]:
        """What distinguishes the codes of a part from those in another scheme."""
        return tuple(self.forms[path] for path in part.paths)

    def nbytes(self, part: _Part) -> int:
        return sum(self.leaves[path].nbytes for path in part.paths)


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A model to measure: some leaves replaced."""

    part: str
    scheme: str
    model: Model


def sensitivity(
    model: Model,
    text: str | Path,
    schemes: Sequence[str],
    by: str,
    budget: int | None,
    ctx_size: int,
    chunks: int | None,
    results: Path | None,
    progress: Progress,
) -> Sensitivity:
    """Return the sensitivity of the parts of a model; see `api.sensitivity.sensitivity`."""
    check_unquantized(model)
    if by not in BY:
        raise InputError(f"`by` is {by!r}: expected {', '.join(BY)}")
    quantizations = _quantizations(schemes)
    windows = Selection("llamacpp", ctx_size, chunks=chunks).windows(model, text).windows
    measured = Measurements(ResultFile(results, lambda: _header(model, text, ctx_size)))
    made = [_Scheme(model, each) for each in quantizations]
    parts = _parts(model, by, list(made[0].leaves))
    others = sum(w.nbytes for path, w in named_leaves(model.decoder) if path not in made[0].leaves)
    least = others + sum(min(scheme.nbytes(part) for scheme in made) for part in parts)
    if budget is not None and budget < least:
        raise InputError(
            f"`budget` is {quantity(budget, 'B')}: the weights have {quantity(least, 'B')} in the smallest "
            "schemes"
        )
    # A part has the same codes in several schemes if it has a least number of bits: it is measured once.
    first = {part.name: {scheme.form(part): scheme for scheme in reversed(made)} for part in parts}
    candidates = [
        _Candidate(
            part.name, str(scheme), _replaced(model, {path: scheme.leaves[path] for path in part.paths})
        )
        for part in parts
        for scheme in reversed(first[part.name].values())
    ]
    candidates += [_Candidate(_WHOLE, str(scheme), _whole(model, scheme.leaves, scheme)) for scheme in made]
    more = 0 if budget is None else len(windows)
    _measure(model, windows, candidates, measured, progress, more)

    def kl(part: _Part, scheme: _Scheme) -> tuple[float, float, float]:
        return measured.mean(part.name, str(first[part.name][scheme.form(part)]), len(windows))

    costs = {
        part.name: {str(scheme): (scheme.nbytes(part), kl(part, scheme)[0]) for scheme in made}
        for part in parts
    }
    uniform = tuple(
        QuantizedWhole(
            str(scheme),
            {},
            others + sum(scheme.nbytes(part) for part in parts),
            sum(costs[part.name][str(scheme)][1] for part in parts),
            *measured.mean(_WHOLE, str(scheme), len(windows)),
        )
        for scheme in made
    )
    mixed = None
    if budget is not None:
        chosen, _ = choose(costs, budget - others)
        mixed = _mixed(model, windows, parts, made, chosen, costs, others, measured, progress)
    before = {path: leaf.nbytes for path, leaf in named_leaves(model.decoder)}
    rows = [
        PartSensitivity(
            part.name,
            str(scheme),
            sum(math.prod(scheme.leaves[path].shape) for path in part.paths),
            sum(before[path] for path in part.paths),
            scheme.nbytes(part),
            *kl(part, scheme),
        )
        for part in parts
        for scheme in made
    ]
    worst = {part.name: max(each.kl_mean for each in rows if each.part == part.name) for part in parts}
    rows.sort(key=lambda each: (-worst[each.part], each.part))
    _, path = choose(costs, sum(before.values()))
    return Sensitivity(
        model.source,
        by,
        tuple(map(str, made)),
        ctx_size,
        len(windows),
        sum(window.scored for window in windows),
        sum(before.values()),
        tuple(rows),
        uniform,
        budget,
        mixed,
        tuple((size + others, kl_sum) for size, kl_sum in path),
    )


def choose(
    costs: Mapping[str, Mapping[str, tuple[int, float]]], budget: int
) -> tuple[dict[str, str], list[tuple[int, float]]]:
    """Return part -> scheme with at most `budget` bytes, and the (bytes, sum of divergences) of each step.

    costs: part -> scheme -> (bytes, divergence). Every part begins with its fewest bytes. Each step gives one
    part a scheme with more bytes: that which reduces the sum of the divergences most per byte and still fits.
    """
    chosen = {part: min(options, key=lambda name: options[name]) for part, options in costs.items()}
    size = sum(costs[part][scheme][0] for part, scheme in chosen.items())
    total = sum(costs[part][scheme][1] for part, scheme in chosen.items())
    steps = [(size, total)]
    while True:
        best: tuple[float, str, str, int, float] | None = None
        for part, options in costs.items():
            own_size, own_kl = options[chosen[part]]
            for scheme, (its_size, its_kl) in options.items():
                added, less = its_size - own_size, own_kl - its_kl
                if added > 0 and less > 0 and size + added <= budget:
                    found = less / added, part, scheme, added, less
                    best = found if best is None or found[0] > best[0] else best
        if best is None:
            return chosen, steps
        _, part, scheme, added, less = best
        chosen[part], size, total = scheme, size + added, total - less
        steps.append((size, total))


def _quantizations(schemes: Sequence[str]) -> list[Quantization]:
    """The quantizations, of which only the weights may differ."""
    found: list[Quantization] = []
    for each in schemes:
        quantization = Quantization.of(each)
        if quantization is None:
            raise InputError("`schemes` contains 'none': expected schemes such as W8A16")
        if quantization not in found:
            found.append(quantization)
    if not found:
        raise InputError("`schemes` is empty: expected schemes such as W8A16")
    base = found[0].scheme
    for quantization in found:
        own = quantization.scheme
        if (own.activation_bits, own.kv_bits) != (base.activation_bits, base.kv_bits):
            raise InputError(
                f"`schemes`: {own} and {base} have different bits of activations or of the cache: a mixed "
                "scheme has different bits of weights only"
            )
    return found


def _parts(model: Model, by: str, paths: Sequence[str]) -> list[_Part]:
    """The parts of a model, in order; paths: of the weights that can be quantized."""
    found: dict[tuple[str, str], list[str]] = {}
    for path in paths:
        module = model.module(path)
        name = pattern = module if by == "tensor" else module.rpartition(".")[2]
        if by == "layer" and path.startswith("layers."):
            name = ".".join(path.split(".")[:2])
            pattern = re.escape(model.module(name)) + r"\..*"
        found.setdefault((name, pattern), []).append(path)
    return [_Part(name, pattern, tuple(own)) for (name, pattern), own in found.items()]


def _replaced(model: Model, leaves: Mapping[str, Leaf]) -> Model:
    decoder = map_named(lambda path, weight: leaves.get(path, weight), model.decoder)
    return replace(model, decoder=decoder)


def _whole(model: Model, leaves: Mapping[str, Leaf], scheme: _Scheme) -> Model:
    kv_bits = scheme.quantization.scheme.kv_bits
    types = model.cache_types if kv_bits is None else scheme.quantization.cache_types
    return replace(_replaced(model, leaves), cache_types=types)


def _measure(
    model: Model,
    windows: Sequence[Window],
    candidates: Iterable[_Candidate],
    measured: Measurements,
    progress: Progress,
    more: int = 0,
) -> None:
    """Measure the candidates on each chunk, except those that are measured already.

    more: number of measurements that follow these, for the progress.
    """
    missing = [
        [each for each in candidates if not measured.has(each.part, each.scheme, i)]
        for i in range(len(windows))
    ]
    done, total = 0, sum(map(len, missing)) + more
    for i, window in enumerate(windows):
        if not missing[i]:
            continue
        reference = scored_logits(model, window)
        for candidate in missing[i]:
            logits = scored_logits(candidate.model, window)
            kl, same = _divergences(reference, logits)
            measured.add(candidate.part, candidate.scheme, i, kl, same)
            done += 1
            progress(done, total)


def _divergences(reference: Array, logits: Array) -> tuple[Array, Array]:
    """KL(reference || model) of each token, and whether the most probable tokens are equal."""
    kl, same = np.empty(len(logits)), np.empty(len(logits), bool)
    for rows, (p, q) in log_probabilities(reference, logits):
        kl[rows], same[rows] = row_divergences(p, q)
    return kl, same


def _mixed(
    model: Model,
    windows: Sequence[Window],
    parts: Sequence[_Part],
    made: Sequence[_Scheme],
    chosen: Mapping[str, str],
    costs: Mapping[str, Mapping[str, tuple[int, float]]],
    others: int,
    measured: Measurements,
    progress: Progress,
) -> QuantizedWhole:
    """The measured mixed scheme; its base is the scheme of most elements."""
    schemes = {str(scheme): scheme for scheme in made}
    elements: Counter[str] = Counter()
    for part in parts:
        elements[chosen[part.name]] += sum(math.prod(made[0].leaves[path].shape) for path in part.paths)
    base = schemes[max(schemes, key=lambda name: elements[name])]
    own = {part.name: schemes[chosen[part.name]] for part in parts}
    by_name = {
        part.pattern: str(own[part.name]) for part in parts if own[part.name].form(part) != base.form(part)
    }
    leaves = {path: own[part.name].leaves[path] for part in parts for path in part.paths}
    name = f"{base} {hashlib.sha256(repr(by_name).encode()).hexdigest()[:16]}"
    _measure(model, windows, [_Candidate(_WHOLE, name, _whole(model, leaves, base))], measured, progress)
    return QuantizedWhole(
        str(base),
        by_name,
        others + sum(own[part.name].nbytes(part) for part in parts),
        sum(costs[part.name][chosen[part.name]][1] for part in parts),
        *measured.mean(_WHOLE, name, len(windows)),
    )


def _header(model: Model, text: str | Path, ctx_size: int) -> dict[str, Any]:
    """What the measurements of a file have in common: the values of the weights, and the tokens."""
    windows = Selection("llamacpp", ctx_size).windows(model, text).windows
    return {
        "model": model.source,
        "weights": weights_digest(model),
        "text": tokens_digest([window.tokens for window in windows]),
        "ctx_size": ctx_size,
    }


def _by_part(found: Sensitivity) -> dict[str, list[PartSensitivity]]:
    """Part -> its row in each scheme."""
    rows: dict[str, list[PartSensitivity]] = {}
    for each in found.parts:
        rows.setdefault(each.part, []).append(each)
    return rows


def _parts_table(found: Sensitivity, every: bool) -> Any:
    columns = [text for scheme in found.schemes for text in (scheme, "KL")]
    table = terminal_table((found.by, "bytes", *columns))
    rows = _by_part(found)
    shown = list(rows.values())[: None if every else _SHOWN]
    for row in shown:
        cells = [text for each in row for text in (quantity(each.bytes, "B"), f"{each.kl_mean:.5f}")]
        table.add_row(row[0].part, quantity(row[0].bytes_before, "B"), *cells)
    if len(shown) < len(rows):
        table.add_row(f"and {len(rows) - len(shown)} more")
    return table


def _wholes_table(found: Sensitivity) -> Any:
    table = terminal_table(("whole model", "bytes", "KL", "+/-", "sum of parts", "same top"))
    rows = [(each.scheme, each) for each in found.uniform]
    if found.mixed is not None:
        rows.append(("mixed", found.mixed))
    for name, each in rows:
        numbers = f"{each.kl_mean:.5f}", f"{each.kl_standard_error:.5f}", f"{each.kl_sum:.5f}"
        table.add_row(name, quantity(each.bytes, "B"), *numbers, f"{each.same_top:.1%}")
    return table


def _lines(found: Sensitivity) -> list[str]:
    lines = [
        "",
        f"{found.model}: {quantity(found.bytes_before, 'B')} of weights",
        f"KL: divergence from the model without quantization on {found.chunks} chunks of {found.ctx_size}, "
        f"{found.tokens:,} scored tokens",
    ]
    mixed, rival = found.mixed, found.rival
    if mixed is None or found.budget is None:
        return lines
    counts = Counter(mixed.by_name.values())
    others = ", ".join(f"{count} by name {scheme}" for scheme, count in counts.items())
    lines.append(f"mixed within {quantity(found.budget, 'B')}: {mixed.scheme}{others and f', {others}'}")
    lines += [f"  --quantization-by-name '{name}={scheme}'" for name, scheme in mixed.by_name.items()][
        :_SHOWN
    ]
    if len(mixed.by_name) > _SHOWN:
        lines.append(f"  and {len(mixed.by_name) - _SHOWN} more (--json)")
    if rival is None:
        lines.append("no scheme for the whole model has so few bytes")
    else:
        ratio = mixed.kl_mean / rival.kl_mean if rival.kl_mean else math.inf
        lines.append(f"its divergence is {ratio:.2f} times that of the whole model in {rival.scheme}")
    return lines


def plot(found: Sensitivity, path: str | Path) -> None:
    """Write a PNG file of bytes against divergence: of each part, and of the whole models."""
    figure = new_figure(path, 12)
    left, right = figure.subplots(1, 2)
    _plot_parts(left, found)
    _plot_wholes(right, found)
    write_figure(figure, path)


def _plot_parts(axes: Any, found: Sensitivity) -> None:
    """Each part in each scheme; a line connects the schemes of a part."""
    points = {
        name: [((each.bytes_before - each.bytes) / 1e6, max(each.kl_mean, _LEAST)) for each in row]
        for name, row in _by_part(found).items()
    }
    labels: list[float] = []
    for name, own in points.items():
        axes.plot(*zip(*own), color="0.85", linewidth=1, zorder=0)
        highest = max(own, key=lambda point: point[1])
        free = all(abs(math.log10(highest[1] / other)) > _APART for other in labels)
        if free and len(labels) < _LABELS:
            labels.append(highest[1])
            axes.annotate(name, highest, fontsize=7, xytext=(4, 2), textcoords="offset points")
    for i, scheme in enumerate(found.schemes):
        axes.scatter(*zip(*(own[i] for own in points.values())), s=14, label=scheme)
    axes.set(xscale="log", yscale="log", xlabel="bytes saved (MB)", ylabel="KL divergence (nats per token)")
    axes.set_title(f"one {found.by} quantized")
    axes.margins(x=0.2)
    axes.legend(frameon=False, fontsize=8)


def _plot_wholes(axes: Any, found: Sensitivity) -> None:
    """The whole model in each scheme and in the mixed one, and the curve of mixed schemes."""
    sizes, sums = zip(*found.curve)
    line = [size / 1e6 for size in sizes]
    axes.plot(line, sums, color="0.6", linewidth=1, label="mixed schemes: sum of the parts")
    named = [(each.scheme, "o", 6, f"C{i}", each) for i, each in enumerate(found.uniform)]
    if found.mixed is not None:
        named.append(("mixed, measured", "*", 12, "black", found.mixed))
    for label, marker, size, color, each in named:
        point = each.bytes / 1e6, each.kl_mean, each.kl_standard_error
        axes.errorbar(*point, fmt=marker, markersize=size, color=color, label=label)
    axes.set(yscale="log", xlabel="weights of the model (MB)", title="whole model quantized")
    axes.legend(frameon=False, fontsize=8)
