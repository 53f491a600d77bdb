"""`diff`: two models side by side, from their configs alone."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from einsum_transformer.cli import options

Source = Annotated[
    str, typer.Argument(help="A folder, hub id, .gguf file or JSON config.", show_default=False)
]


def diff(
    a: Source,
    b: Source,
    batch: Annotated[int, typer.Option("--batch", "-b", metavar="N", min=1, help="Rows.")] = 1,
    tokens: Annotated[int, typer.Option("--tokens", metavar="N", min=1, help="Tokens of each row.")] = 128,
    offline: options.Offline = False,
    allow_links: options.AllowLinks = False,
    json: options.Json = False,
) -> None:
    """Lay two models side by side: settings, parameters, equations, FLOPs, bytes, KV cache.

    Only configs are read, so models of any size can be compared. The table goes to stdout.

    \b
    etx diff configs/llama.json configs/gemma.json
    etx diff configs/mistral.json configs/mixtral.json --tokens 4096
    """
    from einsum_transformer.analysis.compare import compare, render
    from einsum_transformer.loading.configs import read_config

    sources = [options.source_of(source) for source in (a, b)]
    # A JSON config of the project stays one: its adapters count too.
    checked = [read_config(source, offline, allow_links) for source in sources]
    configs = [each if isinstance(source, str) else source for source, each in zip(sources, checked)]
    short = [Path(source).stem or source for source in (a, b)]
    names = (short[0], short[1]) if short[0] != short[1] else ("A", "B")
    with options.announced("counting the tiles of attention ...", json):
        found = compare(configs[0], configs[1], batch, tokens, names)
    options.write_line(asdict(found) if json else render(found))
