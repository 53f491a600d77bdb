"""`merge`: merge an adapter into the weights, or subtract it again."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from einsum_transformer.cli import options, output
from einsum_transformer.cli.flags import flag, moved
from einsum_transformer.errors import InputError

_TYPES = {"f32": "float32", "float32": "float32", "bf16": "bfloat16", "bfloat16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class Stored:
    """Where the weights are written, and in which type."""

    output: options.Output = None
    save_dtype: str = flag(default="float32", metavar="float32|bfloat16", help="Type of the stored weights.")
    moved_dtype: str | None = moved("--dtype", "--save-dtype float32|bfloat16")


def merge(
    *,
    named: options.Named,
    adapter_path: options.AdapterPath = None,
    stored: Stored,
    unmerge: Annotated[
        bool, typer.Option("--unmerge", help="Subtract an adapter that was merged into the weights.")
    ] = False,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Merge into the values of quantized weights, as floats.")
    ] = False,
    hub: options.Hub,
    shown: options.Shown,
) -> None:
    """Write a model with an adapter merged into its weights, W + scaling * B A, and show the rounding errors.

    transformers and every command here can load the folder. Its merged_adapters.json records the adapter, so
    that it is not merged twice. --unmerge subtracts it again; the base weights are restored up to the
    rounding of the storage type. In Python: et.merge.

    \b
    etx merge --adapter-path my-run/step-00000100 -o my-model
    etx merge my-base --adapter-path my-adapter --save-dtype bfloat16 -o my-model
    etx merge my-model --adapter-path my-adapter --unmerge -o my-base-again
    etx merge my-4-bit-model --adapter-path my-adapter --dequantize -o my-model
    """
    from einsum_transformer.api.merge import merge as call

    folder = stored.output
    if adapter_path is None or folder is None:
        raise InputError("--adapter-path and --output are required: the adapter, and the folder to write")
    if stored.save_dtype not in _TYPES:
        raise InputError(f"--save-dtype is {stored.save_dtype!r}: expected float32 or bfloat16")
    dtype, source = _TYPES[stored.save_dtype], named.source()
    with output.announced(f"merging {adapter_path} ...", shown.silent):
        choices: dict[str, Any] = {"dtype": dtype, "unmerge": unmerge, "dequantize": dequantize}
        found = call(source, adapter_path, folder, **choices, **asdict(hub))
    if shown.json:
        output.write_line(found.to_dict())
    elif not shown.quiet:
        output.console().print(found.table())
        done = "without" if unmerge else "with"
        output.note(
            f"{len(found.tensors)} weights {done} the adapter are in {folder} ({dtype}); "
            f"largest rounding error {found.worst.relative:.2%} of the change, in {found.worst.name}"
        )
