"""Rates of this machine, measured with the engine, and the time of a plan that follows from them.

Elementwise operations and attention tiles are measured alone. Products of weights are measured inside of
forward passes of two random models, because they are slower there than alone: other data is in the caches,
and the threads of the BLAS library sleep between products. The passes of the models give two equations

    seconds of the products = calls * overhead + operations / rate

for each number of rows, which determine overhead and rate.
"""

from __future__ import annotations

import math
import statistics
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any

import numpy as np

from einsum_transformer.analysis import dry_plan
from einsum_transformer.analysis.plan import Elementwise, Plan, PlanPhase, PlanStep
from einsum_transformer.engine import blas, einsum
from einsum_transformer.engine.replay import WARM_UP
from einsum_transformer.errors import InputError
from einsum_transformer.generation.rows import prefill
from einsum_transformer.loading import libraries
from einsum_transformer.loading.load import load
from einsum_transformer.models.model import Model
from einsum_transformer.models.ready import ready_config
from einsum_transformer.notes import note_once

Array = np.ndarray

ROWS = (1, 8, 32, 128, 512)
"""Rows of x for which products are measured; rates in between are interpolated."""
_MODELS = ((512, 20), (1024, 6))
"""Width and layers of the random models; their weights in 8 bits, 60 MB and more, are larger than caches."""
_SCHEMES = {"float32": None, "int8": "W8A8"}
STEPS = 2 * len(ROWS) + 1
"""Number of reports of progress."""
_SECONDS = 0.01
_ROUNDS = 5
_ELEMENTS = 1 << 19
"""Elements of the arrays of elementwise operations: about those of an activation of 512 tokens."""
_FUNCTIONS: dict[str, Callable[[Array, Array], object]] = {
    "multiply": lambda a, out: np.multiply(a, a, out=out),
    "divide": lambda a, out: np.divide(a, a, out=out),
    "exp": lambda a, out: np.exp(a, out=out),
    "sqrt": lambda a, out: np.sqrt(a, out=out),
    "tanh": lambda a, out: np.tanh(a, out=out),
    "copy": lambda a, out: np.copyto(out, a),
    "add.reduce": lambda a, out: np.add.reduce(a, axis=-1),
}
_LIKE = {"log": "exp", "power": "exp", "expm1": "exp", "log1p": "exp", "sin": "tanh", "cos": "tanh"}


@dataclass(frozen=True, slots=True)
class Product:
    """Products of weights, for one number of rows: seconds = overhead per call + operations / rate."""

    overhead: float
    rate: float


@dataclass(frozen=True, slots=True)
class Rates:
    """The measured rates."""

    threads: int
    bandwidth: float
    """Bytes per second of reading memory with all threads."""
    call: float
    """Seconds of an einsum call without work."""
    short_call: float
    """Seconds of an elementwise NumPy call without work."""
    products: Mapping[str, Mapping[int, Product]]
    """Type ("float32", "int8") -> rows -> products of weights, with all threads."""
    tile: float
    """Operations per second of the products of an attention tile, on one thread."""
    keys: float
    """Bytes per second of the keys and values that one query attends to, on one thread."""
    elements: Mapping[str, float]
    """NumPy function -> elements per second, on one thread."""

    @property
    def peak(self) -> float:
        """Operations per second of the fastest measured products of float32."""
        return max(found.rate for found in self.products["float32"].values())

    def of_step(self, step: PlanStep) -> float:
        """Return the seconds of a step in one layer."""
        if is_product(step):
            found = self.product(step.dtype, rows_of(step))
            return step.calls * found.overhead + step.flops / found.rate
        overhead = step.calls * self.call
        if {"t", "s", "h"} <= set(step.sizes):
            if step.sizes["t"] == 1:
                return overhead + (step.kv_bytes or step.activation_bytes) / self.keys
            return overhead + step.flops / (self.tile * (self.threads if step.calls > 1 else 1))
        # A sum, or a product with a number per row: an elementwise pass.
        return overhead + step.activation_bytes / 8 / self.elements["multiply"]

    def bound(self, step: PlanStep) -> str:
        """Return what bounds a step: "Python" if its calls take half of the time, "memory" if the rate is
        less than half of that of many rows, else "compute"."""
        seconds = self.of_step(step)
        if not is_product(step):
            tile = {"t", "s", "h"} <= set(step.sizes)
            work = "compute" if tile and step.calls > 1 else "memory"
            return "Python" if 2 * step.calls * self.call > seconds else work
        found, best = self.product(step.dtype, rows_of(step)), self.product(step.dtype, max(ROWS))
        if 2 * step.calls * found.overhead > seconds:
            return "Python"
        return "memory" if 2 * found.rate < best.rate else "compute"

    def product(self, dtype: str, rows: int) -> Product:
        """Return the products with so many rows, interpolated in the logarithm of the rows."""
        measured = self.products.get(dtype) or self.products["float32"]
        known = sorted(measured)
        i = bisect_left(known, rows)
        if i in (0, len(known)) or known[i] == rows:
            return measured[known[min(i, len(known) - 1)]]
        low, high = measured[known[i - 1]], measured[known[i]]
        share = math.log(rows / known[i - 1]) / math.log(known[i] / known[i - 1])
        overhead = (1 - share) * low.overhead + share * high.overhead
        return Product(overhead, low.rate ** (1 - share) * high.rate**share)

    def of_pass(self, each: Elementwise) -> float:
        """Return the seconds of elementwise operations in one layer."""
        name = each.function if each.function in self.elements else _LIKE.get(each.function, "multiply")
        if each.function.endswith(".reduce"):
            name = "add.reduce"
        divided = each.path[0] == "loss" or (each.path[-1] in ("scores", "mix") and each.calls > 4)
        threads = self.threads if divided else 1
        return each.calls * self.short_call + each.elements / self.elements[name] / threads

    def seconds(self, phase: PlanPhase) -> float:
        """Return the predicted seconds of a phase."""
        steps = sum(step.times * self.of_step(step) for step in phase.steps)
        return steps + sum(each.times * self.of_pass(each) for each in phase.elementwise)


def timed(plan: Plan, rates: Rates, machine: str) -> Plan:
    """Return the plan with predicted seconds."""

    def step(each: PlanStep) -> PlanStep:
        return replace(each, seconds=rates.of_step(each), bound=rates.bound(each))

    phases = tuple(
        replace(
            phase,
            steps=tuple(map(step, phase.steps)),
            elementwise=tuple(replace(each, seconds=rates.of_pass(each)) for each in phase.elementwise),
        )
        for phase in plan.phases
    )
    return replace(plan, phases=phases, machine=machine)


def is_product(step: PlanStep) -> bool:
    """Return whether a step is a product with a matrix of weights, or gives the gradient of one."""
    return _weight_size(step) > 1


def rows_of(step: PlanStep) -> int:
    """Return the rows that a matrix is multiplied with in one call."""
    return max(1, step.flops // (2 * step.calls * _weight_size(step)))


def _weight_size(step: PlanStep) -> int:
    """The elements of the matrix of a step, the operand or result without the letters of tokens; 1 if there
    is none."""
    inputs, _, output = step.equation.partition("->")
    terms = [term for term in (*inputs.split(","), output) if len(term) > 1 and not set(term) & set("bts")]
    return max((math.prod(step.sizes[letter] for letter in term) for term in terms), default=1)


def measure(
    threads: int, bandwidth: float, progress: Callable[[int, int], object] = lambda done, total: None
) -> Rates:
    """Measure the rates in about 20 seconds. bandwidth: bytes per second."""
    rng = np.random.default_rng(0)
    with blas.fixed_threads():
        with blas.one_thread():
            tile = _tile(rng)
        keys = _keys(rng)
        elements = {name: _elementwise(rng, run) for name, run in _FUNCTIONS.items()}
        one = np.ones((1, 1, 1), np.float32)
        call = _rate(lambda: einsum("btd,fd->btf", one, one[0]), 1)
        short = _rate(lambda: np.multiply(one, one, out=one), 1)
        free = Product(0.0, math.inf)
        known = Rates(threads, bandwidth, 1 / call, 1 / short, {"float32": {1: free}}, tile, keys, elements)
        products: dict[str, dict[int, Product]] = {}
        for i, (dtype, scheme) in enumerate(_SCHEMES.items()):
            models = [_model(width, layers, scheme) for width, layers in _MODELS]
            products[dtype] = {}
            for n, rows in enumerate(ROWS):
                progress(i * len(ROWS) + n + 1, STEPS)
                products[dtype][rows] = _solved(*(_pass(model, scheme, rows, known) for model in models))
                # A prefill ends with a product of one row: known from here on.
                known = replace(known, products={"float32": {1: products[dtype][1]}})
    progress(STEPS, STEPS)
    return replace(known, products=products)


def _model(width: int, layers: int, scheme: str | None) -> Model:
    """A model with random weights."""
    base = ready_config("fast_lora")
    assert base is not None
    heads = {"n_heads": width // 64, "n_kv_heads": width // 128}
    config = replace(base, d_model=width, n_layers=layers, d_ff=3 * width, use_lora=False, **heads)
    return load(config, quantization=scheme)


def _pass(model: Model, scheme: str | None, rows: int, known: Rates) -> tuple[int, int, float]:
    """Return calls, operations and seconds of the products with `rows` rows in a pass of a model."""
    plan = dry_plan.inference(model.config, scheme, rows if rows > 1 else 64)
    phase = plan["decode" if rows == 1 else "prefill"]
    products = [step for step in phase.steps if is_product(step) and rows_of(step) == rows]
    others = tuple(step for step in phase.steps if step not in products)
    calls = sum(step.times * step.calls for step in products)
    flops = sum(step.times * step.flops for step in products)
    rest = known.seconds(replace(phase, steps=others))
    return calls, flops, max(_seconds(model, rows) - rest, 0.1 * rest)


def _seconds(model: Model, rows: int) -> float:
    """The median seconds of a prefill of `rows` tokens, or of a decode step for one row."""
    tokens = np.arange(max(rows, 64))[None]
    cache = model.cache(640)
    if rows == 1:
        prefill(model, tokens, cache)
        for _ in range(WARM_UP + 8):  # two steps are traced, and one replay is checked
            model.decoder.forward(tokens[:, :1], cache)
    found: list[float] = []
    for _ in range(40 if rows <= 32 else _ROUNDS):
        if rows > 1:
            cache.truncate(0)
        start = time.perf_counter()
        if rows == 1:
            model.decoder.forward(tokens[:, :1], cache)
        else:
            prefill(model, tokens[:, :rows], cache)
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def _solved(small: tuple[int, int, float], large: tuple[int, int, float]) -> Product:
    """Overhead and rate from calls, operations and seconds of two models.

    An overhead below 0 is noise, and so is one of more than two thirds of the seconds."""
    (c1, f1, s1), (c2, f2, s2) = small, large
    determinant = c1 * f2 - c2 * f1
    overhead = (s1 * f2 - s2 * f1) / determinant if determinant else 0.0
    slope = (c1 * s2 - c2 * s1) / determinant if determinant else 0.0
    both = (s1 + s2) / (f1 + f2)
    if overhead < 0 or slope < both / 3:
        return Product(0.0, 1 / both)
    return Product(overhead, 1 / slope)


def _rate(run: Callable[[], object], amount: float) -> float:
    """`amount` per second of a call, the median of the rounds."""
    found: list[float] = []
    run()
    for _ in range(_ROUNDS):
        start, calls, seconds = time.perf_counter(), 0, 0.0
        while seconds < _SECONDS:
            run()
            calls += 1
            seconds = time.perf_counter() - start
        found.append(amount * calls / seconds)
    return statistics.median(found)


def _tile(rng: np.random.Generator) -> float:
    """Operations per second of the products of an attention tile: 128 queries, 512 keys of 64 elements."""
    q = rng.standard_normal((1, 128, 1, 3, 64), dtype=np.float32)
    k = rng.standard_normal((1, 1, 64, 528), dtype=np.float32)[..., :512].transpose(0, 3, 1, 2)

    def run() -> None:
        p = einsum("btkgh,bskh->bkgts", q, k)
        einsum("bkgts,bskh->btkgh", p, k)

    return _rate(run, 2 * 2 * 3 * 128 * 512 * 64)


def _keys(rng: np.random.Generator) -> float:
    """Bytes per second of the products of one query of nine heads with 1,024 keys and values of three.

    The keys and values of all layers do not fit in the caches of the processor together with the weights, so
    these have 192 MB."""
    q = rng.standard_normal((1, 1, 3, 3, 64), dtype=np.float32)
    caches = np.full((240, 1, 3, 64, 1040), 0.5, np.float32)
    views = cycle([cache[..., :1024].transpose(0, 3, 1, 2) for cache in caches])

    def run() -> None:
        p = einsum("btkgh,bskh->bkgts", q, next(views))
        einsum("bkgts,bskh->btkgh", p, next(views))

    return _rate(run, 2 * 4 * 3 * 64 * 1024)


def _elementwise(rng: np.random.Generator, run: Callable[[Array, Array], object]) -> float:
    a = rng.random((_ELEMENTS >> 9, 512), dtype=np.float32) + 1
    out = np.empty_like(a)
    return _rate(lambda: run(a, out), a.size)


def stored_rates() -> Rates | None:
    """Return the rates of this machine that `etx machine` stored for the current number of threads, or None.

    Rates that are not valid are not used; a note names the reason."""
    try:
        stored = libraries.stored_rates(blas.get_threads())
        return None if stored is None else parsed(stored)
    except InputError as error:
        note_once(f"no seconds are predicted: {error}")
        return None


def parsed(stored: Mapping[str, Any]) -> Rates:
    """Return the rates that `dataclasses.asdict` wrote to a JSON file. Raises InputError if they are not."""
    try:
        products = {
            str(dtype): {
                int(rows): Product(_positive(each["overhead"], 0), _positive(each["rate"]))
                for rows, each in by_rows.items()
            }
            for dtype, by_rows in stored["products"].items()
        }
        elements = {str(name): _positive(rate) for name, rate in stored["elements"].items()}
        names = ("bandwidth", "call", "short_call", "tile", "keys")
        numbers = {name: _positive(stored[name]) for name in names}
        if not products["float32"] or set(elements) != set(_FUNCTIONS):
            raise ValueError("incomplete")
        return Rates(threads=int(stored["threads"]), products=products, elements=elements, **numbers)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"stored rates of this machine are not valid ({error}): run `etx machine`") from None


def _positive(value: Any, least: float = 1e-12) -> float:
    number = float(value)
    if not least <= number < math.inf:
        raise ValueError(f"{number}")
    return number
