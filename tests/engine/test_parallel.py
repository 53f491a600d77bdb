"""for_each: every task once, on several threads or one, whatever fails."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from einsum_transformer.engine import Recorder, blas, phase
from einsum_transformer.engine.parallel import for_each


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = blas.get_threads()
    blas.set_threads(2)
    yield
    blas.set_threads(before)


@pytest.mark.parametrize("coarse", [True, False])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 500])
def test_every_task_once(count: int, coarse: bool) -> None:
    done = np.zeros(count, int)

    def task(i: int, step: int) -> None:
        done[i] += step

    for_each(task, [(i, 1) for i in range(count)], coarse)
    assert (done == 1).all()


def test_tasks_run_side_by_side_with_one_blas_thread_each() -> None:
    """Two tasks that wait for each other both end."""
    barrier, threads, seen = threading.Barrier(2, timeout=30), set(), []

    def task(i: int) -> None:
        barrier.wait()
        threads.add(threading.get_ident())
        seen.append(blas.current().get_threads())

    for_each(task, [(0,), (1,)])
    assert len(threads) == 2
    assert seen == [1, 1]
    assert blas.get_threads() == blas.current().get_threads() == 2


def test_fine_tasks_stay_in_order_on_the_calling_thread() -> None:
    order = []
    for_each(lambda i: order.append((i, threading.get_ident())), [(i,) for i in range(9)], coarse=False)
    assert order == [(i, threading.get_ident()) for i in range(9)]


@pytest.mark.parametrize("failing", [[0], [5], [19], list(range(20))])
def test_an_error_arrives_after_all_have_stopped(failing: list[int]) -> None:
    """Nobody is at work any more, the thread count is as before, and the next call works."""
    running = []

    def task(i: int) -> None:
        running.append(i)
        try:
            if i in failing:
                raise KeyError(i)
        finally:
            running.remove(i)

    with pytest.raises(KeyError):
        for_each(task, [(i,) for i in range(20)])
    assert running == []
    assert blas.get_threads() == 2
    for_each(running.append, [(i,) for i in range(5)])
    assert sorted(running) == list(range(5))


def test_a_task_may_call_for_each() -> None:
    done = []
    for_each(
        lambda i: for_each(lambda j: done.append((i, j)), [(j,) for j in range(3)]), [(i,) for i in range(4)]
    )
    assert sorted(done) == [(i, j) for i in range(4) for j in range(3)]


def test_an_error_in_a_phase_while_recording() -> None:
    """Also then the recorder is whole afterwards."""

    def task(i: int) -> None:
        with phase("task"):
            raise KeyError

    with Recorder() as recorder:
        with pytest.raises(KeyError), phase("around"):
            for_each(task, [(i,) for i in range(4)])
        with phase("after"):
            pass
    assert recorder.spans[-1].path == ("after",)


def test_errstate_holds_on_all_threads() -> None:
    """What the caller ignores is ignored on other threads too: warnings are errors in these tests."""
    big, barrier = np.full(4, 1e38, np.float32), threading.Barrier(2)

    def task(_: int) -> None:
        barrier.wait(10)
        np.multiply(big, big)

    with np.errstate(over="ignore"):
        for_each(task, [(0,), (1,)])
