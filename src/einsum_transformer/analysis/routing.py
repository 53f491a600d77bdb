"""Routing statistics of a mixture of experts per layer, from the values of its routers."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from einsum_transformer.tables import terminal_table, with_lines

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class LayerRouting:
    """The router of one layer over a whole run. `choices` counts every selected expert of every token."""

    layer: int
    choices: tuple[int, ...]
    """Tokens of each expert."""
    mean_weight: tuple[float, ...]
    """Mean router weight of each expert over its tokens; 0 for an expert without tokens."""
    entropy: float
    """Mean entropy of the router's probabilities in bits, at most log2 of the number of experts."""

    @property
    def imbalance(self) -> float:
        """Tokens of the busiest expert / mean over the experts; 1 is an even load."""
        return max(self.choices) * len(self.choices) / max(sum(self.choices), 1)

    @property
    def idle(self) -> int:
        """The number of experts without tokens."""
        return sum(count == 0 for count in self.choices)

    @property
    def load_entropy(self) -> float:
        """Entropy of the choices in bits; log2 of the number of experts for an even load."""
        shares = [count / max(sum(self.choices), 1) for count in self.choices if count]
        return -sum(share * math.log2(share) for share in shares)

    def to_dict(self) -> dict[str, Any]:
        """Return the statistics in JSON types."""
        derived = {"imbalance": self.imbalance, "idle": self.idle, "load_entropy": self.load_entropy}
        return asdict(self) | derived


class RoutingReader:
    """Sums up the choices of every router: `recorder.on_value(reader, *reader.NAMES)`."""

    NAMES = ("*.gate.chosen", "*.gate.weights", "*.gate.probabilities")

    def __init__(self) -> None:
        self._values: dict[str, Array] = {}
        self._sums: dict[int, tuple[Array, Array, float, int]] = {}
        """Layer -> choices and summed weights of each expert, sum of entropies, tokens."""

    def __call__(self, name: str, value: Array) -> None:
        # Order of a router's values: chosen experts (b, t, top_k), their weights, probabilities (b, t, e).
        _, layer, *_, kind = name.split(".")
        self._values[kind] = value
        if kind != "probabilities":
            return
        chosen, w = self._values["chosen"].ravel(), self._values["weights"].ravel()
        choices = np.bincount(chosen, minlength=value.shape[-1])
        weights = np.bincount(chosen, w, minlength=value.shape[-1])
        bits = -value * np.log2(np.maximum(value, np.finfo(value.dtype).tiny))
        own = choices, weights, float(bits.sum()), value[..., 0].size
        before = self._sums.get(int(layer), (0, 0, 0.0, 0))
        self._sums[int(layer)] = tuple(old + new for old, new in zip(before, own))  # type: ignore[assignment]

    def layers(self) -> list[LayerRouting]:
        """Return the statistics so far; empty for a model without experts."""
        return [
            LayerRouting(
                layer,
                tuple(int(count) for count in choices),
                tuple(float(weight) for weight in weights / np.maximum(choices, 1)),
                entropy / max(tokens, 1),
            )
            for layer, (choices, weights, entropy, tokens) in sorted(self._sums.items())
        ]


def render(layers: list[LayerRouting]) -> Any:
    """Return the statistics as a rich renderable."""
    table = terminal_table(
        ("experts", "choices", "busiest", "its share", "max / mean", "idle", "entropy", "load")
    )
    for each in layers:
        total, busiest = sum(each.choices), int(np.argmax(each.choices))
        share = 100 * each.choices[busiest] / max(total, 1)
        table.add_row(
            f"layer {each.layer}",
            str(total),
            f"#{busiest}",
            f"{share:.1f} %",
            f"{each.imbalance:.2f}",
            str(each.idle),
            f"{each.entropy:.2f}",
            f"{each.load_entropy:.2f}",
        )
    most = math.log2(len(layers[0].choices))
    note = (
        f"entropy of the router's probabilities and of the load (tokens per expert), in bits; "
        f"{most:.2f} is even"
    )
    return with_lines([table], [note])
