"""Weights in memory: one allocation for all, with each matrix in the layout that products read fastest."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from einsum_transformer.engine.parallel import for_each
from einsum_transformer.formats import TensorSource, as_rows

Array = np.ndarray

_SHORT_ROW = 1024
_LINE = 64  # bytes of a cache line, to which every weight is aligned
_PIECE = 1 << 18  # elements that are read, converted and transposed at once, so that they stay in the cache
_TASK = 1 << 22  # elements of one thread's task


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor to read from a file: its name, the weight's shape, and the order of its rows."""

    name: str
    shape: tuple[int, ...]
    in_file_order: Callable[[Array], Array] | None = None
    """Maps the weight to the view that the tensor fills in file order; None: the weight itself."""
    first_row: int = 0
    """First row of the weight in the tensor (all axes but the last flattened)."""
    minus: float = 0.0
    """Constant that the file adds to each value."""
    others: tuple[Stored, ...] = ()
    """Further tensors that fill other parts of the same weight."""

    @property
    def plain(self) -> bool:
        """Whether the rows of the tensor are those of the weight."""
        return self.in_file_order is None and not self.minus and not self.others


def input_major(shape: tuple[int, ...]) -> bool:
    """Whether a weight of this shape in a file, [out, in], is stored as [in, out] in memory.

    A decode step multiplies one vector by every matrix, which is bound by memory bandwidth. BLAS reads a
    matrix with rows of 576 floats at two thirds of the bandwidth, and its transpose at nearly all of it
    (docs/performance.md); from about a thousand floats per row on, there is no difference.
    """
    return len(shape) == 2 and shape[1] < _SHORT_ROW <= shape[0] * 2


def allocate(
    shapes: Sequence[tuple[int, ...]],
    dtype: np.dtype,
    groups: Sequence[Hashable] | None = None,
    transpose: bool = True,
) -> list[Array]:
    """Allocate uninitialized arrays of these shapes as one block; input-major ones are transposed views if
    `transpose`.

    The system maps one large allocation in pages of 2 MB, many small ones in pages of 4 kB: the first access
    to 538 MB takes 0.08 s or 0.3 to 1 s (docs/performance.md).

    groups: the group of each array. Consecutive matrices of a group with rows of the same length are the
    rows of one matrix, so that one product serves all of them (`engine.einsums`).
    """
    step = _LINE // dtype.itemsize
    stacks = _stacks(shapes, groups)
    sizes = [sum(math.prod(shapes[i]) for i in stack) for stack in stacks]
    memory = np.empty(sum(-(-size // step) * step for size in sizes) + step, dtype)
    begin = -memory.ctypes.data % _LINE // dtype.itemsize
    arrays: list[Array] = []
    for stack, size in zip(stacks, sizes):
        flat, shape = memory[begin : begin + size], _whole(shapes, stack)
        begin += -(-size // step) * step
        array = flat.reshape(shape[::-1]).T if transpose and input_major(shape) else flat.reshape(shape)
        ends = np.cumsum([shapes[i][0] for i in stack]) if len(stack) > 1 else []
        arrays += np.split(array, ends[:-1]) if len(stack) > 1 else [array]
    return arrays


def copied_together(
    parts: Sequence[Mapping[str, Array]], groups: Sequence[Hashable]
) -> list[dict[str, Array]]:
    """Copy the named parts of matrices, such as codes and scales, into one block of memory for each name,
    where those of consecutive matrices of a group are the rows of one matrix (see `allocate`)."""
    found: list[dict[str, Array]] = [{} for _ in parts]
    for name in dict.fromkeys(name for each in parts for name in each):
        for size in sorted({each[name].itemsize for each in parts if name in each}):
            chosen = [i for i, each in enumerate(parts) if name in each and each[name].itemsize == size]
            shapes, own = [parts[i][name].shape for i in chosen], [groups[i] for i in chosen]
            memory = allocate(shapes, parts[chosen[0]][name].dtype, own, transpose=False)
            for i, array in zip(chosen, memory):
                found[i][name] = array.view(parts[i][name].dtype)
                found[i][name][...] = parts[i][name]
    return found


def _stacks(shapes: Sequence[tuple[int, ...]], groups: Sequence[Hashable] | None) -> list[list[int]]:
    """Split the indices of the shapes into runs of matrices of one group with rows of the same length; others
    are alone."""
    stacks: list[list[int]] = []
    for i, shape in enumerate(shapes):
        before = i - 1
        together = i > 0 and groups is not None and groups[before] == groups[i]
        if together and len(shape) == 2 and shapes[before][1:] == shape[1:]:
            stacks[-1].append(i)
        else:
            stacks.append([i])
    return stacks


def _whole(shapes: Sequence[tuple[int, ...]], stack: Sequence[int]) -> tuple[int, ...]:
    """The shape of a stack of matrices as one matrix."""
    if len(stack) == 1:
        return shapes[stack[0]]
    return sum(shapes[i][0] for i in stack), shapes[stack[0]][1]


def read_all(
    tensors: TensorSource,
    wanted: Sequence[Stored],
    dtype: np.dtype,
    groups: Sequence[Hashable] | None = None,
) -> list[Array]:
    """Read the tensors as `dtype`; one that needs no conversion is a read-only memory map of the file.

    groups: see `allocate`.
    """
    arrays: list[Array | None] = [None] * len(wanted)
    shapes = [stored.shape for stored in wanted]
    for stack in _stacks(shapes, groups):
        if not input_major(_whole(shapes, stack)):
            for i in stack:
                arrays[i] = mapped(tensors, wanted[i], dtype)
    missing = [i for i, array in enumerate(arrays) if array is None]
    own = None if groups is None else [groups[i] for i in missing]
    allocated = allocate([shapes[i] for i in missing], dtype, own)
    fill(tensors, [(wanted[i], array) for i, array in zip(missing, allocated)])
    for i, array in zip(missing, allocated):
        arrays[i] = array
    return [array for array in arrays if array is not None]


def mapped(tensors: TensorSource, stored: Stored, dtype: np.dtype) -> Array | None:
    """The tensor as a view of the mapped file, or None if its dtype or the order of its rows must change."""
    if not stored.plain or tensors.info(stored.name).dtype != {4: "F32", 8: "F64"}[dtype.itemsize]:
        return None
    whole = tensors.read(stored.name)
    if whole.shape == stored.shape:
        return whole
    whole = as_rows(whole)
    rows = math.prod(stored.shape[: max(1, len(stored.shape) - 1)])
    return whole[stored.first_row : stored.first_row + rows].reshape(stored.shape)


def fill(tensors: TensorSource, pairs: Sequence[tuple[Stored, Array]]) -> None:
    """Read each tensor into its array, of any layout, with as many threads as BLAS has, and release the pages
    of the file."""
    tasks = []
    for whole, array in pairs:
        for stored in (whole, *whole.others):
            target = array if stored.in_file_order is None else stored.in_file_order(array)
            rows, per_row = target.shape[0], math.prod(target.shape[1:])
            step = rows if target.ndim == 1 else max(1, _TASK // per_row)
            for start in range(0, rows, step):
                tasks.append((tensors, stored, target, start, min(start + step, rows)))
    for_each(_fill_rows, tasks, coarse=sum(array.size for _, array in pairs) > _TASK)


def _fill_rows(tensors: TensorSource, stored: Stored, target: Array, start: int, stop: int) -> None:
    """Read target[start:stop] in pieces: a piece in the CPU cache is transposed three times as fast."""
    per_row = math.prod(target.shape[1:])
    step = stop - start if target.ndim == 1 else max(1, _PIECE // per_row)
    shape = tensors.info(stored.name).shape
    file_rows = per_row // (shape[-1] if len(shape) > 1 else 1)  # rows of the file per row of the target
    for begin in range(start, stop, step):
        end = min(begin + step, stop)
        first = stored.first_row
        rows = tensors.read_rows(stored.name, first + begin * file_rows, first + end * file_rows)
        rows = converted(rows, target.dtype).reshape(target[begin:end].shape)
        target[begin:end] = rows - target.dtype.type(stored.minus) if stored.minus else rows
    tensors.release(stored.name)


def converted(rows: Array, dtype: np.dtype) -> Array:
    """Values of a file in the computation dtype; bfloat16 is converted via float32, exactly."""
    if rows.dtype.itemsize <= 2:
        rows = rows.astype(np.float32)
    return rows.astype(dtype, copy=False)
