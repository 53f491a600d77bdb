"""Puts this folder on the import path, so that tests in sub-folders find the helpers that lie here."""

import logging
from collections.abc import Iterator

import pytest

from einsum_transformer.notes import LOGGER


@pytest.fixture(autouse=True)
def notes_are_shown() -> Iterator[None]:
    """A command with `--quiet` in one test does not silence the notes of the next."""
    yield
    LOGGER.setLevel(logging.NOTSET)
