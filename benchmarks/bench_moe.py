"""A mixture of experts compared with a dense feed-forward layer of equal FLOPs.

The dense layer is as wide as the selected experts of a token together. The cost of a mixture of experts must
follow the routed tokens, not the number of experts. The candidates alternate in every round, and medians are
reported. README.md explains the output.

    python benchmarks/bench_moe.py --json moe.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Imported before NumPy, so that idle OpenBLAS threads do not spin.
import einsum_transformer  # noqa: F401

import machine  # isort: skip
import numpy as np
from machine import Table, median, progress

from einsum_transformer.components.gated_mlp import GatedMLP
from einsum_transformer.components.moe import MoE, Routing
from einsum_transformer.engine import blas

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class Row:
    """Medians in milliseconds for one number of experts and tokens."""

    experts: int
    tokens: int
    moe: float
    dense: float
    moe_backward: float
    dense_backward: float
    gflops: float
    """GFLOP/s of the forward pass of the dense layer."""


def values(*shape: int) -> Array:
    return np.random.default_rng(shape).standard_normal(shape, dtype=np.float32) * np.float32(0.02)


def mlp(model: int, hidden: int) -> GatedMLP:
    return GatedMLP(values(hidden, model), values(hidden, model), values(model, hidden))


def timed(task: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = task()
    return 1e3 * (time.perf_counter() - start), result


def bench(experts: int, tokens: int, options: argparse.Namespace) -> Row:
    model, hidden, top_k = options.model, options.hidden, options.top_k
    parts = tuple(mlp(model, hidden) for _ in range(experts))
    candidates = MoE(values(experts, model) * 50, parts, routing=Routing(top_k)), mlp(model, top_k * hidden)
    x = values(model, tokens).T.reshape(1, tokens, model)  # the memory layout of a projection's output
    dy = values(model, tokens).T.reshape(1, tokens, model)
    samples: dict[tuple[int, str], list[float]] = {}
    for _ in range(options.rounds + 1):
        for i, candidate in enumerate(candidates):
            ms, (_, saved) = timed(lambda candidate=candidate: candidate.forward(x))
            samples.setdefault((i, "forward"), []).append(ms)
            ms, _ = timed(lambda candidate=candidate, saved=saved: candidate.backward(dy, saved))
            samples.setdefault((i, "backward"), []).append(ms)
    medians = {key: median(found[1:]) for key, found in samples.items()}
    flops = 6 * model * hidden * top_k * tokens
    return Row(
        experts,
        tokens,
        medians[0, "forward"],
        medians[1, "forward"],
        medians[0, "backward"],
        medians[1, "backward"],
        flops / medians[1, "forward"] / 1e6,
    )


def table(rows: Sequence[Row]) -> Table:
    header = ("", "MoE ms", "dense ms", "MoE / dense", "dense GFLOP/s", "backward ms", "dense ms", "ratio")
    lines = [
        (
            f"{row.experts} experts, {row.tokens} tokens",
            f"{row.moe:.2f}",
            f"{row.dense:.2f}",
            f"{row.moe / row.dense:.2f}x",
            f"{row.gflops:.0f}",
            f"{row.moe_backward:.2f}",
            f"{row.dense_backward:.2f}",
            f"{row.moe_backward / row.dense_backward:.2f}x",
        )
        for row in rows
    ]
    return Table("forward and backward of one layer", header, lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--experts", nargs="+", type=int, default=[16, 64, 128], metavar="N", help="numbers of experts")
    add("--top-k", type=int, default=8, help="experts per token (%(default)s)")
    add("--model", type=int, default=1024, help="model size (%(default)s)")
    add("--hidden", type=int, default=512, help="hidden size of an expert (%(default)s)")
    add("--tokens", nargs="+", type=int, default=[1, 128, 512, 2048], metavar="N", help="tokens of a pass")
    add("--rounds", type=int, default=7, help="measured rounds (%(default)s)")
    add("--threads", type=int, default=2, help="BLAS threads (%(default)s)")
    add("--quick", action="store_true", help="smoke test: few tokens, one round")
    add("--json", type=Path, metavar="FILE", help="write all results")
    add("--markdown", action="store_true", help="print the tables as Markdown")
    options = parser.parse_args(arguments)
    if options.quick:
        options.experts, options.tokens, options.rounds = [16], [1, 32], 1
    return options


def main() -> None:
    options = parse()
    blas.set_threads(options.threads)
    rows = []
    for experts in options.experts:
        for tokens in options.tokens:
            progress(f"{experts} experts, {tokens} tokens")
            rows.append(bench(experts, tokens, options))
    setting = f"model {options.model}, {options.top_k} experts of {options.hidden} for each token"
    lines = [
        machine.machine_line(),
        f"{setting}; {options.threads} threads; medians of {options.rounds} rounds",
    ]
    machine.show(lines, [table(rows)], options.markdown)
    result = {"machine": machine.describe(), "rows": [asdict(row) for row in rows]}
    machine.save_json(options.json, result)


if __name__ == "__main__":
    main()
