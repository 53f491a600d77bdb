"""Run coarse tasks in parallel threads, with single-threaded BLAS in each.

Waking a thread takes about 0.1 ms on a virtual machine, so tasks should take a millisecond or more; the
caller states whether they do. The calling thread also works, and each thread takes one task at a time, which
balances tasks of different length.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

from einsum_transformer.engine import blas, recorder

LARGE = 1 << 18
"""Elements of arrays from which passes over cache-sized pieces are divided over the threads."""
_pool: ThreadPoolExecutor | None = None
_pool_size = 0
_lock = threading.Lock()


def for_each(task: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], coarse: bool = True) -> None:
    """Call `task(*arguments[i])` for every i, on as many threads as BLAS may use now if the tasks are coarse,
    else sequentially."""
    blas.follow_load(coarse)
    threads = min(blas.free_threads(), len(arguments)) if coarse and len(arguments) > 1 else 1
    if threads <= 1:
        for given in arguments:
            task(*given)
        return
    remaining = iter(arguments)
    with blas.one_thread(), recorder.parallel():
        pool = _workers(threads - 1)
        # In copies of the caller's context, so that np.errstate and the recorder apply to the other threads.
        others = [pool.submit(copy_context().run, _drain, task, remaining) for _ in range(threads - 1)]
        try:
            _drain(task, remaining)
        finally:
            # Also after an error here: no thread may still write when the caller continues.
            for other in others:
                other.exception()
        for other in others:
            other.result()


def _drain(task: Callable[..., None], remaining: Iterator[tuple[Any, ...]]) -> None:
    # Several threads can share a sequence's iterator: the GIL makes each step atomic.
    for given in remaining:
        task(*given)


def _workers(count: int) -> ThreadPoolExecutor:
    """Return a pool that exists until the process ends, because starting threads takes longer than a task."""
    global _pool, _pool_size
    with _lock:
        if _pool is None or _pool_size < count:
            _pool, _pool_size = ThreadPoolExecutor(count, thread_name_prefix="einsum"), count
        return _pool
