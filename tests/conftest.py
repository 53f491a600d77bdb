"""Shared fixtures. This file also puts its folder on the import path, for the helper modules of the tests."""

import logging
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import einsum_transformer as et
from agreement import WHERE, disagreement, problems_of
from einsum_transformer.engine import blas
from einsum_transformer.loading.load import load
from einsum_transformer.loading.sources import DTYPES
from einsum_transformer.notes import LOGGER, note_once
from golden_files import Folders, Models, load_golden, read_only, write_folder


@pytest.fixture(scope="session")
def golden_folder(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Folders of golden models, written on first use; tests share them and must not write to them."""
    top = tmp_path_factory.mktemp("golden")

    @cache
    def folder(name: str) -> Path:
        golden = load_golden(name)
        return write_folder(top / name, golden.config, golden.weights)

    return folder


@pytest.fixture(scope="session")
def golden_model(golden_folder: Folders) -> Models:
    """Golden models, loaded on first use; tests share them and must not change them."""

    @cache
    def model(name: str, dtype: str = "float32") -> et.Model:
        return read_only(et.load(golden_folder(name), dtype=dtype))

    return model


@pytest.fixture(autouse=True, scope="session")
def threads_do_not_follow_the_load() -> None:
    """Tests run on all cores at once, so the number of threads would differ from run to run."""
    blas.adaptive = False


@pytest.fixture(autouse=True)
def notes_are_shown() -> Iterator[None]:
    """Reset `--quiet` and the cache of notes that are shown once, so that each test sees all its notes."""
    note_once.cache_clear()
    yield
    LOGGER.setLevel(logging.NOTSET)


@pytest.fixture
def every_load_is_inspected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run `inspect` on every source that a test loads, and check that both report the same errors."""

    def both(source: Any, dtype: str = "float32", **options: Any) -> et.Model:
        where = {name: value for name, value in options.items() if name in WHERE}
        refusal = ""
        try:
            return load(source, dtype, **options)
        except et.InputError as error:
            refusal = str(error)
            raise
        finally:
            # inspect does not have load's other options, such as seed.
            if not refusal or (options == where and dtype in DTYPES):
                assert disagreement(refusal, problems_of(source, **where)) == ""

    monkeypatch.setattr(et, "load", both)
