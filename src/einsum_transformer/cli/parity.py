"""`parity`: compare a model with the activations of another program."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from einsum_transformer.cli import options, output
from einsum_transformer.cli.prompts import read_tokens


def parity(
    *,
    named: options.Named,
    reference: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="A .npz or .safetensors file of activations, or a folder with one.",
            show_default=False,
        ),
    ] = ...,  # type: ignore[assignment]
    tokens: options.TokenFile = None,
    tolerance: Annotated[
        float, typer.Option(metavar="X", min=0, help="Maximum relative error of a step.")
    ] = 1e-4,
    adapter_path: options.AdapterPath = None,
    machine: options.Stored,
    max_layers: options.MaxLayers = None,
    dtype: options.Dtype = None,
    hub: options.Hub,
    shown: options.Shown,
) -> None:
    """Compare a model's activations with a reference and find the first step that differs.

    The model runs on the tokens of the reference or of --tokens; embedding, norms, the product of every
    matrix, attention, feed-forward, layers and logits are compared one by one. The reference names them as
    the checkpoint names its modules (model.layers.0.self_attn.q_proj), with `tokens` and `logits`;
    tools/dump_reference.py writes such a file from transformers. With --quantization, the differences are
    those of the quantized model. The exit code is 1 if a step differs. In
    Python: et.parity.

    \b
    python tools/dump_reference.py my-model reference.npz --prompt "The capital of France is"
    etx parity my-model --reference reference.npz
    etx parity my-model.gguf --reference reference.npz --tolerance 0.05 --json
    """
    from einsum_transformer.api.compare import parity as call

    more = {"max_layers": max_layers, "adapter": adapter_path, **machine.stored()}
    loaded, _ = options.open_model(named.source(), hub, machine, dtype, shown.silent, **more)
    ids = None if tokens is None else loaded.checked(read_tokens(Path(tokens)), f"the ids of {tokens}")
    found = call(loaded, reference, tokens=ids, tolerance=tolerance)
    output.write_line(found.to_dict() if shown.json else found.text(every=not shown.quiet))
    if not found.passed:
        raise typer.Exit(1)
