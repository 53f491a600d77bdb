"""Seconds and memory that `et.plan` predicts, beside those of a run.

The rates of the machine are measured first. Prefill, decode steps and training steps of SmolLM2 alternate
over the rounds; medians are reported. Memory is the peak of NumPy's allocations (tracemalloc), measured in a
pass of its own.

    python benchmarks/bench_plan.py --markdown
"""

from __future__ import annotations

import argparse
import gc
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from machine import Table, machine_line, median, progress, save_json, show

import einsum_transformer as et
from einsum_transformer.generation.rows import prefill
from einsum_transformer.training.loop import Trainer

LENGTHS = (32, 128, 512, 2048)
TRAININGS = ((4, 128), (1, 512))
SCHEMES = (None, "W8A8")


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a smoke test; its figures have no meaning")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE", dest="json_file", help="all samples")
    given = parser.parse_args()
    et.machine()
    lengths, trainings = ((16,), ((1, 16),)) if given.quick else (LENGTHS, TRAININGS)
    runs: dict[str, tuple[float, Callable[[], float], float, Callable[[], int]]] = {}
    for scheme in SCHEMES:
        model = et.load("fast_lora" if given.quick else "smollm2-135m", quantization=scheme)
        for tokens in lengths:
            runs |= inference(model, scheme, tokens)
    model = et.load("fast_lora" if given.quick else "smollm2-135m")
    for rows, tokens in trainings:
        runs |= training(model, rows, tokens)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(given.rounds):
        for name, (_, run, _, _) in runs.items():
            progress(f"round {i + 1}: {name}")
            samples[name].append(run())
    rows: list[list[str]] = []
    for name, (seconds, _, nbytes, memory) in runs.items():
        measured, held = median(samples[name]), memory()
        ratios = f"{seconds / measured:.2f}", f"{nbytes / held:.2f}" if held > 1e6 else ""
        sizes = [f"{amount / 1e6:.1f}" for amount in (nbytes, held)]
        rows.append([name, f"{1e3 * seconds:.1f}", f"{1e3 * measured:.1f}", ratios[0], *sizes, ratios[1]])
    headings = ["", "predicted ms", "measured ms", "ratio", "predicted MB", "measured MB", "ratio"]
    table = Table("Predicted and measured", headings, rows)
    show([machine_line()], [table], given.markdown)
    save_json(given.json_file, {"samples": samples})


def inference(model: et.Model, scheme: str | None, tokens: int) -> dict[str, Any]:
    """Predictions and runs of a prefill and of a decode step after it."""
    plan = et.plan(model, 1, tokens, quantization=scheme)
    prompt = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, tokens))
    cache = model.cache(tokens + 64, horizon=tokens + 64)

    def run_prefill() -> float:
        seconds = 0.0
        for _ in range(2):  # the first one touches memory that other runs have freed
            cache.truncate(0)
            seconds = timed(lambda: prefill(model, prompt, cache))
        return seconds

    def run_decode() -> float:
        cache.truncate(0)
        prefill(model, prompt, cache)
        steps = [timed(lambda: model.decoder.forward(prompt[:, :1], cache)) for _ in range(48)]
        return median(steps[24:])  # those that are replayed

    def of(run: Callable[[], float]) -> Callable[[], int]:
        return lambda: peak(run)

    name = scheme or "float32"
    first, second = plan.phase("prefill"), plan.phase("decode")
    return {
        f"prefill {tokens}, {name}": (first.seconds, run_prefill, first.peak_bytes, of(run_prefill)),
        f"decode after {tokens}, {name}": (second.seconds, run_decode, second.peak_bytes, lambda: 0),
    }


def training(model: et.Model, rows: int, tokens: int) -> dict[str, Any]:
    """Prediction and run of a training step of all weights by SGD."""
    plan = et.plan(model, rows, tokens, optimizer="sgd")
    batches = et.RandomTokens(model.config.vocab_size, rows, tokens)
    trainer = Trainer(model, batches, et.TrainingSettings(et.Schedule(1e-6, 100)))

    def run() -> float:
        return timed(trainer.step)

    expected = plan.phase("training")
    return {f"training {rows} x {tokens}": (expected.seconds, run, expected.peak_bytes, lambda: peak(run))}


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak(run: Callable[[], object]) -> int:
    """The most bytes that NumPy allocates during a run."""
    gc.collect()
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


if __name__ == "__main__":
    main()
