"""Prefill, decode and training steps while other processes use the processor.

The load is a number of processes that each run a loop on one core. This script starts them before each
measurement and ends them after it; a process also ends by itself after a minute. README.md explains the
output.

    python benchmarks/bench_busy.py --oracle-python other/bin/python --json busy.json
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import checkouts
import machine
import train_workers
import workers
from bench_generate import DECODE_AFTER
from machine import Table, median, progress
from processes import PREFIX, ROOT, Worker
from workers import random_tokens

LOOP = "import time\nend = time.monotonic() + 60\nwhile time.monotonic() < end:\n    pass"
SETTLE = 0.5
"""Seconds between the start of the load and the measurement."""
MEASURES = ("decode", "prefill", "train all weights", "train LoRA")
ADAPTER = {"train all weights": False, "train LoRA": True}
TRAINED_BY = {"numpy": "numpy", "mkl": "mkl", "auto": "auto", "transformers": "torch"}
"""Candidate of bench_generate.py -> the same library in bench_train.py."""
TARGET = 1.15
"""Maximum of our time / transformers' under the same load."""


@dataclass(slots=True)
class Run:
    """The settings and results: samples[measure, processes][candidate] is a list with a value per round."""

    options: argparse.Namespace
    candidates: dict[str, workers.Candidate]
    left_out: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    samples: defaultdict[tuple[str, int], dict[str, list[float]]] = field(
        default_factory=lambda: defaultdict(dict)
    )

    def median(self, measure: str, processes: int, candidate: str) -> float | None:
        values = self.samples[measure, processes].get(candidate)
        return median(values) if values else None


@contextmanager
def load(processes: int) -> Iterator[None]:
    """Run a number of busy processes."""
    started = [subprocess.Popen([sys.executable, "-c", LOOP]) for _ in range(processes)]
    try:
        if started:
            time.sleep(SETTLE)
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def measure(run: Run) -> None:
    """Fill `run`: prepare the files, start the workers, and run all rounds."""
    options = run.options
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        progress("preparing the model's files")
        inference = {"model_name": options.model, "folder": folder, "lengths": []}
        training = {"models": {"model": {"source": options.model}}, "folder": folder}
        training |= {"batch_size": options.batch_size, "seq_len": options.seq_len}
        facts = [
            answer_once(script.__file__, options.ours_python, {"prepare": task})
            for script, task in ((workers, inference), (train_workers, training))
        ]
        started = dict(start(run, facts))
        if not started:
            raise SystemExit("no candidate can run: see the reasons above")
        try:
            for number in range(-1, options.rounds):
                progress("warm-up" if number < 0 else f"round {number + 1} of {options.rounds}")
                one_round(run, started, number, facts[0]["vocabulary"])
        finally:
            for worker in started.values():
                worker.close()


def answer_once(script: str, python: str, task: dict[str, Any]) -> dict[str, Any]:
    worker = Worker(script, python, task, ROOT)
    answer = worker.answer()
    worker.close()
    if "failed" in answer:
        raise SystemExit(f"{python}: einsum_transformer: {answer['failed']}")
    return answer


def start(run: Run, facts: Sequence[dict[str, Any]]) -> Iterator[tuple[tuple[str, str], Worker]]:
    """Yield ((candidate, kind), worker) of those that can run; kind: "" for inference, or a measure."""
    inference, training = facts[0]["sources"], facts[1]["model"]
    options = run.options
    for name, candidate in run.candidates.items():
        python = options.ours_python if candidate.checkout else options.oracle_python
        common = {"candidate": name, "threads": options.threads}
        own = common | {"source": inference.get(candidate.sources[0]), "context": options.length + 256}
        tasks = {"": (workers, own)} if own["source"] else {}
        known = TRAINED_BY.get(name.removeprefix(PREFIX))
        for measure, adapter in ADAPTER.items():
            if known is not None and measure in options.measures:
                prefix = PREFIX if name.startswith(PREFIX) else ""
                source = {"source": training["source"], "adapter": training["adapter"] if adapter else None}
                tasks[measure] = (train_workers, common | {"candidate": prefix + known} | source)
        for kind, (script, task) in tasks.items():
            worker = Worker(script.__file__, python, task, candidate.checkout)
            first = worker.answer()
            if "failed" in first:
                run.left_out[candidate.label] = first["failed"]
                progress(f"skipped: {candidate.label}: {first['failed']}")
                worker.close()
                continue
            run.versions |= {} if name.startswith(PREFIX) else first["versions"]
            yield (name, kind), worker


def one_round(run: Run, started: dict[tuple[str, str], Worker], number: int, vocabulary: int) -> None:
    """Every measure under every load for every candidate, whose order rotates with the round."""
    options, names = run.options, list(run.candidates)
    names = names[number % len(names) :] + names[: number % len(names)]
    ids = random_tokens(options.length, vocabulary, seed=number)
    rng = random.Random(number)
    rows = [rng.choices(range(vocabulary), k=options.seq_len + 1) for _ in range(options.batch_size)]
    for measure in options.measures:
        for processes in options.processes:
            for name in names:
                worker = started.get((name, measure if measure in ADAPTER else ""))
                if worker is None:
                    continue
                with load(processes):
                    if measure == "decode":
                        answer = worker.ask("decode", ids=ids[:DECODE_AFTER], steps=options.steps)
                    elif measure == "prefill":
                        answer = worker.ask("prefill", ids=ids)
                    else:
                        answer = worker.ask("step", rows=rows)
                if number >= 0:
                    run.samples[measure, processes].setdefault(name, []).append(answer["ms"])


def reference(run: Run) -> str:
    return "transformers" if "transformers" in run.candidates else next(iter(run.candidates))


def tables(run: Run) -> list[Table]:
    options, found = run.options, []
    header = ["", *(_processes(count) for count in options.processes)]
    for measure in options.measures:
        rows = []
        for name, candidate in run.candidates.items():
            cells = []
            for count in options.processes:
                ms, base = (run.median(measure, count, each) for each in (name, reference(run)))
                ratio = f" ({ms / base:.2f}x)" if ms and base else ""
                cells.append(f"{ms:.1f}{ratio}" if ms else "-")
            if any(cell != "-" for cell in cells):
                rows.append((candidate.label, *cells))
        title = f"{measure}, ms (this / {run.candidates[reference(run)].label})"
        found.append(Table(title[0].upper() + title[1:], header, rows))
    if options.against:
        found.append(checkouts.table(options.against, against_rows(run)))
    return [*found, machine.targets_table(targets(run))]


def _processes(count: int) -> str:
    return "alone" if count == 0 else f"{count} busy process{'es' if count > 1 else ''}"


def against_rows(run: Run) -> Iterator[tuple[str, Sequence[float], Sequence[float]]]:
    """(measure, load and candidate; our samples; samples of the other checkout)."""
    for (measure, count), by_name in run.samples.items():
        for name in by_name:
            if PREFIX + name in by_name:
                label = run.candidates[name].label.removeprefix("ours, ")
                row = f"{measure} ms, {_processes(count)}: {label}"
                yield row, by_name[name], by_name[PREFIX + name]


def targets(run: Run) -> Iterator[tuple[str, float | None, str, float]]:
    """(measure and load, our time / transformers', "at most", maximum)."""
    for (measure, count), by_name in run.samples.items():
        ours = [median(by_name[name]) for name in ("numpy", "mkl", "auto") if name in by_name]
        base = by_name.get("transformers")
        ratio = min(ours) / median(base) if ours and base else None
        if count >= run.options.threads:
            yield f"{measure}, {_processes(count)}: ours / transformers", ratio, "at most", TARGET


def notes(run: Run) -> Iterator[str]:
    options = run.options
    yield machine.machine_line()
    training = f"training steps of SGD on {options.batch_size} x {options.seq_len} tokens"
    yield f"model {options.model}; {options.threads} threads; prefill of {options.length} tokens; {training}"
    yield ", ".join(f"{name} {version}" for name, version in run.versions.items())
    spread = median(
        [machine.spread(values) for by_name in run.samples.values() for values in by_name.values()]
    )
    yield f"medians of {options.rounds} rounds; range of the rounds: {spread:.0%} of the median"
    for name, reason in run.left_out.items():
        yield f"skipped: {name}: {reason}"


def result(run: Run) -> dict[str, Any]:
    """The settings, results and samples for --json."""
    hidden = ("ours_python", "oracle_python", "json", "against")
    settings = {key: value for key, value in vars(run.options).items() if key not in hidden}
    return {
        "machine": machine.describe(),
        "settings": settings,
        "versions": run.versions,
        "left_out": run.left_out,
        "targets": [dict(zip(("what", "measured", "bound", "target"), target)) for target in targets(run)],
        "samples": {
            f"{measure}, {_processes(count)}": each for (measure, count), each in run.samples.items()
        },
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    ours, oracle = (
        "Python with the dependencies of this package",
        "Python with transformers, torch and llama_cpp",
    )
    add("--ours-python", default=sys.executable, metavar="EXE", help=f"{ours} (default: the current one)")
    add("--oracle-python", default=sys.executable, metavar="EXE", help=f"{oracle} (default: the current one)")
    add("--model", default="smollm2-135m", help="any source of et.load (default: %(default)s)")
    known = workers.CANDIDATES
    usual = [name for name in known if name not in ("numpy", "mkl")]
    chosen = f"default: {' '.join(usual)}; numpy and mkl do not follow the load"
    add("--candidates", nargs="+", choices=known, default=usual, help=chosen)
    add("--measures", nargs="+", choices=MEASURES, default=list(MEASURES), help="default: all")
    counts = "numbers of busy processes (default: 0 1 2)"
    add("--processes", nargs="+", type=int, default=[0, 1, 2], metavar="N", help=counts)
    checkouts.add_option(parser)
    add("--length", type=int, default=512, help="tokens of the prefill (default: %(default)s)")
    add("--steps", type=int, default=128, help="decode steps (default: %(default)s)")
    add("--batch-size", type=int, default=4, help="rows of a training step (default: %(default)s)")
    add("--seq-len", type=int, default=128, help="tokens of a row (default: %(default)s)")
    add("--rounds", type=int, default=5, help="measured rounds, after a warm-up (default: %(default)s)")
    add("--threads", type=int, default=2, help="threads of every candidate (default: %(default)s)")
    add("--quick", action="store_true", help="smoke test: one round with tiny sizes, meaningless timings")
    add("--json", type=Path, metavar="FILE", help="write settings, versions and every sample")
    add("--markdown", action="store_true", help="print the tables as Markdown")
    options = parser.parse_args(arguments)
    if options.quick:
        options.length, options.steps, options.rounds = 16, 2, 1
        options.batch_size, options.seq_len, options.processes = 1, 16, [0, 1]
    return options


def main() -> None:
    options = parse()
    chosen = {name: known for name, known in workers.CANDIDATES.items() if name in options.candidates}
    run = Run(options, checkouts.with_other(chosen, options.against))
    measure(run)
    machine.show(list(notes(run)), tables(run), options.markdown)
    machine.save_json(options.json, result(run))


if __name__ == "__main__":
    main()
