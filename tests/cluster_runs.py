"""Helpers that train in one process or on workers, and kill workers."""

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

import einsum_transformer as et
from einsum_transformer.cluster.data_parallel import DataParallel
from einsum_transformer.models.adapters import with_lora
from einsum_transformer.models.lora_config import LoRAConfig
from einsum_transformer.training.data import Batch
from einsum_transformer.training.loop import Trainer, TrainingSettings
from einsum_transformer.training.optimizers import AdamW
from einsum_transformer.training.schedule import Schedule
from einsum_transformer.tree import map_named
from tiny_models import tiny_model

Array = np.ndarray
STEPS = 4


class Ragged:
    """Nine rows in micro-batches of four and five rows, with 1 to 9 targets per row."""

    def batch(self, step: int) -> list[Batch]:
        tokens, targets = np.random.default_rng(step).integers(0, 61, (2, 9, 12))
        targets[np.arange(12) > np.arange(9)[:, None]] = -100
        return [(tokens[:4], targets[:4]), (tokens[4:], targets[4:])]


def trainer(
    compute: Callable[..., Any], dtype: str = "float64", lora: bool = False, optimizer: Any = None
) -> Trainer:
    """A trainer of the tiny model, or of adapters with dropout on it."""
    model = input_major(tiny_model(dtype, tie_word_embeddings=lora))
    if lora:
        model = with_lora(model, LoRAConfig(r=4, target_modules="all-linear", lora_dropout=0.2))
    settings = TrainingSettings(Schedule(0.01, 10), optimizer or AdamW(), clip_norm=1.0, recompute=lora)
    return Trainer(model, Ragged(), settings, compute)


def input_major(model: et.Model) -> et.Model:
    """The model with its projections transposed in memory, the layout of larger models."""

    def leaf(path: str, weight: Array) -> Array:
        entry = model.weights[path]
        matrix = "proj" in path and len(entry.stored) == 2
        return np.asfortranarray(weight.reshape(entry.stored)).reshape(entry.shape) if matrix else weight

    return replace(model, decoder=map_named(leaf, model.decoder))


def final(compute: Callable[..., Any], **given: Any) -> dict[str, Array]:
    """The weights and moments after a run in which no worker dies."""
    made = trainer(compute, **given)
    list(made.run(STEPS))
    found = snapshot(made)
    if isinstance(made.compute, DataParallel):
        made.compute.close()
    return found


def snapshot(made: Trainer) -> dict[str, Array]:
    """Copies of the weights and moments."""
    found = {name: array.copy() for name, array in made.weights.items()}
    for moment, arrays in made.compute.moments().items():
        found |= {f"{moment} {name}": array.copy() for name, array in arrays.items()}
    return found


def kill(compute: DataParallel, worker: int) -> None:
    os.kill(compute.pool.places[worker].pid, signal.SIGKILL)


def kill_while_it_works(compute: DataParallel, worker: int) -> None:
    """Stop the worker, so that its next call does not finish, and kill it half a second later."""
    pid = compute.pool.places[worker].pid
    os.kill(pid, signal.SIGSTOP)
    threading.Timer(0.5, os.kill, (pid, signal.SIGKILL)).start()


def wait_until_gone(pids: list[int]) -> None:
    """Wait until no process has these ids, at most ten seconds."""
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        assert time.monotonic() < deadline, pids
        time.sleep(0.05)
