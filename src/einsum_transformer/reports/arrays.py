"""Samples of the operands and results of einsum calls, small enough for a page."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from einsum_transformer.analysis.explain import role_of
from einsum_transformer.engine import Equation
from einsum_transformer.engine.recorder import Event, Path

Array = np.ndarray
Key = tuple[str, int | None, Path, str, str]
"""Stage, layer, phases inside of the stage, role and equation of a call."""

MOST = 32
"""Largest number of rows and of columns of a sample."""
_ROWS = "tn"
"""Letters that are the rows of a sample, the first that a term has."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Elements of an array as a matrix: every `row_step`-th row and `column_step`-th column."""

    term: str
    shape: tuple[int, ...]
    dtype: str
    rows: str
    """The letters of the rows, which are joined if they are several; "" for one row."""
    columns: str
    row_count: int
    """The size of `rows` in the whole array."""
    column_count: int
    row_step: int
    column_step: int
    fixed: dict[str, int]
    """Letter -> the one index that is shown."""
    values: tuple[tuple[float | None, ...], ...]
    """With four digits; None if a value is not finite."""

    @property
    def lowest(self) -> float | None:
        """The smallest finite value of the sample."""
        return min((x for row in self.values for x in row if x is not None), default=None)

    @property
    def highest(self) -> float | None:
        """The largest finite value of the sample."""
        return max((x for row in self.values for x in row if x is not None), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Return the sample in JSON types."""
        names = ("term", "dtype", "rows", "columns", "row_count", "column_count", "row_step", "column_step")
        found = {name: getattr(self, name) for name in names} | {"fixed": dict(self.fixed)}
        values = [list(row) for row in self.values]
        return found | {
            "shape": list(self.shape),
            "lowest": self.lowest,
            "highest": self.highest,
            "values": values,
        }


def sample(term: str, array: Array, most: int = MOST) -> Sample:
    """Return a sample of an array whose axes are the letters of `term`.

    Scores are shown for one row of the batch and one head; otherwise the rows are positions, if the array has
    any, and the columns are all other axes, joined.
    """
    rows, columns = _axes(term)
    fixed = {letter: 0 for letter in term if letter not in rows + columns}
    index = tuple(0 if letter in fixed else slice(None) for letter in term)
    kept = [letter for letter in term if letter not in fixed]
    matrix = array[index].transpose([kept.index(letter) for letter in rows + columns])
    sizes = dict(zip(rows + columns, matrix.shape))
    row_count = math.prod(sizes[letter] for letter in rows)
    column_count = math.prod(sizes[letter] for letter in columns)
    row_step, column_step = max(1, -(-row_count // most)), max(1, -(-column_count // most))
    # Indices of the joined axes, so that a large array that is not contiguous is not copied.
    picked = np.ix_(np.arange(0, row_count, row_step), np.arange(0, column_count, column_step))
    at = [
        each for letters, i in ((rows, picked[0]), (columns, picked[1])) for each in _split(letters, sizes, i)
    ]
    values = np.broadcast_to(
        np.asarray(matrix[tuple(at)], np.float64), np.broadcast_shapes(*map(np.shape, picked))
    )
    steps = row_count, column_count, row_step, column_step
    return Sample(term, tuple(array.shape), str(array.dtype), rows, columns, *steps, fixed, _rounded(values))


def _axes(term: str) -> tuple[str, str]:
    """The letters of the rows and of the columns."""
    letters = term.replace("b", "") if len(term) > 1 else term
    if "t" in letters and "s" in letters:
        return "t", "s"
    rows = next((letter for letter in (*_ROWS, "s") if letter in letters), "")
    if not rows and len(letters) > 1:
        rows = letters[:-1]
    return rows, "".join(letter for letter in letters if letter not in rows)


def _split(letters: str, sizes: dict[str, int], index: Array) -> Sequence[Array]:
    if not letters:
        return []
    return np.unravel_index(index, [sizes[letter] for letter in letters])  # type: ignore[return-value]


def _rounded(values: Array) -> tuple[tuple[float | None, ...], ...]:
    return tuple(tuple(float(f"{x:.4g}") if math.isfinite(x) else None for x in row) for row in values)


class ArrayReader:
    """Keeps a sample of each operand and result of the calls of some layers, and of those outside of layers.

    Of the calls of an equation in one role, stage and layer, the first one is kept; for a norm, which a layer
    has several of, the first two. Add it to a recorder with `on_arrays`.
    """

    def __init__(self, layers: Collection[int], matrices: Collection[str]) -> None:
        self.samples: list[Sample] = []
        """Each sample once, however many calls read the same array."""
        self.calls: dict[Key, list[tuple[int | None, ...]]] = {}
        """The index in `samples` of each operand and of the result of a call; None for an operand that is not
        in memory as an array."""
        self._layers, self._matrices = frozenset(layers), matrices
        self._known: dict[Any, int] = {}

    def __call__(self, event: Event, operands: Sequence[Any], result: Any) -> None:
        if event.layer is not None and event.layer not in self._layers:
            return
        if not result.size or not all(operand.size for operand in operands):  # an expert without tokens
            return
        stage, *inside = event.path
        key = stage, event.layer, tuple(inside), role_of(event, self._matrices), event.equation
        calls = self.calls.setdefault(key, [])
        if len(calls) >= (2 if event.path[-1] == "norm" else 1):
            return
        equation = Equation.parse(event.equation)
        pairs = zip((*equation.inputs, equation.output), (*operands, result))
        calls.append(tuple(self._index(term, array) for term, array in pairs))

    def _index(self, term: str, array: Any) -> int | None:
        if type(array) is not np.ndarray or array.ndim != len(term) or not array.size or "." in term:
            return None
        if array.dtype.kind not in "fiu" and str(array.dtype) != "bfloat16":
            return None
        found = sample(term, array)
        key = term, found.shape, found.values
        if key not in self._known:
            self._known[key] = len(self.samples)
            self.samples.append(found)
        return self._known[key]
