"""`gradcheck`: compare the hand-derived gradients of a model with central differences."""

from __future__ import annotations

from typing import Annotated

import typer

from einsum_transformer.cli import options, output


def gradcheck(
    *,
    named: options.NamedOrConfig,
    adapter_path: options.AdapterPath = None,
    batch_size: options.Rows = None,
    seq_len: options.Length = 8,
    parameters: Annotated[
        str, typer.Option(metavar="REGEX", help="Only parameters whose name this is found in.")
    ] = ".*",
    tolerance: Annotated[float, typer.Option(metavar="X", help="Maximum relative error.")] = 1e-6,
    grad_checkpoint: options.GradCheckpoint = False,
    seed: options.Seed = None,
    machine: options.Machine,
    max_layers: options.MaxLayers = None,
    assignments: options.Assignments = None,
    hub: options.Hub,
    shown: options.Shown,
) -> None:
    """Compare the gradient of every parameter with central differences of the loss, in float64.

    The directions are: all parameters at once, a random direction in each parameter, and single elements, on
    2 rows of random tokens. The exit code is 1 if one of them differs. In Python: et.gradcheck.

    \b
    etx gradcheck fast_lora --max-layers 2
    etx gradcheck --max-layers 1 --parameters "self_attn|mlp"
    """
    from einsum_transformer.api.compare import gradcheck as call

    more = {"max_layers": max_layers, "seed": seed, "adapter": adapter_path}
    loaded, _ = options.open_model(named.source(assignments), hub, machine, "float64", quiet=True, **more)

    def progress(done: int, total: int) -> None:
        if not shown.silent and (done == total or done % 20 == 0):
            output.note(f"{done} of {total} parameters")

    found = call(
        loaded,
        batch_size=2 if batch_size is None else batch_size,
        seq_len=seq_len,
        parameters=parameters,
        tolerance=tolerance,
        grad_checkpoint=grad_checkpoint,
        seed=seed or 0,
        progress=progress,
    )
    if shown.json:
        output.write_line(found.to_dict())
    elif not shown.quiet:
        output.console().print(found.table())
    if not found.passed:
        raise typer.Exit(1)
