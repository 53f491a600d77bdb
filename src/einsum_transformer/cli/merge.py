"""`merge`: an adapter into the weights it is on, or out of them again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from einsum_transformer.cli import options
from einsum_transformer.errors import InputError
from einsum_transformer.tables import terminal_table

if TYPE_CHECKING:
    from einsum_transformer.models.adapters import Merged

_TYPES = {"f32": "float32", "float32": "float32", "bf16": "bfloat16", "bfloat16": "bfloat16"}


def merge(
    *,
    named: options.Named,
    adapter_path: options.AdapterPath = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FOLDER", help="Where the model is written.")
    ] = None,
    dtype: Annotated[str, typer.Option(metavar="f32|bf16", help="What the weights are stored in.")] = "f32",
    unmerge: Annotated[
        bool, typer.Option("--unmerge", help="Take an adapter that was merged out of the weights.")
    ] = False,
    hub: options.Hub,
    shown: options.Shown,
) -> None:
    """Write a model with an adapter merged into its weights, W + scaling * B A, and how exact each became.

    The folder loads in transformers and in every command here, and says in merged_adapters.json what it
    holds, so that the same adapter is not merged twice. --unmerge subtracts it again; the base comes back up
    to the rounding of the stored type.

    \b
    etx merge --adapter-path my-run/step-00000100 -o my-model
    etx merge my-base --adapter-path my-adapter --dtype bf16 -o my-model
    etx merge my-model --adapter-path my-adapter --unmerge -o my-base-again
    """
    from einsum_transformer.models.adapters import merged, read_merged, write_merged
    from einsum_transformer.models.peft import adapter_digest

    if adapter_path is None or output is None:
        raise InputError("--adapter-path and --output are needed: the adapter, and where the model goes")
    if dtype not in _TYPES:
        raise InputError(f"--dtype {dtype!r}: choose f32 or bf16")
    source = named.source()
    name = source if isinstance(source, str) else source.source
    folder, target = Path(name), Path(output)
    if target.exists() and folder.exists() and target.samefile(folder):
        raise InputError(f"--output {output}: is the model itself; choose another folder")
    held, own = read_merged(folder), adapter_digest(adapter_path)
    if unmerge and own not in held:
        raise InputError(f"{name}: {adapter_path} was not merged into it, so it cannot be taken out")
    if not unmerge and own in held:
        raise InputError(f"{name}: {adapter_path} is merged into it already; --unmerge takes it out")
    loaded, _ = options.open_model(source, hub, options.Machine(), quiet=shown.silent, adapter=adapter_path)
    whole, report = merged(loaded, _TYPES[dtype], -1 if unmerge else 1)
    whole.save(target, dtype=_TYPES[dtype])
    write_merged(target, [each for each in held if each != own] if unmerge else [*held, own])
    if shown.json:
        rows = [{"name": r.name, "change": r.change, "error": r.error} for r in report]
        options.write_line({"model": loaded.source, "folder": output, "tensors": rows})
    elif not shown.quiet:
        options.console().print(_table(report))
        worst = max(report, key=lambda row: row.relative)
        done = "without" if unmerge else "with"
        options.note(
            f"{len(report)} weights {done} the adapter are in {output} ({_TYPES[dtype]}); "
            f"largest rounding error {worst.relative:.2%} of the change, in {worst.name}"
        )


def _table(report: list[Merged]) -> Any:
    table = terminal_table(("weight", "rms change", "rms error", "error of change"))
    for row in report:
        table.add_row(row.name, f"{row.change:.3g}", f"{row.error:.3g}", f"{row.relative:.3%}")
    return table
