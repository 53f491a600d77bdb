# pyright: reportUnnecessaryIsInstance=false
"""The training loop: batch, forward, loss, backward, clipping, update."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from einsum_transformer.arguments import checked
from einsum_transformer.engine import Recorder, blas, phase
from einsum_transformer.engine.memory import keep_freed
from einsum_transformer.engine.parallel import for_each
from einsum_transformer.engine.recorder import reads_values
from einsum_transformer.errors import ArgumentError, InputError
from einsum_transformer.models.decoder import Decoder
from einsum_transformer.models.families.config_keys import unapplied_settings
from einsum_transformer.models.finite import FirstBad
from einsum_transformer.models.model import Model
from einsum_transformer.models.parameters import frozen, gradients_by_name, trainable, with_dropout, writable
from einsum_transformer.notes import note
from einsum_transformer.numerics.softmax import IGNORE_INDEX
from einsum_transformer.training.data import Batch, Batches, BatchSource
from einsum_transformer.training.optimizers import SGD, Optimizer, global_norm, start
from einsum_transformer.training.schedule import Schedule
from einsum_transformer.tree import named_leaves

Array = np.ndarray


@checked
@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """Settings of a training.

    schedule: the learning rate of each step. optimizer: SGD or AdamW. clip_norm: maximum norm of all
    gradients together; larger ones are scaled. seed: seed of dropout. recompute: save only the input of each
    block, and compute the block again in the backward pass. max_bad_steps: maximum number of successive steps
    that are skipped because a value is not finite.
    """

    schedule: Schedule
    optimizer: Optimizer = SGD()  # noqa: RUF009 (frozen)
    clip_norm: float | None = None
    seed: int = 0
    recompute: bool = False
    max_bad_steps: int = 3

    def __post_init__(self) -> None:
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise InputError(f"`clip_norm` is {self.clip_norm}: expected a number above 0")


@checked
@dataclass(frozen=True, slots=True)
class StepReport:
    """The result of one step. step: from 0; loss: the mean over its targets, before the update; norm: of all
    gradients together, before clipping."""

    step: int
    loss: float
    norm: float
    lr: float
    targets: int
    seconds: float
    fault: str | None = None
    """Why the step was skipped (the origin of the first value that is not finite), or None."""


class TrainingFailed(InputError):
    """Too many successive steps were not finite."""


class Compute(Protocol):
    """Computes gradients and updates weights, in this process or with the workers of a cluster."""

    def gradients(self, parts: list[Batch], count: int, step: int) -> tuple[float, dict[str, Array]]:
        """Return the loss of a batch, divided by `count`, and its gradient by every trained array."""
        ...

    def update(self, gradients: dict[str, Array], lr: float, step: int, scale: float) -> None:
        """Update the weights and the optimizer's state in place."""
        ...

    def moments(self) -> dict[str, dict[str, Array]]:
        """Return the optimizer's state by moment and name, read-only."""
        ...

    def restore(self, moments: dict[str, dict[str, Array]]) -> None:
        """Replace the optimizer's state; the weights do not change."""
        ...

    def close(self) -> None:
        """Stop the workers, if any."""
        ...


class Local:
    """Computation in this process."""

    def __init__(self, model: Model, settings: TrainingSettings) -> None:
        keep_freed()
        self.decoder: Decoder = model.decoder
        self.settings: TrainingSettings = settings
        self.weights: dict[str, Array] = trainable(model.decoder)
        self.state: dict[str, dict[str, Array]] = start(settings.optimizer, self.weights)

    def gradients(self, parts: list[Batch], count: int, step: int) -> tuple[float, dict[str, Array]]:
        return batch_gradients(
            self.decoder, numbered(parts), count, (self.settings.seed, step), self.settings
        )

    def update(self, gradients: dict[str, Array], lr: float, step: int, scale: float) -> None:
        self.settings.optimizer.update(self.weights, gradients, self.state, lr, step, scale)

    def moments(self) -> dict[str, dict[str, Array]]:
        return self.state

    def restore(self, moments: dict[str, dict[str, Array]]) -> None:
        for moment, arrays in moments.items():
            for name, array in arrays.items():
                np.copyto(self.state[moment][name], array)

    def close(self) -> None:
        """Nothing to stop."""


def numbered(parts: list[Batch]) -> list[tuple[int, Array, Array]]:
    """Return (index of its first row in the whole batch, tokens, targets) of each part."""
    firsts = np.cumsum([0, *(len(tokens) for tokens, _ in parts)])
    return [(int(first), tokens, targets) for first, (tokens, targets) in zip(firsts, parts)]


@blas.fixed_threads()
def batch_gradients(
    decoder: Any,
    parts: list[tuple[int, Array, Array]],
    count: int,
    key: tuple[int, ...],
    settings: TrainingSettings,
) -> tuple[float, dict[str, Array]]:
    """Return the loss and the gradients of numbered parts, summed in order; key: the seed of dropout."""
    loss, total = 0.0, {}
    for part in parts:
        for part_loss, gradients in _sliced(decoder, part, count, key, settings.recompute):
            loss += part_loss
            for name, array in gradients.items() if total else ():
                total[name] += array
            total = total or gradients
    return loss, total


def _sliced(
    decoder: Any, part: tuple[int, Array, Array], count: int, key: tuple[int, ...], recompute: bool
) -> list[tuple[float, dict[str, Array]]]:
    """Return loss and gradients of a part: of all rows at once, or of one slice of rows per thread."""
    first_row, tokens, targets = part
    slices = min(blas.shares(), len(tokens)) if _slices_pay(decoder, tokens.size) else 1
    found: list[Any] = [None] * slices

    def compute(i: int, first_row: int, tokens: Array, targets: Array) -> None:
        own = with_dropout(decoder, key, first_row)
        loss, gradient = own.loss_and_gradient(tokens, targets, count, recompute)
        found[i] = loss, gradients_by_name(own, gradient)

    rows = list(zip(np.array_split(tokens, slices), np.array_split(targets, slices)))
    for_each(compute, [(i, first_row + first, *pair) for i, (first, *pair) in enumerate(numbered(rows))])
    return found


def _slices_pay(decoder: Any, tokens: int) -> bool:
    """Return whether one slice of rows per thread is faster than threads that share each product.

    Slices avoid waits between products, and parallelize the elementwise work too. But every thread then has
    its own gradient, which is written, read and added: about 1.2 ns per trained parameter, while a parameter
    of the model takes 0.03 ns per token. The products are shared if that is more than 4 %, e.g. if all
    weights are trained on less than 1,000 tokens.
    """
    if reads_values():
        return False
    trained = sum(array.size for array in trainable(decoder).values())
    everything = sum(math.prod(leaf.shape) for _, leaf in named_leaves(decoder))
    return 1000 * trained <= everything * tokens


@checked
class Trainer:
    """Trains a model. Its weights change in place; those of a read-only file are copied first.

    Every array of the model is trained, or only the matrices of its adapters if it has any (`with_lora`).
    batches: RandomTokens, TextBatches, or another source of batches. compute: returns the `Compute` for the
    model and the settings; by default this process computes.
    """

    def __init__(
        self,
        model: Model,
        batches: Batches,
        settings: TrainingSettings,
        compute: Callable[[Model, TrainingSettings], Compute] = Local,
    ) -> None:
        if not isinstance(batches, BatchSource):
            kinds = "RandomTokens, TextBatches, or an object with a method `batch(step)`"
            raise ArgumentError(f"Trainer(): `batches` is {batches!r:.60}, expected {kinds}")
        if model.quantization is not None and model.lora is None:
            raise InputError(
                f"{model.source}: weights that are quantized to {model.quantization} have no gradient: "
                "train adapters (`lora`, --use-lora), or load without quantization"
            )
        if unapplied := unapplied_settings(model.config):
            note(f"{model.source}: training does not apply {', '.join(unapplied)}")
        self.model: Model = replace(model, decoder=writable(model.decoder))
        self.batches: Batches = batches
        self.settings: TrainingSettings = settings
        self.weights: dict[str, Array] = trainable(self.model.decoder)
        self.compute: Compute = compute(self.model, settings)
        self.steps_done: int = 0
        self.bad_steps: int = 0
        """Total number of steps that were skipped because a value was not finite."""
        self.bad_in_a_row: int = 0

    @cached_property
    def frozen_crc(self) -> int:
        """The checksum of the frozen weights, which checkpoints do not contain."""
        crc = 0
        for part in frozen(self.model.decoder).values():
            weight = np.asarray(part)
            # In memory order, so that nothing is copied; the loader determines the layout.
            flat = weight.transpose(np.argsort(weight.strides, kind="stable")[::-1])
            crc = zlib.crc32(np.ascontiguousarray(flat).reshape(-1).view(np.uint8).data, crc)
        return crc

    def run(self, steps: int) -> Iterator[StepReport]:
        """Yield the reports of the steps up to `steps`, counted from the start of the training."""
        while self.steps_done < steps:
            yield self.step()

    # The report names overflows, so NumPy's warnings are not needed.
    @blas.fixed_threads()
    @np.errstate(over="ignore", invalid="ignore")
    def step(self) -> StepReport:
        """Run one step; the weights do not change if a value in it is not finite."""
        begin, number = time.perf_counter(), self.steps_done
        with phase("batch"):
            parts = self.batches.batch(number)
            count = sum(int(np.sum(targets != IGNORE_INDEX)) for _, targets in parts)
        loss, gradients = self.compute.gradients(parts, count, number)
        lr = self.settings.schedule(number)
        with phase("clipping"):
            norm = global_norm(gradients)
        fault = None
        if math.isfinite(loss) and math.isfinite(norm):
            clip = self.settings.clip_norm
            # The update scales the gradients, which saves a pass over them.
            scale = 1.0 if clip is None or norm <= clip else clip / norm
            with phase("update"):
                self.compute.update(gradients, lr, number, scale)
            self.bad_in_a_row = 0
        else:
            fault = self._fault(parts, gradients)
            self.bad_steps += 1
            self.bad_in_a_row += 1
            if self.bad_in_a_row > self.settings.max_bad_steps:
                raise TrainingFailed(
                    f"step {number + 1}: {fault}; {self.bad_in_a_row} steps in a row were not finite: "
                    "lower the learning rate, or clip the gradients with `clip_norm`"
                )
        self.steps_done += 1
        return StepReport(number, loss, norm, lr, count, time.perf_counter() - begin, fault)

    def _fault(self, parts: list[Batch], gradients: dict[str, Array]) -> str:
        """Return the origin of the first value that is not finite: in the forward, else the backward pass."""
        bad = FirstBad()
        with Recorder(spans=False).on_value(bad):
            for tokens, _ in parts:
                if not bad.name:
                    self.model.decoder.forward(tokens)
        if bad.name:
            return f"{bad.name} has a value that is not finite"
        # The backward pass runs from the last layer to the first.
        for name in reversed(gradients):
            if not np.isfinite(gradients[name]).all():
                return f"the gradient of {name} is not finite"
        return "the norm of the gradients is not finite"
