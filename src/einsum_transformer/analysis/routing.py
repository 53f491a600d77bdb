"""Where a mixture of experts sent its tokens, layer by layer: a reading of a recorder's counts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class LayerRouting:
    """One layer's router over a whole run. Choices count every chosen expert of every token."""

    layer: int
    choices: tuple[int, ...]
    """Of each expert."""
    mean_weight: tuple[float, ...]
    """Of each expert, over the tokens that went to it; 0 where none did."""
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


def routing(counts: Mapping[tuple[int | None, str], Array]) -> list[LayerRouting]:
    """What the counts of a recorder (counts_wanted) say about the routers; nothing where there are none."""
    found = []
    for (layer, name), choices in sorted(counts.items(), key=lambda item: (item[0][0] or 0, item[0][1])):
        if name != "choices" or layer is None:
            continue
        weights = counts[layer, "weights"] / np.maximum(choices, 1)
        entropy, tokens = counts[layer, "entropy"]
        found.append(
            LayerRouting(
                layer,
                tuple(int(count) for count in choices),
                tuple(float(weight) for weight in weights),
                float(entropy / max(tokens, 1)),
            )
        )
    return found


def render(layers: list[LayerRouting]) -> Any:
    """The layers for a terminal, as a rich renderable."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left")
    for heading in ("experts", "choices", "busiest", "its share", "max / mean", "idle", "entropy", "load"):
        table.add_column(heading, justify="left" if heading == "experts" else "right")
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
    return Group(table, Text(note))
