"""`parity`: a model against the activations of another program."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from einsum_transformer.cli import options


def parity(
    *,
    named: options.Named,
    reference: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="A .npz or .safetensors file of activations, or a folder that holds one.",
            show_default=False,
        ),
    ] = ...,  # type: ignore[assignment]
    tokens: Annotated[
        str | None, typer.Option(metavar="FILE.npy", help="Token ids, where the reference holds none.")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(metavar="X", min=0, help="Largest relative error of a step; default 1e-4.")
    ] = None,
    adapter_path: options.AdapterPath = None,
    machine: options.Machine,
    max_layers: options.MaxLayers = None,
    dtype: options.Dtype = None,
    hub: options.Hub,
    json: options.Json = False,
    quiet: Annotated[
        bool,
        typer.Option("--quiet", callback=options.silence, help="Only the steps that diverge, and no notes."),
    ] = False,
) -> None:
    """Find the first step where a model leaves a reference.

    The model runs on the reference's tokens; embedding, norms, the product of every matrix, attention,
    feed-forward, layers and logits are compared one by one. The reference names them as the checkpoint names
    its modules (model.layers.0.self_attn.q_proj), beside `tokens` and `logits`; tools/dump_reference.py
    writes such a file from transformers. The exit code is 1 if a step diverges.

    \b
    python tools/dump_reference.py my-model reference.npz --prompt "The capital of France is"
    etx parity my-model --reference reference.npz
    etx parity my-model.gguf --reference reference.npz --tolerance 0.05 --json
    """
    from einsum_transformer.analysis.parity import TOLERANCE, open_reference, render
    from einsum_transformer.analysis.parity import parity as compare
    from einsum_transformer.cli.prompts import read_tokens

    dump = open_reference(Path(reference))
    ids = None if tokens is None else read_tokens(Path(tokens))
    loaded, _ = options.open_model(
        named.source(), hub, machine, dtype, quiet or json, max_layers=max_layers, adapter=adapter_path
    )
    if ids is not None:
        ids = loaded.checked(ids, f"the ids of {tokens}")
    found = compare(loaded, dump, TOLERANCE if tolerance is None else tolerance, ids)
    options.write_line({"model": loaded.source} | found.to_dict() if json else render(found, every=not quiet))
    if not found.passed:
        raise typer.Exit(1)
