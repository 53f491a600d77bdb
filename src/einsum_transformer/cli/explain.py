"""`explain`: print the program of a model."""

from __future__ import annotations

from typing import Annotated

import typer

from einsum_transformer.cli import options


def explain(
    *,
    named: options.NamedOrConfig,
    batch: Annotated[int, typer.Option("--batch", "-b", metavar="N", min=1, help="Rows.")] = 1,
    tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of each row.")] = 128,
    backward: Annotated[bool, typer.Option("--backward", help="Also the gradient equations.")] = False,
    assignments: options.Assignments = None,
    adapter_path: options.AdapterPath = None,
    offline: options.Offline = False,
    allow_links: options.AllowLinks = False,
    json: options.Json = False,
) -> None:
    """Print a model's program: its equations and what they cost.

    Every equation comes with its FLOPs, its bytes and the matrix product it runs as. The same Python that
    runs the model runs over arrays that have only a shape, so a config of any size is enough. Adapters count,
    those of --adapter-path and those that a config trains (use_lora); what they freeze has no gradient.

    \b
    etx explain                                        the default model, 128 tokens
    etx explain configs/llama.json --tokens 2048       a model of 3B, its attention in tiles
    etx explain config.json --backward                 also the gradients, for a Hugging Face config
    etx explain --config configs/fast_lora.json --set use_mqa=true --json
    """
    from einsum_transformer.analysis.explain import explain as dry_run
    from einsum_transformer.analysis.explain import without_weights
    from einsum_transformer.loading.configs import read_config
    from einsum_transformer.models.peft import with_adapter

    source = named.source(assignments)
    config_read = read_config(source, offline, allow_links)
    described = config_read if isinstance(source, str) else source
    if adapter_path is not None:
        name = source if isinstance(source, str) else source.source
        described = with_adapter(without_weights(config_read, name), adapter_path)
    with options.announced("counting the tiles of attention ...", json):
        program = dry_run(described, batch, tokens, backward)
    options.write_line(program.to_dict() if json else str(program))
