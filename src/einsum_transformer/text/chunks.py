"""A text as chunks of tokens of the same length, for evaluation and calibration."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from einsum_transformer.errors import InputError
from einsum_transformer.text.tokenizer import Tokenizer

Array = np.ndarray

_LARGEST = 1 << 28
"""Bytes of a text file."""


def token_chunks(tokenizer: Tokenizer, text: str | Path, size: int, most: int | None = None) -> Array:
    """Return the token ids (n, size) of a text, or of a file in UTF-8, without those after the last chunk.

    The first token of each chunk is replaced by BOS if the tokenizer adds one to a text. most: the number of
    chunks; default all. Raises InputError for a text that is shorter than a chunk or not in UTF-8.
    """
    content, name = (read_text(text), str(text)) if isinstance(text, Path) else (text, "the text")
    bos = tokenizer.bos_id if tokenizer.encode("a")[:1] == [tokenizer.bos_id] else None
    tokens = np.array(tokenizer.encode(content, add_special_tokens=False), np.int64)
    tokens = tokens if bos is None else np.concatenate([[bos], tokens])
    count = len(tokens) // size
    if not count:
        raise InputError(f"{name} has {len(tokens):,} tokens: at least {size:,} are needed")
    chunks = tokens[: count * size].reshape(count, size)[:most].copy()
    if bos is not None:
        chunks[:, 0] = bos
    return chunks


def read_text(path: Path) -> str:
    """Return the text of a file. Raises InputError if it is too large or not in UTF-8."""
    if path.stat().st_size > _LARGEST:
        raise InputError(f"{path}: larger than {_LARGEST >> 20} MiB")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a text in UTF-8: byte {error.start}") from None
