"""`auto` uses the library that was measured to be faster for each kind of product."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import einsum_transformer as et
from einsum_transformer.analysis import machine, rates
from einsum_transformer.analysis.machine import Measured, choose
from einsum_transformer.engine import blas, einsum
from einsum_transformer.engine.contract import lowering
from einsum_transformer.engine.libraries import Library
from einsum_transformer.loading import libraries


class Fake:
    """A second library: NumPy's product, counted."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, ...]] = []
        self.threads = 2

    def matmul(self, a: Any, b: Any, out: Any = None) -> Any:
        self.calls.append((*a.shape, b.shape[-1]))
        return np.matmul(a, b, out=out)

    def library(self) -> Library:
        def set_threads(count: int) -> None:
            self.threads = count

        return Library("mkl", "1.0", self.matmul, set_threads, lambda: self.threads)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Fake]:
    """MKL seems to be installed; the user's cache folder is empty."""
    settings, threads = blas.settings(), blas.get_threads()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fake = Fake()
    library = fake.library()
    for module in (blas, machine):
        monkeypatch.setattr(module, "mkl_library", lambda: library)
    monkeypatch.setattr(libraries, "installed_version", lambda: "1.0")
    monkeypatch.setattr(libraries, "mkl_problem", lambda: "")
    blas.set_threads(2)
    yield fake
    blas.use("numpy")
    monkeypatch.undo()
    blas.use(*settings)
    blas.set_threads(threads)


def save(choice: Any, threads: int = 2) -> Path:
    return libraries.store(threads, {"choice": choice})


def test_without_a_measurement_numpy_computes_and_a_note_says_how_to_measure(
    fake: Fake, caplog: pytest.LogCaptureFixture
) -> None:
    libraries.use("auto")
    einsum("ij,jk->ik", np.ones((64, 64)), np.ones((64, 64)))
    assert not fake.calls
    assert "etx machine" in caplog.text
    assert blas.description().startswith("numpy/")


def test_the_stored_choice_decides_for_each_kind(fake: Fake) -> None:
    save({"vector": "mkl", "matrix": "numpy", "matrix, 1 thread": "mkl", "stack": "mkl"})
    libraries.use("auto")
    a, x, few = np.ones((64, 64)), np.ones((64, 1)), np.ones((64, 8))
    assert "numpy" in blas.description()
    assert "mkl 1.0 (vector stack)" in blas.description()
    einsum("ij,jk->ik", a, a)
    einsum("ij,jk->ik", a, few)
    assert not fake.calls
    einsum("ij,jk->ik", a, x)
    assert fake.calls.pop() == (64, 64, 1)
    einsum("bij,bjk->bik", np.ones((3, 64, 64)), np.ones((3, 64, 64)))
    assert fake.calls.pop() == (3, 64, 64, 64)
    assert lowering("ij,jk->ik", a, x).endswith(", by mkl")
    assert lowering("ij,jk->ik", a, a).endswith(", by numpy")
    with blas.one_thread():
        assert fake.threads == 1
        einsum("ij,jk->ik", a, a)
        assert fake.calls.pop() == (64, 64, 64)
        einsum("ij,jk->ik", a, few)
    assert fake.threads == 2
    assert not fake.calls
    blas.use("numpy")
    einsum("ij,jk->ik", a, x)
    assert not fake.calls
    assert "by" not in lowering("ij,jk->ik", a, x)
    blas.use("mkl")
    einsum("ij,jk->ik", a, few)
    assert fake.calls.pop() == (64, 64, 8)
    assert blas.current().name == "mkl"


def test_a_choice_belongs_to_a_thread_count_and_to_versions(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    save({"vector": "mkl"}, threads=3)
    assert libraries.stored_choice(2) is None
    assert libraries.stored_choice(3) == {"vector": "mkl"}
    monkeypatch.setattr(libraries, "processor", lambda: "another processor")
    assert libraries.stored_choice(3) is None


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"choice": 3}', '{"choice": {"vector": "cuda"}}', '{"choice": {"tensor": "mkl"}}',
     '{"choice": {"vector": ["mkl"]}}', '{"choice": {}, "choice": {}}', "\x00", " " * (2 << 20)],
)  # fmt: skip
def test_a_damaged_file_is_noted_and_not_used(
    fake: Fake, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = save({"vector": "mkl"})
    path.write_text(content)
    libraries.use("auto")
    assert str(path) in caplog.text
    assert "not used" in caplog.text
    einsum("ij,jk->ik", np.ones((64, 64)), np.ones((64, 1)))
    assert not fake.calls


def test_a_library_that_cannot_be_loaded_is_noted(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save({"vector": "mkl"})
    monkeypatch.setattr(blas, "mkl_library", lambda: None)
    monkeypatch.setattr(libraries, "mkl_problem", lambda: "libmkl_rt.so.2 cannot be loaded")
    libraries.use("auto")
    assert "MKL is not used: libmkl_rt.so.2 cannot be loaded" in caplog.text
    einsum("ij,jk->ik", np.ones((64, 64)), np.ones((64, 1)))
    assert not fake.calls


def test_choose() -> None:
    """MKL where it is at least 5 % faster, as a geometric mean over the cases of a kind."""

    def speeds(kind: str, threads: int, numpy: list[float], mkl: list[float]) -> list[Measured]:
        return [
            Measured(kind, f"case {i}", threads, name, value)
            for name, values in (("numpy", numpy), ("mkl", mkl))
            for i, value in enumerate(values)
        ]

    measured = [
        *speeds("vector", 1, [10], [10.4]),
        *speeds("vector", 2, [10], [10.6]),
        *speeds("narrow", 1, [10, 10], [20, 5]),
        *speeds("narrow", 2, [10, 10], [40, 5]),
        *speeds("matrix", 1, [10], [1]),
        *speeds("matrix", 2, [10], [11]),
        *speeds("stack", 1, [10], [11]),
        *speeds("stack", 2, [10], [9]),
    ]
    assert choose(measured, 2) == {
        **{"vector": "mkl", "vector, 1 thread": "numpy", "narrow": "mkl", "narrow, 1 thread": "numpy"},
        **{"matrix": "mkl", "matrix, 1 thread": "numpy", "stack": "numpy", "stack, 1 thread": "mkl"},
    }
    assert choose(measured, 2).keys() == libraries.KEYS


def test_a_measurement_is_stored_and_used(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_SECONDS", 1e-4)
    monkeypatch.setattr(machine, "_CACHED", 1 << 20)
    monkeypatch.setattr(machine, "_STREAM", 1 << 20)
    monkeypatch.setattr(rates, "_SECONDS", 1e-4)
    monkeypatch.setattr(rates, "_MODELS", ((128, 1), (256, 1)))
    done = []
    found = et.machine(threads=2, progress=lambda i, total: done.append((i, total)))
    assert done[-1][0] == done[-1][1]
    assert found.path is not None
    assert json.loads(Path(found.path).read_text()) == json.loads(json.dumps(found.to_dict()))
    assert libraries.stored_choice(2) == found.choice
    assert blas.settings() == ("auto", found.choice)
    Path(found.path).unlink()
    assert et.machine(save=False).path is None
    assert not Path(found.path).exists()
    with pytest.raises(et.InputError, match="threads"):
        et.machine(threads=0)
