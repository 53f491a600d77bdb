"""The table of a run: every second of the spans is in exactly one part."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from einsum_transformer.analysis.report import Report, Run, quantity, render, report, rope_facts, summary
from einsum_transformer.engine.recorder import Recorder, Span
from einsum_transformer.generation.decode import Generation, Settings, decode_batch
from einsum_transformer.generation.sampling import Sampling
from tiny_models import LLAMA3, config_of, tiny_model

LAYER = [
    # (phases inside the layer, seconds), inner ones first, as a recorder has them
    ("norm", 1),
    ("attention/qkv/load", 2),
    ("attention/qkv", 5),
    ("attention/rope", 1),
    ("attention/cache", 1),
    ("attention/scores", 2),
    ("attention/mix", 1),
    ("attention/scores", 2),
    ("attention/mix", 1),
    ("attention/output/load", 1),
    ("attention/output", 3),
    ("attention", 18),
    ("norm", 1),
    ("feed-forward/load", 4),
    ("feed-forward", 10),
    ("", 32),
]
LAYER_PARTS = {
    "norm": 2,
    "attention/load": 3,
    "attention/QKV projection": 3,
    "attention/RoPE": 1,
    "attention/KV cache": 1,
    "attention/scores + softmax": 4,
    "attention/output (mix + projection)": 4,
    "attention/tiles and Python": 2,
    "feed-forward/load": 4,
    "feed-forward/compute": 6,
    "residuals and Python": 2,
}


def spans_of(*steps: tuple[str, float], start: float = 0.0) -> list[Span]:
    """Spans with these paths and seconds; only the starts of the outermost ones are meant."""
    spans = []
    for path, seconds in steps:
        spans.append(Span(tuple(filter(None, path.split("/"))), None, start, float(seconds)))
        start += seconds if "/" not in path else 0
    return spans


def forward(stage: str, layers: int, slow: float = 1.0) -> list[tuple[str, float]]:
    inside = [(f"{stage}/layer/{path}", slow * seconds) for path, seconds in LAYER]
    total = slow * (3 + 32 * layers + 7) + 2
    return [(f"{stage}/embedding", 3 * slow), *(inside * layers), (f"{stage}/head", 7 * slow), (stage, total)]


SPANS = spans_of(
    *forward("prefill", 2, slow=10.0),
    ("sampling/text", 0.5),
    ("sampling", 2.5),
    *forward("decode", 2),
    ("sampling/text", 0.5),
    ("sampling", 1.5),
    *forward("decode", 2),
    ("sampling", 1.0),
    start=100.0,
)
STAGES = 742 + 2.5 + 76 + 1.5 + 76 + 1.0
RUN = Run(config_of(), 99.0, STAGES + 10, 30.0, (5,), (3,), 1234)


def lines(found: Report) -> dict[str, Any]:
    """Rows by their place in the tree: `layers/attention/load`."""
    place: list[str] = []
    named = {}
    for row in found.rows:
        place[row.depth :] = [row.name]
        named["/".join(place)] = row
    return named


@pytest.fixture(scope="module")
def found() -> Report:
    return report(SPANS, RUN)


def test_parts_add_up_to_the_stages(found: Report) -> None:
    parts = sum(row.seconds for row in found.rows if row.part)
    assert parts == pytest.approx(STAGES)
    assert found.parts_seconds == pytest.approx(parts)
    assert found.outside_seconds == pytest.approx(10)
    assert sum(row.share for row in found.rows if row.part) == pytest.approx(STAGES / (STAGES + 10))
    assert abs(found.parts_seconds - found.seconds) <= 0.02 * found.seconds


def test_each_second_is_where_it_belongs(found: Report) -> None:
    rows = lines(found)
    layer_calls = [10.0] * 2 + [1.0] * 4
    for name, seconds in LAYER_PARTS.items():
        row = rows[f"layers/{name}"]
        assert row.part, name
        assert row.calls == 6
        assert row.seconds == pytest.approx(seconds * sum(layer_calls)), name
        assert row.p50 == pytest.approx(seconds), name
        assert row.p99 == pytest.approx(np.percentile(np.multiply(layer_calls, seconds), 99)), name
    assert rows["layers"].seconds == pytest.approx(32 * sum(layer_calls))
    assert rows["layers/attention"].seconds == pytest.approx(18 * sum(layer_calls))
    assert rows["layers/weight load (both below)"].seconds == pytest.approx(7 * sum(layer_calls))
    assert (rows["prefill"].calls, rows["prefill"].seconds) == (1, pytest.approx(742))
    assert (rows["decode"].calls, rows["decode"].seconds) == (2, pytest.approx(152))
    assert (rows["embedding"].calls, rows["embedding"].seconds) == (3, pytest.approx(36))
    assert (rows["output head"].calls, rows["output head"].seconds) == (3, pytest.approx(84))
    assert (rows["sampling"].calls, rows["sampling"].seconds) == (3, pytest.approx(4))
    assert (rows["writing text"].calls, rows["writing text"].seconds) == (2, pytest.approx(1))
    assert rows["between layers (Python)"].seconds == pytest.approx(6)


def test_sums_are_the_sums_of_their_parts(found: Report) -> None:
    rows = lines(found)
    for name in ("layers", "layers/attention", "layers/feed-forward"):
        assert not rows[name].part
        below = [row.seconds for path, row in rows.items() if row.part and path.startswith(f"{name}/")]
        assert rows[name].seconds == pytest.approx(sum(below))


def test_rates_and_first_token(found: Report) -> None:
    assert found.time_to_first_token == pytest.approx(
        1 + 742 + 2
    )  # started at 99, and 0.5 s of writing is later
    assert found.time_to_first_token_with_load == pytest.approx(745 + 30)
    assert found.prompt_tokens_per_second == pytest.approx(5 / 742)
    assert found.new_tokens_per_second == pytest.approx(2 / (152 + 4))
    assert found.kv_cache_bytes == 1234
    assert found.rope["positions"] == [0, 7]


def test_ratios(found: Report) -> None:
    assert found.feed_forward_per_attention == pytest.approx(10 / 18)
    assert found.weight_load_share == pytest.approx(7 / 32)
    assert found.decode_p99_per_p50 is None
    lines = "\n".join(summary(found))
    assert "ratios: feed-forward / attention 0.56; weight load 21.9 % of the layers" in lines
    assert "advice: weights are read from the file in every pass" in lines
    steps = [step for i in range(20) for step in forward("decode", 1, slow=9.0 if i == 7 else 1.0)]
    slow = report(spans_of(*steps), RUN)
    assert slow.decode_p99_per_p50 is not None
    assert slow.decode_p99_per_p50 > 2
    assert "advice: some steps take more than twice the median" in "\n".join(summary(slow))
    none = report([], RUN)
    assert (none.feed_forward_per_attention, none.weight_load_share) == (None, 0.0)
    assert "ratios" not in "\n".join(summary(none))


def test_loads_of_embedding_and_head_appear_only_if_there_are_any(found: Report) -> None:
    assert lines(found)["embedding"].part
    assert "embedding/load" not in lines(found)
    spans = spans_of(
        ("prefill/embedding/load", 2), ("prefill/embedding", 3), ("prefill/head", 4), ("prefill", 8)
    )
    rows = lines(report(spans, replace(RUN, seconds=8.0)))
    assert not rows["embedding"].part
    assert (rows["embedding/load"].seconds, rows["embedding/compute"].seconds) == (2, 1)
    assert sum(row.seconds for row in rows.values() if row.part) == 8


def test_phases_of_components_to_come_are_shown() -> None:
    steps = [
        ("prefill/layer/experts/router", 1),
        ("prefill/layer/experts", 3),
        ("prefill/layer", 4),
        ("prefill", 4),
    ]
    rows = lines(report(spans_of(*steps), replace(RUN, seconds=4.0)))
    assert rows["layers/experts/router"].seconds == 1
    assert rows["layers/experts/compute"].seconds == 2
    assert sum(row.seconds for row in rows.values() if row.part) == 4


def test_nothing_generated_gives_no_rates() -> None:
    found = report(spans_of(*forward("prefill", 1)), replace(RUN, new_lengths=(0,)))
    assert found.time_to_first_token is None
    assert found.new_tokens_per_second is None
    assert found.prompt_tokens_per_second is not None


def test_a_real_run_reconciles() -> None:
    model = tiny_model()
    results = [Generation([1, 2, 3])]
    with Recorder() as recorder:
        list(decode_batch(model, results, Sampling(), Settings(4, ignore_eos=True)))
    top = sum(span.seconds for span in recorder.spans if len(span.path) == 1)
    found = report(recorder.spans, Run(model.config, recorder.spans[0].start, top, 0.0, (3,), (4,), 0))
    assert found.parts_seconds == pytest.approx(top)
    rows = lines(found)
    assert (rows["prefill"].calls, rows["decode"].calls, rows["sampling"].calls) == (1, 3, 4)
    assert rows["layers"].calls == 2 * 4
    assert all(rows[name].calls == 8 for name in ("layers/norm", "layers/attention/scores + softmax"))


def test_what_is_printed(found: Report) -> None:
    written = io.StringIO()
    Console(width=100, file=written).print(render(found))
    printed = written.getvalue()
    assert max(map(len, printed.splitlines())) <= 100
    for row in found.rows:
        assert row.name in printed
    assert f"parts {STAGES:.3f} s = 98.9 % of {STAGES + 10:.3f} s; outside of all phases: 10.000 s" in printed
    assert "first token after 745.000 s (775.000 s with loading the model)" in printed
    assert "KV cache 1.23 kB" in printed
    json.dumps(asdict(found), allow_nan=False)


def test_rope_made_visible() -> None:
    facts = rope_facts(config_of(rope_scaling=LLAMA3, rope_theta=500000.0), 40)
    assert (facts["base"], facts["head_dim"], facts["rotated_dims"]) == (500000.0, 6, 6)
    assert facts["shortest_wavelength"] == pytest.approx(2 * np.pi)
    assert facts["longest_wavelength"] == pytest.approx(8 * 2 * np.pi * 500000 ** (2 / 3))
    line = summary(report(SPANS, replace(RUN, config=config_of(rope_scaling=LLAMA3))))[-1]
    assert "scaling llama3 x8 over 64, positions 0-7" in line


@pytest.mark.parametrize(
    ("amount", "text"),
    [(0, "0 B"), (7, "7 B"), (999, "999 B"), (999.6, "1.00 kB"), (1234, "1.23 kB"), (12345678, "12.3 MB"),
     (999_900_000, "1.00 GB"), (4.5e17, "450 PB"), (0.5, "0.50 B")],
)  # fmt: skip
def test_quantities(amount: float, text: str) -> None:
    assert quantity(amount, "B") == text
