"""The costs and the memory of a model before it runs: prefill, decode and training, as data and as tables.

All numbers are counted in dry runs of the program (`analysis.dry_plan`); no weights are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from einsum_transformer.analysis.devices import Device, devices
from einsum_transformer.arguments import checked
from einsum_transformer.displays import as_html
from einsum_transformer.engine.phases import ATTENTION, COUNTED_AS, FEED_FORWARD, PASS
from einsum_transformer.engine.recorder import Path
from einsum_transformer.tables import as_text, quantity, terminal_table


@dataclass(frozen=True, slots=True)
class PlanStep:
    """One equation in one role, in each of `layers` (empty: outside of the layers); amounts are per layer."""

    path: Path
    """The phases that enclose it, from the outermost."""
    role: str
    """The weight that it uses, `dq_proj` for the gradient of that weight, else the inner phase."""
    equation: str
    sizes: dict[str, int]
    """Letter -> size; the largest if the calls differ."""
    dtype: str
    """The type of the product: "float32"; "bfloat16" or "int8" if the weight is stored so and activations are
    rounded to it."""
    layers: tuple[int, ...]
    calls: int
    flops: int
    """Operations of the program, which computes attention in tiles, also the masked part of a tile."""
    flops_causal: int
    """Only pairs of a query and a key that it attends to."""
    flops_dense: int
    """All pairs of the queries and all keys."""
    weight_bytes: int
    """Bytes of weights as they are stored."""
    kv_bytes: int
    """Bytes of keys and values, of latents, or of the cache."""
    activation_bytes: int
    """Bytes of all other operands and of the results."""
    seconds: float | None = None
    """Predicted seconds on this machine; None without a measurement."""
    bound: str = ""
    """What most of these seconds are: "compute", "memory" or "Python" (the overhead of calls)."""

    @property
    def times(self) -> int:
        """How often the step occurs in the whole program."""
        return max(1, len(self.layers))

    @property
    def bytes(self) -> int:
        """All bytes, in one layer."""
        return self.weight_bytes + self.kv_bytes + self.activation_bytes


@dataclass(frozen=True, slots=True)
class Elementwise:
    """The elementwise operations, reductions and copies of one NumPy function in one phase, per layer."""

    path: Path
    function: str
    dtype: str
    layers: tuple[int, ...]
    calls: int
    elements: int
    seconds: float | None = None
    """Predicted seconds on this machine; None without a measurement."""

    @property
    def times(self) -> int:
        """How often it occurs in the whole program."""
        return max(1, len(self.layers))


@dataclass(frozen=True, slots=True)
class PlanPhase:
    """The costs of one phase: "prefill" of all tokens, "decode" of one more token per row, or "training"."""

    name: str
    batch: int
    tokens: int
    """Tokens of each row that the phase computes."""
    context: int
    """Tokens of each row at its end."""
    steps: tuple[PlanStep, ...]
    elementwise: tuple[Elementwise, ...]
    peak_bytes: int
    """Most bytes of activations, saved activations and gradients at any time."""

    def total(self, name: str) -> int:
        """The sum of an amount of all steps in all layers, such as "flops" or "weight_bytes"."""
        return sum(step.times * getattr(step, name) for step in self.steps)

    @property
    def elements(self) -> int:
        """Elements of all elementwise operations in all layers."""
        return sum(each.times * each.elements for each in self.elementwise)

    @property
    def seconds(self) -> float | None:
        """Predicted seconds on this machine; None without a measurement."""
        parts = [(each.times, each.seconds) for each in (*self.steps, *self.elementwise)]
        return sum(times * (seconds or 0.0) for times, seconds in parts) if self.is_timed else None

    @property
    def is_timed(self) -> bool:
        """Whether seconds are predicted."""
        return any(step.seconds is not None for step in self.steps)


@dataclass(frozen=True, slots=True)
class Ledger:
    """The memory of a training step in bytes."""

    kind: str
    """"full", or LoRA with the rank and the type of the frozen weights."""
    trained: int
    """Number of trained parameters."""
    weights: int
    gradients: int
    optimizer: int
    saved: int
    """Activations saved for the backward pass."""
    peak: int
    """Most bytes at any time: weights, optimizer, and the most of activations and gradients together."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """The roofline (Williams et al., 2009) of a plan on another machine: lower bounds from its data sheet.

    A step takes at least its operations divided by the peak rate, and its bytes divided by the bandwidth.
    """

    device: str
    memory: int
    holds: bool
    """Whether weights, KV cache and activations of prefill and decode fit into its memory."""
    seconds: dict[str, float]
    """Phase -> seconds."""
    compute_bound: dict[str, float]
    """Phase -> share of these seconds in steps that are bound by operations, not by bytes."""
    source: str


@checked
@dataclass(frozen=True, slots=True)
class Plan:
    """The costs and the memory of a model before it runs. `str()` is the tables."""

    model: str
    batch: int
    tokens: int
    quantization: str | None
    """The scheme of the weights, or "bfloat16"; None: float32."""
    kv_cache: tuple[str, str]
    parameters: int
    active_parameters: int
    """Parameters that a token uses: without the experts that are not selected for it."""
    weight_bytes: int
    kv_bytes_per_token: int
    """Bytes that one more token of one row adds, as long as no sliding window is full."""
    kv_bytes: int
    """Bytes of the cache for all rows and tokens."""
    phases: tuple[PlanPhase, ...]
    training: tuple[Ledger, ...]
    machine: str | None = None
    """The processor whose measured rates predict the seconds; None: `etx machine` has not measured it."""

    def phase(self, name: str) -> PlanPhase:
        """Return the phase of this name."""
        return next(each for each in self.phases if each.name == name)

    @property
    def inference_bytes(self) -> int:
        """Weights, KV cache and the most activations of prefill and decode."""
        peaks = [each.peak_bytes for each in self.phases if each.name != "training"]
        return self.weight_bytes + self.kv_bytes + max(peaks)

    def estimates(self) -> tuple[Estimate, ...]:
        """Return the roofline of each machine of `devices/*.json`, by memory."""
        return tuple(_estimate(self, device) for device in devices())

    def to_dict(self) -> dict[str, Any]:
        """Return the plan in JSON types."""
        found = asdict(self)
        for own, each in zip(found["phases"], self.phases):
            own["totals"] = {name: each.total(name) for name in _AMOUNTS} | {"elements": each.elements}
            own["seconds"] = each.seconds
        return found | {
            "inference_bytes": self.inference_bytes,
            "devices": list(map(asdict, self.estimates())),
        }

    def tables(self) -> Iterator[Any]:
        """Yield the tables and lines as rich renderables."""
        yield from _heading(self)
        yield ""
        yield _phases_table(self)
        for each in self.phases:
            yield ""
            yield _parts_table(each)
        yield ""
        yield _ledger_table(self.training)
        yield ""
        yield _devices_table(self)
        yield from _NOTES
        yield _machine_line(self)

    def __str__(self) -> str:
        return as_text(*self.tables())

    def _repr_html_(self) -> str:
        return as_html(*self.tables())


_AMOUNTS = ("flops", "flops_causal", "flops_dense", "weight_bytes", "kv_bytes", "activation_bytes")
_NOTES = (
    "FLOPs: attention in tiles, as computed; causal: only visible pairs of query and key; dense: all pairs.",
    "Bytes: each operand and result of an equation once per call. Elementwise operations are not in FLOPs.",
    "Machines: lower bounds by peak rates and bandwidths of data sheets, whose names are in to_dict().",
)


def _machine_line(plan: Plan) -> str:
    if plan.machine is None:
        return "Seconds on this machine: `etx machine` measures its rates once, in half a minute."
    return f"Seconds: predicted for this machine ({plan.machine}) by its measured rates; training: no update."


def _estimate(plan: Plan, device: Device) -> Estimate:
    seconds: dict[str, float] = {}
    compute: dict[str, float] = {}
    for each in plan.phases:
        total = bound = 0.0
        for step in each.steps:
            times = device.seconds(step.times * step.flops, step.times * step.bytes, step.dtype)
            total += max(times)
            bound += times[0] if times[0] >= times[1] else 0
        seconds[each.name], compute[each.name] = total, bound / total if total else 0.0
    holds = plan.inference_bytes <= device.memory
    return Estimate(device.name, device.memory, holds, seconds, compute, device.source)


def totals_table(plans: Sequence[tuple[str, Plan]]) -> Any:
    """Return the totals of several plans as a rich table, with the ratio of the last to the first."""
    names = [name for name, _ in plans]
    table = terminal_table(("", *names, *(["ratio"] if len(plans) > 1 else [])))
    for rows in zip(*(_totals(plan) for _, plan in plans)):
        amounts = [amount for _, _, amount in rows]
        ratio = [f"{amounts[-1] / amounts[0]:.3g}" if amounts[0] else ""] if len(plans) > 1 else []
        table.add_row(rows[0][0], *(quantity(amount, unit) for _, unit, amount in rows), *ratio)
    return table


def _totals(plan: Plan) -> Iterator[tuple[str, str, int]]:
    """Yield names, units and amounts."""
    yield "parameters", "", plan.parameters
    yield "active parameters", "", plan.active_parameters
    yield "weights", "B", plan.weight_bytes
    yield "KV cache, each token", "B", plan.kv_bytes_per_token
    yield "KV cache", "B", plan.kv_bytes
    for each in plan.phases:
        yield f"{each.name}, FLOPs", "", each.total("flops")
    yield "prefill and decode, memory", "B", plan.inference_bytes
    yield "training all weights, memory", "B", plan.training[0].peak
    yield "training adapters, memory", "B", plan.training[1].peak


def _heading(plan: Plan) -> Iterator[str]:
    active = plan.active_parameters
    used = "" if active == plan.parameters else f" ({active:,} active per token)"
    stored = f"{quantity(plan.weight_bytes, 'B')} in {plan.quantization or 'float32'}"
    yield f"{plan.model}: {plan.parameters:,} parameters{used}, {stored}"
    rows = f"{plan.batch} row{'s' * (plan.batch > 1)} of {plan.tokens:,} tokens"
    cache = "" if plan.kv_cache == ("unchanged", "unchanged") else f" ({' and '.join(plan.kv_cache)})"
    sizes = (plan.kv_bytes_per_token, plan.kv_bytes, plan.inference_bytes)
    token, whole, needed = (quantity(size, "B") for size in sizes)
    yield f"{rows}; KV cache{cache} {token} per token, {whole} in total; prefill and decode need {needed}"


def _phases_table(plan: Plan) -> Any:
    columns = ("FLOPs", "causal", "dense", "weights", "KV", "activations", "elementwise", "peak activations")
    timed = plan.machine is not None
    table = terminal_table(("phase", *columns, *(["predicted"] if timed else [])))
    for each in plan.phases:
        amounts = [quantity(each.total(name), "" if "flops" in name else "B") for name in _AMOUNTS]
        seconds = [] if each.seconds is None else [_duration(each.seconds)]
        table.add_row(each.name, *amounts, quantity(each.elements), quantity(each.peak_bytes, "B"), *seconds)
    return table


def _parts_table(phase: PlanPhase) -> Any:
    """The steps of a phase, summed over the layers by part of the program."""
    columns = ("FLOPs", "weights", "KV", "activations", "elementwise", "FLOPs/B")
    timed = ("predicted", "share", "bound") if phase.is_timed else ()
    table = terminal_table((f"{phase.name}, all layers", *columns, *timed))
    parts: dict[tuple[str, Path], list[int]] = {}
    bounds = _bounds(phase)
    for step in phase.steps:
        found = parts.setdefault(_part(phase, step.path), [0] * 5)
        amounts = (step.flops, step.weight_bytes, step.kv_bytes, step.activation_bytes)
        for i, amount in enumerate(amounts):
            found[i] += step.times * amount
    for each in phase.elementwise:
        parts.setdefault(_part(phase, each.path), [0] * 5)[4] += each.times * each.elements
    order = {path: i for i, path in enumerate(PASS)}
    for (stage, path), (flops, *sizes, elements) in sorted(
        parts.items(), key=lambda item: (_STAGES.index(item[0][0]), order.get(item[0][1], 99))
    ):
        label = PASS.get(path, path[-1] if path else "cross-entropy").partition(" (")[0]
        if path[:-1] in (ATTENTION, FEED_FORWARD):
            label = f"{path[-2]}: {label}"
        intensity = f"{flops / sum(sizes):.1f}" if flops and sum(sizes) else ""
        cells = [quantity(size, "B") if size else "" for size in sizes]
        staged = phase.name == "training" and stage != "loss"
        table.add_row(
            f"{stage}: {label}" if staged else label,
            quantity(flops) if flops else "",
            *cells,
            quantity(elements) if elements else "",
            intensity,
            *_timing(bounds.get((stage, path), {}), phase.seconds),
        )
    return table


def _bounds(phase: PlanPhase) -> dict[tuple[str, Path], dict[str, float]]:
    """Part of the program -> what bounds it -> seconds."""
    found: dict[tuple[str, Path], dict[str, float]] = {}
    for each in (*phase.steps, *phase.elementwise):
        own = found.setdefault(_part(phase, each.path), {})
        bound = each.bound if isinstance(each, PlanStep) else "elementwise"
        own[bound] = own.get(bound, 0.0) + each.times * (each.seconds or 0.0)
    return found


def _timing(bounds: dict[str, float], whole: float | None) -> list[str]:
    """The cells of the predicted seconds, their share of the phase, and what most of them are."""
    if not whole:
        return []
    seconds = sum(bounds.values())
    return [_duration(seconds), f"{100 * seconds / whole:.1f} %", max(bounds, key=lambda name: bounds[name])]


_STAGES = ("prefill", "decode", "forward", "loss", "backward")


def _part(phase: PlanPhase, path: Path) -> tuple[str, Path]:
    """The stage of a step, and its part of the program."""
    inner = COUNTED_AS.get(path[1:4], path[1:4])
    known = (inner[:depth] for depth in (3, 2, 1) if inner[:depth] in PASS)
    return path[0], next(known, inner[:1])


def _ledger_table(ledgers: Sequence[Ledger]) -> Any:
    columns = ("parameters", "weights", "gradients", "optimizer", "saved activations", "peak")
    table = terminal_table(("memory of training", *columns))
    for each in ledgers:
        sizes = (each.weights, each.gradients, each.optimizer, each.saved, each.peak)
        table.add_row(each.kind, f"{each.trained:,}", *(quantity(size, "B") for size in sizes))
    return table


def _devices_table(plan: Plan) -> Any:
    table = terminal_table(("machine", "memory", "holds it", "prefill", "decode", "training", "bound"))
    smallest = next((each.device for each in plan.estimates() if each.holds), None)
    for each in plan.estimates():
        times = [_duration(each.seconds[name]) for name in ("prefill", "decode", "training")]
        bounds = [each.compute_bound[name] >= 0.5 for name in ("prefill", "decode")]
        words = "/".join("compute" if bound else "memory" for bound in bounds)
        holds = "yes, the smallest" if each.device == smallest else "yes" if each.holds else "no"
        table.add_row(each.device, quantity(each.memory, "B"), holds, *times, words)
    return table


def _duration(seconds: float) -> str:
    for limit, factor, unit in ((1e-3, 1e6, "us"), (1, 1e3, "ms")):
        if seconds < limit:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s"
