"""Comparison of two models from their configs alone: fields, parameters, program, costs, cache."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, is_dataclass
from math import prod
from typing import Any

from einsum_transformer.analysis.explain import Program, explain
from einsum_transformer.arguments import checked
from einsum_transformer.displays import as_html
from einsum_transformer.models.builder import weights_of
from einsum_transformer.models.config import ModelConfig
from einsum_transformer.models.model import Model
from einsum_transformer.models.run_config import RunConfig
from einsum_transformer.tables import columns, quantity

_NOT_COMPARED = {"defaulted", "ignored", "training", "attention_block", "initializer_range"}
_ITEM = 4  # bytes of a float32
Pair = tuple[Any, Any]
_Source = Model | ModelConfig | RunConfig


@dataclass(frozen=True, slots=True)
class StepPair:
    """One equation in one role, summed over all layers: calls and FLOPs of each model, 0 if it lacks it."""

    where: str
    role: str
    equation: str
    times: tuple[int, int]
    flops: tuple[int, int]


@checked
@dataclass(frozen=True, slots=True)
class Comparison:
    """The differences between two models and the costs of each. Bytes are for float32."""

    names: tuple[str, str]
    batch: int
    tokens: int
    fields: dict[str, Pair]
    """Config fields that differ; `rope.rope_theta` is a field of `rope`, which may be None in one model."""
    parameters: tuple[int, int]
    components: dict[str, tuple[int, int]]
    """Parameters per component, summed over all layers and experts."""
    steps: tuple[StepPair, ...]
    flops: tuple[int, int]
    bytes_moved: tuple[int, int]
    cache_per_token: tuple[int, int]
    """Bytes that one more token adds to the cache, as long as no sliding window is full."""
    cache: tuple[int, int]
    """Bytes of the cache at this batch and length; layers with a sliding window store only the window."""

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison in JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        return render(self)

    def _repr_html_(self) -> str:
        return as_html(str(self))


def compare(
    a: _Source, b: _Source, batch: int = 1, tokens: int = 128, names: tuple[str, str] = ("A", "B")
) -> Comparison:
    """Compare two models or configs for `batch` rows of `tokens` tokens."""
    programs = explain(a, batch, tokens), explain(b, batch, tokens)
    a, b = programs[0].config, programs[1].config
    totals = [program.totals("forward") for program in programs]
    return Comparison(
        names,
        batch,
        tokens,
        dict(_differing(a, b)),
        (programs[0].parameters, programs[1].parameters),
        _paired(_components(a), _components(b)),
        tuple(_steps(*programs)),
        (totals[0]["flops"], totals[1]["flops"]),
        (_moved(totals[0]), _moved(totals[1])),
        (cache_bytes(a, 1, 1), cache_bytes(b, 1, 1)),
        (cache_bytes(a, batch, tokens), cache_bytes(b, batch, tokens)),
    )


def cache_bytes(config: ModelConfig, batch: int, tokens: int) -> int:
    """Return the bytes of keys and values, or of latents, for `batch` rows of `tokens` tokens."""
    if config.latent is not None:
        elements = config.latent.kv_lora_rank + config.latent.qk_rope_head_dim
    else:
        elements = 2 * config.num_key_value_heads * config.head_dim
    stored = sum(tokens if window is None else min(tokens, window) for window in config.windows)
    return batch * stored * elements * _ITEM


def _moved(totals: dict[str, int]) -> int:
    return totals["bytes_read"] + totals["bytes_written"]


def _differing(a: Any, b: Any, prefix: str = "") -> Iterator[tuple[str, Pair]]:
    """Yield the fields that differ. If `a` or `b` is None, yield all fields of the other that are set."""
    for field in fields(a if a is not None else b):
        one, other = (None if each is None else getattr(each, field.name) for each in (a, b))
        if field.name in _NOT_COMPARED or one == other or {one, other} <= {None, False, ()}:
            continue
        if is_dataclass(one) or is_dataclass(other):
            yield from _differing(one, other, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", (one, other)


def _components(config: ModelConfig) -> dict[str, int]:
    found = Counter[str]()
    for weight in weights_of(config):
        name = re.sub(r"^layers\.\d+\.|\.\d+(?=\.)|\.weight$", "", weight.path)
        found[name] += prod(weight.stored)
    return found


def _paired(a: dict[str, int], b: dict[str, int]) -> dict[str, tuple[int, int]]:
    return {name: (a.get(name, 0), b.get(name, 0)) for name in dict.fromkeys([*a, *b])}


def _steps(a: Program, b: Program) -> Iterator[StepPair]:
    """Yield the steps in the order of the first program, then those that only the second has."""
    found: dict[tuple[str, str, str], list[list[int]]] = {}
    for which, program in enumerate((a, b)):
        for step in program.steps:
            where = " / ".join(part for part in step.path[1:] if part != "layer") or step.path[0]
            times, flops = found.setdefault((where, step.role, step.equation), [[0, 0], [0, 0]])
            times[which] += step.times * step.calls
            flops[which] += step.times * step.flops
    for key, (times, flops) in found.items():
        yield StepPair(*key, (times[0], times[1]), (flops[0], flops[1]))


def render(found: Comparison) -> str:
    """Return the comparison as text."""
    rows = f"batch {found.batch}, {found.tokens} tokens, float32"
    totals = [
        _row("parameters", found.parameters),
        _row("FLOPs of a forward pass", found.flops),
        _row("bytes of its equations", found.bytes_moved, "B"),
        _row("cache, each token", found.cache_per_token, "B"),
        _row("cache, all tokens", found.cache, "B"),
    ]
    settings = [(name, _short(one), _short(other), "") for name, (one, other) in found.fields.items()]
    parts = [_row(name, pair) for name, pair in found.components.items() if pair[0] != pair[1]]
    steps = [
        _row(f"{step.equation}  {_place(step)}", step.flops)
        for step in found.steps
        if step.flops[0] != step.flops[1]
    ]
    same = len(found.steps) - len(steps)
    tables = [
        (f"costs ({rows})", totals),
        ("settings that differ", settings),
        ("parameters that differ", parts),
        ("FLOPs of equations that differ", steps),
    ]
    lines = [line for title, cells in tables for line in (*_table(title, found.names, cells), "")]
    return "\n".join([*lines, f"{same} of {len(found.steps)} equations cost the same in both"])


def _row(name: str, pair: tuple[int, int], unit: str = "") -> tuple[str, ...]:
    """Return the cells of two amounts and their ratio."""
    a, b = pair
    ratio = "only in B" if not a and b else "only in A" if a and not b else f"{b / a:.2f}" if a else ""
    return name, quantity(a, unit), quantity(b, unit), ratio


def _place(step: StepPair) -> str:
    """Return the weight or phase, with the part of the layer if the name alone is ambiguous."""
    part = step.where.rpartition(" / ")[2]
    plain = part in ("attention", "feed-forward", "qkv", "output", "head", step.role)
    return step.role if plain else f"{step.role} ({part})"


def _table(title: str, names: tuple[str, str], rows: list[tuple[str, ...]]) -> Iterator[str]:
    if not rows:
        yield f"{title}: none"
        return
    yield from columns([(title, *names, "B / A"), *rows], right=(1, 2, 3))


def _short(value: list[Any] | tuple[Any, ...] | str | float | None) -> str:
    if isinstance(value, (list, tuple)):
        kinds = list(dict.fromkeys(value))
        return (
            f"{len(value)}: " + ", ".join(f"{value.count(kind)} {kind}" for kind in kinds) if value else "-"
        )
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
