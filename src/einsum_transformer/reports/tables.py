"""The tables of a page, as text, from the data of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from einsum_transformer.tables import quantity

OWNERS = ("weights", "cache", "optimizer", "gradients", "saved", "temporary")


@dataclass(frozen=True, slots=True)
class Table:
    """A table with a caption; the first cell of a row is its heading."""

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1
    """Number of columns that are aligned at the left."""


def tables_of(run: dict[str, Any]) -> dict[str, list[Table]]:
    """Return the tables of a run by section."""
    measured = [run["measured"], *([run["training"]] if run["training"] else [])]
    found = {
        "stages": [_stages(measured)],
        "change": [_change(run, measured)],
        "equations": [_equations(each["equations"]) for each in measured],
        "timings": [_timings(run["timings"])],
        "memory": [
            _memory(run["memory"]),
            *(_memory(part["memory"], " of training") for part in measured[1:]),
        ],
        "quantization": [],
    }
    if run["quantization_report"] is not None:
        found["quantization"] = _quantization(run["quantization_report"])
    return found


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.3f}"


def _percent(share: float | None, sign: str = "") -> str:
    return "" if share is None else f"{100 * share:{sign}.1f} %"


def _stages(measured: Sequence[dict[str, Any]]) -> Table:
    headings = ["stage", "calls", "seconds", "equations", "rest", "predicted", "residual"]
    rows = [
        [
            each["stage"],
            str(each["calls"]),
            *(f"{each[name]:.4f}" for name in ("seconds", "equations", "rest")),
            "" if each["predicted"] is None else f"{each['predicted']:.4f}",
            _percent(each["residual"], "+"),
        ]
        for part in measured
        for each in part["stages"]
    ]
    return Table("Seconds of each stage, of all calls", *_filled(headings, rows))


def _change(run: dict[str, Any], measured: Sequence[dict[str, Any]]) -> Table:
    """Each equation in all stages: operations, bytes, and their ratio."""
    times = {
        (row["stage"], row["role"], row["equation"]): row for part in measured for row in part["equations"]
    }
    stages = run["stages"]
    rows: dict[tuple[str, str], dict[str, list[str]]] = {}
    for stage in stages:
        for step in stage["steps"]:
            if not step["equation"]:
                continue
            measured_row = times.get((stage["name"], step["role"], step["equation"]))
            p50 = "" if measured_row is None else f"{1e6 * measured_row['p50']:.0f}"
            ratio = step["flops"] / step["bytes"] if step["bytes"] else 0.0
            cells = [quantity(step["flops"]), quantity(step["bytes"]), f"{ratio:.2g}", p50]
            rows.setdefault((step["role"], step["equation"]), {}).setdefault(stage["name"], cells)
    columns = ("FLOPs", "bytes", "FLOP/byte", "p50 \u00b5s")
    headings = [
        "weight or phase",
        "equation",
        *(f"{each['name']}: {name}" for each in stages for name in columns),
    ]
    table = [
        [
            role,
            equation,
            *(cell for stage in stages for cell in found.get(stage["name"], [""] * len(columns))),
        ]
        for (role, equation), found in rows.items()
    ]
    return Table("Each equation in one layer, in all stages", headings, table, 2)


def _equations(equations: Sequence[dict[str, Any]]) -> Table:
    headings = [
        "stage",
        "weight or phase",
        "equation",
        "runs as",
        "calls",
        "p50 \u00b5s",
        "p90 \u00b5s",
        "p99 \u00b5s",
    ]
    headings += ["total ms", "share", "GFLOP/s", "GB/s", "elements", "predicted ms", "of roofline", "bound"]
    rows = [
        [
            row["stage"],
            row["role"],
            row["equation"] or "(elementwise, Python)",
            row["lowering"],
            str(row["calls"]),
            *(f"{1e6 * row[name]:.1f}" for name in ("p50", "p90", "p99")),
            _milliseconds(row["seconds"]),
            _percent(row["share"]),
            *(f"{row[name]:.2f}" if row["equation"] else "" for name in ("gflops", "gbps")),
            "" if row["elements"] is None else quantity(row["elements"]),
            _milliseconds(row["predicted"]),
            _percent(row["roofline"]),
            row["bound"],
        ]
        for row in equations
    ]
    stages = ", ".join(dict.fromkeys(row["stage"] for row in equations))
    caption = f"Time of each equation and of the rest of each phase: {stages}"
    return Table(caption, *_filled(headings, rows), left=4)


def _timings(timings: dict[str, Any]) -> Table:
    rows = [
        [
            "\u2003" * row["depth"] + row["name"],
            str(row["calls"]),
            _milliseconds(row["p50"]),
            _milliseconds(row["p99"]),
            _milliseconds(row["seconds"]),
            _percent(row["share"]),
        ]
        for row in timings["rows"]
    ]
    headings = ["part", "calls", "p50 ms", "p99 ms", "total ms", "share"]
    return Table("Seconds of each part of the model", headings, rows)


def _memory(memory: dict[str, Any], what: str = "") -> Table:
    owners = [name for name in OWNERS if any(sample[name] for sample in memory["samples"])]
    stages: dict[str, dict[str, Any]] = {}
    for sample in memory["samples"]:
        stage = sample["phase"].partition("/")[0]
        total = sum(sample[name] for name in OWNERS)
        if stage not in stages or total > stages[stage]["total"]:
            stages[stage] = sample | {"total": total}
    rows = [
        [stage, *(quantity(sample[name], "B") for name in owners), quantity(sample["total"], "B")]
        for stage, sample in stages.items()
    ]
    predicted = memory["predicted"]
    note = "" if predicted is None else f", predicted {quantity(predicted, 'B')}"
    caption = f"Most bytes of each stage{what}; peak {quantity(memory['peak'], 'B')}{note}"
    return Table(caption, ["stage", *owners, "total"], rows)


def _quantization(report: dict[str, Any]) -> list[Table]:
    operations = [
        [
            row["operation"],
            f"{row['source']} \u2192 {row['target']}" if row["source"] else "",
            *(quantity(row[name], "B") for name in ("weights_before", "weights_formula", "weights_held")),
        ]
        for row in report["operations"]
    ]
    headings = ["operation", "weights", "before", "by formula", "held"]
    found = [Table(f"Bytes of the weights, quantized to {report['quantization']}", headings, operations, 2)]
    errors = [
        [row["name"], str(row["bits"]), f"{row['relative']:.3%}", f"{row['largest']:.3g}"]
        for row in report["tensors"]
    ]
    if errors:
        headings = ["weight", "bits", "RMS error", "largest change"]
        found.append(Table("Error of each quantized weight, relative to its RMS", headings, errors))
    return found


def comparison_tables(comparison: dict[str, Any]) -> list[Table]:
    """Return the tables of two models: settings that differ, parameters, equations, totals."""
    names = comparison["names"]
    totals = [
        ["parameters", *(f"{each:,}" for each in comparison["parameters"])],
        ["FLOPs of the prompt", *map(quantity, comparison["flops"])],
        ["bytes of the prompt", *(quantity(each, "B") for each in comparison["bytes_moved"])],
        ["KV cache per token", *(quantity(each, "B") for each in comparison["cache_per_token"])],
        *([name, *map(quantity, pair)] for name, pair in comparison["components"].items()),
    ]
    fields = [[name, *map(_field, pair)] for name, pair in comparison["fields"].items()]
    steps = [
        [
            f"{step['where']} {step['role']}",
            step["equation"],
            *map(str, step["times"]),
            *map(quantity, step["flops"]),
        ]
        for step in comparison["steps"]
    ]
    headings = [
        "step",
        "equation",
        *(f"times: {name}" for name in names),
        *(f"FLOPs: {name}" for name in names),
    ]
    return [
        Table("Parameters and costs in float32", ["quantity", *names], totals),
        Table("Settings that differ", ["setting", *names], fields, 3),
        Table("Equations in all layers", headings, steps, 2),
    ]


def _field(value: Any) -> str:
    return "" if value is None else str(value)


def _filled(headings: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """The table without columns that are empty."""
    kept = [i for i in range(len(headings)) if any(row[i] for row in rows)]
    return [headings[i] for i in kept], [[row[i] for i in kept] for row in rows]
