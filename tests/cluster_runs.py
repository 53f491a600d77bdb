"""Trainings that are run in one process and on workers, and the deaths of workers."""

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
    """Nine rows in parts of four and five, with 1 to 9 targets each."""

    def batch(self, step: int) -> list[Batch]:
        tokens, targets = np.random.default_rng(step).integers(0, 61, (2, 9, 12))
        targets[np.arange(12) > np.arange(9)[:, None]] = -100
        return [(tokens[:4], targets[:4]), (tokens[4:], targets[4:])]


def trainer(
    compute: Callable[..., Any], dtype: str = "float64", lora: bool = False, optimizer: Any = None
) -> Trainer:
    """Of the tiny model, or of adapters with dropout on it."""
    model = input_major(tiny_model(dtype, tie_word_embeddings=lora))
    if lora:
        model = with_lora(model, LoRAConfig(r=4, target_modules="all-linear", lora_dropout=0.2))
    settings = TrainingSettings(Schedule(0.01, 10), optimizer or AdamW(), clip_norm=1.0, recompute=lora)
    return Trainer(model, Ragged(), settings, compute)


def input_major(model: et.Model) -> et.Model:
    """The model with its projections transposed in memory, as those of larger models are laid out."""

    def leaf(path: str, weight: Array) -> Array:
        place = model.weights[path]
        turned = "proj" in path and len(place.stored) == 2
        return np.asfortranarray(weight.reshape(place.stored)).reshape(place.shape) if turned else weight

    return replace(model, decoder=map_named(leaf, model.decoder))


def final(compute: Callable[..., Any], **given: Any) -> dict[str, Array]:
    """The weights and moments after a run without deaths."""
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
    """It stops, so that the next thing it is asked stays undone, and dies a little later."""
    pid = compute.pool.places[worker].pid
    os.kill(pid, signal.SIGSTOP)
    threading.Timer(0.5, os.kill, (pid, signal.SIGKILL)).start()


def wait_until_gone(pids: list[int]) -> None:
    """Until no process has these ids, for ten seconds at most."""
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        assert time.monotonic() < deadline, pids
        time.sleep(0.05)
