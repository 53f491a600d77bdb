"""The number of threads follows the cores that other processes leave free, and only where it may."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import einsum_transformer as et
from einsum_transformer.engine import blas, load
from einsum_transformer.engine.load import Load
from einsum_transformer.engine.parallel import for_each
from tiny_models import tiny_model


class Machine:
    """A simulated machine: its cores, its clock, and the seconds that this process and others use."""

    def __init__(self, cores: int) -> None:
        self.cores, self.now, self.own, self.others = frozenset(range(cores)), 100.0, 5.0, 0.0
        self.runnable = 1

    def run(self, seconds: float, own: float, others: float) -> None:
        """Let time pass in which this process uses `own` cores, and others `others` cores."""
        self.now += seconds
        self.own += seconds * own
        self.others += seconds * others


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    simulated = Machine(2)
    monkeypatch.setattr(load, "_cores", lambda: simulated.cores)
    counters = lambda cores: (simulated.own + simulated.others, simulated.runnable)  # noqa: E731
    monkeypatch.setattr(load, "_counters", counters)
    monkeypatch.setattr(load.time, "monotonic", lambda: simulated.now)
    monkeypatch.setattr(load.time, "process_time", lambda: simulated.own)
    return simulated


def test_free_cores(machine: Machine) -> None:
    counter = Load()
    assert counter.limit(lambda: 2, False) is None
    for others, expected in ((0.0, 2), (0.3, 2), (0.7, 1), (1.0, 1), (0.4, 1), (0.2, 2), (2.0, 1), (0.0, 2)):
        machine.run(0.2, 2 - others, others)
        assert counter.limit(lambda: 2, False) == expected, others


def test_long_products_use_all_threads_if_all_cores_are_wanted(machine: Machine) -> None:
    """Two busy processes on two cores, beside one or two threads of this process; then one."""
    counter = Load()
    counter.limit(lambda: 2, True)
    for threads, runnable, expected in ((2, 4, None), (1, 3, None), (1, 2, 1), (2, 3, 1)):
        machine.runnable = runnable
        machine.run(0.2, 1, 1)
        assert counter.limit(lambda n=threads: n, True) == expected
        assert counter.limit(lambda n=threads: n, False) == 1


def test_own_threads_do_not_count(machine: Machine) -> None:
    machine.cores = frozenset(range(8))
    counter = Load()
    counter.limit(lambda: 2, False)
    machine.run(1, 8, 0)
    assert counter.limit(lambda: 2, False) == 8
    machine.run(1, 5, 3)
    assert counter.limit(lambda: 2, False) == 5


def test_it_reads_at_most_ten_times_per_second(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    monkeypatch.setattr(load, "_counters", lambda cores: reads.append(1) or (machine.own, 1))
    counter = Load()
    for _ in range(1000):
        machine.run(0.001, 1, 0)
        counter.limit(lambda: 2, False)
    assert 8 <= len(reads) <= 11


@pytest.mark.parametrize(
    "content", [None, "", "cpu0 1 2", "cpu0 a b c d e f g h", "cpux 1 2 3 4 5 6 7 8", "procs_running"]
)
def test_a_system_that_does_not_tell(content: str | None, tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "stat"
    if content is not None:
        path.write_text(content)
    monkeypatch.setattr(load, "_STAT", path)
    counter = Load()
    for _ in range(3):
        free = counter.limit(lambda: 2, False)
        assert free is None or free >= 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/stat")
def test_the_counters_of_this_machine() -> None:
    cores = load._cores()
    before, runnable = load._counters(cores)
    assert before is not None
    assert runnable >= 1
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass
    after, _ = load._counters(cores)
    assert after is not None
    assert after - before >= 0.2


class Busy:
    """Stands for the load of a machine; `free` cores are left."""

    free: int | None = None

    def limit(self, threads: Callable[[], int], long: bool) -> int | None:
        return self.free


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Busy]:
    simulated = Busy()
    monkeypatch.setattr(blas, "adaptive", True)
    monkeypatch.setattr(blas, "_load", simulated)
    settings, before = blas.settings(), blas.get_threads()
    blas.use("auto")
    blas.set_threads(2)
    yield simulated
    blas.use(*settings)
    blas.set_threads(before)


def counts() -> tuple[int, int, int, int]:
    """(set, free for tasks, parts of a task, in the library) after a task."""
    for_each(lambda: None, [()])
    return blas.get_threads(), blas.free_threads(), blas.shares(), blas.current().get_threads()


def test_products_use_the_free_cores(busy: Busy) -> None:
    assert counts() == (2, 2, 2, 2)
    busy.free = 1
    assert counts() == (2, 1, 2, 1)
    blas.set_threads(3)
    assert counts() == (3, 1, 3, 1)
    busy.free = 2
    assert counts() == (3, 2, 3, 2)
    busy.free = 16
    assert counts() == (3, 3, 3, 3)
    blas.set_threads(2)
    busy.free = 1
    counts()
    with blas.one_thread():
        busy.free = 2
        assert counts() == (2, 1, 1, 1)
    assert counts() == (2, 2, 2, 2)


def test_a_library_by_name_uses_the_threads_that_are_set(busy: Busy) -> None:
    busy.free = 1
    assert counts() == (2, 1, 2, 1)
    blas.use("numpy")
    assert counts() == (2, 2, 2, 2)


def test_training_uses_the_threads_that_are_set(busy: Busy) -> None:
    """Its results are the same bit for bit in every run."""
    busy.free = 1
    assert counts() == (2, 1, 2, 1)
    with blas.fixed_threads():
        assert counts() == (2, 2, 2, 2)
        with blas.fixed_threads():
            pass
        assert counts() == (2, 2, 2, 2)
    assert counts() == (2, 1, 2, 1)

    seen = []
    model = tiny_model()
    data = et.RandomTokens(model.config.vocab_size, 2, 8)
    trainer = et.Trainer(model, data, et.TrainingSettings(et.Schedule(1e-3, 1, "constant")))
    gradients = trainer.compute.gradients

    def spied(*arguments: Any) -> Any:
        seen.append(counts())
        return gradients(*arguments)

    trainer.compute.gradients = spied
    trainer.step()
    assert seen == [(2, 2, 2, 2)]


def test_gradients_use_the_threads_that_are_set(busy: Busy, monkeypatch: pytest.MonkeyPatch) -> None:
    busy.free = 1
    assert counts() == (2, 1, 2, 1)
    model, seen = tiny_model(), []
    forward = type(model.decoder).forward

    def spied(*arguments: Any, **options: Any) -> Any:
        seen.append(counts())
        return forward(*arguments, **options)

    monkeypatch.setattr(type(model.decoder), "forward", spied)
    model.loss_and_gradients([[1, 2]], [[2, 3]])
    model.logits([[1, 2]])
    assert seen == [(2, 2, 2, 2), (2, 1, 2, 1)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/stat")
def test_generation_beside_busy_processes() -> None:
    """In a process of its own: with a busy process on each core, products use fewer threads."""
    program = (
        "import time\nimport numpy as np\nfrom einsum_transformer.engine import blas\n"
        "from einsum_transformer.engine.parallel import for_each\n"
        "blas.set_threads(2)\na = np.ones((300, 300), np.float32)\nend = time.monotonic() + 20\n"
        "while blas.free_threads() > 1 and time.monotonic() < end:\n"
        "    a @ a\n    for_each(lambda: None, [()], coarse=False)\n"
        "print(blas.free_threads(), blas.get_threads())"
    )
    loop = "import time\nend = time.monotonic() + 60\nwhile time.monotonic() < end: pass"
    loops = [subprocess.Popen([sys.executable, "-c", loop]) for _ in load._cores()]
    try:
        child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    finally:
        for each in loops:
            each.kill()
            each.wait()
    threads = min(2, len(load._cores()))
    assert child.stdout.split() == ["1", str(threads)]
    assert np.isfinite(threads)
