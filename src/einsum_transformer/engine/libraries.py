"""NumPy's BLAS library, and what is known of every library."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import numpy as np

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class Library:
    """A BLAS library: its name in tables, its matrix product and its thread control."""

    name: str
    version: str
    matmul: Callable[..., Array]
    """The semantics of np.matmul for at least two axes: (..., m, k) . (..., k, n) -> (..., m, n)."""
    set_threads: Callable[[int], None]
    get_threads: Callable[[], int]

    def __str__(self) -> str:
        return f"{self.name} {self.version}".strip()


@cache
def numpy_library() -> Library:
    """Return NumPy's own BLAS (OpenBLAS in the PyPI wheels, Accelerate on a Mac)."""
    from threadpoolctl import ThreadpoolController

    libraries = ThreadpoolController().select(user_api="blas").lib_controllers
    ours = [library for library in libraries if "mkl" not in library.internal_api] or libraries
    if not ours:
        name = np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"]  # type: ignore[index]
        return Library(f"numpy/{name}", "", np.matmul, lambda count: None, lambda: 1)
    library = ours[0]
    return Library(
        f"numpy/{library.internal_api}",
        str(library.version or ""),
        np.matmul,
        _setter(library),
        lambda: int(library.num_threads),
    )


def _setter(library: Any) -> Callable[[int], None]:
    """Return the function that sets a library's thread count and works from any thread.

    For an OpenBLAS with its own thread pool, threadpoolctl has an effect only in the first thread that calls
    it; the callers here hold a lock, so they call the library directly.
    """
    if library.internal_api == "openblas" and library.info().get("threading_layer") != "openmp":
        symbols = ctypes.CDLL(library.filepath)
        for prefix, suffix in product(("", "scipy_"), ("", "64_", "_64")):
            with suppress(AttributeError):
                return getattr(symbols, f"{prefix}openblas_set_num_threads{suffix}")
    return library.set_num_threads
