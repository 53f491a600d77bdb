"""Steps: the calls of a step are repeated with the results of the program, or the program runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from einsum_transformer.engine import blas, einsum, replay
from einsum_transformer.engine.replay import Steps, condition

Array = np.ndarray
STEPS = 20

rng = np.random.default_rng(0)
WEIGHT = rng.standard_normal((6, 4))


@pytest.fixture(autouse=True)
def no_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "WARM_UP", 0)
    monkeypatch.setattr(replay, "LEAST", 1)


class Run:
    """A program that runs step by step, with memory that grows by a column per step."""

    def __init__(self, program: Callable[[Run, Array], Array]) -> None:
        self.program, self.lines, self.steps = program, np.full((4, STEPS + 2), np.nan), Steps()
        self.lines[:, :2] = 1.0
        self.length = 0
        self.programs_run = 0

    def step(self, x: Array) -> Array:
        def function(x: Array) -> Array:
            self.programs_run += 1
            y = self.program(self, x)
            self.length += 1
            return y

        return self.steps.run(function, [x], self.length, STEPS - self.length, self, 0, self.advance)

    def advance(self) -> None:
        self.length += 1

    def append(self, column: Array) -> Array:
        """Store a column; returns it with those before it. There are two from the start."""
        np.copyto(self.lines[:, self.length + 2], column)
        return self.lines[:, : self.length + 3]


def inputs() -> list[Array]:
    return [np.random.default_rng(i).standard_normal(4) for i in range(STEPS)]


def check(program: Callable[[Run, Array], Array], repeated: int = STEPS - 3) -> Run:
    """Run the program with and without replays; return the run with replays."""
    run, plain = Run(program), Run(program)
    for x in inputs():
        expected = plain.program(plain, x)
        plain.length += 1
        np.testing.assert_array_equal(run.step(x), expected)
    np.testing.assert_array_equal(run.lines, plain.lines)
    assert (run.length, run.steps.repeated) == (STEPS, repeated), run.steps.reason
    assert run.programs_run == STEPS - repeated
    return run


def attention(run: Run, x: Array) -> Array:
    """A small step with all kinds of calls that decode steps make."""
    y = einsum("d,fd->f", x, WEIGHT)
    y = np.maximum(y, -1.5)
    y *= 0.5
    y += 1
    seen = run.append(y.reshape(3, 2).sum(axis=1).copy()[:1] + x)
    p = np.exp(einsum("d,ds->s", x, seen) / 2)
    p /= p.sum(keepdims=True)
    mixed = einsum("s,ds->d", p, seen)
    return np.where(mixed > 0, mixed, np.tanh(mixed))


def test_a_step_is_repeated_from_the_fourth_on() -> None:
    check(attention)


def test_an_earlier_result_is_not_overwritten() -> None:
    run, plain = Run(attention), Run(attention)
    results = [run.step(x) for x in inputs()]
    for x, result in zip(inputs(), results):
        np.testing.assert_array_equal(result, plain.program(plain, x))
        plain.length += 1


def test_an_axis_that_has_size_one_only_now_grows() -> None:
    check(
        lambda run, x: np.add.reduce(np.multiply(run.lines[0, : run.length], x[:1]), keepdims=True) + x,
        STEPS - 5,
    )


def test_results_share_memory_only_if_they_are_not_used_at_the_same_time() -> None:
    def program(_: Run, x: Array) -> Array:
        kept = [x * i for i in range(1, 6)]
        passing = x
        for _ in range(10):
            passing = passing + 1
        total = passing * kept[0]
        for each in kept[1:]:
            total = total + passing * each
        return total

    check(program)


def test_weights_that_change_in_place_are_used() -> None:
    weight = np.ones(4)
    run = Run(lambda _, x: x * weight)
    for i, x in enumerate(inputs()):
        weight[...] = i
        np.testing.assert_array_equal(run.step(x), x * i)
    assert run.steps.repeated == STEPS - 3


def test_a_step_that_comes_again_or_out_of_turn_has_its_result() -> None:
    run, plain = Run(attention), Run(attention)
    order = [*range(8), 5, 6, 7, 8, 9, 10, 11, 9, 10, 11, 12, 13, 14, 15, 16, 17]
    for number in order:
        run.length = plain.length = number
        np.testing.assert_array_equal(run.step(inputs()[number]), plain.program(plain, inputs()[number]))
    assert 5 <= run.steps.repeated < len(order)


def test_other_inputs_weights_and_libraries_start_again(monkeypatch: pytest.MonkeyPatch) -> None:
    owner: Any = object()
    memory, steps = 0, Steps()

    def step(x: Array, number: int, factor: float) -> None:
        got = steps.run(lambda x: x * factor, [x], number, 99 - number, owner, memory, lambda: None)
        np.testing.assert_array_equal(got, x * factor)

    for number in range(5):
        step(np.ones(4), number, 2.0)
    assert steps.repeated == 2
    for number in range(5, 10):
        step(np.ones((2, 4)), number, 3.0)
    assert steps.repeated == 4
    owner = object()
    for number in range(10, 15):
        step(np.ones((2, 4)), number, 4.0)
    assert steps.repeated == 6
    memory = 1
    for number in range(15, 20):
        step(np.ones((2, 4)), number, 5.0)
    assert steps.repeated == 8
    product = blas.PRODUCTS["vector"]
    monkeypatch.setattr(product, "matmul", lambda a, b: np.matmul(a, b))
    for number in range(20, 25):
        step(np.ones((2, 4)), number, 6.0)
    assert steps.repeated == 10


@pytest.mark.parametrize("kind", blas.KINDS)
def test_products_of_another_library_are_repeated(kind: blas.Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def matmul(a: Array, b: Array, out: Array | None = None) -> Array:
        calls.append(type(a))
        return np.matmul(a, b, out=out)

    monkeypatch.setattr(blas.PRODUCTS[kind], "matmul", matmul)
    matrix, stack = rng.standard_normal((40, 6)), rng.standard_normal((3, 5, 6))

    def program(_: Run, x: Array) -> Array:
        y = einsum("d,fd->f", x, WEIGHT)
        rows = y[None] * np.ones_like(y, shape=(40, 1))
        total = einsum("tf,uf->tu", rows, matrix).sum(axis=0)
        total += einsum("tf,uf->tu", rows[:8], matrix).sum(axis=0)
        return (
            einsum("f,uf->u", y, matrix) + total + einsum("kf,ksf->ks", rows[:3], stack).sum(keepdims=True)[0]
        )

    check(program)
    assert blas.PRODUCTS[kind].matmul is matmul
    assert len(calls) >= STEPS
    assert set(calls) == {np.ndarray}


def test_a_condition_with_another_result_runs_the_program() -> None:
    def small(a: Array) -> bool:
        return bool(a.max() < 100)

    def program(_: Run, x: Array) -> Array:
        y = x * 2
        return y + 1 if condition(small, y) else y - 1

    run = Run(program)
    for i, x in enumerate(inputs()):
        x = np.abs(x) % 1 + 1000 * (i % 7 == 6)
        np.testing.assert_array_equal(run.step(x), program(run, x))
    assert run.steps.repeated == STEPS - 3 - 2


def unrecorded(_: Run, x: Array) -> Array:
    y = x + 1
    hidden = y.view(np.ndarray)
    hidden *= 2  # the memory is known, but nothing records the call
    return y + 1


def python_number(run: Run, x: Array) -> Array:
    return x * float(run.length)


def outside(run: Run, x: Array) -> Array:
    return x + np.arange(4) * (run.length + 1)


def decided(_: Run, x: Array) -> Array:
    return x + 1 if x[0] > 0 else x - 1


def of_a_value(_: Run, x: Array) -> Array:
    return x * float(x[0])


def listed(_: Run, x: Array) -> Array:
    return x * sum(x.tolist())


def largest(_: Run, x: Array) -> Array:
    return x + WEIGHT[x.argmax()]


def largest_by_function(_: Run, x: Array) -> Array:
    return x + WEIGHT[np.argmax(x)]


def positive(_: Run, x: Array) -> Array:
    return x * len(x[x > 0])


def gathered(_: Run, x: Array) -> Array:
    return WEIGHT[np.argsort(x)].sum(axis=0) + x


def scattered(_: Run, x: Array) -> Array:
    y = x * 0
    y[np.argsort(x)[:2]] = 1.0
    return y + x


def in_a_thread(_: Run, x: Array) -> Array:
    y = np.empty_like(x)
    thread = threading.Thread(target=lambda: np.multiply(x, 2, out=y))
    thread.start()
    thread.join()
    return y + 1


def with_zeros(_: Run, x: Array) -> Array:
    y = np.zeros_like(x)
    y += x
    return y


def masked(_: Run, x: Array) -> Array:
    return np.add(x, 1, where=np.ones(4, bool), out=np.empty_like(x))


def growing(run: Run, x: Array) -> Array:
    return run.append(x)[0] * np.add.reduce(x)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (unrecorded, "a replay has another result"),
        (python_number, "a number changes"),
        (outside, "computed outside"),
        (decided, "values decide"),
        (of_a_value, "values decide"),
        (listed, "values decide"),
        (largest, "values decide"),
        (largest_by_function, "values decide"),
        (positive, "values decide"),
        (gathered, "values decide"),
        (scattered, "values decide"),
        (in_a_thread, "several threads"),
        (with_zeros, "computed outside"),
        (masked, "a keyword of a call is an array"),
        (growing, "does not return one array"),
    ],
)
def test_what_cannot_be_repeated_runs_as_a_program(
    program: Callable[[Run, Array], Array], reason: str
) -> None:
    assert reason in check(program, repeated=0).steps.reason


def test_a_result_that_grows_is_not_repeated() -> None:
    run = check(lambda run, x: run.append(x)[0] * x[:1], repeated=0)
    assert run.steps.reason == "the result has another shape at every step"


def test_a_replay_ends_where_the_memory_ends() -> None:
    """The view of the constant grows by two per step, and leaves its memory after step 10."""
    constant = np.arange(23.0)
    grown = np.arange(100.0)

    def program(run: Run, x: Array) -> Array:
        n = 2 * run.length + 3
        part = (constant if n <= len(constant) else grown)[:n]
        return np.add.reduce(x[:, None] * part, axis=1)

    check(program, repeated=STEPS - 6)


def test_few_steps_are_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "WARM_UP", 5)
    check(attention, repeated=STEPS - 3 - 5)
    monkeypatch.setattr(replay, "LEAST", STEPS - 4)
    check(attention, repeated=0)
