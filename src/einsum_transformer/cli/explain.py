"""`explain`: print the equations of a model and their cost."""

from __future__ import annotations

from typing import Annotated

import typer

from einsum_transformer.cli import options, output


def explain(
    *,
    named: options.NamedOrConfig,
    batch: options.Rows = None,
    tokens: options.Length = 128,
    backward: Annotated[bool, typer.Option("--backward", help="Also the gradient equations.")] = False,
    assignments: options.Assignments = None,
    adapter_path: options.AdapterPath = None,
    offline: options.Offline = False,
    allow_links: options.AllowLinks = False,
    json: options.Json = False,
    renamed: options.MovedSizes,
) -> None:
    """Print the equations of a model and their cost.

    Each equation is listed with its FLOPs, its bytes and the matrix product that computes it. The model runs
    on arrays that have only a shape, so models of any size work. Adapters count, both those of --adapter-path
    and those that a run config trains (use_lora); frozen weights have no gradient. In Python: et.explain.

    \b
    etx explain                                  the default model, 1 row of 128 tokens
    etx explain llama --seq-len 2048             a model of 3B, its attention in tiles
    etx explain config.json --backward           also the gradients, for a Hugging Face config
    etx explain fast_lora --set use_mqa=true --json
    """
    from einsum_transformer.api.compare import explain as call

    source = named.source(assignments)
    with output.announced("counting the tiles of attention ...", json):
        program = call(
            source,
            batch or 1,
            tokens,
            backward,
            adapter=adapter_path,
            offline=offline,
            allow_links=allow_links,
        )
    output.write_line(program.to_dict() if json else str(program))
