"""Weights in memory: every type and layout arrives as the file has it, whatever the pieces and threads."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from einsum_transformer.engine import blas
from einsum_transformer.leaves import resident
from einsum_transformer.leaves.resident import Stored, allocate, fill, input_major, read_all
from memory_source import MemorySource

TYPES = [
    np.float64,
    np.float32,
    np.float16,
    ml_dtypes.bfloat16,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e5m2,
]
SHAPES = [(7,), (6, 5), (1024, 3), (512, 1023), (8, 1024), (4, 6, 5)]


def values(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("pieces", [(1, 4), (7, 40), (1 << 18, 1 << 22)], ids=str)
@pytest.mark.parametrize("target", [np.float32, np.float64])
@pytest.mark.parametrize("dtype", TYPES)
def test_every_type_and_shape(
    dtype: Any, target: Any, pieces: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident, "_PIECE", pieces[0])
    monkeypatch.setattr(resident, "_TASK", pieces[1])
    shapes = SHAPES if pieces[0] > 1 else [(7,), (6, 5), (4, 6, 5)]
    tensors = {f"t{i}": values(shape, dtype) for i, shape in enumerate(shapes)}
    source = MemorySource(**tensors)
    arrays = read_all(source, [Stored(name, t.shape) for name, t in tensors.items()], np.dtype(target))
    for array, tensor in zip(arrays, tensors.values(), strict=True):
        np.testing.assert_array_equal(array, tensor.astype(np.float64).astype(target), strict=True)


def test_rows_in_the_order_of_the_file() -> None:
    """Two heads of four rows whose halves the file interleaves; also where the weight is kept input-major."""
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    for shape in ((16,), (16, 5), (16, 2, 3), (2048, 6)):
        heads = shape[0] // 8

        def view(a: np.ndarray, heads: int = heads) -> np.ndarray:
            return a.reshape(heads, 2, 4, *a.shape[1:]).swapaxes(1, 2)

        ours = values(shape, np.float32)
        in_file = ours.reshape(heads, 8, *shape[1:])[:, order].reshape(shape)
        source = MemorySource(w=in_file)
        (array,) = read_all(source, [Stored("w", shape, view)], np.dtype(np.float32))
        np.testing.assert_array_equal(array, ours)


def test_what_lies_in_the_file_as_wanted_stays_there() -> None:
    source = MemorySource(wide=values((4, 1024), np.float32), long=values((1024, 4), np.float32))
    wide, long = read_all(
        source, [Stored("wide", (4, 1024)), Stored("long", (1024, 4))], np.dtype(np.float32)
    )
    assert wide is source.tensors["wide"]
    assert not np.shares_memory(long, source.tensors["long"])
    assert input_major((1024, 4))
    assert long.T.flags.c_contiguous


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rooms_begin_at_cache_lines_and_do_not_overlap(dtype: Any) -> None:
    shapes = [(3,), (5, 7), (1024, 3), (0, 4), (), (2, 3, 4)]
    arrays = allocate(shapes, np.dtype(dtype))
    for i, array in enumerate(arrays):
        array[...] = i
    for i, (array, shape) in enumerate(zip(arrays, shapes, strict=True)):
        assert array.shape == shape
        assert array.dtype == dtype
        assert array.ctypes.data % 64 == 0 or array.size == 0
        assert (array == i).all()


@pytest.mark.parametrize("width", [7, 1024])
def test_matrices_of_a_group_are_rows_of_one_matrix(width: int) -> None:
    """Whether the matrix is input-major depends on all its rows; other arrays are alone."""
    shapes = [(300, width), (200, width), (40, width), (40, width), (9,), (600, 8), (600, width)]
    arrays = allocate(shapes, np.dtype(np.float32), [*"aaabbbb"])
    for i, array in enumerate(arrays):
        array[...] = i
    for i, (array, shape) in enumerate(zip(arrays, shapes, strict=True)):
        assert array.shape == shape
        assert (array == i).all()
    q, k, v, *_ = arrays
    assert input_major((540, 7))
    assert q.strides == k.strides == v.strides == ((4, 540 * 4) if width == 7 else (width * 4, 4))
    assert k.ctypes.data - q.ctypes.data == 300 * q.strides[0]
    assert v.ctypes.data - k.ctypes.data == 200 * q.strides[0]
    assert arrays[3].ctypes.data % 64 == arrays[5].ctypes.data % 64 == 0


def test_a_group_is_mapped_or_allocated_as_a_whole() -> None:
    """Rows of 576 floats: k alone would stay in the file, q, k and v are allocated input-major."""
    source = MemorySource(
        **{name: values((rows, 576), np.float32) for name, rows in (("q", 512), ("k", 192), ("v", 192))}
    )
    wanted = [Stored(name, tensor.shape) for name, tensor in source.tensors.items()]
    arrays = read_all(source, wanted, np.dtype(np.float32), ["a"] * 3)
    for array, tensor in zip(arrays, source.tensors.values()):
        assert array.strides == (4, 896 * 4)
        np.testing.assert_array_equal(array, tensor)
    assert read_all(source, wanted, np.dtype(np.float32))[1] is source.tensors["k"]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_the_rows(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "_PIECE", 64)
    monkeypatch.setattr(resident, "_TASK", 256)
    before = blas.get_threads()
    tensors = {f"t{i}": values((40 + i, 9), np.float16) for i in range(5)}
    source = MemorySource(**tensors)
    out = [np.full(t.shape, np.nan, np.float32) for t in tensors.values()]
    blas.set_threads(threads)
    try:
        fill(source, [(Stored(n, t.shape), array) for (n, t), array in zip(tensors.items(), out)])
    finally:
        blas.set_threads(before)
    for array, tensor in zip(out, tensors.values()):
        np.testing.assert_array_equal(array, tensor.astype(np.float32))
    assert len(source.reads) == len(set(source.reads))


def test_an_error_while_reading_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "_TASK", 8)
    source = MemorySource(a=values((64, 3), np.float16))
    with pytest.raises(KeyError, match="gone"):
        fill(source, [(Stored("gone", (64, 3)), np.empty((64, 3), np.float32))])
