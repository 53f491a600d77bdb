"""`precision`: the error of each step of a model against float64."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from einsum_transformer.cli import options, output


def precision(
    *,
    named: options.NamedOrConfig,
    file: Annotated[
        str | None,
        typer.Option(
            "--file", "-f", metavar="FILE", show_default=False, help="A text in UTF-8; or random tokens."
        ),
    ] = None,
    schemes: options.Schemes = None,
    ctx_size: options.ChunkSize = None,
    every: options.Every = False,
    machine: options.Machine,
    max_layers: options.MaxLayers = None,
    seed: options.Seed = None,
    hub: options.Hub,
    shown: options.Shown,
) -> None:
    """Show the error of each step against float64: in float32, in bfloat16 and in quantization schemes.

    The table has the output of each layer, and the step of the layer with the largest error in float32. A
    second table shows whether a batch, chunks and the KV cache change float32, and the first step that they
    change. In Python: et.precision.

    \b
    etx precision -f notes.txt
    etx precision -f notes.txt --scheme W4A16g64 --every
    etx precision fast_lora --max-layers 2 -c 32 --json
    """
    from einsum_transformer.api.precision import precision as call

    text = None if file is None else options.text_file(file)
    given = {"ctx_size": ctx_size, "schemes": schemes or None, "seed": seed}
    more: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    settings = {"max_layers": max_layers, "seed": seed, "quantization": "none"}
    model, _ = options.open_model(named.source(), hub, machine, quiet=shown.silent, **settings)
    found = call(model, text, progress=output.progress("runs", shown.silent), **more)
    output.write_line(found.to_dict() if shown.json else found.text(every))
