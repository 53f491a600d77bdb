"""`convert`: write a model as a GGUF file."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from einsum_transformer.cli import options, output
from einsum_transformer.cli.flags import flag
from einsum_transformer.errors import InputError
from einsum_transformer.tables import quantity


@dataclass(frozen=True, slots=True)
class Written:
    """The file, and the type of its matrices."""

    output: str | None = flag("--output", "-o", metavar="PATH", help="GGUF file to write the result to.")
    outtype: str = flag(
        default="F16",
        metavar="F32|F16|BF16|Q8_0|Q4_0|Q4_1",
        help="Type of the matrices in the file.",
    )


def convert(*, named: options.Named, written: Written, hub: options.Hub, shown: options.Shown) -> None:
    """Write a model as a GGUF file, which llama.cpp and programs based on it load.

    The file contains the weights, the tokenizer and the chat template. Norms, biases and routers are stored
    as F32; with Q4_0 and Q4_1, the embedding and the output head are stored as Q8_0. A setting that GGUF
    files cannot represent is an error. In Python: et.convert.

    \b
    etx convert my-model -o my-model.gguf
    etx convert my-model --outtype Q8_0 -o my-model-Q8_0.gguf
    """
    from einsum_transformer.api.convert import convert as call

    if written.output is None:
        raise InputError("--output is required: the GGUF file to write")
    progress, outtype = output.progress("tensors", shown.silent), written.outtype.upper()
    path = call(named.source(), written.output, outtype, progress=progress, **asdict(hub))
    size = path.stat().st_size
    if shown.json:
        output.write_line({"file": str(path), "outtype": outtype, "bytes": size})
    elif not shown.quiet:
        output.note(f"{path}: {quantity(size, 'B')}, with matrices of type {outtype}")
