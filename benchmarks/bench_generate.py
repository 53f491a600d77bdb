"""Prefill, decode, cold start and memory of this package, transformers and llama.cpp on one model.

Each candidate runs in a separate process, optionally with another Python. The candidates run one at a time
and alternate in every round; medians are reported. README.md explains the output.

    python benchmarks/bench_generate.py --oracle-python other/bin/python --json generate.json
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import checkouts
import machine
import workers
from machine import Table, median, progress
from processes import PAUSE, PREFIX, ROOT, Worker
from workers import CANDIDATES, Candidate, random_tokens

PROMPT = "The capital of France is"
DECODE_AFTER = 128
ROWS = 8
MEMORY_TOKENS = 512
SOURCES = {"safetensors": "safetensors", "default": "the original file", "gguf": "float32 GGUF"}


@dataclass(slots=True)
class Run:
    """The settings and results of a run: samples[measure][candidate] is a list with a value per round."""

    options: argparse.Namespace
    candidates: dict[str, Candidate]
    facts: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    agreement: dict[str, Any] = field(default_factory=dict)
    samples: defaultdict[str, defaultdict[str, list[float]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )

    def medians(self, measure: str) -> dict[str, float]:
        """Candidate -> median, in the order of `candidates`."""
        order = [*self.candidates, "NumPy"]
        names = sorted(self.samples[measure], key=lambda name: order.index(name.split()[0]))
        return {name: median(self.samples[measure][name]) for name in names}

    def best(self, measure: str) -> float | None:
        """The largest sample of all candidates, an estimate of the machine's limit."""
        return max((max(values) for values in self.samples[measure].values()), default=None)


def task(run: Run, candidate: str, source: str, context: int) -> tuple[str, dict[str, Any]]:
    """(Python executable, task) of a worker."""
    options = run.options
    python = options.ours_python if run.candidates[candidate].checkout else options.oracle_python
    settings = {"candidate": candidate, "threads": options.threads, "context": context}
    return python, settings | {"source": run.facts["sources"][source]}


def measure(run: Run) -> None:
    """Fill `run`: prepare the files, start the workers, and run all rounds."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        progress("preparing the model's files")
        model = {"model_name": run.options.model, "folder": folder, "lengths": run.options.lengths}
        preparation = Worker(workers.__file__, run.options.ours_python, {"prepare": model}, ROOT)
        run.facts = preparation.answer()
        preparation.close()
        if "failed" in run.facts:
            raise SystemExit(f"{run.options.ours_python}: einsum_transformer: {run.facts['failed']}")
        started = start_workers(run)
        try:
            # Round 0 warms up caches, files and clocks.
            for number in range(run.options.rounds + 1):
                progress("warm-up" if number == 0 else f"round {number} of {run.options.rounds}")
                one_round(run, started, number)
        finally:
            for worker in started.values():
                worker.close()


def start_workers(run: Run) -> dict[str, Worker]:
    """Start the workers of the candidates that can run; `run.left_out` gets the reasons of the others."""
    started: dict[str, Worker] = {}
    context = max(*run.options.lengths, DECODE_AFTER) + run.options.steps + 8
    for name, candidate in run.candidates.items():
        source = candidate.sources[0]
        if source not in run.facts["sources"]:
            run.left_out[name] = f"{run.options.model} is not a {source} file"
            continue
        worker = Worker(workers.__file__, *task(run, name, source, context), candidate.checkout)
        first = worker.answer()
        if "failed" in first:
            run.left_out[name] = first["failed"]
            worker.close()
            continue
        # Another checkout uses the same NumPy and BLAS, and its version is part of its name.
        run.versions |= {} if name.startswith(PREFIX) else first["versions"]
        started[name] = worker
    for name, reason in run.left_out.items():
        progress(f"skipped: {label(run, name)}: {reason}")
    if not started:
        raise SystemExit("no candidate can run: see the reasons above")
    return started


def one_round(run: Run, started: dict[str, Worker], number: int) -> None:
    """Every measure once for every candidate; the order of the candidates rotates with the round."""

    def add(measure: str, candidate: str, value: float | None) -> None:
        if number and value is not None:
            run.samples[measure][candidate].append(value)

    options, vocabulary = run.options, run.facts["vocabulary"]
    names = list(started)
    names = names[number % len(names) :] + names[: number % len(names)]
    for name in names:
        add("sgemm GFLOP/s", name, started[name].ask("sgemm", size=options.sgemm_size))
    for name in [name for name in names if run.candidates[name].checkout == ROOT][:1]:
        add("stream GB/s", "NumPy", started[name].ask("stream", size=options.stream_bytes))
    for length in options.lengths:
        ids = random_tokens(length, vocabulary, seed=number)
        for name in names:
            answer = started[name].ask("prefill", ids=ids)
            add(f"prefill {length} ms", name, answer["ms"])
            record_tokens(run, f"prefill {length}", number, name, answer["token"])
    ids = random_tokens(DECODE_AFTER, vocabulary, seed=number)
    for name in names:
        answer = started[name].ask("decode", ids=ids, steps=options.steps)
        add("decode ms", name, answer["ms"])
        record_tokens(run, "decode", number, name, answer["tokens"])
    rows = [random_tokens(DECODE_AFTER, vocabulary, seed=row) for row in range(ROWS)]
    for name in names:
        if run.candidates[name].checkout:
            add("decode of 8 rows ms", name, started[name].ask("rows", rows=rows, steps=options.steps))
    for name in names:
        for source in run.candidates[name].sources:
            seconds, peak = fresh_process(run, name, source, number)
            add("first token s", f"{name} {source}", seconds)
            add("peak bytes", f"{name} {source}", peak)


def record_tokens(run: Run, measure: str, number: int, candidate: str, tokens: Any) -> None:
    """Store the tokens of a candidate, to check that all candidates compute the same model."""
    run.agreement.setdefault(f"{measure} round {number}", {})[candidate] = tokens


def fresh_process(run: Run, candidate: str, source: str, number: int) -> tuple[float, float | None]:
    """(seconds from the start of a process to its first token, its peak memory at the end)."""
    ids = random_tokens(run.options.memory_tokens, run.facts["vocabulary"])
    python, settings = task(run, candidate, source, run.options.memory_tokens + run.options.steps + 8)
    machine.touch_memory()
    time.sleep(PAUSE)
    start = time.perf_counter()
    worker = Worker(
        workers.__file__,
        python,
        settings | {"fresh": {"prompt": PROMPT, "ids": ids, "steps": run.options.steps}},
        run.candidates[candidate].checkout,
    )
    first = worker.answer()
    seconds = time.perf_counter() - start
    if "failed" in first:
        raise SystemExit(f"{label(run, candidate)} from {source}: {first['failed']}")
    record_tokens(run, "first token", number, f"{candidate} {source}", first["token"])
    peak = worker.answer()["peak_bytes"]
    worker.close()
    return seconds, peak


def label(run: Run, candidate: str) -> str:
    """The name of a candidate in the tables, with its source if `candidate` contains one."""
    name, _, source = candidate.partition(" ")
    known = run.candidates[name].label if name in run.candidates else name
    return known + (f", from {SOURCES[source]}" if source else "")


def ratio(run: Run, measure: str, candidate: str) -> float | None:
    """The speed-up over transformers (ratio of medians); None if one of the two was not measured."""
    medians = run.medians(measure)
    reference = medians.get("transformers", medians.get("transformers safetensors"))
    return reference / medians[candidate] if reference and candidate in medians else None


def shown(value: float | None, pattern: str) -> str:
    return "-" if value is None else pattern.format(value)


def tables(run: Run) -> list[Table]:
    found = [limits_table(run), prefill_table(run), decode_table(run), rows_table(run), fresh_table(run)]
    if run.options.against:
        found.append(checkouts.table(run.options.against, against_rows(run)))
    return [*found, machine.targets_table(targets(run))]


def against_rows(run: Run) -> Iterator[tuple[str, list[float], list[float]]]:
    """(measure and candidate, our samples, samples of the other checkout on the same BLAS)."""
    for measure, by_name in run.samples.items():
        if "/s" in measure:  # a limit of the machine, the same for both checkouts
            continue
        unit, shown_measure = (1e6, "peak MB") if measure == "peak bytes" else (1, measure)
        for name in run.medians(measure):
            if PREFIX + name in by_name:
                row = f"{shown_measure}: {label(run, name).removeprefix('ours, ')}"
                ours, theirs = ([value / unit for value in by_name[each]] for each in (name, PREFIX + name))
                yield row, ours, theirs


def limits_table(run: Run) -> Table:
    rows = []
    for measure in ("sgemm GFLOP/s", "stream GB/s"):
        limit, unit = measure.split()
        for name, middle in run.medians(measure).items():
            best = max(run.samples[measure][name])
            rows.append((f"{limit}, {label(run, name)}", f"{middle:.1f}", f"{best:.1f}", unit))
    return Table("Limits of the machine measured in this run", ("", "median", "best", "unit"), rows)


def prefill_table(run: Run) -> Table:
    rows, peak = [], run.best("sgemm GFLOP/s")
    for length in run.options.lengths:
        for name, ms in run.medians(f"prefill {length} ms").items():
            rate = run.facts["flops"][str(length)] / ms / 1e6
            share = None if peak is None else rate / peak
            against = ratio(run, f"prefill {length} ms", name)
            cells = f"{length}", f"{ms:.1f}", f"{length / ms * 1e3:.0f}", f"{rate:.1f}"
            rows.append((label(run, name), *cells, shown(share, "{:.0%}"), shown(against, "{:.2f}x")))
    header = ("", "tokens", "ms", "tokens/s", "GFLOP/s", "of best sgemm", "transformers / this")
    return Table("Prefill", header, rows)


def decode_share(run: Run, candidate: str) -> float | None:
    """Bytes of weights read per second, relative to the best stream bandwidth of this run."""
    ms, stream = run.medians("decode ms").get(candidate), run.best("stream GB/s")
    return run.facts["bytes_per_token"] / ms / 1e6 / stream if ms and stream else None


def decode_table(run: Run) -> Table:
    rows = []
    for name, ms in run.medians("decode ms").items():
        rate = run.facts["bytes_per_token"] / ms / 1e6
        share, against = decode_share(run, name), ratio(run, "decode ms", name)
        cells = f"{ms:.2f}", f"{1e3 / ms:.1f}", f"{rate:.1f}"
        rows.append((label(run, name), *cells, shown(share, "{:.0%}"), shown(against, "{:.2f}x")))
    header = ("", "ms/token", "tokens/s", "GB/s", "of stream", "transformers / this")
    return Table(f"Decode after {DECODE_AFTER} tokens", header, rows)


def rows_gain(run: Run, candidate: str) -> float | None:
    """Tokens per second of a batch, relative to one row."""
    one, several = (run.medians(measure).get(candidate) for measure in ("decode ms", "decode of 8 rows ms"))
    return ROWS * one / several if one and several else None


def rows_table(run: Run) -> Table:
    rows = []
    for name, ms in run.medians("decode of 8 rows ms").items():
        cells = f"{ms:.2f}", f"{ROWS * 1e3 / ms:.1f}", shown(rows_gain(run, name), "{:.2f}x")
        rows.append((label(run, name), *cells))
    header = ("", "ms/step", "tokens/s", "of one row")
    return Table(f"Decode of {ROWS} rows at once", header, rows)


def fresh_table(run: Run) -> Table:
    rows, peaks = [], run.medians("peak bytes")
    for name, seconds in run.medians("first token s").items():
        against, peak = ratio(run, "first token s", name), peaks.get(name)
        times = None if peak is None else peak / run.facts["weight_bytes"]
        memory = shown(None if peak is None else peak / 1e6, "{:.0f}"), shown(times, "{:.2f}x")
        rows.append((label(run, name), f"{seconds:.2f}", shown(against, "{:.2f}x"), *memory))
    header = ("", "first token s", "transformers / this", "peak MB", "of float32 weights")
    return Table("A fresh process", header, rows)


def targets(run: Run) -> list[tuple[str, float | None, str, float]]:
    """(name, measured value, "at least" or "at most", target)."""
    found: list[tuple[str, float | None, str, float]] = []

    def faster(values: Callable[[str], float | None]) -> float | None:
        """The largest value of our candidates."""
        ours = map(values, ("numpy", "mkl", "auto"))
        return max((value for value in ours if value is not None), default=None)

    for length in run.options.lengths:
        measure = f"prefill {length} ms"
        best = faster(lambda name, measure=measure: ratio(run, measure, name))
        found.append((f"prefill {length}: transformers / ours, fastest", best, "at least", 1.0))
        own = ratio(run, measure, "numpy")
        found.append((f"prefill {length}: transformers / ours, NumPy's BLAS", own, "at least", 0.9))
    best = faster(lambda name: ratio(run, "decode ms", name))
    found.append(("decode: transformers / ours, fastest", best, "at least", 1.5))
    medians = run.medians("decode ms")
    share = faster(lambda name: decode_share(run, name))
    found.append(("decode: share of stream bandwidth, fastest", share, "at least", 0.7))
    llama = medians.get("llama.cpp")
    best = faster(lambda name: llama / medians[name] if llama and name in medians else None)
    found.append(("decode: llama.cpp / ours, fastest", best, "at least", 0.95))
    found.append(
        ("decode of 8 rows: tokens/s of one row", faster(lambda name: rows_gain(run, name)), "at least", 3.0)
    )
    for source in CANDIDATES["numpy"].sources:
        where = SOURCES[source]
        cold = faster(lambda name, source=source: ratio(run, "first token s", f"{name} {source}"))
        found.append((f"first token: transformers / ours, from {where}", cold, "at least", 5.0))
        seconds = [run.medians("first token s").get(f"{name} {source}") for name in ("numpy", "mkl", "auto")]
        least = min((each for each in seconds if each is not None), default=None)
        found.append((f"first token: seconds, from {where}", least, "at most", 1.0))
        peaks = [run.medians("peak bytes").get(f"{name} {source}") for name in ("numpy", "auto")]
        peak = next((each for each in peaks if each is not None), None)
        times = None if peak is None else peak / run.facts["weight_bytes"]
        found.append((f"peak memory: times float32 weights, from {where}", times, "at most", 1.25))
    return found


def notes(run: Run) -> Iterator[str]:
    options = run.options
    yield machine.machine_line()
    weights = f"float32 weights {run.facts['weight_bytes'] / 1e6:.0f} MB"
    yield f"model {options.model}, {weights}; {options.threads} threads"
    yield ", ".join(f"{name} {version}" for name, version in run.versions.items())
    yield f"medians of {options.rounds} rounds; {widest_spread(run)}"
    same = sum(
        all(tokens == first for tokens in each) for first, *each in map(_answers, run.agreement.values())
    )
    yield f"all candidates chose the same tokens in {same} of {len(run.agreement)} measurements"
    for name, reason in run.left_out.items():
        yield f"skipped: {label(run, name)}: {reason}"


def _answers(by_candidate: dict[str, Any]) -> list[Any]:
    return list(by_candidate.values())


def widest_spread(run: Run) -> str:
    """The spread of the rounds; a difference of two medians that is smaller is not significant."""
    spreads = {}
    for measure, by_name in run.samples.items():
        for name, values in by_name.items():
            spreads[f"{measure.rsplit(' ', 1)[0]}, {label(run, name)}"] = machine.spread(values)
    typical, where = median(list(spreads.values())), max(spreads, key=spreads.__getitem__)
    return f"range of the rounds: {typical:.0%} of the median, at most {spreads[where]:.0%} ({where})"


def result(run: Run) -> dict[str, Any]:
    """The settings, results and samples for --json."""
    settings = {
        key: str(value) if isinstance(value, Path) else value for key, value in vars(run.options).items()
    }
    facts = {key: value for key, value in run.facts.items() if key != "sources"}
    named = ("what", "measured", "bound", "target")
    return {
        "machine": machine.describe(),
        "settings": {
            key: value
            for key, value in settings.items()
            if not key.endswith("python") and key not in ("json", "against")
        },
        "candidates": {name: known.label for name, known in run.candidates.items()},
        "versions": run.versions,
        "left_out": run.left_out,
        "model": facts,
        "medians": {measure: run.medians(measure) for measure in run.samples},
        "targets": [dict(zip(named, target)) for target in targets(run)],
        "samples": run.samples,
        "tokens": run.agreement,
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--ours-python",
        default=sys.executable,
        metavar="EXE",
        help="Python with the dependencies of this package (default: the current one)",
    )
    add(
        "--oracle-python",
        default=sys.executable,
        metavar="EXE",
        help="Python with transformers, torch and llama_cpp (default: the current one)",
    )
    add("--model", default="smollm2-135m", help="any source of et.load (default: %(default)s)")
    add(
        "--candidates",
        nargs="+",
        choices=CANDIDATES,
        default=list(CANDIDATES),
        help="default: all installed ones",
    )
    add(
        "--lengths",
        nargs="+",
        type=int,
        default=[128, 512, 2048],
        metavar="N",
        help="prompt lengths of the prefill",
    )
    checkouts.add_option(parser)
    add("--steps", type=int, default=128, help="decode steps per round (default: %(default)s)")
    add("--rounds", type=int, default=5, help="measured rounds, after a warm-up (default: %(default)s)")
    add("--threads", type=int, default=2, help="threads of every candidate (default: %(default)s)")
    add(
        "--quick",
        action="store_true",
        help="smoke test: one round with tiny sizes, meaningless timings",
    )
    add("--json", type=Path, metavar="FILE", help="write settings, versions and every sample")
    add("--markdown", action="store_true", help="print the tables as Markdown")
    options = parser.parse_args(arguments)
    options.memory_tokens, options.sgemm_size, options.stream_bytes = (
        MEMORY_TOKENS,
        machine.SGEMM_SIZE,
        machine.STREAM_BYTES,
    )
    if options.quick:
        options.lengths, options.steps, options.rounds = [8, 16], 2, 1
        options.memory_tokens, options.sgemm_size, options.stream_bytes = 16, 128, 4_000_000
    return options


def main() -> None:
    options = parse()
    chosen = {name: CANDIDATES[name] for name in CANDIDATES if name in options.candidates}
    run = Run(options, checkouts.with_other(chosen, options.against))
    measure(run)
    machine.show(list(notes(run)), tables(run), options.markdown)
    machine.save_json(options.json, result(run))


if __name__ == "__main__":
    main()
