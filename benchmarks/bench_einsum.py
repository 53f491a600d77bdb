"""The einsum equations of a model: this package's einsum, np.einsum with and without optimize, and np.matmul.

The calls are recorded from one layer of the model (forward with a cache, forward and backward without one),
so equations, shapes and memory layouts are realistic. README.md explains the output.

    python benchmarks/bench_einsum.py --json einsum.json
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine
import numpy as np
from machine import Table, median, progress

import einsum_transformer as et
from einsum_transformer.engine import Equation, blas, weight_grad

Array = np.ndarray
Task = Callable[[], Any]

CACHED = 128
FIRST_GUESS = 1e9
"""Assumed FLOP/s of plain np.einsum for an equation that is not yet measured with fewer tokens."""


@dataclass(frozen=True, slots=True)
class Call:
    """A recorded call of einsum or weight_grad, with shapes and strides of its operands, the weight last."""

    function: Callable[..., Array]
    equation: str
    layouts: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    options: dict[str, Any]

    @property
    def flops(self) -> int:
        equation = Equation.parse(self.equation)
        return equation.flops(equation.sizes([shape for shape, _ in self.layouts[: len(equation.inputs)]]))

    def operands(self) -> list[Array]:
        """Random float32 arrays with the recorded shapes and strides."""
        rng = np.random.default_rng(0)
        arrays = []
        for shape, strides in self.layouts:
            span = sum((n - 1) * stride for n, stride in zip(shape, strides)) // 4 + 1
            memory = rng.random(span, dtype=np.float32)
            arrays.append(np.lib.stride_tricks.as_strided(memory, shape, strides))
        return arrays


@dataclass(frozen=True, slots=True)
class Row:
    """Median microseconds of one equation by candidate; None if it was skipped or does not apply."""

    tokens: int
    equation: str
    flops: int
    ours: float
    plain: float | None
    optimized: float
    bare: float | None

    @property
    def ratio(self) -> float:
        return self.optimized / self.ours


def weight_grad_of_last(equation: str, *operands: Array) -> Array:
    """weight_grad with the weight as its last argument."""
    *others, weight = operands
    return weight_grad(weight, equation, *others)


@contextmanager
def recording() -> Iterator[list[Call]]:
    """Record every einsum and weight_grad call of the components within the context."""
    calls: list[Call] = []
    originals = []

    def spy(function: Callable[..., Array]) -> Callable[..., Array]:
        def recorded(*arguments: Any, **options: Any) -> Array:
            if all(each is not None for each in arguments):  # the weight is None for a missing bias
                before = int(function is weight_grad)
                replayed = weight_grad_of_last if before else function
                operands = (*arguments[before + 1 :], *arguments[:before])
                layouts = tuple((operand.shape, operand.strides) for operand in operands)
                calls.append(Call(replayed, arguments[before], layouts, options))
            return function(*arguments, **options)

        return recorded

    for name, module in list(sys.modules.items()):
        if name.startswith("einsum_transformer.components."):
            for function in ("einsum", "weight_grad"):
                if function in vars(module):
                    originals.append((module, function, vars(module)[function]))
                    setattr(module, function, spy(vars(module)[function]))
    try:
        yield calls
    finally:
        for module, name, function in originals:
            setattr(module, name, function)


def calls_of(model: et.Model, count: int) -> list[Call]:
    """The calls of a pass over `count` tokens, each equation once, in the size with the most FLOPs.

    Fewer than 128 tokens are a decoding step after 128 cached tokens.
    """
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, count))
    cache = model.cache()
    if count < CACHED:
        model.decoder.forward(np.zeros((1, CACHED), int), cache, "none")
    # On one thread, because the list of calls is not thread-safe.
    blas.set_threads(1)
    with recording() as calls:
        model.decoder.forward(tokens, cache, "last")
        logits, saved = model.decoder.forward(tokens, keep=True)
        model.decoder.backward(logits, saved)
    largest: dict[tuple[str, Any], Call] = {}
    for call in calls:
        previous = largest.setdefault((call.equation, call.function), call)
        if call.flops > previous.flops:
            largest[call.equation, call.function] = call
    return list(largest.values())


def bare_products(text: str, operands: Sequence[Array]) -> list[Task]:
    """np.matmul on prepared views or copies, in both operand orders; empty if it is not a matrix product."""
    equation = Equation.parse(text)
    if len(equation.inputs) != 2:
        return []
    left, right = equation.inputs
    batch = [letter for letter in equation.output if letter in left and letter in right]
    inner = [letter for letter in left if letter in right and letter not in equation.output]
    rows, columns = (
        [letter for letter in term if letter not in other] for term, other in ((left, right), (right, left))
    )
    if not inner or not rows + columns:
        return []
    size = equation.sizes([operand.shape for operand in operands])

    def matrix(term: str, operand: Array, groups: Sequence[list[str]]) -> Array:
        order = [letter for group in groups for letter in group]
        shape = [math.prod(size[letter] for letter in group) for group in groups]
        view = operand.transpose([term.index(letter) for letter in order])
        view = view.reshape(shape[1:] if shape[0] == 1 else shape)
        return view if operand.itemsize in view.strides[-2:] else np.ascontiguousarray(view)

    a, b = (
        matrix(left, operands[0], (batch, rows, inner)),
        matrix(right, operands[1], (batch, inner, columns)),
    )
    flipped = functools.partial(np.matmul, b.swapaxes(-1, -2), a.swapaxes(-1, -2))
    return [functools.partial(np.matmul, a, b), flipped]


def repeated(task: Task, number: int) -> float:
    """The mean time of `number` consecutive calls, in microseconds."""
    start = time.perf_counter()
    for _ in range(number):
        task()
    return (time.perf_counter() - start) / number * 1e6


def in_turns(tasks: dict[str, Task], rounds: int, seconds: float) -> dict[str, float]:
    """Name -> median microseconds; the tasks alternate, `seconds` each, and their order rotates."""
    numbers = {}
    for name, task in tasks.items():
        task()
        numbers[name] = max(1, int(seconds * 1e6 / max(repeated(task, 1), 0.1)))
    samples: dict[str, list[float]] = {name: [] for name in tasks}
    names = list(tasks)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            samples[name].append(repeated(tasks[name], numbers[name]))
    return {name: median(values) for name, values in samples.items()}


def bench(call: Call, tokens: int, rates: dict[str, float], options: argparse.Namespace) -> Row:
    """Measure one equation with all candidates; updates `rates`, equation -> FLOP/s of plain np.einsum."""
    operands = call.operands()
    inputs = operands[: call.equation.partition("->")[0].count(",") + 1]
    tasks: dict[str, Task] = {
        "ours": functools.partial(call.function, call.equation, *operands, **call.options),
        "optimized": functools.partial(np.einsum, call.equation, *inputs, optimize=True),
    }
    check(call.equation, tasks)
    if call.flops / rates.get(call.equation, FIRST_GUESS) <= options.plain_limit:
        tasks["plain"] = functools.partial(np.einsum, call.equation, *inputs)
    bare = bare_products(call.equation, inputs)
    tasks |= {f"bare {i}": task for i, task in enumerate(bare)}
    medians = in_turns(tasks, options.rounds, options.turn)
    plain = medians.get("plain")
    if plain is not None:
        rates[call.equation] = call.flops / plain * 1e6
    fastest = min((medians[f"bare {i}"] for i in range(len(bare))), default=None)
    return Row(tokens, call.equation, call.flops, medians["ours"], plain, medians["optimized"], fastest)


def check(equation: str, tasks: dict[str, Task]) -> None:
    """Compare the result with that of np.einsum; exits with an error if they differ."""
    expected, got = tasks["optimized"](), tasks["ours"]()
    error = np.linalg.norm((got - expected).ravel()) / np.linalg.norm(expected.ravel())
    if not error < 1e-4:
        raise SystemExit(f"{equation}: differs from np.einsum by {error:.1e}")


def overhead(options: argparse.Namespace) -> dict[str, float]:
    """Microseconds of a tiny product: by einsum with a cached plan, and by np.matmul alone."""
    x, weight = np.ones((1, 1, 16), np.float32), np.ones((16, 16), np.float32)
    row = x.reshape(1, 16)
    tasks: dict[str, Task] = {
        "ours": functools.partial(et.einsum, "btd,fd->btf", x, weight),
        "bare": functools.partial(np.matmul, row, weight.T),
    }
    return in_turns(tasks, options.rounds, options.turn)


def micros(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}" if abs(value) < 100 else f"{value:.0f}"


def table(tokens: int, rows: Sequence[Row]) -> Table:
    lines = []
    for row in rows:
        plain = "skipped" if row.plain is None else micros(row.plain)
        over = None if row.bare is None else row.ours - row.bare
        rate = f"{row.flops / row.ours / 1e3:.1f}"
        times = micros(row.ours), rate, plain, micros(row.optimized), f"{row.ratio:.2f}x"
        lines.append((row.equation, *times, micros(row.bare), micros(over)))
    header = (
        "",
        "ours us",
        "GFLOP/s",
        "np.einsum us",
        "optimize us",
        "optimize / ours",
        "matmul us",
        "over matmul us",
    )
    return Table(f"{tokens} token{'s' if tokens > 1 else ''}", header, lines)


def summary(rows: Sequence[Row], tiny: dict[str, float], options: argparse.Namespace) -> Iterator[str]:
    provider = blas.current()
    yield machine.machine_line()
    yield f"numpy {np.__version__}, {provider}; {options.threads} threads; medians of {options.rounds} rounds"
    worst = min(rows, key=lambda row: row.ratio)
    mean = math.exp(sum(math.log(row.ratio) for row in rows) / len(rows))
    where = f"({worst.equation} at {worst.tokens} tokens)"
    yield f"np.einsum(optimize=True) / ours: worst {worst.ratio:.2f}x {where}, geometric mean {mean:.2f}x"
    parts = f"einsum {tiny['ours']:.2f} us, np.matmul alone {tiny['bare']:.2f} us"
    yield f"overhead of einsum: {tiny['ours'] - tiny['bare']:.2f} us per call ({parts})"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--model",
        default="smollm2-135m",
        help="the model to record: any source of et.load (%(default)s)",
    )
    add("--tokens", nargs="+", type=int, default=[1, 8, 128, 512, 2048], metavar="N", help="tokens of a pass")
    add("--rounds", type=int, default=5, help="measured rounds (default: %(default)s)")
    add("--threads", type=int, default=2, help="BLAS threads (default: %(default)s)")
    add(
        "--plain-limit",
        type=float,
        default=2.0,
        metavar="S",
        help="skip plain np.einsum if it takes longer (%(default)s s)",
    )
    add("--quick", action="store_true", help="smoke test: few tokens, one short round")
    add("--json", type=Path, metavar="FILE", help="write all results")
    add("--markdown", action="store_true", help="print the tables as Markdown")
    options = parser.parse_args(arguments)
    options.turn = 0.02
    if options.quick:
        options.tokens, options.rounds, options.plain_limit, options.turn = [1, 8], 1, 0.01, 0.0
    return options


def main() -> None:
    options = parse()
    model = et.load(options.model, max_layers=1)
    rates: dict[str, float] = {}
    rows: list[Row] = []
    for tokens in options.tokens:
        calls = calls_of(model, tokens)
        blas.set_threads(options.threads)
        for i, call in enumerate(calls, 1):
            progress(f"{tokens} tokens, {i} of {len(calls)}: {call.equation}")
            rows.append(bench(call, tokens, rates, options))
    tiny = overhead(options)
    tables = [table(tokens, [row for row in rows if row.tokens == tokens]) for tokens in options.tokens]
    machine.show(list(summary(rows, tiny, options)), tables, options.markdown)
    result = {"machine": machine.describe(), "numpy": np.__version__, "blas": str(blas.current())}
    settings = {"model": options.model, "threads": options.threads, "rounds": options.rounds}
    numbers = [{name: getattr(row, name) for name in Row.__slots__} for row in rows]
    machine.save_json(options.json, result | settings | {"microseconds": numbers, "overhead": tiny})


if __name__ == "__main__":
    main()
