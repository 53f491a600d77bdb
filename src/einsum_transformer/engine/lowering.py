"""Equation + shapes + strides -> plan: which views, which (batched) matrix product.

A two-operand equation sorts its letters into four groups: *batch* (in both operands and the output), *rows*
(operand 0 and output), *columns* (operand 1 and output) and *contracted* (both operands, not the output).
Groups whose strides line up become one axis of a matrix product without moving a byte; row or column letters
that do not line up become loops of the batched product. Everything else is copied, and the plan reports it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from string import ascii_letters
from typing import Any

import numpy as np

from einsum_transformer.engine import blas
from einsum_transformer.engine.equation import Equation

Array = np.ndarray
FEW_ROWS = 16
"""Products of at most as many rows are bound by reading the weights."""
Run = Callable[..., Array]


@dataclass(frozen=True, slots=True)
class Plan:
    """The computation of one equation for operands of given shapes, strides and types."""

    run: Run
    how: str
    """A one-line description: the product's sizes, its loops, and any copies."""
    product: blas.Product | None = None
    """The matrix product that it ends in, if any."""

    def description(self) -> str:
        """`how`, and the library of the product if two libraries are in use."""
        return f"{self.how}, by {self.product.library}" if self.product and blas.several() else self.how


@dataclass(frozen=True, slots=True)
class Operand:
    """The term and memory layout of an operand, without its data."""

    term: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int

    def stride(self, letter: str) -> int:
        return self.strides[self.term.index(letter)]

    def size(self, letter: str) -> int:
        return self.shape[self.term.index(letter)]

    def by_stride(self, letters: Sequence[str]) -> list[str]:
        """Sort letters from outermost to innermost; letters of size 1 have arbitrary strides and go first."""
        return sorted(letters, key=lambda letter: (self.size(letter) != 1, -abs(self.stride(letter))))

    def lines_up(self, outer: str, inner: str) -> bool:
        """Return whether the two axes, in this order, can be one axis of a view."""
        if self.size(outer) == 1 or self.size(inner) == 1:
            return True
        return self.stride(outer) == self.stride(inner) * self.size(inner)

    def merges(self, letters: Sequence[str]) -> bool:
        live = [letter for letter in letters if self.size(letter) != 1]
        return all(self.lines_up(outer, inner) for outer, inner in pairwise(live))

    def chunks(self, letters: Sequence[str]) -> list[list[str]]:
        """Split `letters`, outermost first, wherever two neighbours do not line up."""
        chunks: list[list[str]] = []
        for letter in self.by_stride(letters):
            if chunks and self.merges([*chunks[-1], letter]):
                chunks[-1].append(letter)
            else:
                chunks.append([letter])
        return chunks


def lower_single(equation: Equation, operand: Operand, dtype: np.dtype) -> Plan:
    """Plan one operand: a diagonal view, then a sum, then a transposed view."""
    diagonal = _diagonal(operand.term)
    term = "".join(dict.fromkeys(operand.term))
    summed = tuple(i for i, letter in enumerate(term) if letter not in equation.output)
    remaining = [letter for letter in term if letter in equation.output]
    permutation = tuple(remaining.index(letter) for letter in equation.output)
    reduce = np.logical_or.reduce if dtype.kind == "b" else np.add.reduce

    def run(a: Array) -> Array:
        if diagonal is not None:
            a = diagonal(a)
        if summed:
            a = reduce(a, axis=summed, dtype=dtype)
            # A sum over every axis is a scalar in NumPy; einsum always returns an array.
            a = np.asanyarray(a)
        return a.transpose(permutation)

    steps = [*(["diagonal"] if diagonal is not None else []), *(["sum"] if summed else []), "view"]
    return Plan(run, " + ".join(steps))


def lower_pair(equation: Equation, left: Operand, right: Operand, dtype: np.dtype, order: str = "K") -> Plan:
    """Plan two operands: reduce each (diagonal, sum of letters only it has), then a product."""
    reduce_left, left, note_left = _reduce(left, equation.output + right.term, dtype)
    reduce_right, right, note_right = _reduce(right, equation.output + left.term, dtype)
    contracted = [letter for letter in left.term if letter in right.term and letter not in equation.output]
    if all(left.size(letter) == 1 for letter in contracted):
        plan = _elementwise(equation.output, left, right, order)
    elif (
        any((letter in left.term) != (letter in right.term) for letter in equation.output)
        or not equation.output
    ):
        plan = _gemm(equation.output, left, right, contracted, order)
    else:
        plan = _row_dots(equation.output, left, right)
    if reduce_left is None and reduce_right is None:
        return plan
    inner = plan.run

    def run(a: Array, b: Array) -> Array:
        return inner(reduce_left(a) if reduce_left else a, reduce_right(b) if reduce_right else b)

    return Plan(run, " + ".join(filter(None, [note_left, note_right, plan.how])), plan.product)


def _diagonal(term: str) -> Run | None:
    """Return the view of the joint diagonal of every repeated letter, or None if no letter repeats."""
    letters, steps = list(term), []
    while len(letters) > len(set(letters)):
        letter = next(letter for letter in letters if letters.count(letter) > 1)
        first = letters.index(letter)
        second = letters.index(letter, first + 1)
        steps.append((first, second))
        letters = [*letters[:first], *letters[first + 1 : second], *letters[second + 1 :], letter]
    if not steps:
        return None
    permutation = [letters.index(letter) for letter in dict.fromkeys(term)]

    def run(a: Array) -> Array:
        view = a
        for first, second in steps:
            view = view.diagonal(axis1=first, axis2=second)
        view = view.transpose(permutation)
        # np.diagonal returns a read-only view; np.einsum's is writable if the operand is. The flag cannot be
        # set if the array that owns the operand's memory has become read-only.
        with suppress(ValueError):
            view.flags.writeable = a.flags.writeable
        return view

    return run


def _reduce(operand: Operand, needed: str, dtype: np.dtype) -> tuple[Run | None, Operand, str]:
    """Take the diagonal of repeated letters and sum the letters that are not in `needed`."""
    term = "".join(letter for letter in dict.fromkeys(operand.term) if letter in needed)
    if term == operand.term:
        return None, operand, ""
    plan = lower_single(Equation((operand.term,), term), operand, dtype)
    if "sum" in plan.how:
        shape = tuple(operand.size(letter) for letter in term)
        # NumPy chooses the memory order of the sum; C order makes the strides known.
        run: Run = lambda a: np.asarray(plan.run(a), order="C")  # noqa: E731
        strides = _c_strides(shape, dtype.itemsize)
        return run, Operand(term, shape, strides, dtype.itemsize), plan.how
    strides = tuple(
        sum(s for other, s in zip(operand.term, operand.strides) if other == letter) for letter in term
    )
    return plan.run, Operand(term, tuple(map(operand.size, term)), strides, operand.itemsize), plan.how


def _c_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    strides = [itemsize]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides[: len(shape)]))


def _elementwise(output: str, left: Operand, right: Operand, order: str) -> Plan:
    """Plan one broadcast multiplication, for equations that sum nothing but axes of size 1."""
    if order == "F" and not set(output) <= set(left.term):
        natural = sorted(output, key=lambda letter: (letter in left.term, letter not in right.term))
        plan, permutation = _elementwise("".join(natural), left, right, "C"), list(map(natural.index, output))
        return Plan(lambda a, b: plan.run(a, b).transpose(permutation), plan.how)
    view_left, view_right = _broadcast_view(output, left), _broadcast_view(output, right)

    if not output:
        first, second = view_left or _same, view_right or _same
        # The product of two scalars is a scalar in NumPy; einsum always returns an array.
        return Plan(lambda a, b: np.asarray(np.multiply(first(a), second(b))), "multiply")
    if view_left is None and view_right is not None:
        return Plan(lambda a, b: np.multiply(a, view_right(b)), "multiply")
    first, second = view_left or _same, view_right or _same
    return Plan(lambda a, b: np.multiply(first(a), second(b)), "multiply")


def _broadcast_view(output: str, operand: Operand) -> Run | None:
    letters = [letter for letter in output if letter in operand.term]
    permutation = tuple(operand.term.index(letter) for letter in letters)
    index = tuple(slice(None) if letter in operand.term else None for letter in output)
    summed = tuple(axis for axis, letter in enumerate(operand.term) if letter not in output)
    if summed:
        drop = (*(0 if axis in summed else slice(None) for axis in range(len(operand.term))), ...)
        remaining = tuple(sum(other not in summed for other in range(axis)) for axis in permutation)
        return lambda a: a[drop].transpose(remaining)[index]
    if permutation == tuple(range(len(operand.term))):
        return None if len(permutation) == len(output) else lambda a: a[index]
    return lambda a: a.transpose(permutation)[index]


def _row_dots(output: str, left: Operand, right: Operand) -> Plan:
    """Plan many short dot products, where all output letters are batch letters, with NumPy's einsum loop."""
    shape = tuple(left.size(letter) for letter in output)
    inner = [[letter for letter in operand.term if letter not in output] for operand in (left, right)]
    if math.prod(shape) == 1 and inner[0] == inner[1]:
        flat = (1, -1)
        return Plan(lambda a, b: np.vecdot(a.reshape(flat), b.reshape(flat)).reshape(shape), "dot")
    # The output letters become np.einsum's `...`, so that its alphabet suffices for any number of them.
    names = dict(zip(dict.fromkeys(inner[0]), ascii_letters))
    text = "{},{}->...".format(*("..." + "".join(names[letter] for letter in term) for term in inner))
    orders = [
        [operand.term.index(letter) for letter in (*output, *letters)]
        for operand, letters in zip((left, right), inner)
    ]
    return Plan(
        lambda a, b: np.asanyarray(np.einsum(text, a.transpose(orders[0]), b.transpose(orders[1]))),
        "row dots",
    )


def _gemm(output: str, left: Operand, right: Operand, contracted: list[str], order: str) -> Plan:
    """Plan a (batched) matrix product [rows x contracted] . [contracted x columns] on views."""
    batch = [letter for letter in output if letter in left.term and letter in right.term]
    inner = _contracted_order(left, right, contracted)
    row_loops, rows = _split([letter for letter in output if letter not in right.term], left)
    column_loops, columns = _split([letter for letter in output if letter not in left.term], right)
    size = {letter: operand.size(letter) for operand in (left, right) for letter in operand.term}
    flip = order == "F" or (order == "K" and _columns_first(left, right, rows, columns, inner))

    # Axes of size 1 are dropped: they would only make the product's outer loop deeper.
    lead = [letter for letter in batch if size[letter] != 1]
    loops = [letter for letter in row_loops + column_loops if size[letter] != 1]
    view_left, copy_left = _matrix_view(left, lead, loops, rows, inner, size, flip)
    view_right, copy_right = _matrix_view(right, lead, loops, inner, columns, size, flip)
    natural = [*batch, *row_loops, *column_loops, *(columns + rows if flip else rows + columns)]
    matrix = [
        math.prod(size[letter] for letter in group)
        for group in ((columns, rows) if flip else (rows, columns))
    ]
    unpack = _unpack(natural, output, size, (*(size[letter] for letter in lead + loops), *matrix))
    count = math.prod(size[letter] for letter in lead + loops)
    product = blas.product_of(matrix[0], matrix[1], count)
    compose = _compose_flipped if flip else _compose
    run = compose(product, view_left, view_right, unpack)

    sizes = [math.prod(size[letter] for letter in group) for group in (rows, inner, columns)]
    m, k, n = sizes
    how = f"gemm {n}x{k} . {k}x{m}" if flip else f"gemm {m}x{k} . {k}x{n}"
    how += f" x{count}" if count > 1 else ""
    copied = [term for term, copy in ((left.term, copy_left), (right.term, copy_right)) if copy]
    return Plan(run, how + (f", copies {' and '.join(copied)}" if copied else ""), product)


def _contracted_order(left: Operand, right: Operand, contracted: list[str]) -> list[str]:
    """Order the contracted letters so that they are one axis in both operands if possible, else in the larger
    operand."""
    candidates = [left.by_stride(contracted), right.by_stride(contracted)]
    for candidate in candidates:
        if left.merges(candidate) and right.merges(candidate):
            return candidate
    return candidates[0 if math.prod(left.shape) >= math.prod(right.shape) else 1]


def _split(letters: list[str], operand: Operand) -> tuple[list[str], list[str]]:
    """Return (letters to loop over, letters of the matrix axis): the axis is the longest chunk.

    Many loops over short axes are slower than a copy: below 16 rows with more than 32 loops, all letters are
    merged into the axis.
    """
    chunks = operand.chunks(letters)
    if len(chunks) <= 1:
        return [], chunks[0] if chunks else []
    sizes = [math.prod(operand.size(letter) for letter in chunk) for chunk in chunks]
    longest = max(range(len(chunks)), key=sizes.__getitem__)
    if sizes[longest] < 16 and math.prod(sizes) > 32 * sizes[longest]:
        return [], operand.by_stride(letters)
    return [letter for i, chunk in enumerate(chunks) if i != longest for letter in chunk], chunks[longest]


def _columns_first(
    left: Operand, right: Operand, rows: list[str], columns: list[str], inner: list[str]
) -> bool:
    """Return whether the product is stored with operand 0's rows innermost: out[column, row] in memory.

    Measured on OpenBLAS and MKL (docs/performance.md): weights . activations is up to 1.8 times faster than
    activations . weights at 2 to 64 rows and never slower below 2,048, except that up to 16 rows of weights
    with columns innermost are read up to 1.5 times faster as activations . weights. If the rows of operand 0
    are already innermost, more than 16 stay innermost: then elementwise operations between two projections
    run over long contiguous lines.
    """
    m, n = (math.prod(map(operand.size, group)) for operand, group in ((left, rows), (right, columns)))
    if m == 1 or n == 1:
        return False
    unit_left = _innermost(left, [*rows, *inner])
    if unit_left in rows and m > FEW_ROWS:
        return True
    unit_right = _innermost(right, [*columns, *inner])
    return unit_right not in columns and m <= max(n, 1024)


def _innermost(operand: Operand, letters: list[str]) -> str:
    live = [letter for letter in letters if operand.size(letter) != 1] or letters
    return min(live, key=lambda letter: abs(operand.stride(letter)))


def _matrix_view(
    operand: Operand,
    lead: list[str],
    loops: list[str],
    outer: list[str],
    inner: list[str],
    size: dict[str, int],
    flip: bool,
) -> tuple[Run | None, bool]:
    """Return the view [lead..., loops..., outer, inner] (the last two swapped if `flip`), and whether it
    requires a copy."""
    dropped = [letter for letter in operand.term if letter not in lead + loops + outer + inner]
    own = [letter for letter in loops if letter in operand.term]
    pair = [inner, outer] if flip else [outer, inner]
    letters = [*dropped, *lead, *own, *pair[0], *pair[1]]
    permutation = tuple(operand.term.index(letter) for letter in letters)
    shape = (
        *(size[letter] for letter in lead),
        *(size[letter] if letter in operand.term else 1 for letter in loops),
        *(math.prod(size[letter] for letter in group) for group in pair),
    )
    copies = not (operand.merges(pair[0]) and operand.merges(pair[1]))
    contiguous = not copies and not _blas_ready(operand, pair)
    return _viewer(permutation, operand.shape, shape, contiguous), copies or contiguous


def _blas_ready(operand: Operand, pair: list[list[str]]) -> bool:
    """Return whether BLAS can read the matrix in place: one axis has unit stride, and the rows along the
    other do not overlap."""
    axes = []
    for group in pair:
        live = [letter for letter in group if operand.size(letter) != 1]
        length = math.prod(map(operand.size, group))
        axes.append((length, operand.stride(live[-1]) if live else None))
    for (_, outer), (length, inner) in (axes, axes[::-1]):
        if (inner is None or inner == operand.itemsize) and (
            outer is None or (outer % operand.itemsize == 0 and outer >= length * operand.itemsize)
        ):
            return True
    return False


def _viewer(
    permutation: tuple[int, ...], given: tuple[int, ...], shape: tuple[int, ...], contiguous: bool
) -> Run | None:
    """Return the shortest chain of NumPy view calls from shape `given` to `shape`; None if not needed."""
    straight = permutation == tuple(range(len(permutation)))
    if contiguous:
        return lambda a: a.transpose(permutation).copy().reshape(shape)
    if straight:
        return None if shape == given else lambda a: a.reshape(shape)
    if shape == tuple(given[axis] for axis in permutation):
        return (lambda a: a.T) if permutation == (1, 0) else lambda a: a.transpose(permutation)
    return lambda a: a.transpose(permutation).reshape(shape)


def _unpack(natural: list[str], output: str, size: dict[str, int], given: tuple[int, ...]) -> Run | None:
    """Return the conversion of the product's axes, of sizes `given`, to the output's letters; None if not
    needed."""
    full = tuple(size[letter] for letter in natural)
    permutation = tuple(natural.index(letter) for letter in output)
    straight = permutation == tuple(range(len(natural)))
    same_axes = full == given
    if straight:
        return None if same_axes else lambda y: y.reshape(full)
    if same_axes:
        return (lambda y: y.T) if permutation == (1, 0) else lambda y: y.transpose(permutation)
    return lambda y: y.reshape(full).transpose(permutation)


def _compose(product: blas.Product, view_left: Run | None, view_right: Run | None, unpack: Run | None) -> Run:
    """left . right; common cases avoid Python calls, each of which takes as long as a small view."""
    if view_left is None and view_right is None and unpack is None:
        return lambda a, b: product.matmul(a, b)
    if view_left is None and view_right is not None and unpack is None:
        return lambda a, b: product.matmul(a, view_right(b))
    left, right, out = view_left or _same, view_right or _same, unpack or _same
    return lambda a, b: out(product.matmul(left(a), right(b)))


def _compose_flipped(
    product: blas.Product, view_left: Run | None, view_right: Run | None, unpack: Run | None
) -> Run:
    """right^T . left^T: the same values with operand 0's rows innermost in memory."""
    if view_left is not None and view_right is None and unpack is not None:
        return lambda a, b: unpack(product.matmul(b, view_left(a)))
    left, right, out = view_left or _same, view_right or _same, unpack or _same
    return lambda a, b: out(product.matmul(right(b), left(a)))


def _same(a: Any) -> Any:
    return a
