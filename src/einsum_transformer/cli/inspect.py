"""`inspect`: list the contents of a checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from einsum_transformer.cli import options, output


def inspect(
    *,
    named: options.NamedOrConfig,
    every: Annotated[
        bool, typer.Option("--all", help="One line per tensor instead of one per kind of tensor.")
    ] = False,
    hub: options.Hub,
    json: options.Json = False,
) -> None:
    """List the contents of a checkpoint: tensors, types, sizes, and the weights of the model they are.

    Weights are not loaded. Keys of the config are listed as used, as absent (the architecture's default
    applies) or as ignored. Everything that prevents the checkpoint from loading is listed as a problem, with
    exit code 1. In Python: et.inspect.

    \b
    etx inspect                                 the default model
    etx inspect my-model --all                  every tensor of a Hugging Face folder
    etx inspect model.gguf --json               a GGUF file, for programs
    etx inspect config.json                     a config alone: which keys are used
    """
    from einsum_transformer.api.compare import inspect as call

    found = call(named.source(), **asdict(hub))
    output.write_line(found.to_dict() if json else found.text(every))
    if found.problems:
        raise typer.Exit(1)
