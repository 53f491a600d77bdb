"""Run the command line in this process, and write models that it can run on."""

from __future__ import annotations

import io
import json
import logging
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest

import einsum_transformer as et
from einsum_transformer.cli.app import main
from einsum_transformer.engine import blas
from einsum_transformer.notes import LOGGER
from tiny_models import make_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] + ':' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


class Ran(NamedTuple):
    """What a command wrote, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON object on stdout."""
        return json.loads(self.out)


def etx(*arguments: Any, stdin: str = "") -> Ran:
    """Run `etx` with these arguments; BLAS and the log level are restored afterwards."""
    out, err = io.StringIO(), io.StringIO()
    settings, threads = blas.settings(), blas.get_threads()
    try:
        with (
            mock.patch("sys.stdin", io.StringIO(stdin)),
            redirect_stdout(out),
            redirect_stderr(err),
            pytest.raises(SystemExit) as left,
        ):
            main([str(argument) for argument in arguments])
    finally:
        blas.use(*settings)
        blas.set_threads(threads)
        LOGGER.setLevel(logging.NOTSET)
    assert isinstance(left.value.code, int)
    return Ran(left.value.code, out.getvalue(), err.getvalue())


def save_with_tokenizer(folder: Path, model: et.Model) -> Path:
    """Write the model (at least 128 tokens) with one token per ASCII character and a chat template."""
    from tokenizers import pre_tokenizers

    model.save(folder)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    make_tokenizer(folder, [byte_level.pre_tokenize_str(chr(byte))[0][0] for byte in range(128)])
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder
