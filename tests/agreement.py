"""`load` and `inspect` on one source: what the one refuses, the other lists."""

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
"""Depends on the machine and not on the source, so inspect does not say it."""


def problems_of(source: str | Path | RunConfig, **where: Any) -> list[str]:
    """What `inspect` has against a source; that alone which it raises, if it does."""
    options, level = Options(**where), LOGGER.level
    LOGGER.setLevel(logging.CRITICAL)  # the notes are load's
    try:
        return list(inspect(find(source, options), options).problems)
    except et.InputError as error:
        return [str(error)]
    finally:
        LOGGER.setLevel(level)


def disagreement(refusal: str, problems: list[str]) -> str:
    """What is wrong with the problems that inspect lists of a source which load refuses so, "" if nothing is.

    refusal: "" if it was loaded. Of tensors load tells up to three problems in one line.
    """
    if not refusal or not problems:
        same = not refusal and not problems
    else:
        told = ["; ".join(problems[:count]) for count in (1, 2, 3)]
        same = refusal in problems or any(refusal.endswith(f": {text}") for text in told)
    if same or MEMORY in refusal:
        return ""
    return f"load: {refusal[:300] or 'fine'!r}; inspect: {[problem[:200] for problem in problems[:4]]}"


def compared(source: str | Path | RunConfig, **where: Any) -> tuple[str, str]:
    """(what load and inspect disagree in, why load refuses the source); "" for nothing."""
    refusal = ""
    try:
        load(source, **where)
    except et.InputError as error:
        refusal = str(error)
    return disagreement(refusal, problems_of(source, **where)), refusal
