"""What it costs to capture the output of one layer, beside a plain pass of SmolLM2 over 512 tokens.

Passes without a recorder, with a recorder that reads nothing, with the output of one layer, and with the
attention weights of one layer alternate over the rounds; medians are reported. Memory is the peak of NumPy's
allocations (tracemalloc), measured in a pass of its own.

    python benchmarks/bench_capture.py --markdown
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
from machine import Table, machine_line, median, progress, save_json, show

import einsum_transformer as et
from einsum_transformer.engine import Recorder

TOKENS = 512


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="a smoke test; its figures have no meaning")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE", dest="json_file", help="all samples")
    given = parser.parse_args()
    model = et.load("fast_lora" if given.quick else "smollm2-135m")
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, TOKENS))

    def plain() -> None:
        model.decoder.forward(tokens, None, "last")

    def recorded() -> None:
        with Recorder(spans=False):
            plain()

    candidates: dict[str, Callable[[], object]] = {
        "a plain pass": plain,
        "a recorder without readers": recorded,
        "the output of layer 7": lambda: et.capture(model, tokens, "layers.7"),
        "the attention weights of layer 7": lambda: et.capture(model, tokens, "layers.7.self_attn.pattern"),
    }
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for i in range(given.rounds):
        progress(f"round {i + 1}")
        for name, run in candidates.items():
            run()
            start = time.perf_counter()
            run()
            samples[name].append(time.perf_counter() - start)
    first, memory = samples["a plain pass"], {name: peak(run) for name, run in candidates.items()}
    rows = []
    for name, seconds in samples.items():
        ratio = median([own / other for own, other in zip(seconds, first)])
        extra = memory[name] - memory["a plain pass"]
        rows.append([name, f"{1e3 * median(seconds):.1f}", f"{ratio:.3f}", f"{extra / 1e6:.2f}"])
    headings = ["", "ms", "of a plain pass", "MB more than a plain pass"]
    note = f"one array (t d) has {4e-6 * TOKENS * model.config.hidden_size:.2f} MB"
    show([machine_line(), note], [Table("Capturing a value", headings, rows)], given.markdown)
    save_json(given.json_file, {"samples": samples, "peaks": memory})


def peak(run: Callable[[], object]) -> int:
    """The most bytes that are allocated during a call, its result included."""
    run()
    tracemalloc.start()
    kept = run()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    del kept
    return most


if __name__ == "__main__":
    main()
