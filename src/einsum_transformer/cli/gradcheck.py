"""`gradcheck`: the hand-derived gradients of a model against central differences."""

from __future__ import annotations

from typing import Annotated

import typer

from einsum_transformer.cli import options


def gradcheck(
    *,
    named: options.NamedOrConfig,
    adapter_path: options.AdapterPath = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", metavar="N", min=1, help="Rows.")] = 2,
    seq_len: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens of a row.")] = 8,
    parameters: Annotated[
        str, typer.Option(metavar="REGEX", help="Only parameters with a name that this finds a part of.")
    ] = ".*",
    tolerance: Annotated[float, typer.Option(metavar="X", help="Largest relative error.")] = 1e-6,
    grad_checkpoint: Annotated[
        bool, typer.Option("--grad-checkpoint", help="Check the backward pass that runs blocks again.")
    ] = False,
    seed: options.Seed = None,
    machine: options.Machine,
    max_layers: options.MaxLayers = None,
    assignments: options.Assignments = None,
    hub: options.Hub,
    shown: options.Shown,
) -> None:
    """Compare the gradient of every parameter with central differences of the loss, in float64.

    Along all parameters at once, along a random direction in each one, and for single entries of it. The
    exit code is 1 if one of them differs.

    \b
    etx gradcheck --config configs/fast_lora.json --max-layers 2
    etx gradcheck --max-layers 1 --parameters "self_attn|mlp"
    """
    import numpy as np

    from einsum_transformer.analysis.gradcheck import gradcheck as check
    from einsum_transformer.analysis.gradcheck import render
    from einsum_transformer.models.adapters import with_lora

    source = named.source(assignments)
    loaded, _ = options.open_model(
        source, hub, machine, "float64", quiet=True, max_layers=max_layers, seed=seed, adapter=adapter_path
    )
    lora = None if isinstance(source, str) else source.lora
    if lora is not None and loaded.lora is None:
        loaded = with_lora(loaded, lora, seed or 0)
    rng = np.random.default_rng(seed or 0)
    tokens = rng.integers(0, loaded.config.vocab_size, (batch_size, seq_len + 1))
    targets = np.where(rng.random((batch_size, seq_len)) < 0.2, -100, tokens[:, 1:])
    targets[-1, seq_len // 2 :] = -100  # a ragged row
    targets[0, 0] = tokens[0, 1]

    def told(done: int, total: int) -> None:
        if not shown.silent and (done == total or done % 20 == 0):
            options.note(f"{done} of {total} parameters")

    found = check(loaded, tokens[:, :-1], targets, tolerance, parameters, grad_checkpoint, seed or 0, told)
    if shown.json:
        options.write_line({"model": loaded.source} | found.to_dict())
    elif not shown.quiet:
        options.console().print(render(found))
    if not found.passed:
        raise typer.Exit(1)
