"""A training step of all weights and of LoRA adapters, compared with transformers and peft on PyTorch.

Each candidate runs each kind of training in a separate process. The processes run one at a time and alternate
in every round; medians are reported. README.md explains the output.

    python benchmarks/bench_train.py --oracle-python other/bin/python --json train.json
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import checkouts
import machine
import train_workers
from machine import Table, median, progress
from processes import PREFIX, ROOT, Worker
from train_workers import CANDIDATES, Candidate

KINDS = {"full": "all weights", "lora": "LoRA"}
REFERENCE = "torch"
# minimum of torch / ours by kind of training, for the first model, and for the small one
TARGETS = {"full": 1.0, "lora": 1.15}
SMALL = 0.95
# maximum of our peak memory / torch's
MEMORY = 0.65

Key = tuple[str, str, str]
"""(model, kind, candidate)"""


@dataclass(slots=True)
class Run:
    """The settings and results of a run."""

    options: argparse.Namespace
    candidates: dict[str, Candidate]
    models: dict[str, dict[str, Any]]
    facts: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    sgemm: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    ms: dict[Key, list[float]] = field(default_factory=dict)
    losses: dict[Key, list[float]] = field(default_factory=dict)
    peaks: dict[Key, int | None] = field(default_factory=dict)

    def faster(self, key: Key) -> float | None:
        """The speed-up over torch, as the median ratio over the rounds."""
        reference = self.ms.get((*key[:2], REFERENCE))
        return median([theirs / own for theirs, own in zip(reference, self.ms[key])]) if reference else None

    def best_sgemm(self) -> float:
        return max(max(values) for values in self.sgemm.values())


def measure(run: Run) -> None:
    """Fill `run`: prepare the files, start the processes, and run all rounds."""
    options = run.options
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        progress("preparing the models' files")
        sizes = {"batch_size": options.batch_size, "seq_len": options.seq_len}
        task = {"prepare": {"folder": folder, "models": run.models} | sizes}
        preparation = Worker(train_workers.__file__, options.ours_python, task, ROOT)
        run.facts = preparation.answer()
        preparation.close()
        if "failed" in run.facts:
            raise SystemExit(f"{options.ours_python}: einsum_transformer: {run.facts['failed']}")
        started = start(run)
        try:
            # Warm-up rounds (torch needs three) are not timed, but their losses are compared.
            for number in range(-options.warm_up, options.rounds):
                progress(f"warm-up {-number}" if number < 0 else f"round {number + 1} of {options.rounds}")
                one_round(run, started, number)
            run.peaks = {key: worker.ask("peak") for key, worker in started.items()}
        finally:
            for worker in started.values():
                worker.close()


def start(run: Run) -> dict[Key, Worker]:
    """Start the processes of the candidates that can run; `run.left_out` gets the reasons of the others."""
    started: dict[Key, Worker] = {}
    for model, facts in run.facts.items():
        for kind in KINDS:
            for name, known in run.candidates.items():
                python = run.options.ours_python if known.checkout else run.options.oracle_python
                task = {"candidate": name, "source": facts["source"], "threads": run.options.threads}
                task["adapter"] = facts["adapter"] if kind == "lora" else None
                worker = Worker(train_workers.__file__, python, task, known.checkout)
                first = worker.answer()
                if "failed" in first:
                    run.left_out[f"{known.label}, {KINDS[kind]}"] = first["failed"]
                    worker.close()
                    continue
                # Another checkout uses the same NumPy and BLAS, and its version is part of its name.
                run.versions |= {} if name.startswith(PREFIX) else first["versions"]
                started[model, kind, name] = worker
    for name, reason in run.left_out.items():
        progress(f"skipped: {name}: {reason}")
    if not started:
        raise SystemExit("no candidate can run: see the reasons above")
    return started


def one_round(run: Run, started: dict[Key, Worker], number: int) -> None:
    """A step of every candidate; the order of the candidates rotates with the round."""
    options, names = run.options, list(run.candidates)
    first = number % len(names)
    names = names[first:] + names[:first]
    for name in names:
        worker = next((worker for key, worker in started.items() if key[2] == name), None)
        if worker is not None:
            run.sgemm[name].append(worker.ask("sgemm", size=options.sgemm_size))
    for model, facts in run.facts.items():
        rng = random.Random(number)
        rows = [
            rng.choices(range(facts["vocabulary"]), k=options.seq_len + 1) for _ in range(options.batch_size)
        ]
        for kind in KINDS:
            for key in ((model, kind, name) for name in names if (model, kind, name) in started):
                answer = started[key].ask("step", rows=rows)
                run.losses.setdefault(key, []).append(answer["loss"])
                if number >= 0:
                    run.ms.setdefault(key, []).append(answer["ms"])


def shown(value: float | None, pattern: str) -> str:
    return "-" if value is None else pattern.format(value)


def in_order(run: Run) -> Iterator[Key]:
    for model in run.facts:
        for kind in KINDS:
            yield from ((model, kind, name) for name in run.candidates if (model, kind, name) in run.ms)


def tables(run: Run) -> list[Table]:
    found = [limits_table(run), steps_table(run)]
    if run.options.against:
        found.append(checkouts.table(run.options.against, against_rows(run)))
    return [*found, machine.targets_table(targets(run))]


def against_rows(run: Run) -> Iterator[tuple[str, Sequence[float], Sequence[float]]]:
    """(measure, model, kind and BLAS; our samples; samples of the other checkout)."""
    for key in in_order(run):
        model, kind, name = key
        other = model, kind, PREFIX + name
        if other in run.ms:
            where = f"{model}, {KINDS[kind]}: {run.candidates[name].label.removeprefix('ours, ')}"
            yield f"ms, {where}", run.ms[key], run.ms[other]
            own, theirs = run.peaks[key], run.peaks[other]
            if own and theirs:
                yield f"peak MB, {where}", [own / 1e6], [theirs / 1e6]


def limits_table(run: Run) -> Table:
    rows = [
        (f"sgemm, {known.label}", f"{median(run.sgemm[name]):.1f}", f"{max(run.sgemm[name]):.1f}")
        for name, known in run.candidates.items()
        if name in run.sgemm
    ]
    return Table("Limits of the machine measured in this run, GFLOP/s", ("", "median", "best"), rows)


def steps_table(run: Run) -> Table:
    rows, tokens = [], run.options.batch_size * run.options.seq_len
    for key in in_order(run):
        model, kind, name = key
        ms, peak = median(run.ms[key]), run.peaks[key]
        rate = run.facts[model]["flops"][kind] / ms / 1e6
        cells = f"{ms:.0f}", f"{tokens / ms * 1e3:.0f}", f"{rate:.1f}", f"{rate / run.best_sgemm():.0%}"
        memory = shown(None if peak is None else peak / 1e6, "{:.0f}")
        against = shown(run.faster(key), "{:.2f}x")
        rows.append((f"{model}, {KINDS[kind]}: {run.candidates[name].label}", *cells, memory, against))
    header = ("", "ms", "tokens/s", "GFLOP/s", "of best sgemm", "peak MB", "torch / this")
    return Table("A training step", header, rows)


def targets(run: Run) -> list[tuple[str, float | None, str, float]]:
    """(name, measured value, "at least" or "at most", target)."""
    found: list[tuple[str, float | None, str, float]] = []
    for i, model in enumerate(run.facts):
        for kind, target in TARGETS.items():
            ours = [name for name in ("numpy", "mkl", "auto") if (model, kind, name) in run.ms]
            ratios = [ratio for name in ours if (ratio := run.faster((model, kind, name))) is not None]
            what, best = f"{model}, {KINDS[kind]}", max(ratios, default=None)
            found.append((f"{what}: torch / ours, fastest", best, "at least", SMALL if i else target))
            peaks = [run.peaks.get((model, kind, name)) for name in ours[:1]]
            own, theirs = next(iter(peaks), None), run.peaks.get((model, kind, REFERENCE))
            share = own / theirs if own and theirs else None
            found.append((f"{what}: peak memory, ours / torch", share, "at most", MEMORY))
    return found


def notes(run: Run) -> Iterator[str]:
    options = run.options
    yield machine.machine_line()
    yield f"a step of SGD on {options.batch_size} x {options.seq_len} random tokens"
    yield f"LoRA: r 8 on {', '.join(train_workers.LORA_TARGETS)}; {options.threads} threads"
    yield ", ".join(f"{name} {version}" for name, version in run.versions.items())
    spreads = [machine.spread(values) for values in run.ms.values()]
    yield (
        f"medians of {options.rounds} rounds after {options.warm_up} warm-up rounds, ratios by round; "
        f"range of the rounds: {median(spreads):.0%} of the median, at most {max(spreads):.0%}"
    )
    yield from agreement(run)
    for name, reason in run.left_out.items():
        yield f"skipped: {name}: {reason}"


def agreement(run: Run) -> Iterator[str]:
    """The largest differences of the losses to torch and to the other checkout, which check that all
    candidates train the same model."""
    steps = run.options.warm_up + run.options.rounds
    for other in (REFERENCE, PREFIX):
        gaps = [
            abs(own - theirs)
            for (model, kind, name), losses in run.losses.items()
            if (reference := run.losses.get((model, kind, PREFIX + name if other == PREFIX else other)))
            for own, theirs in zip(losses, reference)
        ]
        if gaps:
            known = "torch" if other == REFERENCE else checkouts.name_of(run.options.against)
            yield f"losses of the {steps} steps differ from those of {known} by at most {max(gaps):.1e}"


def result(run: Run) -> dict[str, Any]:
    """The settings, results and samples for --json."""

    def named(by_key: dict[Key, Any]) -> dict[str, Any]:
        return {" ".join(key): value for key, value in by_key.items()}

    settings = ("batch_size", "seq_len", "rounds", "warm_up", "threads", "quick")
    columns = ("what", "measured", "bound", "target")
    return {
        "machine": machine.describe(),
        "settings": {name: getattr(run.options, name) for name in settings},
        "candidates": {name: known.label for name, known in run.candidates.items()},
        "versions": run.versions,
        "left_out": run.left_out,
        "flops": {model: facts["flops"] for model, facts in run.facts.items()},
        "medians": {name: median(values) for name, values in named(run.ms).items()},
        "targets": [dict(zip(columns, target)) for target in targets(run)],
        "sgemm": run.sgemm,
        "samples": named(run.ms),
        "losses": named(run.losses),
        "peak_bytes": named(run.peaks),
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    current = sys.executable
    add(
        "--ours-python",
        default=current,
        metavar="EXE",
        help="Python with the dependencies of this package (default: the current one)",
    )
    add("--oracle-python", default=current, metavar="EXE", help="Python with torch, transformers and peft")
    add("--model", default="smollm2-135m", help="any source of et.load (default: %(default)s)")
    add("--config", default=str(ROOT / "configs/fast_lora.json"), help="a small model (default: fast_lora)")
    add("--max-layers", type=int, default=4, metavar="N", help="its layers (default: %(default)s)")
    names = list(CANDIDATES)
    add("--candidates", nargs="+", choices=names, default=names, help="default: all installed ones")
    checkouts.add_option(parser)
    add("--batch-size", type=int, default=4, metavar="N", help="rows per step (default: %(default)s)")
    add("--seq-len", type=int, default=128, metavar="N", help="tokens per row (default: %(default)s)")
    add("--rounds", type=int, default=9, help="measured rounds (default: %(default)s)")
    add("--threads", type=int, default=2, help="threads of every candidate (default: %(default)s)")
    add("--quick", action="store_true", help="smoke test: one short round, meaningless timings")
    add("--json", type=Path, metavar="FILE", help="write settings, versions and every sample")
    add("--markdown", action="store_true", help="print the tables as Markdown")
    options = parser.parse_args(arguments)
    options.warm_up, options.sgemm_size = 3, machine.SGEMM_SIZE
    if options.quick:
        options.batch_size, options.seq_len, options.rounds = 2, 8, 1
        options.warm_up, options.sgemm_size = 1, 128
    return options


def main() -> None:
    options = parse()
    small = f"{Path(options.config).stem}, {options.max_layers} layers"
    truncated = {"source": options.config, "max_layers": options.max_layers}
    chosen = {name: CANDIDATES[name] for name in CANDIDATES if name in options.candidates}
    candidates = checkouts.with_other(chosen, options.against)
    run = Run(options, candidates, {options.model: {"source": options.model}, small: truncated})
    measure(run)
    machine.show(list(notes(run)), tables(run), options.markdown)
    machine.save_json(options.json, result(run))


if __name__ == "__main__":
    main()
