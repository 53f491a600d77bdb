"""The table after a run: where the seconds of prefill, decode and sampling went, and whether they add up.

A span's own seconds are its seconds minus those of the spans inside it. So the own seconds of all spans add
up to the stages exactly, and every line of the table is a sum of them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from einsum_transformer.components.rope import inverse_frequencies
from einsum_transformer.engine import blas
from einsum_transformer.engine.phases import ATTENTION, COUNTED_AS, FEED_FORWARD, LAYER, PASS, STAGES
from einsum_transformer.engine.recorder import Span
from einsum_transformer.models.config import ModelConfig
from einsum_transformer.tables import peak_rss_bytes, quantity, terminal_table, with_lines

Key = tuple[str, ...]

OWN = "own"
"""What a phase did outside of the phases inside it."""
_SOMETIMES = frozenset({"router", "experts", "shared expert", "recomputed"})
"""Phases that only some models or runs have."""
_STAGES: set[Key] = {(stage,) for stage in STAGES}
_LOADS = (*LAYER, "weight load")
_LABELS: dict[Key, str] = {
    **PASS,
    _LOADS: "weight load (both below)",
    (*ATTENTION, OWN): "tiles and Python",
    (*LAYER, OWN): "residuals and Python",
    ("text",): "writing text",
    ("stage",): "between layers (Python)",
}
_ORDER: tuple[Key, ...] = (
    *(line for path in PASS for line in ((_LOADS, path) if path == ATTENTION else (path,))),
    *((*part, OWN) for part in (ATTENTION, FEED_FORWARD, LAYER)),
    *(("sampling",), ("text",), ("stage",)),
)
"""The lines of the table in order; phases that it does not know are put after their siblings."""
_ALWAYS = {line for line in _ORDER if line[-1] not in _SOMETIMES}
"""Lines that are shown for every model."""


@dataclass(frozen=True, slots=True)
class Run:
    """Facts of a run that its spans do not contain. Times are of time.perf_counter, lengths in tokens."""

    config: ModelConfig
    started: float
    """When the prompt was handed over."""
    seconds: float
    """From then to the end of the run."""
    load_seconds: float
    prompt_lengths: tuple[int, ...]
    new_lengths: tuple[int, ...]
    """Generated tokens of each row; end tokens do not count."""
    kv_cache_bytes: int


@dataclass(frozen=True, slots=True)
class Row:
    """One line: seconds of one call (p50, p99), of all calls, and their share of the run.

    A call is one layer in one forward pass; for embedding and head one forward pass; for the stages, sampling
    and text one step. Parts add up to the run, the other lines are sums of parts.
    """

    name: str
    depth: int
    part: bool
    calls: int
    p50: float | None
    p99: float | None
    seconds: float
    share: float


@dataclass(frozen=True, slots=True)
class Report:
    """The table and the numbers below it; seconds, bytes, tokens."""

    rows: tuple[Row, ...]
    seconds: float
    parts_seconds: float
    outside_seconds: float
    """The run minus its parts: what no phase covers."""
    load_seconds: float
    time_to_first_token: float | None
    time_to_first_token_with_load: float | None
    prompt_tokens: int
    prompt_tokens_per_second: float | None
    new_tokens: int
    new_tokens_per_second: float | None
    """Tokens after the first ones, by the seconds of decode and sampling."""
    kv_cache_bytes: int
    peak_rss_bytes: int | None
    blas: str
    threads: int
    rope: dict[str, Any]


def report(spans: Sequence[Span], run: Run) -> Report:
    """The reading of a recorder's spans after a run."""
    samples = _samples(spans)
    rows = tuple(_rows(samples, run.seconds))
    parts = sum(row.seconds for row in rows if row.part)
    first = _first_token(spans)
    to_first = None if first is None else first - run.started
    prompt, new = sum(run.prompt_lengths), sum(run.new_lengths)
    later = sum(max(length - 1, 0) for length in run.new_lengths)
    stages = {name: sum(samples.get((name,), [])) for name in ("prefill", "decode", "sampling")}
    return Report(
        rows=rows,
        seconds=run.seconds,
        parts_seconds=parts,
        outside_seconds=run.seconds - parts,
        load_seconds=run.load_seconds,
        time_to_first_token=to_first,
        time_to_first_token_with_load=None if to_first is None else to_first + run.load_seconds,
        prompt_tokens=prompt,
        prompt_tokens_per_second=_rate(prompt, stages["prefill"]),
        new_tokens=new,
        new_tokens_per_second=_rate(later, stages["decode"] + stages["sampling"]),
        kv_cache_bytes=run.kv_cache_bytes,
        peak_rss_bytes=peak_rss_bytes(),
        blas=str(blas.current()),
        threads=blas.get_threads(),
        rope=rope_facts(run.config, max(map(sum, zip(run.prompt_lengths, run.new_lengths)), default=0)),
    )


def _samples(spans: Sequence[Span]) -> dict[Key, list[float]]:
    """Line -> its seconds in every call. Spans come in the order they ended: inner ones before outer ones."""
    samples: dict[Key, list[float]] = defaultdict(list)
    inside: dict[Key, float] = defaultdict(float)
    pending: dict[Key, float] = defaultdict(float)
    for span in spans:
        own = span.seconds - inside.pop(span.path, 0.0)
        if len(span.path) > 1:
            inside[span.path[:-1]] += span.seconds
        key = span.path[1:] if span.path[:1] in _STAGES else span.path
        if not key:
            samples[span.path].append(span.seconds)
            samples[("stage",)].append(own)
            continue
        place = _place(key)
        lines = [place[:depth] for depth in range(1, len(place) + 1)]
        if place[:1] == LAYER and place[-1] == "load":
            lines.append(_LOADS)
        for line in lines:
            pending[line] += own
        if len(key) == 1:
            for line in list(pending):
                samples[line].append(pending.pop(line))
    return dict(samples)


def _place(key: Key) -> Key:
    """The line that a phase's own seconds belong to."""
    if key[-1] == "text":
        return ("text",)
    if key[-1] == "load":
        return (*key[: 2 if key[0] == "layer" else 1], "load")
    if key[:3] in COUNTED_AS:
        return COUNTED_AS[key[:3]]
    place = key[:3] if key[:1] == LAYER else key[:1]
    return place if len(place) == 3 else (*place, OWN)


def _rows(samples: dict[Key, list[float]], seconds: float) -> Iterator[Row]:
    """The stages, then the tree of lines; a line with nothing inside but its own seconds is one line."""
    keys = {*samples, *_ALWAYS} - _STAGES
    alone = {key for key in keys if key[-1] == OWN and sum(other[:-1] == key[:-1] for other in keys) == 1}
    keys -= alone
    for stage in STAGES:
        yield _row(stage, 0, False, samples.get((stage,), []), seconds)
    for key in sorted(keys, key=_order):
        children = any(other[:-1] == key and other != _LOADS for other in keys)
        label = _LABELS.get(key, "compute" if key[-1] == OWN else key[-1])
        yield _row(label, len(key) - 1, not children and key != _LOADS, samples.get(key, []), seconds)


def _order(key: Key) -> list[Any]:
    """Sorts as `_ORDER` has it, level by level."""
    place = []
    for depth in range(1, len(key) + 1):
        known = key[:depth] in _ORDER
        place.append((_ORDER.index(key[:depth]) if known else len(_ORDER), key[depth - 1]))
    return place


def _row(name: str, depth: int, part: bool, values: list[float], whole: float) -> Row:
    p50, p99 = (float(p) for p in np.percentile(values, (50, 99))) if values else (None, None)
    total = math.fsum(values)
    return Row(name, depth, part, len(values), p50, p99, total, total / whole if whole > 0 else 0.0)


def _first_token(spans: Sequence[Span]) -> float | None:
    """When the first token was chosen: the end of the first sampling, without the writing of text."""
    for i, span in enumerate(spans):
        if span.path == ("sampling",):
            written = sum(inner.seconds for inner in spans[:i] if inner.path[:-1] == span.path)
            return span.start + span.seconds - written
    return None


def _rate(count: int, seconds: float) -> float | None:
    return count / seconds if count > 0 and seconds > 0 else None


def rope_facts(config: ModelConfig, length: int) -> dict[str, Any]:
    """The rotation made visible: base, dimensions, scaling, wavelengths in tokens, positions of a run."""
    rope, positions = config.rope, [0, max(length - 1, 0)]
    if rope is None:
        learned = f"learned, {config.max_position_embeddings} rows" if config.learned_positions else "ALiBi"
        return {"scheme": learned, "positions": positions}
    inv_freq, factor = inverse_frequencies(rope, config.head_dim, length)
    return {
        "scheme": "RoPE",
        "base": rope.rope_theta,
        "local_base": None if config.local_rope is None else config.local_rope.rope_theta,
        "head_dim": config.head_dim,
        "rotated_dims": 2 * len(inv_freq),
        "scaling": rope.rope_type,
        "factor": rope.factor,
        "original_max_position_embeddings": rope.original_max_position_embeddings,
        "attention_factor": factor,
        "shortest_wavelength": float(2 * math.pi / inv_freq.max()),
        "longest_wavelength": float(2 * math.pi / inv_freq.min()),
        "positions": positions,
    }


def render(found: Report) -> Any:
    """The report for a terminal of 80 columns or more, as a rich renderable."""
    table = terminal_table(("stage", "calls", "p50 ms", "p99 ms", "total s", "share"))
    for row in found.rows:
        style = "" if row.part else "bold" if row.depth == 0 else "cyan"
        cells = [f"{row.seconds:.3f}", f"{100 * row.share:.1f} %"] if row.calls else ["-", "-"]
        spread = ["-" if p is None else f"{1000 * p:.3f}" for p in (row.p50, row.p99)]
        table.add_row("  " * row.depth + row.name, str(row.calls or "-"), *spread, *cells, style=style)
    return with_lines([table], summary(found))


def summary(found: Report) -> list[str]:
    """The lines below the table."""
    lines = [_sum_line(found), ""]
    if found.time_to_first_token is not None and found.time_to_first_token_with_load is not None:
        lines.append(
            f"first token after {found.time_to_first_token:.3f} s "
            f"({found.time_to_first_token_with_load:.3f} s with loading the model)"
        )
    rates = (found.prompt_tokens_per_second, found.new_tokens_per_second)
    prompt, new = (f", {rate:.1f} tokens/s" if rate else "" for rate in rates)
    lines.append(f"prompt {found.prompt_tokens} tokens{prompt}; generated {found.new_tokens} tokens{new}")
    peak = "unknown" if found.peak_rss_bytes is None else quantity(found.peak_rss_bytes, "B")
    lines.append(
        f"KV cache {quantity(found.kv_cache_bytes, 'B')}; peak memory {peak}; "
        f"BLAS {found.blas}, {found.threads} thread{'s' * (found.threads != 1)}"
    )
    return [*lines, rope_line(found.rope)]


def speculation_lines(numbers: dict[str, Any] | None) -> list[str]:
    """What speculative decoding did, for people; nothing where there was none."""
    if not numbers or not numbers["rounds"]:
        return []
    drafted, accepted = sum(numbers["drafted"]), sum(numbers["accepted"])
    places = ", ".join(f"{100 * share:.0f} %" for share in numbers["acceptance"])
    rounds = f"{numbers['rounds']} round{'s'[: numbers['rounds'] != 1]}"
    line = (
        f"speculation: {rounds} of draft and check gave {numbers['new_tokens']} tokens, "
        f"{numbers['tokens_per_round']:.2f} a round; {accepted} of {drafted} drafts accepted "
        f"(per position: {places})"
    )
    speeds = [
        f"{numbers[name]:.2f}x {what}"
        for name, what in (("speed_up", "as fast as step by step"), ("expected_speed_up", "by the formula"))
        if numbers[name] is not None
    ]
    return [line, f"speculation: those tokens came {', '.join(speeds)}"] if speeds else [line]


def _sum_line(found: Report) -> str:
    share = 100 * found.parts_seconds / found.seconds if found.seconds > 0 else 100.0
    return (
        f"parts {found.parts_seconds:.3f} s = {share:.1f} % of {found.seconds:.3f} s; "
        f"outside of any phase: {found.outside_seconds:.3f} s (setting up, Python)"
    )


def rope_line(facts: dict[str, Any]) -> str:
    """One line that describes the position encoding."""
    low, high = facts["positions"]
    if facts["scheme"] != "RoPE":
        return f"positions: {facts['scheme']}; {low}-{high}"
    local = "" if facts["local_base"] is None else f" ({facts['local_base']:g} in layers with a window)"
    scaling = facts["scaling"]
    if scaling != "default":
        scaling += f" x{facts['factor']:g} over {facts['original_max_position_embeddings']}"
    waves = f"{facts['shortest_wavelength']:.1f}-{facts['longest_wavelength']:.0f}"
    return (
        f"RoPE: base {facts['base']:g}{local}, {facts['rotated_dims']} of {facts['head_dim']} head dims, "
        f"scaling {scaling}, positions {low}-{high}, wavelengths {waves}"
    )
