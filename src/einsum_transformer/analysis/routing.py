"""Where a mixture of experts sent its tokens, layer by layer: a reading of its routers' values."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from einsum_transformer.tables import terminal_table, with_lines

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class LayerRouting:
    """One layer's router over a whole run. Choices count every chosen expert of every token."""

    layer: int
    choices: tuple[int, ...]
    """Number of choices of each expert."""
    mean_weight: tuple[float, ...]
    """Mean weight of each expert over the tokens that were sent to it; 0 if there were none."""
    entropy: float
    """Mean entropy of the router's probabilities in bits, at most log2 of the number of experts."""

    @property
    def imbalance(self) -> float:
        """Choices of the busiest expert / the mean; 1 is an even load."""
        return max(self.choices) * len(self.choices) / max(sum(self.choices), 1)

    @property
    def idle(self) -> int:
        """Experts that no token went to."""
        return sum(count == 0 for count in self.choices)

    @property
    def load_entropy(self) -> float:
        """Entropy of the choices in bits; log2 of the number of experts for an even load."""
        shares = [count / max(sum(self.choices), 1) for count in self.choices if count]
        return -sum(share * math.log2(share) for share in shares)

    def to_dict(self) -> dict[str, Any]:
        """The numbers in JSON types."""
        derived = {"imbalance": self.imbalance, "idle": self.idle, "load_entropy": self.load_entropy}
        return asdict(self) | derived


class RoutingReader:
    """Adds up what every router chose, as a reader of values: recorder.on_value(reader, *reader.NAMES)."""

    NAMES = ("*.gate.chosen", "*.gate.weights", "*.gate.probabilities")

    def __init__(self) -> None:
        self._values: dict[str, Array] = {}
        self._sums: dict[int, tuple[Array, Array, float, int]] = {}
        """Layer -> choices and weights of each expert, the sum of entropies, tokens."""

    def __call__(self, name: str, value: Array) -> None:
        # A router's choice (b, t, top_k) comes first, then its weights, then the probabilities (b, t, e).
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
        """What was read so far; nothing of a model without experts."""
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
    """The layers for a terminal, as a rich renderable."""
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
        f"entropy: of the router's probabilities, load: of where the tokens went, in bits; {most:.2f} is even"
    )
    return with_lines([table], [note])
