"""A training step on one Ray worker and on several, each with one BLAS thread; the weights are random.

The runs alternate in every round, and medians are reported. README.md explains the output.

    python benchmarks/bench_ray.py --json ray.json
"""

from __future__ import annotations

import argparse
import os
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import machine
from machine import Table, median, progress

LORA_TARGETS = ("q_proj", "v_proj")
PHASES = ("share", "workers", "sum", "clipping", "update")
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True, slots=True)
class Case:
    """A run: the number of workers, the trained weights, and whether the optimizer's state is sharded."""

    name: str
    workers: int
    lora: bool
    shard_optimizer: bool = False


def cases(workers: int) -> list[Case]:
    """Runs that train all weights and runs that train adapters; the baseline of each comes first."""
    many = f"{workers} workers"
    return [
        Case("all weights, 1 worker", 1, lora=False),
        Case(f"all weights, {many}", workers, lora=False),
        Case(f"all weights, {many}, sharded state", workers, lora=False, shard_optimizer=True),
        Case("LoRA, 1 worker", 1, lora=True),
        Case(f"LoRA, {many}", workers, lora=True),
    ]


def trainer(case: Case, options: argparse.Namespace, stack: ExitStack) -> Any:
    """The Trainer of a run with started workers, which the stack ends."""
    import einsum_transformer as et
    from einsum_transformer.cluster.data_parallel import RayWorkers
    from einsum_transformer.models.adapters import with_lora
    from einsum_transformer.models.lora_config import LoRAConfig
    from einsum_transformer.training.data import RandomTokens
    from einsum_transformer.training.loop import Trainer, TrainingSettings
    from einsum_transformer.training.optimizers import AdamW
    from einsum_transformer.training.schedule import Schedule

    model = et.load(options.config)
    if case.lora:
        model = with_lora(model, LoRAConfig(8, target_modules=LORA_TARGETS))
    batches = RandomTokens(model.config.vocab_size, options.batch_size, options.seq_len)
    start = RayWorkers(case.workers, threads=case.workers, shard_optimizer=case.shard_optimizer).compute()
    return Trainer(
        model,
        batches,
        TrainingSettings(Schedule(1e-4, 1), AdamW()),
        lambda model, settings: stack.enter_context(start(model, settings)),
    )


def measure(options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Case -> phase of a step -> milliseconds of every round."""
    from einsum_transformer.cluster.pool import Connection
    from einsum_transformer.engine import Recorder, blas

    samples: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with ExitStack() as stack:
        wanted = cases(options.workers)
        connection = Connection(None, sum(case.workers for case in wanted), options.store_bytes)
        stack.callback(connection.close)
        started = []
        for case in wanted:
            progress(f"starting {case.name}")
            started.append((case, trainer(case, options, stack)))
        # Round 0 is a warm-up.
        for number in range(options.rounds + 1):
            progress("warm-up" if number == 0 else f"round {number} of {options.rounds}")
            first = number % len(started)
            for case, training in started[first:] + started[:first]:
                # The driver's threads under `train --ray-workers N --threads N`, used while workers wait.
                blas.set_threads(case.workers)
                with Recorder() as recorder:
                    seconds = training.step().seconds
                if number == 0:
                    continue
                samples[case.name]["step"].append(seconds * 1e3)
                for name in PHASES:
                    spent = sum(span.seconds for span in recorder.spans if span.path == (name,))
                    samples[case.name][name].append(spent * 1e3)
    return samples


def medians(samples: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    return {case: {part: median(values) for part, values in parts.items()} for case, parts in samples.items()}


def table(options: argparse.Namespace, samples: dict[str, dict[str, list[float]]]) -> Table:
    found, tokens = medians(samples), options.batch_size * options.seq_len
    wanted = cases(options.workers)
    baseline = {case.lora: found[case.name]["step"] for case in wanted if case.workers == 1}
    rows = []
    for case in wanted:
        times = found[case.name]
        cells = [f"{times['step']:.1f}", f"{tokens / times['step'] * 1e3:.0f}"]
        cells += [f"{times[name]:.1f}" for name in PHASES]
        rows.append((case.name, *cells, f"{baseline[case.lora] / times['step']:.2f}x"))
    return Table("A training step", ("", "ms", "tokens/s", *PHASES, "1 worker / this"), rows)


def notes(options: argparse.Namespace, samples: dict[str, dict[str, list[float]]]) -> list[str]:
    spreads = [machine.spread(parts["step"]) for parts in samples.values()]
    return [
        machine.machine_line(),
        f"{options.config.name}, random weights; {options.batch_size} x {options.seq_len} tokens; AdamW",
        f"Ray {version('ray')}, NumPy {version('numpy')}; one BLAS thread per worker, the sum of them in "
        "the driver",
        f"medians of {options.rounds} rounds; range of the rounds: at most {max(spreads):.0%} of the median",
    ]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", type=Path, default=ROOT / "configs/fast_lora.json", help="default: %(default)s")
    add("--workers", type=int, default=os.cpu_count() or 2, help="default: one per core, %(default)s")
    add("--batch-size", type=int, default=8, metavar="N", help="rows per step (default: %(default)s)")
    add("--seq-len", type=int, default=128, metavar="N", help="tokens per row (default: %(default)s)")
    add("--rounds", type=int, default=7, help="measured rounds, after a warm-up (default: %(default)s)")
    add("--store-bytes", type=int, default=1 << 31, help="size of Ray's object store (default: %(default)s)")
    add("--quick", action="store_true", help="smoke test: one short round, meaningless timings")
    add("--json", type=Path, metavar="FILE", help="write settings and every sample")
    add("--markdown", action="store_true", help="print the table as Markdown")
    options = parser.parse_args(arguments)
    if options.workers < 2:
        parser.error("--workers: at least 2 is expected")
    if options.quick:
        options.batch_size, options.seq_len, options.rounds = options.workers, 8, 1
    return options


def main() -> None:
    options = parse()
    samples = measure(options)
    machine.show(notes(options, samples), [table(options, samples)], options.markdown)
    settings = {key: str(value) for key, value in vars(options).items() if key != "json"}
    found = {"machine": machine.describe(), "settings": settings, "medians": medians(samples)}
    machine.save_json(options.json, found | {"samples": samples})


if __name__ == "__main__":
    main()
