"""Products of 4-bit matrices with a few rows by ONNX Runtime, which multiplies codes in registers.

y[n, m] = sum_k (codes[n, k] - zeros[n, k // size]) * scales[n, k // size] * x[m, k], in float32. MatMulNBits
has its own order of the codes, so they are held twice. Its threads wait in loops, which slows down every
other product, so each session has one thread, and large matrices are divided over ours.
Source: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from functools import cache
from typing import Any

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
    note_once(f"{' '.join(why.split())[:200]}; weights of 4 bits are multiplied by NumPy, which is slower")


def _is_right(libraries: tuple[Any, Any]) -> bool:
    """Test the product with zero points and a last group that is shorter."""
    rng = np.random.default_rng(0)
    codes, zeros = rng.integers(0, 16, (70, 150), np.uint8), rng.integers(0, 16, (70, 5), np.uint8)
    scales, x = rng.random((70, 5), np.float32), rng.standard_normal((3, 150), np.float32)
    offsets, factors = np.repeat(zeros, 32, axis=1)[:, :150], np.repeat(scales, 32, axis=1)[:, :150]
    expected = ((codes - offsets.astype(np.float64)) * factors) @ x.T
    session = _session(libraries, codes, scales, zeros, 32)
    found = np.concatenate([_run(session, x[i : i + 1]) for i in range(3)])
    return bool(np.abs(found.T - expected).max() < 1e-3)


class FourBits:
    """A matrix (n, k) of 4-bit codes for products with a few rows.

    codes: uint8 (n, k), 0 to 15. scales: float32 (n, groups). zeros: uint8 (n, groups); None: 8. size:
    elements of a group, one of `SIZES`.
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
            self._sessions.append((rows, _session(libraries, codes[rows], scales[rows], own, size)))
        self._rows = n

    def product(self, x: Array, out: Array | None = None) -> Array:
        """Return the product (n, m) with rows x (m, k) of float32, computed row by row."""
        y = np.empty((self._rows, len(x)), np.float32) if out is None else out

        def run(rows: slice, session: Any) -> None:
            for i in range(len(x)):
                y[rows, i] = _run(session, x[i : i + 1])[0]

        for_each(run, self._sessions, coarse=len(self._sessions) > 1)
        return y


def _run(session: Any, x: Array) -> Array:
    return session.run(None, {"x": x})[0]


def _session(libraries: tuple[Any, Any], codes: Array, scales: Array, zeros: Array | None, size: int) -> Any:
    """Return an inference session of one operator."""
    onnxruntime, onnx = libraries
    (n, k), groups = codes.shape, scales.shape[1]
    padded = np.zeros((n, groups * size), np.uint8)
    padded[:, :k] = codes
    constants = {"codes": _pairs(padded).reshape(n, groups, size // 2), "scales": scales}
    if zeros is not None:
        even = np.zeros((n, groups + groups % 2), np.uint8)
        even[:, :groups] = zeros
        constants["zeros"] = _pairs(even).reshape(-1)
    helper, number = onnx.helper, onnx.TensorProto.FLOAT
    node = helper.make_node(
        "MatMulNBits",
        ["x", *constants],
        ["y"],
        domain="com.microsoft",
        K=k,
        N=n,
        bits=4,
        block_size=size,
        accuracy_level=1,  # float32
    )
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", number, ["m", k])],
        [helper.make_tensor_value_info("y", number, ["m", n])],
        [onnx.numpy_helper.from_array(np.ascontiguousarray(each), name) for name, each in constants.items()],
    )
    versions = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=versions, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 3  # errors
    return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def _pairs(codes: Array) -> Array:
    """Two codes per byte, the first one in the lower four bits."""
    return codes[:, ::2] | codes[:, 1::2] << 4
