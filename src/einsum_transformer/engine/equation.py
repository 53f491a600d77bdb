"""An einsum equation as a value: its terms, its checks, its gradients and its cost."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from string import ascii_uppercase
from typing import Any

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

_TERM = re.compile(r"[A-Za-z ]*(\.\.\.)?[A-Za-z ]*")
# Axes that an ellipsis stands for get letters that the equation leaves free, so that lowering sees only
# letters. Lower-case letters are left to leaves, which add letters of their own (LoRA's r).
_FREE_LETTERS = ascii_uppercase + "".join(chr(0xE000 + i) for i in range(64))


class EquationError(InputError):
    """An equation is malformed, or its operands do not fit it."""


class OperandTypeError(EquationError, TypeError):
    """An argument of einsum has a type that it cannot take."""


@dataclass(frozen=True, slots=True)
class Equation:
    """`inputs[0],inputs[1],...->output`: every letter names an axis; letters missing from the output are
    summed."""

    inputs: tuple[str, ...]
    output: str
    text: str = field(default="", compare=False, repr=False)
    """The equation as the caller spelled it, for messages; empty if it was not parsed from text."""

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

    @property
    def shown(self) -> str:
        """The equation as messages name it: in the caller's own spelling."""
        return self.text or str(self)

    def gradient(self, operand: int) -> Equation:
        """The equation of the gradient by one of two operands: the same three terms, permuted.

        With C = einsum("A,B->C") and a scalar loss, dA = einsum("C,B->A", dC, B) and dB = einsum("C,A->B",
        dC, A). Where `...` broadcasts an operand, its gradient is also a sum over those axes: evaluate the
        equation with `weight_grad(equation, dC, B, A)`, which reads from the shape of A what to sum.
        """
        if len(self.inputs) != 2:
            raise EquationError(
                f"einsum {self.shown}: a gradient equation needs two operands, not {len(self.inputs)}"
            )
        target, other = self.inputs[operand], self.inputs[1 - operand]
        if double := [letter for letter in target if letter != "." and target.count(letter) > 1]:
            raise EquationError(
                f"einsum {self.shown}: letter {double[0]!r} stands twice in operand {operand}, "
                "its gradient is a diagonal"
            )
        if lost := set(target.replace("...", "")) - set(other + self.output):
            raise EquationError(
                f"einsum {self.shown}: letter {min(lost)!r} is in operand {operand} only, "
                "its gradient broadcasts"
            )
        return Equation((self.output, other), target)

    def sizes(self, shapes: Sequence[tuple[int, ...]]) -> dict[str, int]:
        """Letter -> size, checked: a letter has one size everywhere (size 1 does not broadcast).

        The axes of `...` have no letter and are left out (see `spell`).
        """
        if len(shapes) != len(self.inputs):
            raise EquationError(
                f"einsum {self.shown}: {len(self.inputs)} operands expected, {len(shapes)} given"
            )
        sizes: dict[str, int] = {}
        first: dict[str, int] = {}
        for position, (term, shape) in enumerate(zip(self.inputs, shapes)):
            head, dots, tail = term.partition("...")
            named = len(head) + len(tail)
            if len(shape) < named or (len(shape) > named and not dots):
                raise EquationError(
                    f"einsum {self.shown}: operand {position} {term!r} has {named} letters but shape {shape}"
                )
            for letter, size in zip(head + tail, (*shape[: len(head)], *shape[len(shape) - len(tail) :])):
                if sizes.setdefault(letter, size) != size:
                    note = "; a letter of size 1 does not broadcast" if 1 in (size, sizes[letter]) else ""
                    raise EquationError(
                        f"einsum {self.shown}: letter {letter!r} is {sizes[letter]} in operand "
                        f"{first[letter]} {self.inputs[first[letter]]!r} but {size} in operand {position} "
                        f"{term!r} {shape}{note}"
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

    def spell(self, shapes: Sequence[tuple[int, ...]]) -> tuple[Equation, list[tuple[Any, ...]] | None]:
        """The equation for operands of these shapes with letters for `...`, and an index for each operand.

        `...` broadcasts as in NumPy: its axes are aligned at the right, and one of size 1 fits any size. The
        index drops the axes of size 1 that meet a larger (or empty) one, and their letters are left out of
        that operand's term. Without `...` it is the equation itself, checked, and None.
        """
        self.sizes(shapes)
        if "..." not in "".join(self.inputs) + self.output:
            return self, None
        spans = [
            shape[len(head) : len(shape) - len(tail)] if dots else ()
            for (head, dots, tail), shape in zip((term.partition("...") for term in self.inputs), shapes)
        ]
        full = self._broadcast(spans)
        if full and "..." not in self.output:
            raise EquationError(
                f"einsum {self.shown}: '...' stands for axes {full}, so it must also stand in the output, "
                "or be named by letters and summed"
            )
        free = [letter for letter in _FREE_LETTERS if letter not in self.letters][: len(full)]
        terms, indices = [], []
        for term, span in zip(self.inputs, spans):
            start = len(full) - len(span)
            kept = [size == wide for size, wide in zip(span, full[start:])]
            letters = "".join(letter for letter, keep in zip(free[start:], kept) if keep)
            head, _, tail = term.partition("...")
            terms.append(head + letters + tail)
            drop = (slice(None) if keep else 0 for keep in kept)
            indices.append((*[slice(None)] * len(head), *drop, ...))
        spelled = Equation(tuple(terms), self.output.replace("...", "".join(free)), self.text)
        return spelled, None if all(0 not in index for index in indices) else indices

    def _broadcast(self, spans: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """The common shape of what `...` stands for in each operand (np.broadcast_shapes ends at 32 axes)."""
        full: tuple[int, ...] = ()
        for position, (term, span) in enumerate(zip(self.inputs, spans)):
            rank = max(len(full), len(span))
            pairs = list(zip((1,) * (rank - len(full)) + full, (1,) * (rank - len(span)) + span))
            if any(size != wide and 1 not in (size, wide) for wide, size in pairs):
                raise EquationError(
                    f"einsum {self.shown}: '...' stands for axes {span} in operand {position} {term!r} "
                    f"but for {full} in the operands before it, and these do not broadcast"
                )
            full = tuple(size if wide == 1 else wide for wide, size in pairs)
        return full


@lru_cache(maxsize=4096)
def _parse(text: str) -> Equation:
    if not isinstance(text, str):
        raise OperandTypeError(f"einsum: the equation must be a string, not {type(text).__name__}")
    left, arrow, output = text.partition("->")
    for term in (*left.split(","), output):
        if not _TERM.fullmatch(term):
            raise EquationError(f"einsum {text!r}: term {term!r} may hold letters and one '...' only")
    inputs, output = tuple(left.replace(" ", "").split(",")), output.replace(" ", "")
    if not arrow:
        output = _implicit_output(inputs)
    named = output.replace("...", "")
    for letter in named:
        if named.count(letter) > 1:
            raise EquationError(f"einsum {text!r}: letter {letter!r} stands twice in the output")
        if not any(letter in term for term in inputs):
            raise EquationError(f"einsum {text!r}: output letter {letter!r} is in no operand")
    return Equation(inputs, output, text)


def _implicit_output(inputs: tuple[str, ...]) -> str:
    """NumPy's rule for an equation without an arrow: the ellipsis, then the letters that occur once, in
    order."""
    text = "".join(inputs)
    dots = "..." if "..." in text else ""
    letters = text.replace("...", "")
    return dots + "".join(sorted(letter for letter in set(letters) if letters.count(letter) == 1))
