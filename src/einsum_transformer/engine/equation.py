"""An einsum equation as a value: its terms, its checks, its gradients and its cost."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from einsum_transformer.errors import InputError

LEGEND = {
    "b": "batch",
    "t": "query position",
    "s": "key position",
    "d": "model",
    "f": "feed-forward hidden",
    "v": "vocabulary",
    "k": "key/value head",
    "g": "query heads per key/value head",
    "h": "head dimension",
    "e": "expert",
    "n": "routed token",
    "r": "LoRA rank",
    "c": "latent (MLA)",
    "j": "joined rows (q, k and v; gate and up)",
}
"""One letter, one meaning, in every equation of a component."""

_TERM = re.compile(r"[A-Za-z]*(\.\.\.)?[A-Za-z]*")
# Axes that an ellipsis stands for get private letters, so that the rest of the engine knows only letters.
_ELLIPSIS_LETTERS = [chr(0x2460 + i) for i in range(20)]


class EquationError(InputError):
    """An equation is malformed, or its operands do not fit it."""


@dataclass(frozen=True, slots=True)
class Equation:
    """`inputs[0],inputs[1],...->output`: every letter names an axis; letters missing from the output are
    summed."""

    inputs: tuple[str, ...]
    output: str

    @staticmethod
    def parse(text: str) -> Equation:
        """The equation that `text` spells, with NumPy's grammar (also `...` and the implicit output)."""
        return _parse(text)

    def __str__(self) -> str:
        return ",".join(self.inputs) + "->" + self.output

    @property
    def letters(self) -> str:
        """Every letter once, in order of appearance."""
        return "".join(dict.fromkeys("".join(self.inputs) + self.output))

    def gradient(self, operand: int) -> Equation:
        """The equation of the gradient by one of two operands: the same three terms, permuted.

        With C = einsum("A,B->C") and a scalar loss, dA = einsum("C,B->A", dC, B) and dB = einsum("C,A->B",
        dC, A).
        """
        if len(self.inputs) != 2:
            raise EquationError(
                f"einsum {self}: a gradient equation needs two operands, not {len(self.inputs)}"
            )
        target, other = self.inputs[operand], self.inputs[1 - operand]
        if lost := set(target) - set(other + self.output):
            raise EquationError(
                f"einsum {self}: letter {min(lost)!r} is in operand {operand} only, its gradient broadcasts"
            )
        return Equation((self.output, other), target)

    def sizes(self, shapes: Sequence[tuple[int, ...]]) -> dict[str, int]:
        """Letter -> size, checked: a letter has one size everywhere (size 1 does not broadcast)."""
        if len(shapes) != len(self.inputs):
            raise EquationError(f"einsum {self}: {len(self.inputs)} operands expected, {len(shapes)} given")
        sizes: dict[str, int] = {}
        first: dict[str, int] = {}
        for position, (term, shape) in enumerate(zip(self.inputs, shapes)):
            if len(term) != len(shape):
                raise EquationError(
                    f"einsum {self}: operand {position} {term!r} has {len(term)} letters but shape {shape}"
                )
            for letter, size in zip(term, shape):
                if sizes.setdefault(letter, size) != size:
                    raise EquationError(
                        f"einsum {self}: letter {letter!r} is {sizes[letter]} in operand {first[letter]} "
                        f"{self.inputs[first[letter]]!r} but {size} in operand {position} {term!r} {shape}"
                    )
                first.setdefault(letter, position)
        return sizes

    def output_shape(self, sizes: dict[str, int]) -> tuple[int, ...]:
        return tuple(sizes[letter] for letter in self.output)

    def flops(self, sizes: dict[str, int]) -> int:
        """Floating-point operations: 2 x the product of all letters for a contraction, 1 x for a plain
        product or sum."""
        work = math.prod(sizes[letter] for letter in self.letters)
        if len(self.inputs) == 1:
            return work if len(self.output) < len(self.letters) else 0
        contracted = set("".join(self.inputs)) - set(self.output)
        return (2 if contracted else 1) * (len(self.inputs) - 1) * work

    def elements(self, sizes: dict[str, int]) -> int:
        """Numbers read plus numbers written, each operand once; times the item size this is the least traffic
        in bytes."""
        return sum(math.prod(sizes[letter] for letter in term) for term in (*self.inputs, self.output))

    def expand_ellipsis(self, shapes: Sequence[tuple[int, ...]]) -> Equation:
        """The same equation for these shapes with each `...` spelled out in private letters, aligned at the
        right."""
        ranks = []
        for position, (term, shape) in enumerate(zip(self.inputs, shapes)):
            named = len(term.replace("...", ""))
            if "..." in term and len(shape) < named:
                raise EquationError(
                    f"einsum {self}: operand {position} {term!r} needs {named} axes, shape is {shape}"
                )
            ranks.append(len(shape) - named if "..." in term else 0)
        widest = max(ranks, default=0)
        if widest > len(_ELLIPSIS_LETTERS):
            raise EquationError(
                f"einsum {self}: '...' stands for {widest} axes, {len(_ELLIPSIS_LETTERS)} are possible"
            )
        axes = "".join(_ELLIPSIS_LETTERS[:widest])
        spelled = [term.replace("...", axes[widest - rank :]) for term, rank in zip(self.inputs, ranks)]
        return Equation(tuple(spelled), self.output.replace("...", axes))


@lru_cache(maxsize=4096)
def _parse(text: str) -> Equation:
    if not isinstance(text, str):
        raise EquationError(f"einsum: the equation must be a string, not {type(text).__name__}")
    left, arrow, output = text.replace(" ", "").partition("->")
    inputs = tuple(left.split(","))
    for term in (*inputs, output):
        if not _TERM.fullmatch(term):
            raise EquationError(f"einsum {text!r}: term {term!r} may hold letters and one '...' only")
    if not arrow:
        output = _implicit_output(inputs)
    named = output.replace("...", "")
    for letter in named:
        if named.count(letter) > 1:
            raise EquationError(f"einsum {text!r}: letter {letter!r} stands twice in the output")
        if not any(letter in term for term in inputs):
            raise EquationError(f"einsum {text!r}: output letter {letter!r} is in no operand")
    if "..." in "".join(inputs) and "..." not in output:
        raise EquationError(
            f"einsum {text!r}: '...' must also stand in the output, or be named by letters and summed"
        )
    if "..." in output and "..." not in "".join(inputs):
        raise EquationError(f"einsum {text!r}: '...' stands in the output but in no operand")
    return Equation(inputs, output)


def _implicit_output(inputs: tuple[str, ...]) -> str:
    """NumPy's rule for an equation without an arrow: the ellipsis, then the letters that occur once, in
    order."""
    text = "".join(inputs)
    dots = "..." if "..." in text else ""
    letters = text.replace("...", "")
    return dots + "".join(sorted(letter for letter in set(letters) if letters.count(letter) == 1))
