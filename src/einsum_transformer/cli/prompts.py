"""Prompts from flags, files and stdin, as they are written."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

from einsum_transformer.errors import InputError


def given_prompt(text: str | None, file: str | None, tokens: str | None) -> dict[str, Any]:
    """The `text` or `tokens` that the flags name, both None without a flag, and their `source`."""
    flags = {"--prompt": text, "--prompt-file": file, "--tokens": tokens}
    named = [flag for flag, value in flags.items() if value is not None]
    if len(named) > 1:
        raise InputError(f"{' and '.join(named)} both give the prompt: choose one")
    if tokens is not None:
        return {"text": None, "tokens": read_tokens(Path(tokens)), "source": tokens}
    if file is not None:
        text = read_text(Path(file))
    elif text == "-":
        # Bytes, since the text layer changes line ends; whatever a program puts in its place has text.
        piped = isinstance(sys.stdin, io.TextIOWrapper)
        text = decoded(sys.stdin.buffer.read(), "--prompt -") if piped else sys.stdin.read()
    return {"text": text, "tokens": None, "source": named[0] if named else None}


def read_tokens(path: Path) -> Any:
    """The token ids (b, t) in a .npy file; read through a map, so that its header cannot request memory."""
    import numpy as np

    from einsum_transformer.formats.sniff import kind_of
    from einsum_transformer.formats.unsupported import named

    if (kind := kind_of(path)) not in ("npy", "binary"):
        words = "a .npz archive: save its array of ids with np.save" if kind == "zip" else named(kind)
        words = words.replace(", not a model", "").replace(", not weights", "")
        raise InputError(f"{path}: not a .npy file of numbers: {words}")
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # whatever NumPy's parser makes of a header that is none
        raise InputError(f"{path}: not a .npy file of numbers: {error}") from None
    if array.ndim not in (1, 2):
        raise InputError(f"{path}: has shape {array.shape}; token ids are (time) or (batch, time)")
    return np.atleast_2d(array)


def read_text(path: Path, name: str = "", most: int | None = None) -> str:
    """A text file in UTF-8, its line ends as they are; of at most `most` bytes. name: for messages."""
    name = name or str(path)
    try:
        if most is not None and path.stat().st_size > most:
            raise InputError(f"{name}: more than {most} bytes")
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror or error}") from None
    return decoded(data, name)


def decoded(data: bytes, source: str) -> str:
    """UTF-8 text, without the byte order mark that some editors begin a file with; InputError that names the
    kind of anything else."""
    from einsum_transformer.formats.unsupported import not_text

    if words := not_text(data):
        raise InputError(f"{source}: {words}")
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(f"{source}: not UTF-8 text (byte {error.start})") from None
