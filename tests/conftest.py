"""Puts this folder on the import path, so that tests in sub-folders find the helpers that lie here."""

import logging
from collections.abc import Iterator

import pytest

from einsum_transformer.notes import LOGGER, note_once


@pytest.fixture(autouse=True)
def notes_are_shown() -> Iterator[None]:
    """Neither a command with `--quiet` in one test nor a note made once silences the notes of the next."""
    note_once.cache_clear()
    yield
    LOGGER.setLevel(logging.NOTSET)
