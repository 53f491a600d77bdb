"""The timing table of a run: the seconds of prefill, decode, sampling and their parts.

The own seconds of a span are its seconds minus those of the spans inside it. The own seconds of all spans
therefore add up exactly to the stages, and every line of the table is a sum of own seconds.
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
"""The time of a phase outside of its inner phases."""
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
"""The lines of the table in order; phases that are not in it follow their siblings."""
_ALWAYS = {line for line in _ORDER if line[-1] not in _SOMETIMES}
"""Lines that are shown for every model."""


@dataclass(frozen=True, slots=True)
class Run:
    """The facts of a run that its spans do not contain. Seconds are of time.perf_counter."""

    config: ModelConfig
    started: float
    """The time when generation started."""
    seconds: float
    """The time from `started` to the end of the run."""
    load_seconds: float
    prompt_lengths: tuple[int, ...]
    new_lengths: tuple[int, ...]
    """Generated tokens of each row, without end tokens."""
    kv_cache_bytes: int


@dataclass(frozen=True, slots=True)
class Row:
    """One line: seconds of one call (p50, p99) and of all calls, and their share of the run.

    A call is one layer in one forward pass; for embedding and head one forward pass; for stages, sampling and
    text one step. The parts add up to the run; the other lines are sums of parts.
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
    """The timing table and its summary, in seconds, bytes and tokens."""

    rows: tuple[Row, ...]
    seconds: float
    parts_seconds: float
    outside_seconds: float
    """The seconds of the run that no phase covers."""
    load_seconds: float
    time_to_first_token: float | None
    time_to_first_token_with_load: float | None
    prompt_tokens: int
    prompt_tokens_per_second: float | None
    new_tokens: int
    new_tokens_per_second: float | None
    """Tokens after the first of each row / seconds of decode and sampling."""
    kv_cache_bytes: int
    peak_rss_bytes: int | None
    blas: str
    threads: int
    rope: dict[str, Any]
    feed_forward_per_attention: float | None
    """Seconds of the feed-forward / seconds of attention; None if a model or run has none."""
    weight_load_share: float
    """Share of the seconds of the layers in which weights are read from a file (`weight_budget`)."""
    decode_p99_per_p50: float | None
    """99 % quantile / median of the decode steps; None for fewer than ten."""


def report(spans: Sequence[Span], run: Run) -> Report:
    """Return the report of a run from the spans of its recorder."""
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
        blas=blas.description(),
        threads=blas.get_threads(),
        rope=rope_facts(run.config, max(map(sum, zip(run.prompt_lengths, run.new_lengths)), default=0)),
        feed_forward_per_attention=_ratio(samples, FEED_FORWARD, ATTENTION),
        weight_load_share=_ratio(samples, _LOADS, LAYER) or 0.0,
        decode_p99_per_p50=_spread(samples.get(("decode",), [])),
    )


def _ratio(samples: dict[Key, list[float]], one: Key, other: Key) -> float | None:
    first, second = (math.fsum(samples.get(key, [])) for key in (one, other))
    return first / second if first and second else None


def _spread(values: list[float]) -> float | None:
    """The 99 % quantile divided by the median."""
    if len(values) < 10:
        return None
    p50, p99 = np.percentile(values, (50, 99))
    return float(p99 / p50)


def _samples(spans: Sequence[Span]) -> dict[Key, list[float]]:
    """Return line -> seconds of each call. Spans are in the order of their ends: inner before outer ones."""
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
        line = _line(key)
        lines = [line[:depth] for depth in range(1, len(line) + 1)]
        if line[:1] == LAYER and line[-1] == "load":
            lines.append(_LOADS)
        for each in lines:
            pending[each] += own
        if len(key) == 1:
            for each in list(pending):
                samples[each].append(pending.pop(each))
    return dict(samples)


def _line(key: Key) -> Key:
    """Return the line that counts the own seconds of a phase."""
    if key[-1] == "text":
        return ("text",)
    if key[-1] == "load":
        return (*key[: 2 if key[0] == "layer" else 1], "load")
    if key[:3] in COUNTED_AS:
        return COUNTED_AS[key[:3]]
    line = key[:3] if key[:1] == LAYER else key[:1]
    return line if len(line) == 3 else (*line, OWN)


def _rows(samples: dict[Key, list[float]], seconds: float) -> Iterator[Row]:
    """Yield the stages, then the tree of lines; own time that is the only child of a line is omitted."""
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
    """Return the sort key of a line: the index in `_ORDER` at each depth."""
    sort_key = []
    for depth in range(1, len(key) + 1):
        known = key[:depth] in _ORDER
        sort_key.append((_ORDER.index(key[:depth]) if known else len(_ORDER), key[depth - 1]))
    return sort_key


def _row(name: str, depth: int, part: bool, values: list[float], whole: float) -> Row:
    p50, p99 = (float(p) for p in np.percentile(values, (50, 99))) if values else (None, None)
    total = math.fsum(values)
    return Row(name, depth, part, len(values), p50, p99, total, total / whole if whole > 0 else 0.0)


def _first_token(spans: Sequence[Span]) -> float | None:
    """Return the time of the first token: the end of the first sampling, minus the output of text in it."""
    for i, span in enumerate(spans):
        if span.path == ("sampling",):
            written = sum(inner.seconds for inner in spans[:i] if inner.path[:-1] == span.path)
            return span.start + span.seconds - written
    return None


def _rate(count: int, seconds: float) -> float | None:
    return count / seconds if count > 0 and seconds > 0 else None


def rope_facts(config: ModelConfig, length: int) -> dict[str, Any]:
    """Return the position encoding of a run: base, dimensions, scaling, wavelengths in tokens, positions."""
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
    """Return the report as a rich renderable, for a terminal of 80 columns or more."""
    table = terminal_table(("stage", "calls", "p50 ms", "p99 ms", "total s", "share"))
    for row in found.rows:
        style = "" if row.part else "bold" if row.depth == 0 else "cyan"
        cells = [f"{row.seconds:.3f}", f"{100 * row.share:.1f} %"] if row.calls else ["-", "-"]
        spread = ["-" if p is None else f"{1000 * p:.3f}" for p in (row.p50, row.p99)]
        table.add_row("  " * row.depth + row.name, str(row.calls or "-"), *spread, *cells, style=style)
    return with_lines([table], summary(found))


def summary(found: Report) -> list[str]:
    """Return the summary that follows the table."""
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
    return [*lines, *_ratio_lines(found), rope_line(found.rope)]


def _ratio_lines(found: Report) -> Iterator[str]:
    """Yield the ratios of the parts, and advice if one is unusual."""
    parts: list[str] = []
    if found.feed_forward_per_attention is not None:
        parts.append(f"feed-forward / attention {found.feed_forward_per_attention:.2f}")
    if found.weight_load_share:
        parts.append(f"weight load {100 * found.weight_load_share:.1f} % of the layers")
    if found.decode_p99_per_p50 is not None:
        parts.append(f"decode steps p99 / p50 {found.decode_p99_per_p50:.2f}")
    if parts:
        yield f"ratios: {'; '.join(parts)}"
    if found.weight_load_share > 0.2:
        yield "advice: weights are read from the file in every pass: use a larger `weight_budget`"
    if (found.decode_p99_per_p50 or 0) > 2:
        yield "advice: some steps take more than twice the median: is the machine shared?"


def speculation_lines(numbers: dict[str, Any] | None) -> list[str]:
    """Return the statistics of speculative decoding as text; empty if there was none."""
    if not numbers or not numbers["rounds"]:
        return []
    drafted, accepted = sum(numbers["drafted"]), sum(numbers["accepted"])
    shares = ", ".join(f"{100 * share:.0f} %" for share in numbers["acceptance"])
    rounds = f"{numbers['rounds']} round{'s'[: numbers['rounds'] != 1]}"
    line = (
        f"speculation: {numbers['new_tokens']} tokens in {rounds}, {numbers['tokens_per_round']:.2f} per "
        f"round; {accepted} of {drafted} drafts accepted (per position: {shares})"
    )
    speeds = [
        f"{numbers[name]:.2f}x {what}"
        for name, what in (("speed_up", "as fast as one token per step"), ("expected_speed_up", "expected"))
        if numbers[name] is not None
    ]
    return [line, f"speculation: {', '.join(speeds)}"] if speeds else [line]


def _sum_line(found: Report) -> str:
    share = 100 * found.parts_seconds / found.seconds if found.seconds > 0 else 100.0
    return (
        f"parts {found.parts_seconds:.3f} s = {share:.1f} % of {found.seconds:.3f} s; "
        f"outside of all phases: {found.outside_seconds:.3f} s (setup, Python)"
    )


def rope_line(facts: dict[str, Any]) -> str:
    """Return the position encoding as one line."""
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
