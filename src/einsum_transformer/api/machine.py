"""`machine`: measure this machine, and store which BLAS library is the faster one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from einsum_transformer.analysis.machine import Machine, measure
from einsum_transformer.arguments import checked
from einsum_transformer.engine import blas
from einsum_transformer.loading import libraries


@checked
def machine(
    threads: int | None = None,
    save: bool = True,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Machine:
    """Measure matrix products of each installed BLAS library, the memory bandwidth, and the rates from which
    `plan` predicts seconds, in half a minute.

    The measurement is stored for this processor, these versions and this number of threads. If MKL is
    installed, `auto` (the default of `--blas`) uses the faster library of each kind of product from then on.
    The machine should be idle. threads: number of threads, by default the current one. save: store the
    measurement. progress: called with the number of finished measurements and their total.
    Raises InputError for an impossible number of threads, OSError if the file cannot be written.
    """
    if threads is not None:
        blas.set_threads(threads)
    count = blas.get_threads()
    found = measure(count, progress)
    if save:
        path = libraries.table_path(count)
        found = replace(found, path=str(path))
        libraries.store(count, found.to_dict())
        if found.choice:
            libraries.use("auto")
    return found
