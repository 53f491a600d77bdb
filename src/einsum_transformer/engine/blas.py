"""The BLAS libraries of the matrix products, their thread count, and which library computes which product.

NumPy's own BLAS is always available; Intel MKL is used if the PyPI wheel `mkl` is installed. Every plan of
`einsum` has one of the `KINDS` of products, and each kind has a library.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, get_args

import numpy as np

from einsum_transformer.engine.libraries import Library, numpy_library
from einsum_transformer.engine.load import Load
from einsum_transformer.engine.mkl import mkl_library, mkl_problem
from einsum_transformer.errors import InputError

Array = np.ndarray

Kind = Literal["vector", "narrow", "matrix", "stack"]
"""vector: a matrix and a vector, as in decoding; narrow: up to 32 rows or columns; matrix: more; stack: a
number of small matrices, as in attention."""
KINDS: tuple[Kind, ...] = get_args(Kind)
Choice = Mapping[str, str]
"""Kind of product -> "numpy" or "mkl"; "kind, 1 thread" has precedence for products on one thread."""

FEW = 32
"""Rows of a product up to which it is bound by reading the weights."""


class Product:
    """The matrix product of one kind: `matmul` is that of the current library."""

    __slots__ = ("library", "matmul")

    def __init__(self) -> None:
        self.library: str = "numpy"
        self.matmul: Callable[..., Array] = np.matmul


PRODUCTS: dict[Kind, Product] = {kind: Product() for kind in KINDS}


def product_of(rows: int, columns: int, count: int = 1) -> Product:
    """Return the product of `count` pairs of matrices with results of rows x columns."""
    if count > 1:
        return PRODUCTS["stack"]
    least = min(rows, columns)
    return PRODUCTS["vector" if least == 1 else "narrow" if least <= FEW else "matrix"]


def matmul(a: Array, b: Array) -> Array:
    """The matrix product by the library of its kind, with the semantics of np.matmul for two or more axes."""
    count = 2 if a.ndim > 2 or b.ndim > 2 else 1
    return product_of(a.shape[-2], b.shape[-1], count).matmul(a, b)


def use(name: str, choice: Choice | None = None) -> None:
    """Set the library of all products to `auto`, `numpy` or `mkl`.

    `auto` uses the measured `choice` (see `etx machine`), and NumPy's BLAS for kinds that it does not
    contain. It also uses fewer threads while other processes use the cores (see `follow_load`), which may
    change the last bits of results; with `numpy` and `mkl` the number of threads is fixed.
    """
    global _name, _choice, _free, _chosen_before
    if name not in ("auto", "numpy", "mkl"):
        raise InputError(f"`blas` is {name!r}: expected auto, numpy or mkl")
    if name == "mkl":
        mkl_provider()
    with _lock:
        threads = get_threads()
        _name, _free, _chosen_before = name, None, True
        _choice = dict(choice or {}) if name == "auto" else dict.fromkeys(KINDS, name)
        if "mkl" in _choice.values() and mkl_library() is None:
            _choice = {}
        _set_wanted(threads)


def chosen() -> bool:
    """Return whether `use` was called."""
    return _chosen_before


def current() -> Library:
    """Return the library of large products."""
    return _library(_chosen("matrix", False))


def description() -> str:
    """Return the names and versions of the libraries in use, with their products if there are two."""
    by_library: dict[str, list[str]] = {}
    for kind in KINDS:
        by_library.setdefault(str(_library(_chosen(kind, False))), []).append(kind)
    if len(by_library) == 1:
        return next(iter(by_library))
    return ", ".join(f"{library} ({' '.join(kinds)})" for library, kinds in by_library.items())


def several() -> bool:
    """Return whether more than one library is in use."""
    return len({_chosen(kind, False) for kind in KINDS}) > 1


def settings() -> tuple[str, dict[str, str]]:
    """Return the arguments with which another process can call `use`."""
    return _name, dict(_choice if _name == "auto" else {})


def mkl_provider() -> Library:
    """Return MKL. Errors: InputError if it is not installed."""
    library = mkl_library()
    if library is None:
        raise InputError(f"`blas` mkl: {mkl_problem()}")
    return library


def set_threads(count: int) -> None:
    """Set the number of threads of the products, at most as many as the library supports."""
    if count < 1:
        raise InputError(f"`threads` is {count}: expected 1 or more")
    with _lock:
        _set_wanted(count)


def get_threads() -> int:
    """Return the number of threads that is set, also while fewer are in use."""
    return _wanted if _limited else current().get_threads()


def free_threads() -> int:
    """Return the number of threads that a task may use now: 1 while any thread is inside `one_thread`, and
    fewer than `get_threads` while other processes use the cores."""
    return 1 if _regions else _usable()


def shares() -> int:
    """Return the number of parts into which a task is divided: 1 inside `one_thread`, else the number of
    threads that is set, so that results do not depend on other processes."""
    return 1 if _regions else get_threads()


def follow_load(long: bool) -> None:
    """With `auto`, limit the products to the cores that other processes leave free (see `Load.limit`).

    long: whether the next products have many rows. Called often (by `for_each`, once per layer); it does
    nothing for a tenth of a second after a reading.
    """
    global _free
    if _name != "auto" or not adaptive or _regions or _fixed:
        return
    free = _load.limit(free_threads, long)
    if free != _free:
        with _lock:
            _remember()
            _free = free
            _apply()


@contextmanager
def fixed_threads() -> Iterator[None]:
    """Use the number of threads that is set, whatever other processes do, so that results are the same bit
    for bit in every run."""
    global _fixed, _free
    with _lock:
        _fixed += 1
        _remember()
        _free = None
        _apply()
    try:
        yield
    finally:
        with _lock:
            _fixed -= 1


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit BLAS to one thread; on exit, restore the count that was set before or inside.

    The count applies to all threads of the process. Regions of several threads may overlap: the first one to
    enter limits it and the last one to exit restores it.
    """
    global _regions
    with _lock:
        _remember()
        _regions += 1
        if _regions == 1:
            _apply()
    try:
        yield
    finally:
        with _lock:
            _regions -= 1
            if not _regions:
                _apply()


def _usable() -> int:
    wanted = get_threads()
    return wanted if _free is None else min(wanted, _free)


def _remember() -> None:
    """Store the thread count before fewer threads are used; others may have changed it in the library."""
    global _wanted
    if not _limited:
        _wanted = current().get_threads()


def _set_wanted(count: int) -> None:
    """Set the thread count, limited to what the library supports."""
    global _wanted
    if not _regions:
        library = current()
        library.set_threads(count)
        count = library.get_threads()
    _wanted = count
    _apply()


def _apply() -> None:
    """Set the threads of the libraries in use, and the library of each kind of product."""
    global _limited
    threads = 1 if _regions else _wanted if _free is None else min(_wanted, _free)
    _limited = threads < _wanted
    # Products of other types than float32 and float64 always use NumPy.
    for each in {"numpy", *_choice.values()}:
        _library(each).set_threads(threads)
    for kind, product in PRODUCTS.items():
        product.library = _chosen(kind, threads == 1)
        product.matmul = _library(product.library).matmul


def _chosen(kind: Kind, one_thread: bool) -> str:
    default = _choice.get(kind, "numpy")
    return _choice.get(f"{kind}, 1 thread", default) if one_thread else default


def _library(name: str) -> Library:
    return mkl_provider() if name == "mkl" else numpy_library()


adaptive: bool = True
"""Whether `auto` follows the load of the machine."""
_lock = threading.Lock()
_load = Load()
_name = "auto"
_chosen_before = False
_choice: dict[str, str] = {}
_wanted = 1
"""The number of threads that is set, while fewer are in use."""
_limited = False
"""Whether fewer threads than `_wanted` are in use."""
_free: int | None = None
"""The number of threads that other processes leave free; None: no limit."""
_regions = 0
"""The number of active regions of `one_thread`."""
_fixed = 0
"""The number of active regions of `fixed_threads`."""
