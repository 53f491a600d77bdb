"""Puts this folder on the import path, so that tests in sub-folders find the helpers that lie here."""

import logging
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import einsum_transformer as et
from agreement import WHERE, disagreement, problems_of
from einsum_transformer.loading.load import load
from einsum_transformer.loading.sources import DTYPES
from einsum_transformer.notes import LOGGER, note_once
from golden_files import Folders, Models, load_golden, read_only, write_folder


@pytest.fixture(scope="session")
def golden_folder(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """The folder of a golden model, written when it is first asked for; tests share it and write nothing."""
    top = tmp_path_factory.mktemp("golden")

    @cache
    def folder(name: str) -> Path:
        golden = load_golden(name)
        return write_folder(top / name, golden.config, golden.weights)

    return folder


@pytest.fixture(scope="session")
def golden_model(golden_folder: Folders) -> Models:
    """A golden model, loaded when it is first asked for; tests share it and do not change it."""

    @cache
    def model(name: str, dtype: str = "float32") -> et.Model:
        return read_only(et.load(golden_folder(name), dtype=dtype))

    return model


@pytest.fixture(autouse=True)
def notes_are_shown() -> Iterator[None]:
    """Neither a command with `--quiet` in one test nor a note made once silences the notes of the next."""
    note_once.cache_clear()
    yield
    LOGGER.setLevel(logging.NOTSET)


@pytest.fixture
def every_load_is_inspected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test loads, or tries to, `inspect` is asked about, and must say the same."""

    def both(source: Any, dtype: str = "float32", **options: Any) -> et.Model:
        where = {name: value for name, value in options.items() if name in WHERE}
        refusal = ""
        try:
            return load(source, dtype, **options)
        except et.InputError as error:
            refusal = str(error)
            raise
        finally:
            # A refused option, such as a negative seed, is none of inspect's business.
            if not refusal or (options == where and dtype in DTYPES):
                assert disagreement(refusal, problems_of(source, **where)) == ""

    monkeypatch.setattr(et, "load", both)
