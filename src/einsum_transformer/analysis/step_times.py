"""Measure the seconds and the memory of a step: a prefill, a decode step or a training step."""

from __future__ import annotations

import gc
import math
import statistics
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from einsum_transformer.components.kv_cache import KVCache
from einsum_transformer.engine import blas
from einsum_transformer.engine.replay import WARM_UP
from einsum_transformer.generation.rows import next_logits, prefill
from einsum_transformer.loading.load import load
from einsum_transformer.models.adapters import with_lora
from einsum_transformer.models.model import Model
from einsum_transformer.models.run_config import RunConfig
from einsum_transformer.training.data import RandomTokens
from einsum_transformer.training.loop import Trainer, TrainingSettings
from einsum_transformer.training.schedule import Schedule

Array = np.ndarray
Kind = Literal["prefill", "decode", "training"]

DECODED = WARM_UP // 2
"""Tokens per row that are decoded with one cache, so that all steps run as a program, not as a replay."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """What was measured of a step."""

    seconds: float
    """The median of all repetitions."""
    seconds_of_each: tuple[float, ...]
    peak_bytes: int
    """Most bytes that NumPy and Python allocated during a step, in a repetition that was not timed."""
    losses: tuple[float | None, ...] = ()
    """The loss before the update in each timed training step; None if it was not finite."""


@dataclass(frozen=True, slots=True)
class _Step:
    """A step that can be repeated."""

    prepare: Callable[[], Any]
    """Return what `run` changes, such as a cache; it is not timed."""
    run: Callable[[Any], float | None]
    most: int | None
    """The number of repetitions after one `prepare`, each of which continues the one before; None: all."""


def step_times(config: RunConfig, kind: Kind, repetitions: int, seed: int) -> StepTimes:
    """Measure a step of the model of a run config, with random weights and tokens of a seed.

    "prefill": of `batch_size` rows of `seq_len` random tokens, into a cache whose memory is allocated.
    "decode": one more token per row; eight tokens are decoded with one cache, the first of which is not
    timed. "training": a step of SGD on one batch; the first one is not timed.
    """
    dtype = "bfloat16" if stores_bfloat16(config) and kind != "training" else "float32"
    model = load(config, dtype, seed=seed)
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, model.config.vocab_size, (config.batch_size, config.seq_len))
    if kind == "prefill":
        step = _prefill(model, tokens)
    elif kind == "decode":
        step = _decode(model, tokens)
    else:
        step = _training(model, config, seed, repetitions)
    with blas.fixed_threads():
        return _measured(step, repetitions)


def stores_bfloat16(config: RunConfig) -> bool:
    """Whether the matrices of a run config are stored in bfloat16."""
    return config.weight_dtype == "bfloat16" and config.quantization in (None, "none")


def _measured(step: _Step, repetitions: int) -> StepTimes:
    state = step.prepare()
    step.run(state)
    seconds: list[float] = []
    losses: list[float | None] = []
    for i in range(repetitions):
        if step.most is not None and i % step.most == 0:
            state = step.prepare()
        begin = time.perf_counter()
        loss = step.run(state)
        seconds.append(time.perf_counter() - begin)
        if loss is not None:
            losses.append(loss if math.isfinite(loss) else None)
    if step.most is not None:
        state = step.prepare()
    peak = _peak_bytes(lambda: step.run(state))
    return StepTimes(statistics.median(seconds), tuple(seconds), peak, tuple(losses))


def _peak_bytes(run: Callable[[], Any]) -> int:
    """The most bytes that are allocated at any time during a call, without those allocated before."""
    gc.collect()
    traced = tracemalloc.is_tracing()
    if not traced:
        tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        run()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        if not traced:
            tracemalloc.stop()


def _allocated(model: Model, rows: int, capacity: int) -> KVCache:
    """An empty cache whose memory is allocated."""
    cache = model.cache(capacity, horizon=capacity)
    model.decoder.forward(np.zeros((rows, 1), np.int64), cache, "none")
    cache.truncate(0)
    return cache


def _prefill(model: Model, tokens: Array) -> _Step:
    def run(cache: KVCache) -> None:
        prefill(model, tokens, cache)

    return _Step(lambda: _allocated(model, *tokens.shape), run, 1)


def _decode(model: Model, tokens: Array) -> _Step:
    def run(cache: KVCache) -> None:
        next_logits(model, tokens[:, :1], cache, "last")

    def prepare() -> KVCache:
        cache = _allocated(model, len(tokens), tokens.shape[1] + DECODED)
        prefill(model, tokens, cache)
        run(cache)
        return cache

    return _Step(prepare, run, DECODED - 1)


def _training(model: Model, config: RunConfig, seed: int, repetitions: int) -> _Step:
    def prepare() -> Trainer:
        adapted = model if config.lora is None else with_lora(model, config.lora, seed)
        batches = RandomTokens(model.config.vocab_size, config.batch_size, config.seq_len, seed, fixed=True)
        steps = repetitions + 2
        settings = TrainingSettings(Schedule(config.learning_rate, steps), seed=seed, max_bad_steps=steps)
        return Trainer(adapted, batches, settings)

    return _Step(prepare, lambda trainer: trainer.step().loss, None)


def with_random_weights(config: RunConfig) -> RunConfig:
    """Return the config without its checkpoint, so that its weights are random."""
    return replace(config, hf_repo_id=None, weight_file=None)
