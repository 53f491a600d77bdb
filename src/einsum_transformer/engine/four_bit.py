"""Products of integer codes in groups with a few rows by ONNX Runtime, which multiplies codes in registers.

y[n, m] = sum_k (codes[n, k] - zeros[n, k // size]) * scales[n, k // size] * x[m, k], in float32. MatMulNBits
multiplies digits of 4 bits: codes of up to 8 bits are 16 * high + low. It has its own order of the digits, so
codes are held twice. Its threads wait in loops, which slows down every other product, so each session has
one thread, and large matrices are divided over ours.
Source: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from einsum_transformer.engine import blas
from einsum_transformer.engine.parallel import for_each
from einsum_transformer.notes import note_once

Array = np.ndarray

SIZES = (16, 32, 64, 128, 256)
"""Possible sizes of a group."""
FEW = 4
"""Rows of x up to which a product per row is faster than one of floats."""
_COARSE = 1 << 22
"""Elements of a matrix from which its rows are divided over the threads."""


def available() -> bool:
    """Return whether ONNX Runtime is installed and right; a note says why if it is installed and is not."""
    return _libraries() is not None


@cache
def _libraries() -> tuple[Any, Any] | None:
    """Return the modules onnxruntime and onnx, or None."""
    try:
        import onnx
        import onnxruntime
    except ImportError:
        return None
    try:
        right = _is_right((onnxruntime, onnx))
    except Exception as error:
        return _without(f"this version of ONNX Runtime is not supported: {error}")
    return (onnxruntime, onnx) if right else _without("4-bit products of ONNX Runtime are wrong here")


def _without(why: str) -> None:
    note_once(f"{' '.join(why.split())[:200]}; codes in groups are multiplied by NumPy, which is slower")


def _is_right(libraries: tuple[Any, Any]) -> bool:
    """Test the product with zero points and a last group that is shorter."""
    rng = np.random.default_rng(0)
    codes, zeros = (rng.integers(-128, 128, (70, n)).astype(np.int8) for n in (150, 5))
    scales, x = rng.random((70, 5), np.float32), rng.standard_normal((3, 150), np.float32)
    offsets, factors = np.repeat(zeros, 32, axis=1)[:, :150], np.repeat(scales, 32, axis=1)[:, :150]
    expected = ((codes - offsets.astype(np.float64)) * factors) @ x.T
    session = _session(libraries, list(_digits(codes, scales, zeros)), 32)
    found = np.concatenate([_run(session, x[i : i + 1]) for i in range(3)])
    return bool(np.abs(found.T - expected).max() < 1e-5 * np.abs(expected).max())


class GroupedCodes:
    """A matrix (n, k) of codes for products with a few rows.

    codes: int8 (n, k). scales: float32 (n, groups). zeros: int8 (n, groups); None: 0. size: elements of a
    group, one of `SIZES`.
    """

    def __init__(self, codes: Array, scales: Array, zeros: Array | None, size: int) -> None:
        libraries = _libraries()
        assert libraries is not None
        n, k = codes.shape
        step = -(-n // blas.free_threads()) if n * k >= _COARSE else n
        self._sessions: list[tuple[slice, Any]] = []
        for start in range(0, n, step):
            rows = slice(start, min(start + step, n))
            own = None if zeros is None else zeros[rows]
            digits = list(_digits(codes[rows], scales[rows], own))
            self._sessions.append((rows, _session(libraries, digits, size)))
        self._rows = n

    def product(self, x: Array, out: Array | None = None) -> Array:
        """Return the product (n, m) with rows x (m, k) of float32, computed row by row."""
        y = np.empty((self._rows, len(x)), np.float32) if out is None else out

        def run(rows: slice, session: Any) -> None:
            for i in range(len(x)):
                y[rows, i] = _run(session, x[i : i + 1])[0]

        for_each(run, self._sessions, coarse=len(self._sessions) > 1)
        return y


class _Digits(NamedTuple):
    """Digits uint8 (n, k) from 0 to 15, and the scales and zeros of their groups."""

    codes: Array
    scales: Array
    zeros: Array


def _digits(codes: Array, scales: Array, zeros: Array | None) -> Iterator[_Digits]:
    """Divide codes into one or two digits."""
    zeros = np.zeros(scales.shape, np.int8) if zeros is None else zeros
    low, high = (int(f([f(codes), f(zeros)])) for f in (np.min, np.max))
    if high - low < 16:
        least = max(min(low, -8), high - 15) if low < 0 else min(low, 0)
        yield _Digits((codes - least).astype(np.uint8), scales, (zeros - least).astype(np.uint8))
        return
    yield _Digits(((codes >> 4) + 8).view(np.uint8), 16 * scales, ((zeros >> 4) + 8).view(np.uint8))
    yield _Digits((codes & 15).view(np.uint8), scales, (zeros & 15).view(np.uint8))


def _run(session: Any, x: Array) -> Array:
    return session.run(None, {"x": x})[0]


def _session(libraries: tuple[Any, Any], digits: list[_Digits], size: int) -> Any:
    """Return an inference session of the sum of the products of the digits."""
    onnxruntime, onnx = libraries
    n, k = digits[0].codes.shape
    helper, number = onnx.helper, onnx.TensorProto.FLOAT
    nodes, constants = [], []
    results = ["y"] if len(digits) == 1 else [f"y{i}" for i in range(len(digits))]
    for i, (each, result) in enumerate(zip(digits, results)):
        arrays = {f"codes{i}": _blocks(each.codes, size), f"scales{i}": each.scales}
        arrays[f"zeros{i}"] = _pairs(_padded(each.zeros, 2)).reshape(-1)
        constants += [
            onnx.numpy_helper.from_array(np.ascontiguousarray(a), name) for name, a in arrays.items()
        ]
        own = {"K": k, "N": n, "bits": 4, "block_size": size, "accuracy_level": 1}  # 1: float32
        nodes.append(helper.make_node("MatMulNBits", ["x", *arrays], [result], domain="com.microsoft", **own))
    if len(results) > 1:
        nodes.append(helper.make_node("Add", results, ["y"]))
    ends = [helper.make_tensor_value_info(name, number, ["m", each]) for name, each in (("x", k), ("y", n))]
    graph = helper.make_graph(nodes, "product", ends[:1], ends[1:], constants)
    versions = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=versions, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 3  # errors
    return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def _blocks(codes: Array, size: int) -> Array:
    """Digits (n, k) as bytes of two, (n, groups, size / 2)."""
    return _pairs(_padded(codes, size)).reshape(len(codes), -1, size // 2)


def _padded(codes: Array, size: int) -> Array:
    """Append zeros to the rows so that their length is a multiple of `size`."""
    return np.pad(codes, ((0, 0), (0, -codes.shape[1] % size)))


def _pairs(codes: Array) -> Array:
    """Two digits per byte, the first one in the lower four bits."""
    return codes[:, ::2] | codes[:, 1::2] << 4
