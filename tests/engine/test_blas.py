"""The BLAS providers: the products are right in every memory layout, and the thread count is what was asked
for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from einsum_transformer.engine import blas, einsum
from einsum_transformer.engine.mkl import mkl_library
from einsum_transformer.errors import InputError

Array = np.ndarray
HAS_MKL = mkl_library() is not None
PROVIDERS = ["numpy", *(["mkl"] if HAS_MKL else [])]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    settings, threads = blas.settings(), blas.get_threads()
    yield
    blas.use(*settings)
    blas.set_threads(threads)


def layouts(a: Array) -> Iterator[Array]:
    """The same matrices in the memory orders that views of activations have."""
    yield a
    yield np.asfortranarray(a)
    yield np.ascontiguousarray(a.swapaxes(-1, -2)).swapaxes(-1, -2)
    wide = np.zeros((*a.shape[:-1], 2 * a.shape[-1] + 1), a.dtype)
    wide[..., : a.shape[-1]] = a
    yield wide[..., : a.shape[-1]]
    tall = np.zeros((*a.shape[:-2], a.shape[-2], a.shape[-1] * 2), a.dtype)
    tall[..., ::2] = a
    yield tall[..., ::2]
    yield a[..., ::-1].copy()[..., ::-1]
    yield a[..., ::-1, :].copy()[..., ::-1, :]


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "complex64"])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_products(provider: str, dtype: str) -> None:
    """Whole numbers, so that every order of summation gives the same."""
    blas.use(provider)
    rng = np.random.default_rng(0)
    sizes = [(1, 1, 1), (1, 7, 5), (6, 1, 5), (6, 7, 1), (33, 40, 21), (2, 3, 4)]
    for m, k, n in sizes:
        for stack in ((), (3,), (2, 2)):
            left = rng.integers(-9, 9, (*stack, m, k)).astype(dtype)
            right = rng.integers(-9, 9, (*stack, k, n)).astype(dtype)
            for a in layouts(left):
                for b in layouts(right):
                    got = blas.matmul(a, b)
                    assert got.dtype == dtype
                    np.testing.assert_array_equal(got, np.matmul(left, right))


@pytest.mark.parametrize("provider", PROVIDERS)
def test_large_stacks_broadcast(provider: str) -> None:
    """Stacks large enough for the library's own product; one of the two may be a single matrix."""
    blas.use(provider)
    rng = np.random.default_rng(1)
    a, b = (rng.integers(-4, 4, shape).astype(np.float32) for shape in ((3, 64, 50), (50, 40)))
    for left, right in ((a, b), (a[:1], np.stack([b] * 3)), (np.broadcast_to(a[0], (3, 64, 50)), b)):
        np.testing.assert_array_equal(blas.matmul(left, right), np.matmul(left, right))


@pytest.mark.parametrize("shape", [(0, 3, 2), (3, 0, 2), (3, 2, 0)])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_empty_matrices(provider: str, shape: tuple[int, int, int]) -> None:
    blas.use(provider)
    m, k, n = shape
    np.testing.assert_array_equal(blas.matmul(np.ones((m, k)), np.ones((k, n))), np.zeros((m, n)))


@pytest.mark.parametrize("provider", PROVIDERS)
def test_foreign_byte_order(provider: str) -> None:
    """Numbers are not read backwards, whichever array came first."""
    blas.use(provider)
    a = np.arange(12.0, dtype=np.float32).reshape(3, 4)
    for kind in ("<f4", ">f4", "<f8", ">f8"):
        swapped = a.astype(kind)
        np.testing.assert_array_equal(einsum("ij,kj->ik", a, a), np.einsum("ij,kj->ik", a, a))
        np.testing.assert_array_equal(einsum("ij,kj->ik", swapped, swapped), np.einsum("ij,kj->ik", a, a))


@pytest.mark.parametrize("provider", PROVIDERS)
def test_not_a_number_passes_through(provider: str) -> None:
    blas.use(provider)
    a = np.ones((20, 20), np.float32)
    a[3, 4] = np.nan
    a[5, 6] = np.inf
    with np.errstate(invalid="ignore"):
        got = blas.matmul(a, np.ones((20, 20), np.float32))
    assert np.isnan(got[3]).all()
    assert np.isinf(got[5]).all()
    assert np.isfinite(np.delete(got, [3, 5], axis=0)).all()


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("count", [1, 2])
def test_threads(provider: str, count: int) -> None:
    blas.use(provider)
    blas.set_threads(count)
    assert blas.get_threads() == blas.current().get_threads() == count


@pytest.mark.parametrize("count", [0, -1])
def test_impossible_thread_counts(count: int) -> None:
    with pytest.raises(InputError, match="threads"):
        blas.set_threads(count)


def test_get_threads_says_what_blas_does() -> None:
    """Also after a count larger than the library allows, and after somebody else changed it."""
    from threadpoolctl import threadpool_limits

    blas.use("numpy")
    blas.set_threads(10**6)
    assert blas.get_threads() == blas.current().get_threads()
    blas.set_threads(2)
    with threadpool_limits(1, user_api="blas"):
        assert blas.get_threads() == 1


@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_thread_count_survives_a_change_of_provider(provider: str) -> None:
    """Set with one in use, it holds for the other, the first time and every time."""
    for count in (1, 2, 1):
        blas.use("numpy")
        blas.set_threads(count)
        blas.use(provider)
        assert blas.get_threads() == blas.current().get_threads() == count


def test_providers_by_name() -> None:
    for name in ("numpy", "auto"):
        blas.use(name)
        assert blas.settings()[0] == name
        assert blas.current().name.startswith("numpy")
        assert blas.description() == str(blas.current())
    with pytest.raises(InputError, match="'magic'"):
        blas.use("magic")


def test_a_provider_that_is_not_installed() -> None:
    """One line, and the provider in use stays in use."""
    program = (
        "from einsum_transformer.engine import blas, mkl\n"
        "mkl.installed_version = lambda: None\n"
        "from einsum_transformer.errors import InputError\n"
        "blas.use('auto')\nbefore = blas.current()\n"
        "try:\n    blas.use('mkl')\nexcept InputError as error:\n    print(blas.current() == before, error)"
    )
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert child.stdout.startswith("True `blas` mkl")


def test_importing_the_package_starts_nothing() -> None:
    """No thread, no BLAS search, none of the heavy packages; NumPy is enough."""
    program = (
        "import sys, threading, einsum_transformer\n"
        "heavy = {'gguf', 'tokenizers', 'jinja2', 'huggingface_hub', 'opt_einsum', 'rich', 'typer'}\n"
        "print(threading.active_count(), sorted(heavy & sys.modules.keys()))"
    )
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert child.stdout.strip() == "1 []"
