"""Prefill and decode with quantized weights, beside llama.cpp's Q8_0 and Q4_0 and transformers in bfloat16.

Each candidate runs in a separate process, with the same threads and random tokens; they alternate in every
round, and medians are reported. llama.cpp quantizes the float32 file itself, all matrices to one type.

    python benchmarks/bench_quantized.py --oracle-python other/bin/python --json quantized.json
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from machine import (
    Table,
    machine_line,
    median,
    progress,
    save_json,
    show,
    spread,
    targets_table,
    touch_memory,
)
from processes import Worker
from quantized_workers import CANDIDATES, FTYPES
from workers import random_tokens

SCRIPT = str(Path(__file__).with_name("quantized_workers.py"))
DECODE_AFTER, STEPS = 128, 128
Samples = defaultdict[str, dict[str, list[float]]]


def ask_once(python: str, **task: Any) -> Any:
    """The answer of a process that is started for one task."""
    worker = Worker(SCRIPT, python, task)
    found = worker.answer()
    worker.close()
    return found


def prepared(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """The files of the model: safetensors, and GGUF in each type."""
    facts = ask_once(
        sys.executable, prepare={"model_name": options.model, "folder": folder, "lengths": [options.prefill]}
    )
    sources = {"ours": facts["sources"]["safetensors"], "transformers": facts["sources"]["safetensors"]}
    sources["llama.cpp F32"] = facts["sources"]["gguf"]
    for name in options.candidates:
        form = CANDIDATES[name].form
        if form in FTYPES:
            sources[name] = str(Path(folder, f"{form}.gguf"))
            given = {"source": sources["llama.cpp F32"], "target": sources[name], "form": form}
            if not Path(sources[name]).exists():
                ask_once(options.oracle_python, requantize=given)
    return {"sources": sources, "vocabulary": facts["vocabulary"]}


def measured(options: argparse.Namespace, facts: dict[str, Any]) -> tuple[Samples, dict[str, Any]]:
    """Samples per candidate and measure, and what the candidates answered first."""
    samples: Samples = defaultdict(lambda: {"prefill": [], "decode": []})
    opened: dict[str, Any] = {}
    workers: dict[str, Worker] = {}
    context = max(options.prefill, DECODE_AFTER + STEPS) + 8
    for name in options.candidates:
        kind = CANDIDATES[name].kind
        source = facts["sources"].get(name) or facts["sources"][kind]
        python = sys.executable if kind == "ours" else options.oracle_python
        task = {"candidate": name, "source": source, "threads": options.threads, "context": context}
        workers[name] = Worker(SCRIPT, python, task)
        opened[name] = workers[name].answer()
        if "failed" in opened[name]:
            progress(f"{name}: {opened[name]['failed']}")
            workers.pop(name).close()
    for i in range(-1, options.rounds):
        ids = random_tokens(options.prefill, facts["vocabulary"], seed=i + 1)
        for name, worker in workers.items():
            touch_memory(1_000_000_000)
            prefill = worker.ask("prefill", ids=ids)["ms"]
            decode = worker.ask("decode", ids=ids[:DECODE_AFTER], steps=STEPS)["ms"]
            if i >= 0:  # the first round warms up
                samples[name]["prefill"].append(prefill)
                samples[name]["decode"].append(decode)
        progress(f"round {i + 1} of {options.rounds}")
    for worker in workers.values():
        worker.close()
    return samples, opened


def tables(samples: Samples, opened: dict[str, Any]) -> list[Table]:
    medians = {
        name: {measure: median(values) for measure, values in found.items()}
        for name, found in samples.items()
    }
    rows = []
    for name, found in samples.items():
        held = opened[name].get("bytes")
        rows.append(
            (
                CANDIDATES[name].label,
                "" if held is None else f"{held / 1e6:.0f}",
                f"{medians[name]['prefill']:.0f}",
                f"{spread(found['prefill']):.0%}",
                f"{medians[name]['decode']:.1f}",
                f"{spread(found['decode']):.0%}",
            )
        )
    header = "", "weights MB", "prefill ms", "spread", "decode ms", "spread"

    def ratio(measure: str, other: str, own: str) -> float | None:
        """How many times faster `own` is than `other`."""
        known = other in medians and own in medians
        return medians[other][measure] / medians[own][measure] if known else None

    def of_float32(name: str) -> float | None:
        known = name in opened and "float32" in opened
        return opened[name]["bytes"] / opened["float32"]["bytes"] if known else None

    targets = [
        ("W8A8 decode / float32", ratio("decode", "float32", "W8A8"), "at least", 2.5),
        ("W8A8 decode / llama.cpp Q8_0", ratio("decode", "llama.cpp Q8_0", "W8A8"), "at least", 1.0),
        ("W8A8 prefill / float32", ratio("prefill", "float32", "W8A8"), "at least", 1.8),
        ("W8A8 prefill / llama.cpp Q8_0", ratio("prefill", "llama.cpp Q8_0", "W8A8"), "at least", 3.0),
        ("W4A16g64 decode / W8A16", ratio("decode", "W8A16", "W4A16g64"), "at least", 1.0),
        ("W8A8 weights of float32", of_float32("W8A8"), "at most", 0.27),
        ("W4A16g64 weights of float32", of_float32("W4A16g64"), "at most", 0.16),
    ]
    return [Table("Quantized weights", header, rows), targets_table(targets)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--candidates", nargs="+", choices=list(CANDIDATES), default=list(CANDIDATES))
    parser.add_argument("--oracle-python", default=sys.executable, help="Python with llama_cpp and torch")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the prefill")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.prefill = 1, 128
        options.candidates = [name for name in options.candidates if CANDIDATES[name].kind == "ours"]
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        samples, opened = measured(options, prepared(options, folder))
    versions = {key: value for each in opened.values() for key, value in each.get("versions", {}).items()}
    lines = [machine_line(), ", ".join(f"{key} {value}" for key, value in versions.items())]
    save_json(options.json, {"lines": lines, "samples": samples, "opened": opened})
    show(lines, tables(samples, opened), options.markdown)


if __name__ == "__main__":
    main()
