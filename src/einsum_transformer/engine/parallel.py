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
from itertools import pairwise
from typing import Any

from einsum_transformer.engine import blas, recorder
from einsum_transformer.engine.shapes import ShapeArray

LARGE = 1 << 18
"""Elements from which elementwise operations are divided over the threads: a few of them then take as long
as waking a thread."""
_pool: ThreadPoolExecutor | None = None
_pool_size = 0
_lock = threading.Lock()


def for_each(task: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], coarse: bool = True) -> None:
    """Call `task(*arguments[i])` for every i, on as many threads as BLAS may use now if the tasks are coarse,
    else sequentially."""
    blas.follow_load()
    threads = min(blas.free_threads(), len(arguments)) if coarse and len(arguments) > 1 else 1
    if threads <= 1:
        sequentially(task, arguments)
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


def sequentially(task: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> None:
    """Call `task(*arguments[i])` for every i on the calling thread."""
    for given in arguments:
        task(*given)


def in_parts(task: Callable[..., None], *arrays: Any) -> None:
    """Call `task(*parts)` for corresponding parts of arrays of one shape, for elementwise operations.

    Large arrays are divided into as many parts as there are threads, along the axis that is outermost in
    memory; None stays None. Small ones are passed as they are.
    """
    first = arrays[0]
    if first.size < LARGE or (count := blas.shares()) == 1 or isinstance(first, ShapeArray):
        task(*arrays)
        return
    axis = max(range(first.ndim), key=lambda each: (first.shape[each] > 1) * abs(first.strides[each]))
    ends = [first.shape[axis] * i // count for i in range(count + 1)]
    parts = [(*(slice(None),) * axis, slice(start, stop)) for start, stop in pairwise(ends) if start < stop]
    for_each(task, [tuple(None if a is None else a[part] for a in arrays) for part in parts])


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
