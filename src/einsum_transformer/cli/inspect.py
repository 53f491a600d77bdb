"""`inspect`: what a checkpoint holds."""

from __future__ import annotations

import json as jsonlib
from typing import Annotated

import typer

from einsum_transformer.cli import options


def inspect(
    model: options.Model = None,
    model_flag: options.ModelFlag = None,
    config: options.ConfigFlag = None,
    every: Annotated[
        bool, typer.Option("--all", help="A line for each tensor, not for each kind of tensor.")
    ] = False,
    revision: options.Revision = None,
    offline: options.Offline = False,
    allow_links: options.AllowLinks = False,
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

    how = Options(revision=revision, offline=offline, allow_links=allow_links)
    found = look(find(options.source_of(model, model_flag, config, None), how), how)
    options.write((jsonlib.dumps(found.to_dict()) if json else render(found, every)) + "\n")
    if found.problems:
        raise typer.Exit(1)
