"""`machine`: measure the BLAS libraries of this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from einsum_transformer.cli import options, output


def machine(
    *,
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads", "-t", "--num-threads", metavar="N", min=1, help="Threads; default all cores."
        ),
    ] = None,
    save: Annotated[
        bool, typer.Option("--save/--no-save", help="Store the choice that `--blas auto` uses.")
    ] = True,
    shown: options.Shown,
) -> None:
    """Measure the matrix products of each installed BLAS library and the memory bandwidth, in a few seconds.

    If MKL is installed, the faster library of each kind of product is stored, and `--blas auto` uses it from
    then on. The machine should be idle. In Python: et.machine.

    \b
    etx machine
    etx machine --threads 4 --no-save
    """
    from einsum_transformer.api.machine import machine as call

    def progress(done: int, total: int) -> None:
        if not shown.silent and (done == total or done % 5 == 0):
            output.note(f"{done} of {total} measurements")

    found = call(threads, save, progress)
    output.write_line(found.to_dict() if shown.json else str(found))
