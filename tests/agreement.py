"""Compares `load` and `inspect` on a source: `inspect` must list the errors that `load` raises."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import einsum_transformer as et
from einsum_transformer.analysis.inspect import inspect
from einsum_transformer.loading.load import load
from einsum_transformer.loading.sources import Options, find
from einsum_transformer.models.run_config import RunConfig
from einsum_transformer.notes import LOGGER

WHERE = ("revision", "offline", "allow_links")
MEMORY = "of random weights, the machine has"
"""Part of an error that depends on the machine and not on the source, so inspect does not report it."""


def problems_of(source: str | Path | RunConfig, **where: Any) -> list[str]:
    """The problems that `inspect` lists, or the error that it raises."""
    options, level = Options(**where), LOGGER.level
    LOGGER.setLevel(logging.CRITICAL)  # only the notes of load are wanted
    try:
        return list(inspect(find(source, options), options).problems)
    except et.InputError as error:
        return [str(error)]
    finally:
        LOGGER.setLevel(level)


def disagreement(refusal: str, problems: list[str]) -> str:
    """Compare the error of load with the problems of inspect; returns a message, or "" if they agree.

    refusal: the message of load's error, or "" if the source was loaded. For tensors, load reports up to
    three problems in one line.
    """
    if not refusal or not problems:
        same = not refusal and not problems
    else:
        joined = ["; ".join(problems[:count]) for count in (1, 2, 3)]
        same = refusal in problems or any(refusal.endswith(f": {text}") for text in joined)
    if same or MEMORY in refusal:
        return ""
    return f"load: {refusal[:300] or 'fine'!r}; inspect: {[problem[:200] for problem in problems[:4]]}"


def compared(source: str | Path | RunConfig, **where: Any) -> tuple[str, str]:
    """(message if load and inspect disagree, error message of load); "" for none."""
    refusal = ""
    try:
        load(source, **where)
    except et.InputError as error:
        refusal = str(error)
    return disagreement(refusal, problems_of(source, **where)), refusal
