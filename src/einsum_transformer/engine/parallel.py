"""Coarse tasks side by side on threads, with BLAS at one thread inside each.

Waking a thread costs about 0.1 ms on a virtual machine, so this pays for tasks of a millisecond and more; the
caller says whether its tasks are. The calling thread works too, and tasks are taken one by one, so uneven
ones even out.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

from einsum_transformer.engine import blas, recorder

_pool: ThreadPoolExecutor | None = None
_pool_size = 0
_lock = threading.Lock()


def for_each(task: Callable[..., None], arguments: Sequence[tuple[Any, ...]], coarse: bool = True) -> None:
    """task(*arguments[i]) for every i, on as many threads as BLAS has if the tasks are coarse, else one by
    one."""
    threads = min(blas.free_threads(), len(arguments)) if coarse and len(arguments) > 1 else 1
    if threads <= 1:
        for given in arguments:
            task(*given)
        return
    remaining = iter(arguments)
    with blas.one_thread(), recorder.parallel():
        pool = _workers(threads - 1)
        # In a context of the caller's: np.errstate and the recorder hold on the other threads too.
        others = [pool.submit(copy_context().run, _drain, task, remaining) for _ in range(threads - 1)]
        try:
            _drain(task, remaining)
        finally:
            # Also after an error here: nobody may still be writing when the caller goes on.
            for other in others:
                other.exception()
        for other in others:
            other.result()


def _drain(task: Callable[..., None], remaining: Iterator[tuple[Any, ...]]) -> None:
    # A sequence's iterator hands each item out once, also to several threads: the GIL guards its step.
    for given in remaining:
        task(*given)


def _workers(count: int) -> ThreadPoolExecutor:
    """A pool that lives as long as the process: starting threads costs more than a task."""
    global _pool, _pool_size
    with _lock:
        if _pool is None or _pool_size < count:
            _pool, _pool_size = ThreadPoolExecutor(count, thread_name_prefix="einsum"), count
        return _pool
