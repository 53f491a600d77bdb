"""Greedy speculative decoding compared with ordinary decoding, on a repetitive text and on prose.

The candidates alternate in every round, and medians are reported; all generate the same text. README.md
explains the output.

    python benchmarks/bench_speculative.py --json speculative.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
from machine import Table, median, progress

import einsum_transformer as et
from einsum_transformer.engine import blas

TEXTS = {
    "repetitive": "name,colour\n" + 2 * "apple,red\nbanana,yellow\nplum,blue\n" + "apple,red\n",
    "prose": "The old lighthouse keeper climbed the stairs slowly, because",
}
CANDIDATES: dict[str, dict[str, Any]] = {
    "step by step": {},
    "look-up, 4 drafts": {"prompt_lookup": 3, "num_draft_tokens": 4},
    "look-up, 8 drafts": {"prompt_lookup": 3, "num_draft_tokens": 8},
    "first 20 layers, 3 drafts": {"draft_layers": 20, "num_draft_tokens": 3},
}


def bench(model: et.Model, text: str, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """For each candidate, the seconds of every round and the statistics of speculation."""
    found: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in CANDIDATES}
    for number in range(options.rounds + 1):
        for name, settings in CANDIDATES.items():
            progress(f"round {number} of {options.rounds}: {name}")
            start = time.perf_counter()
            result = et.generate(
                model, text, max_new_tokens=options.new, temperature=0, ignore_eos=True, **settings
            )
            if number:  # round 0 is a warm-up
                found[name]["seconds"].append(time.perf_counter() - start)
            found[name]["speculation"], found[name]["text"] = result.speculation, result.text
    return found


def table(name: str, found: dict[str, dict[str, Any]], new: int) -> Table:
    plain = median(found["step by step"]["seconds"])
    lines = []
    for candidate, numbers in found.items():
        seconds, counts = median(numbers["seconds"]), numbers["speculation"]
        share = f"{100 * sum(counts['accepted']) / max(sum(counts['drafted']), 1):.0f} %" if counts else "-"
        rounds = f"{counts['tokens_per_round']:.2f}" if counts else "1"
        same = "yes" if numbers["text"] == found["step by step"]["text"] else "no"
        speed = f"{new / seconds:.1f}", f"{plain / seconds:.2f}x"
        lines.append((candidate, *speed, share, rounds, same))
    header = ("", "tokens/s", "speed-up", "drafts accepted", "tokens per check", "same text")
    return Table(name, header, lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="smollm2-135m", help="any source of et.load (%(default)s)")
    add("--new", type=int, default=128, help="tokens to generate (%(default)s)")
    add("--rounds", type=int, default=5, help="measured rounds (%(default)s)")
    add("--threads", type=int, default=2, help="BLAS threads (%(default)s)")
    add("--quick", action="store_true", help="smoke test: few tokens, one round")
    add("--json", type=Path, metavar="FILE", help="write all results")
    add("--markdown", action="store_true", help="print the tables as Markdown")
    options = parser.parse_args(arguments)
    if options.quick:
        options.new, options.rounds = 16, 1
    return options


def main() -> None:
    options = parse()
    blas.set_threads(options.threads)
    model = et.load(options.model)
    found = {name: bench(model, text, options) for name, text in TEXTS.items()}
    setting = f"{options.model}, {options.new} tokens, greedy; {options.threads} threads"
    lines = [machine.machine_line(), f"{setting}; medians of {options.rounds} rounds"]
    machine.show(lines, [table(name, each, options.new) for name, each in found.items()], options.markdown)
    machine.save_json(options.json, {"machine": machine.describe(), "found": found})


if __name__ == "__main__":
    main()
