"""Adapters on stacked experts: one for all experts of a layer in PEFT, one for each expert's matrix here.

transformers 5 stores the experts of a layer as two parameters, `experts.gate_up_proj` [E, 2 f, d] and
`experts.down_proj` [E, d, f]. An adapter of rank r on one of them (PEFT's ParamWrapper) is

    lora_A [E r, in]: row e r + i is row i of expert e,
    lora_B [out, r E]: column i E + e is column i of expert e,

so the gate matrix (the first f rows) and the up matrix of an expert have separate rows of B and share one A.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
Pair = tuple[Array, Array]
"""A (r, inputs) and B (outputs, r)."""

EXPERT = re.compile(r"(?P<experts>.*\.experts)\.(?P<index>\d+)\.(?P<part>gate|up|down)_proj")


@dataclass(frozen=True, slots=True)
class Stack:
    """One stacked parameter. path: `layers.0.mlp.experts.gate_up_proj`; experts: the paths of each expert's
    matrices in it, in the order of its rows."""

    path: str
    experts: tuple[tuple[str, ...], ...]

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of all its matrices."""
        return tuple(path for expert in self.experts for path in expert)

    def split(self, a: Array, b: Array) -> dict[str, Pair]:
        """Split PEFT's lora_A and lora_B into path -> A and B; gate and up share one array A."""
        experts, outputs = len(self.experts), b.shape[0] // len(self.experts[0])
        each_a = a.reshape(experts, -1, a.shape[1])
        each_b = b.reshape(b.shape[0], -1, experts).transpose(2, 0, 1)
        return {
            path: (each_a[e], each_b[e, part * outputs : (part + 1) * outputs])
            for e, expert in enumerate(self.experts)
            for part, path in enumerate(expert)
        }

    def joined(self, pairs: Mapping[str, tuple[Array | None, Array]]) -> Pair:
        """Join matrices, or their gradients, by path, into PEFT's lora_A and lora_B. The A matrices of one
        expert are summed, without those that are None."""
        first, last = pairs[self.experts[0][0]]
        assert first is not None
        rank, outputs, experts = first.shape[0], last.shape[0], len(self.experts)
        a = np.zeros((experts, rank, first.shape[1]), first.dtype)
        b = np.empty((outputs * len(self.experts[0]), rank, experts), last.dtype)
        for e, expert in enumerate(self.experts):
            for part, path in enumerate(expert):
                own_a, own_b = pairs[path]
                if own_a is not None:
                    a[e] += own_a
                b[part * outputs : (part + 1) * outputs, :, e] = own_b
        return a.reshape(-1, a.shape[2]), b.reshape(len(b), -1)


def stacks_of(paths: Iterable[str]) -> dict[str, Stack]:
    """The stacked parameters whose matrices are all in `paths`, by path."""
    by_prefix: dict[str, dict[int, dict[str, str]]] = {}
    for path in paths:
        if match := EXPERT.fullmatch(path):
            by_prefix.setdefault(match["experts"], {}).setdefault(int(match["index"]), {})[match["part"]] = (
                path
            )
    found = {}
    for prefix, experts in by_prefix.items():
        for name, parts in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
            rows = [experts[e] for e in sorted(experts)]
            if all(set(parts) <= row.keys() for row in rows):
                path = f"{prefix}.{name}"
                found[path] = Stack(path, tuple(tuple(row[part] for part in parts) for row in rows))
    return found
