"""Workers on one machine give the results of one process, also when some of them die."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from cluster_runs import STEPS, final, kill, kill_while_it_works, snapshot, trainer, wait_until_gone
from einsum_transformer.cluster.data_parallel import DataParallel, RayWorkers
from einsum_transformer.cluster.pool import Connection
from einsum_transformer.errors import InputError
from einsum_transformer.training.loop import Local
from einsum_transformer.training.optimizers import SGD, AdamW

pytestmark = [pytest.mark.ray, pytest.mark.timeout(100)]
Array = np.ndarray


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """The Ray session that most tests share."""
    connection = Connection(None, 3, 1 << 26)
    yield connection.ray
    connection.close()


def parallel(workers: int = 2, **given: Any) -> Callable[..., DataParallel]:
    return RayWorkers(workers, threads=2, timeout=60, **given).compute()


def assert_same(found: dict[str, Array], expected: dict[str, Array]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.fixture(scope="module")
def uninterrupted(ray: Any) -> dict[str, Array]:
    """The result of two workers that do not die."""
    return final(parallel())


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-6)])
@pytest.mark.parametrize("lora", [False, True])
def test_workers_give_the_gradients_of_one_process(
    ray: Any, dtype: str, tolerance: float, lora: bool
) -> None:
    """Loss and gradients of two micro-batches of different sizes with ignored targets."""
    alone = trainer(Local, dtype, lora)
    list(alone.run(1))  # so that B is not zero
    with trainer(parallel(3), dtype, lora).compute as compute:
        for name, array in alone.weights.items():
            np.copyto(compute.weights[name], array)
        parts = alone.batches.batch(1)
        loss, gradients = compute.gradients(parts, 30, 1)
        expected_loss, expected = alone.compute.gradients(parts, 30, 1)
    assert loss == pytest.approx(expected_loss, rel=tolerance)
    assert gradients.keys() == expected.keys()
    wrong = {name: np.linalg.norm(gradients[name] - array) for name, array in expected.items()}
    sizes = {name: np.linalg.norm(array) for name, array in expected.items()}
    assert min(sizes.values()) > 0
    assert np.hypot.reduce([*wrong.values()]) <= tolerance * np.hypot.reduce([*sizes.values()])
    if dtype == "float64":
        # In float32, small gradients have relative errors above 1e-6 in one process already.
        assert all(wrong[name] <= tolerance * size for name, size in sizes.items())


@pytest.mark.parametrize("optimizer", [SGD(0.9, nesterov=True), AdamW()])
def test_a_run_equals_that_of_one_process(ray: Any, optimizer: Any) -> None:
    expected = final(Local, optimizer=optimizer)
    found = final(parallel(), optimizer=optimizer)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert np.linalg.norm(found[name] - array) <= 1e-12 * np.linalg.norm(array), name


def test_dead_workers_change_nothing(ray: Any, uninterrupted: dict[str, Array]) -> None:
    made = trainer(parallel())
    with made.compute as compute:
        first = [place.pid for place in compute.pool.places]
        made.step()
        kill(compute, 1)
        made.step()
        kill_while_it_works(compute, 0)
        list(made.run(STEPS))
        assert not set(first) & {place.pid for place in compute.pool.places}
        assert_same(snapshot(made), uninterrupted)


def test_a_sharded_state_changes_nothing(ray: Any, uninterrupted: dict[str, Array]) -> None:
    assert_same(final(parallel(shard_optimizer=True)), uninterrupted)


def test_a_sharded_state_survives_dead_workers(
    ray: Any, uninterrupted: dict[str, Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers die before gradients, before both updates of the shards, and before the moments are read."""
    made = trainer(parallel(shard_optimizer=True))
    with made.compute as compute:
        calls, ask = [], compute.pool.ask
        deaths = {3: 0, 7: 1, 11: 0, 12: 1}

        def deadly(submit: Callable[[int], Any]) -> list[Any]:
            if len(calls) in deaths:
                kill_while_it_works(compute, deaths[len(calls)])
            calls.append(submit)
            return ask(submit)

        monkeypatch.setattr(compute.pool, "ask", deadly)
        list(made.run(STEPS))
        assert_same(snapshot(made), uninterrupted)
        assert len(calls) == 3 * STEPS + 1


def test_a_sharded_state_is_restored(ray: Any, uninterrupted: dict[str, Array]) -> None:
    """Moments of a run in one process continue in sharded workers."""
    alone = trainer(Local)
    list(alone.run(2))
    made = trainer(parallel(shard_optimizer=True))
    with made.compute as compute:
        for name, array in alone.weights.items():
            np.copyto(made.weights[name], array)
        compute.restore(alone.compute.moments())
        made.steps_done = 2
        list(made.run(STEPS))
        for name, array in snapshot(made).items():
            np.testing.assert_allclose(array, uninterrupted[name], rtol=1e-9, atol=1e-12, err_msg=name)


def test_both_copies_of_a_shard_lost(ray: Any) -> None:
    made = trainer(parallel(shard_optimizer=True))
    with made.compute as compute:
        made.step()
        kill(compute, 0)
        kill(compute, 1)
        with pytest.raises(InputError, match=r"died together.*resume from the last checkpoint"):
            made.step()


def test_workers_that_die_repeatedly_end_the_run(ray: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(parallel())
    with made.compute as compute:
        monkeypatch.setattr(compute.pool, "recovered", lambda worker: kill(compute, worker))
        kill(compute, 0)
        with pytest.raises(InputError, match="worker 0 died after 4 replacements in one step"):
            made.step()


def test_a_worker_that_hangs_is_named(ray: Any) -> None:
    made = trainer(parallel())
    with made.compute as compute:
        made.step()
        pid = compute.pool.places[1].pid
        compute.pool.timeout = 1
        os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(
                InputError, match=rf"^worker 1 \(process {pid} on .*\) did not respond in 1 s.*set a longer"
            ):
                made.step()
        finally:
            os.kill(pid, signal.SIGKILL)


def test_an_exception_in_a_worker_is_raised_in_the_driver(ray: Any) -> None:
    made = trainer(parallel())
    with made.compute as compute, pytest.raises(IndexError):
        compute.gradients([(np.full((2, 3), 999), np.zeros((2, 3), int))], 6, 0)


def test_threads_are_divided(ray: Any) -> None:
    made = trainer(RayWorkers(3, threads=7).compute())
    with made.compute as compute:
        assert compute.pool.threads == [2, 2, 2]


def test_close_ends_the_workers(ray: Any) -> None:
    """It does not end the Ray session that existed before."""
    made = trainer(parallel())
    with made.compute as compute:
        pids = [place.pid for place in compute.pool.places]
    wait_until_gone(pids)
    assert ray.is_initialized()


def test_wrong_addresses_are_rejected() -> None:
    for address in ("ray://head:10001", "head", "a b:1"):
        with pytest.raises(InputError, match="expected auto or host:port"):
            Connection(address, 2, 0)


def test_another_cluster_than_the_current_one_is_rejected(ray: Any) -> None:
    Connection(ray.get_runtime_context().gcs_address, 2, 0).close()
    assert ray.is_initialized()
    with pytest.raises(InputError, match=r"this process is connected to 127\.0\.0\.1:\d+; call ray"):
        Connection("127.0.0.1:1", 2, 0)
