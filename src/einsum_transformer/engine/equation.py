"""Einsum equations: terms, checks, gradients and cost."""

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
    "o": "output of a quantized matrix",
    "i": "input of a quantized matrix",
    "l": "another input of a quantized matrix",
}
"""The meaning of each letter in the equations of all components."""

_TERM = re.compile(r"[A-Za-z ]*(\.\.\.)?[A-Za-z ]*")
# The axes of an ellipsis get letters that the equation does not use, so that lowering only handles letters.
# Lower-case letters are reserved for letters that leaves add (LoRA's r).
_FREE_LETTERS = ascii_uppercase + "".join(chr(0xE000 + i) for i in range(64))


class EquationError(InputError):
    """An equation is malformed, or its operands do not match it."""


class OperandTypeError(EquationError, TypeError):
    """An argument of einsum has an unsupported type."""


@dataclass(frozen=True, slots=True)
class Equation:
    """`inputs[0],inputs[1],...->output`: every letter names an axis; letters missing from the output are
    summed."""

    inputs: tuple[str, ...]
    output: str
    text: str = field(default="", compare=False, repr=False)
    """The equation as the caller wrote it, for messages; empty if it was not parsed from text."""

    @staticmethod
    def parse(text: str) -> Equation:
        """Parse an equation in NumPy's grammar (including `...` and the implicit output)."""
        return _parse(text)

    def __str__(self) -> str:
        return ",".join(self.inputs) + "->" + self.output

    @property
    def letters(self) -> str:
        """Every letter once, in order of appearance."""
        return "".join(dict.fromkeys("".join(self.inputs) + self.output))

    @property
    def shown(self) -> str:
        """The equation in messages: as the caller wrote it, if known."""
        return self.text or str(self)

    def gradient(self, operand: int) -> Equation:
        """Return the equation of the gradient of one of two operands: the same three terms, permuted.

        With C = einsum("A,B->C") and a scalar loss, dA = einsum("C,B->A", dC, B) and dB = einsum("C,A->B",
        dC, A). Where `...` broadcasts an operand, its gradient is also summed over those axes: evaluate it
        with `weight_grad(A, str(equation), dC, B)`, which infers these axes from the shape of A.
        """
        if len(self.inputs) != 2:
            raise EquationError(
                f"einsum {self.shown}: a gradient equation needs two operands, not {len(self.inputs)}"
            )
        target, other = self.inputs[operand], self.inputs[1 - operand]
        if double := [letter for letter in target if letter != "." and target.count(letter) > 1]:
            raise EquationError(
                f"einsum {self.shown}: letter {double[0]!r} occurs twice in operand {operand}, "
                "so its gradient is a diagonal"
            )
        if lost := set(target.replace("...", "")) - set(other + self.output):
            raise EquationError(
                f"einsum {self.shown}: letter {min(lost)!r} occurs in operand {operand} only, "
                "so its gradient broadcasts"
            )
        return Equation((self.output, other), target)

    def sizes(self, shapes: Sequence[tuple[int, ...]]) -> dict[str, int]:
        """Return letter -> size; a letter must have the same size everywhere (size 1 does not broadcast).

        The axes of `...` do not have letters and are not included (see `spell`).
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
        """Return the floating-point operations: 2 x the product of all sizes for a contraction, 1 x for an
        elementwise product or a sum."""
        work = math.prod(sizes[letter] for letter in self.letters)
        if len(self.inputs) == 1:
            return work if len(self.output) < len(self.letters) else 0
        contracted = set("".join(self.inputs)) - set(self.output)
        return (2 if contracted else 1) * (len(self.inputs) - 1) * work

    def elements(self, sizes: dict[str, int]) -> int:
        """Return the elements read plus the elements written, each operand once; times the item size, this is
        the minimum memory traffic in bytes."""
        return sum(math.prod(sizes[letter] for letter in term) for term in (*self.inputs, self.output))

    def spell(self, shapes: Sequence[tuple[int, ...]]) -> tuple[Equation, list[tuple[Any, ...]] | None]:
        """Return the equation with letters in place of `...`, and an index for each operand of these shapes.

        `...` broadcasts as in NumPy: its axes are aligned at the right, and size 1 matches any size. Axes of
        size 1 that broadcast are removed by the operand's index, and their letters from its term. An
        equation without `...` is checked and returned unchanged, with None.
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
                f"einsum {self.shown}: '...' has axes {full}, so it must also be in the output; "
                "use letters for axes to sum"
            )
        free = [letter for letter in _FREE_LETTERS if letter not in self.letters][: len(full)]
        terms, indices = [], []
        for term, span in zip(self.inputs, spans):
            start = len(full) - len(span)
            equal = [size == wide for size, wide in zip(span, full[start:])]
            letters = "".join(letter for letter, keep in zip(free[start:], equal) if keep)
            head, _, tail = term.partition("...")
            terms.append(head + letters + tail)
            drop = (slice(None) if keep else 0 for keep in equal)
            indices.append((*[slice(None)] * len(head), *drop, ...))
        spelled = Equation(tuple(terms), self.output.replace("...", "".join(free)), self.text)
        return spelled, None if all(0 not in index for index in indices) else indices

    def _broadcast(self, spans: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """Return the common shape of the axes of `...` (np.broadcast_shapes is limited to 32 axes)."""
        full: tuple[int, ...] = ()
        for position, (term, span) in enumerate(zip(self.inputs, spans)):
            rank = max(len(full), len(span))
            pairs = list(zip((1,) * (rank - len(full)) + full, (1,) * (rank - len(span)) + span))
            if any(size != wide and 1 not in (size, wide) for wide, size in pairs):
                raise EquationError(
                    f"einsum {self.shown}: '...' has axes {span} in operand {position} {term!r} "
                    f"but {full} in the operands before it, and these do not broadcast"
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
            raise EquationError(f"einsum {text!r}: term {term!r} may contain only letters and one '...'")
    inputs, output = tuple(left.replace(" ", "").split(",")), output.replace(" ", "")
    if not arrow:
        output = _implicit_output(inputs)
    named = output.replace("...", "")
    for letter in named:
        if named.count(letter) > 1:
            raise EquationError(f"einsum {text!r}: letter {letter!r} occurs twice in the output")
        if not any(letter in term for term in inputs):
            raise EquationError(f"einsum {text!r}: output letter {letter!r} is not in any operand")
    return Equation(inputs, output, text)


def _implicit_output(inputs: tuple[str, ...]) -> str:
    """Return the output of an equation without an arrow, as in NumPy: the ellipsis, then the letters that
    occur once, in alphabetical order."""
    text = "".join(inputs)
    dots = "..." if "..." in text else ""
    letters = text.replace("...", "")
    return dots + "".join(sorted(letter for letter in set(letters) if letters.count(letter) == 1))
