"""Models that run on several threads at once: each run is as it is alone, recorded or not."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import einsum_transformer as et
from einsum_transformer.engine import Recorder, blas
from tiny_models import tiny_model

PROMPTS = [np.random.default_rng(i).integers(0, 61, 400).tolist() for i in range(2)]
"""Long enough for tiles of attention on threads of their own."""


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = blas.get_threads()
    blas.set_threads(2)
    yield
    blas.set_threads(before)


def models() -> list[et.Model]:
    return [
        tiny_model(max_position_embeddings=512),
        tiny_model(max_position_embeddings=512, num_hidden_layers=3),
    ]


def generated(model: et.Model, prompt: list[int]) -> list[int]:
    return et.generate(model, prompt, max_new_tokens=12).tokens


def side_by_side(*tasks: Callable[[], Any]) -> list[Any]:
    """What the tasks return, each on a thread of its own; all begin together."""
    found: list[Any] = [None] * len(tasks)
    barrier = threading.Barrier(len(tasks))

    def run(i: int) -> None:
        barrier.wait(60)
        found[i] = tasks[i]()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def kinds(recorder: Recorder) -> Counter[tuple[Any, ...]]:
    """How often each phase of each layer ran."""
    return Counter((span.path, span.layer) for span in recorder.spans)


@pytest.mark.usefixtures("two_threads")
def test_two_models_generate_at_once_one_of_them_recorded() -> None:
    """Texts are those of each alone; the recorder has the phases, events and values of its own run, and its
    seconds; the other thread is not recorded."""
    first, second = models()
    alone = [generated(model, prompt) for model, prompt in zip((first, second), PROMPTS)]

    def recorded() -> tuple[list[int], Recorder]:
        with Recorder(events=True, values="layers.*.mlp") as recorder:
            return generated(first, PROMPTS[0]), recorder

    _, reference = recorded()
    for _ in range(3):
        (tokens, recorder), other = side_by_side(recorded, lambda: [generated(second, PROMPTS[1])] * 3)
        assert tokens == alone[0]
        assert other == [alone[1]] * 3
        assert {path[:1] for path, _ in kinds(recorder)} == {path[:1] for path, _ in kinds(reference)}
        assert {(path, layer) for path, layer in kinds(recorder) if path[-1] not in ("scores", "mix")} == {
            (path, layer) for path, layer in kinds(reference) if path[-1] not in ("scores", "mix")
        }
        assert len(recorder.events) == len(reference.events)
        assert sorted(recorder.values) == sorted(reference.values) == ["layers.0.mlp", "layers.1.mlp"]
        top = [span for span in recorder.spans if len(span.path) == 1]
        assert all(a.start + a.seconds <= b.start for a, b in itertools.pairwise(top))
    assert blas.get_threads() == blas.current().get_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_two_recorders_on_two_threads_mix_nothing() -> None:
    def recorded(model: et.Model, prompt: list[int]) -> Callable[[], Recorder]:
        def run() -> Recorder:
            with Recorder(events=True) as recorder:
                generated(model, prompt)
            return recorder

        return run

    pairs = list(zip(models(), PROMPTS))
    alone = [recorded(*pair)() for pair in pairs]
    together = side_by_side(*(recorded(*pair) for pair in pairs))
    for one, other in zip(alone, together):
        assert Counter((e.equation, e.layer, e.weight) for e in one.events) == Counter(
            (e.equation, e.layer, e.weight) for e in other.events
        )
        assert {layer for _, layer in kinds(one)} == {layer for _, layer in kinds(other)}


@pytest.mark.usefixtures("two_threads")
def test_a_count_of_threads_that_is_set_meanwhile_holds_afterwards() -> None:
    """Overlapping regions of one thread each: the last one restores the count, also a new one."""
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        with blas.one_thread():
            inside.set()
            done.wait(60)

    thread = threading.Thread(target=other)
    with blas.one_thread():
        thread.start()
        inside.wait(60)
        assert blas.current().get_threads() == 1
        blas.set_threads(3)
        assert (blas.get_threads(), blas.free_threads()) == (3, 1)
    assert blas.current().get_threads() == 1
    done.set()
    thread.join(60)
    assert blas.get_threads() == blas.current().get_threads() == 3
