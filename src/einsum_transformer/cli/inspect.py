"""`inspect`: what a checkpoint holds."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from einsum_transformer.cli import options


def inspect(
    *,
    named: options.NamedOrConfig,
    every: Annotated[
        bool, typer.Option("--all", help="A line for each tensor, not for each kind of tensor.")
    ] = False,
    hub: options.Hub,
    json: options.Json = False,
) -> None:
    """List what a checkpoint holds: tensors, types, sizes, and what each is in the model.

    Nothing is loaded. Keys of the config are told apart: those that were read, those that are absent, so that
    the architecture's default holds, and those that nothing here reads. What keeps the checkpoint from
    loading is told as a problem and makes the exit code 1.

    \b
    etx inspect                                 the default model
    etx inspect my-model --all                  every tensor of a Hugging Face folder
    etx inspect model.gguf --json               the same of a GGUF file, for programs
    etx inspect config.json                     a config alone: which keys count
    """
    from einsum_transformer.analysis.inspect import inspect as look
    from einsum_transformer.analysis.inspect import render
    from einsum_transformer.loading.sources import Options, find

    how = Options(**asdict(hub))
    found = look(find(named.source(), how), how)
    options.write_line(found.to_dict() if json else render(found, every))
    if found.problems:
        raise typer.Exit(1)
