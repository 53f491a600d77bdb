"""The BLAS library of all matrix products, and its thread count.

NumPy's own BLAS is always available. Intel MKL is called through ctypes if the PyPI wheel `mkl` is installed
(the extra `[mkl]`). `matmul` is the product of the current provider; `use` switches it at run time.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from einsum_transformer.errors import InputError

Array = np.ndarray

matmul: Callable[..., Array] = np.matmul
"""The matrix product of the current provider, with the semantics of np.matmul: (..., m, k) . (..., k, n) ->
(..., m, n)."""


@dataclass(frozen=True, slots=True)
class Provider:
    """A BLAS library: its name in tables, its matrix product and its thread control."""

    name: str
    version: str
    matmul: Callable[..., Array]
    set_threads: Callable[[int], None]
    get_threads: Callable[[], int]

    def __str__(self) -> str:
        return f"{self.name} {self.version}".strip()


def use(name: str) -> Provider:
    """Set the provider of all products to `auto`, `numpy` or `mkl`.

    `auto` selects MKL if it is installed and the processor is Intel's, else NumPy's BLAS, which was faster
    than MKL on other processors (docs/performance.md).
    """
    global matmul, _current
    if name == "auto":
        name = "mkl" if _mkl_library() is not None and _is_intel() else "numpy"
    if name not in ("numpy", "mkl"):
        raise InputError(f"`blas` is {name!r}: expected auto, numpy or mkl")
    with _lock:
        threads = current().get_threads()  # 1 inside `one_thread`, which restores the count at its end
        _current = numpy_provider() if name == "numpy" else mkl_provider()
        matmul = _current.matmul
        _set_threads(threads)
        return _current


def current() -> Provider:
    """Return the current provider (NumPy's until `use` selects another)."""
    return _current if _current is not None else numpy_provider()


def set_threads(count: int) -> None:
    """Set the number of threads of the current BLAS."""
    global _restored_count
    if count < 1:
        raise InputError(f"`threads` is {count}: expected 1 or more")
    with _lock:
        if _regions:
            _restored_count = count
        else:
            _set_threads(count)


def get_threads() -> int:
    """Return the number of threads that is set for the current BLAS."""
    return _restored_count if _regions else current().get_threads()


def free_threads() -> int:
    """Return the number of threads that a task may use now: 1 while any thread is inside `one_thread`."""
    return 1 if _regions else current().get_threads()


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit BLAS to one thread; on exit, restore the count that was set before or inside.

    The count applies to all threads of the process. Regions of several threads may overlap: the first one to
    enter saves the count and the last one to exit restores it.
    """
    global _regions, _restored_count
    with _lock:
        if not _regions:
            _restored_count = current().get_threads()
            _set_threads(1)
        _regions += 1
    try:
        yield
    finally:
        with _lock:
            _regions -= 1
            if not _regions:
                _set_threads(_restored_count)


def _set_threads(count: int) -> None:
    provider = current()
    provider.set_threads(count)
    if provider.name == "mkl":
        # Products of other types than float32 and float64 still use NumPy.
        numpy_provider().set_threads(count)


_lock = threading.Lock()
_regions = 0
"""The number of active regions of `one_thread`."""
_restored_count = 1
"""The thread count to set when they have exited."""
_current: Provider | None = None


@cache
def numpy_provider() -> Provider:
    """Return NumPy's own BLAS (OpenBLAS in the PyPI wheels, Accelerate on a Mac)."""
    from threadpoolctl import ThreadpoolController

    libraries = ThreadpoolController().select(user_api="blas").lib_controllers
    ours = [library for library in libraries if "mkl" not in library.internal_api] or libraries
    if not ours:
        name = np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"]  # type: ignore[index]
        return Provider(f"numpy/{name}", "", np.matmul, lambda count: None, lambda: 1)
    library = ours[0]
    return Provider(
        f"numpy/{library.internal_api}",
        str(library.version or ""),
        np.matmul,
        _setter(library),
        lambda: int(library.num_threads),
    )


def _setter(library: Any) -> Callable[[int], None]:
    """Return the function that sets a library's thread count and works from any thread.

    For an OpenBLAS with its own thread pool, threadpoolctl only obeys the first thread that calls it and
    silently ignores all others; the functions here hold a lock, so they call the library directly.
    """
    if library.internal_api == "openblas" and library.info().get("threading_layer") != "openmp":
        symbols = ctypes.CDLL(library.filepath)
        for prefix, suffix in product(("", "scipy_"), ("", "64_", "_64")):
            with suppress(AttributeError):
                return getattr(symbols, f"{prefix}openblas_set_num_threads{suffix}")
    return library.set_num_threads


@cache
def mkl_provider() -> Provider:
    """Return Intel MKL from the wheel `mkl`, called through ctypes (which releases the GIL)."""
    library = _mkl_library()
    if library is None:
        raise InputError("`blas` mkl: the package is not installed; pip install 'einsum-transformer[mkl]'")

    def set_threads(count: int) -> None:
        # A thread-local limit (threadpoolctl leaves one behind) would take precedence over the global one.
        library.MKL_Set_Num_Threads_Local(0)
        library.MKL_Set_Num_Threads(count)

    return Provider(
        "mkl",
        importlib.metadata.version("mkl"),
        _mkl_matmul(library),
        set_threads,
        lambda: int(library.MKL_Get_Max_Threads()),
    )


@cache
def _mkl_library() -> Any:
    """Return the loaded library, or None if the wheel is not installed."""
    try:
        files = importlib.metadata.files("mkl") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = [Path(str(file.locate())).resolve() for file in files if "mkl_rt" in file.name]
    if not found:
        return None
    for name in ("libiomp5.so", "libiomp5.dylib", "libiomp5md.dll"):
        if (runtime := found[0].parent / name).exists():
            ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
    try:
        return ctypes.CDLL(str(found[0]), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise InputError(f"`blas` mkl: {found[0].name} cannot be loaded: {error}") from None


def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "intel" in platform.processor().lower()


_ROW_MAJOR, _NO_TRANSPOSE, _TRANSPOSE = 101, 111, 112


def _mkl_matmul(library: Any) -> Callable[..., Array]:
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    products = {}
    for kind, name, real in (
        (np.float32, "cblas_sgemm", ctypes.c_float),
        (np.float64, "cblas_dgemm", ctypes.c_double),
    ):
        gemm = getattr(library, name)
        gemm.argtypes = [integer] * 6 + [real, pointer, integer, pointer, integer, real, pointer, integer]
        gemm.restype = None
        products[np.dtype(kind).str] = gemm

    def product(a: Array, b: Array) -> Array:
        """a . b by MKL for float matrices and stacks of them (one matrix at a time), else by NumPy."""
        gemm = products.get(a.dtype.str)
        if gemm is None or a.dtype != b.dtype or a.ndim < 2 or b.ndim < 2 or 0 in a.shape or 0 in b.shape:
            return np.matmul(a, b)
        if a.ndim == 2 and b.ndim == 2:
            out = np.empty((a.shape[0], b.shape[1]), a.dtype)
            _gemm_into(gemm, a, b, out)
            return out
        stack = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        if a.shape[-2] * a.shape[-1] * b.shape[-1] < 1 << 16:
            return np.matmul(a, b)
        out = np.empty((*stack, a.shape[-2], b.shape[-1]), a.dtype)
        a, b = np.broadcast_to(a, (*stack, *a.shape[-2:])), np.broadcast_to(b, (*stack, *b.shape[-2:]))
        for index in np.ndindex(*stack):
            _gemm_into(gemm, a[index], b[index], out[index])
        return out

    return product


def _gemm_into(gemm: Any, a: Array, b: Array, out: Array) -> None:
    transpose_a, a, lda = _layout(a)
    transpose_b, b, ldb = _layout(b)
    (m, k), n = a.shape, b.shape[1]
    gemm(
        _ROW_MAJOR, transpose_a, transpose_b, m, n, k,
        1.0, _address(a), lda, _address(b), ldb, 0.0, _address(out), n,
    )  # fmt: skip


def _layout(a: Array) -> tuple[int, Array, int]:
    """Return (transposed?, matrix, leading dimension); copy only if neither axis has unit stride."""
    rows, columns = a.shape
    down, across = a.strides
    item = a.itemsize
    if (across == item or columns == 1) and (rows == 1 or (down >= columns * item and down % item == 0)):
        return _NO_TRANSPOSE, a, down // item if rows > 1 else max(columns, 1)
    if (down == item or rows == 1) and (columns == 1 or (across >= rows * item and across % item == 0)):
        return _TRANSPOSE, a, across // item if columns > 1 else max(rows, 1)
    return _NO_TRANSPOSE, np.ascontiguousarray(a), columns


def _address(a: Array) -> int:
    return a.__array_interface__["data"][0]
