"""The steps of a stage in the order of the program, from the counts of a dry run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from einsum_transformer.analysis.plan import Elementwise, PlanPhase, PlanStep
from einsum_transformer.engine import Equation
from einsum_transformer.engine.equation import EquationError
from einsum_transformer.engine.phases import ATTENTION, FEED_FORWARD, LAYER, PASS
from einsum_transformer.engine.recorder import Path
from einsum_transformer.models.blocks import AnyBlock, ParallelBlock, PostNormBlock

RESIDUAL = "residual"
_MIX = (*ATTENTION, "mix")
_BEFORE: dict[Path, Path] = {(*ATTENTION, "scores"): ATTENTION, (*ATTENTION, "output"): _MIX}
"""Phase -> the one before it, which PASS lists elsewhere or not at all."""
_INSIDE = [
    each
    for path in PASS
    if path[:1] == LAYER and path != ATTENTION
    for each in ([_BEFORE[path]] if path in _BEFORE else []) + [path]
]
"""The phases inside of a layer in the order of a forward pass."""
_LABELS = PASS | {_MIX: "mix", (*ATTENTION, "output"): "output projection"}
_NAMES = {
    "embedding": "look up",
    "head": "normalize",
    "norm": "normalize",
    "rope": "rotate",
    "cache": "append",
    "scores": "softmax",
    "mix": "divide by the sums",
    "feed-forward": "activation",
    "qkv": "bias and split",
    "layer": "add",
}
"""Phase -> what its elementwise operations are."""


@dataclass(frozen=True, slots=True)
class Step:
    """One equation in one role, in each of `layers`, or the elementwise operations of a phase."""

    stage: str
    path: Path
    """The phases inside of the stage."""
    role: str
    equation: str
    """"" for elementwise operations."""
    layers: tuple[int, ...]
    gradients: tuple[str, ...]
    """The equations of the gradients of the operands; empty for other than two operands."""
    plan: PlanStep | None
    elementwise: tuple[Elementwise, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the step in JSON types, with the counts of `etx plan`."""
        found: dict[str, Any] = {
            "stage": self.stage,
            "path": list(self.path),
            "role": self.role,
            "equation": self.equation,
            "layers": list(self.layers),
            "gradients": list(self.gradients),
        }
        if self.plan is not None:
            names = ("sizes", "dtype", "calls", "flops", "weight_bytes", "kv_bytes", "activation_bytes")
            return found | {name: getattr(self.plan, name) for name in names} | {"bytes": self.plan.bytes}
        functions = [asdict(each) for each in self.elementwise]
        return found | {
            "functions": [
                {name: each[name] for name in ("function", "calls", "elements")} for each in functions
            ]
        }


@dataclass(frozen=True, slots=True)
class Group:
    """The steps of one phase, as they are shown together."""

    label: str
    steps: tuple[int, ...]
    """Indices in `Stage.steps`."""
    layers: tuple[int, ...]
    """The layers that run these steps; empty outside of the layers."""
    visit: int = 0
    """How often the phase occurred before in the same layer."""


@dataclass(frozen=True, slots=True)
class Stage:
    """The program of one stage: prefill, decode, forward or backward."""

    name: str
    tokens: int
    context: int
    steps: tuple[Step, ...]
    groups: tuple[Group, ...]
    """In the order of the program; those of each kind of layer follow each other."""

    def to_dict(self) -> dict[str, Any]:
        """Return steps and groups in JSON types."""
        return {
            "name": self.name,
            "tokens": self.tokens,
            "context": self.context,
            "steps": [step.to_dict() for step in self.steps],
            "groups": [asdict(group) for group in self.groups],
        }


def stage_of(phase: PlanPhase, name: str, blocks: Sequence[AnyBlock]) -> Stage:
    """Return the program of the stage `name` of a phase; blocks: of all layers."""
    steps = list(_steps(phase, name))
    places: dict[tuple[Path, tuple[int, ...]], list[int]] = {}
    for i, step in enumerate(steps):
        places.setdefault((step.path, step.layers), []).append(i)
    for found in places.values():
        found[:] = _in_order([steps[i] for i in found], found)
    kinds = dict.fromkeys(step.layers for step in steps if step.layers)
    groups: list[Group] = []
    backward = name == "backward"
    first, last = (("head",), ("embedding",)) if backward else (("embedding",), ("head",))
    groups += _group(first, (), places)
    for kind in kinds:
        groups += _layer(kind, places, blocks, backward)
    groups += _group(last, (), places)
    return Stage(name, phase.tokens, phase.context, tuple(steps), tuple(groups))


def _steps(phase: PlanPhase, name: str) -> Iterator[Step]:
    for step in phase.steps:
        if step.path[0] == name:
            gradients = tuple(_gradients(step.equation)) if name != "backward" else ()
            yield Step(name, step.path[1:], step.role, step.equation, step.layers, gradients, step, ())
    together: dict[tuple[Path, tuple[int, ...]], list[Elementwise]] = {}
    for each in phase.elementwise:
        if each.path[0] == name:
            together.setdefault((each.path[1:], each.layers), []).append(each)
    for (path, layers), found in together.items():
        role = _NAMES.get(path[-1], "elementwise") if name != "backward" else "elementwise"
        yield Step(name, path, role, "", layers, (), None, tuple(found))


def _gradients(text: str) -> Iterator[str]:
    """The gradient equations of both operands, as far as they are equations."""
    equation = Equation.parse(text)
    for operand in range(2 if len(equation.inputs) == 2 else 0):
        try:
            yield str(equation.gradient(operand))
        except EquationError:
            continue


def _in_order(steps: Sequence[Step], indices: Sequence[int]) -> list[int]:
    """The elementwise operations after the first equation of scores, before the last one of a feed-forward
    pass, and after all equations elsewhere."""
    equations = [i for step, i in zip(steps, indices) if step.equation]
    others = [i for step, i in zip(steps, indices) if not step.equation]
    if steps[0].path == FEED_FORWARD and steps[0].stage != "backward" and len(equations) > 1:
        return [*equations[:-1], *others, equations[-1]]
    if steps[0].path == (*ATTENTION, "scores"):
        return [*equations[:1], *others, *equations[1:]]
    return [*equations, *others]


def _layer(
    kind: tuple[int, ...],
    places: dict[tuple[Path, tuple[int, ...]], list[int]],
    blocks: Sequence[AnyBlock],
    backward: bool,
) -> Iterator[Group]:
    """The groups of one kind of layer."""
    attention = [path for path in _INSIDE if path[:2] == ATTENTION]
    feed_forward = [path for path in _INSIDE if path[:2] == FEED_FORWARD]
    norm, visits = (*LAYER, "norm"), 0
    for part in _parts(blocks[kind[0]], backward):
        if part == "norm":
            yield from _group(norm, kind, places, visits)
            visits += 1
        elif part == RESIDUAL:
            yield from _group(LAYER, kind, places)
        else:
            paths = attention if part == "attention" else feed_forward
            for path in paths[::-1] if backward else paths:
                yield from _group(path, kind, places)


def _parts(block: AnyBlock, backward: bool) -> list[str]:
    """The parts of a block in order."""
    if isinstance(block, ParallelBlock):
        norms = ["norm"] * (block.post_attention_layernorm is not None)
        parts = ["norm", "attention", *norms, "feed-forward", RESIDUAL]
    elif isinstance(block, PostNormBlock):
        first = ["norm"] * (block.input_layernorm is not None)
        second = ["norm"] * (block.pre_feedforward_layernorm is not None)
        parts = [*first, "attention", "norm", RESIDUAL, *second, "feed-forward", "norm", RESIDUAL]
    else:
        parts = ["norm", "attention", RESIDUAL, "norm", "feed-forward", RESIDUAL]
    if not backward:
        return parts
    # In the opposite order, but the residual connection is added after the norm.
    return [*parts[-2::-1], RESIDUAL]


def _group(
    path: Path, kind: tuple[int, ...], places: dict[tuple[Path, tuple[int, ...]], list[int]], visit: int = 0
) -> Iterator[Group]:
    found = places.get((path, kind))
    if found:
        yield Group(RESIDUAL if path == LAYER else _LABELS[path], tuple(found), kind, visit)
