"""SGD and AdamW with the updates of torch.optim, and the global gradient norm.

Weights, gradients and moments are flat dictionaries, name -> array, and updates are in place. An update is
bound by memory bandwidth, so all its passes run over one cache-sized piece after the other, on all threads.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from einsum_transformer.arguments import checked
from einsum_transformer.engine import einsum
from einsum_transformer.engine.parallel import for_each
from einsum_transformer.errors import InputError

Array = np.ndarray
Arrays = Mapping[str, Array]

_PIECE = 1 << 15  # elements; fits a core's L2 cache with gradients, two moments and a scratch array
_TASK = 1 << 20  # elements of one thread's task
_ROW = 1 << 10  # elements whose squares are summed in the precision of the gradients
_EXACT = 1e-20, 1e30  # a sum of float32 squares out of this range may have underflowed or overflowed


class Optimizer(ABC):
    """Base class of optimizers: the settings common to all; subclasses are dataclasses that add theirs."""

    __slots__ = ()
    weight_decay: float
    decay_matrices_only: bool
    """Exclude norms and biases, recognized by name, from weight decay, as transformers' Trainer does."""

    @property
    @abstractmethod
    def moments(self) -> tuple[str, ...]:
        """The names of the state arrays of each weight."""

    @abstractmethod
    def change(self, lr: float, step: int, scale: float) -> Callable[..., None]:
        """Return a function `change(w, g, scratch, decay, *moments)` that updates a piece of a weight."""

    def update(
        self,
        weights: Arrays,
        gradients: Arrays,
        state: Mapping[str, Arrays],
        lr: float,
        step: int,
        scale: float = 1.0,
    ) -> None:
        """Update `weights` and `state` in place; `step` counts from 0, and `scale` multiplies gradients."""
        every = not self.decay_matrices_only
        decay = {name: self.weight_decay if every or is_matrix(name) else 0.0 for name in weights}
        moments = [state[moment] for moment in self.moments]
        _by_pieces(self.change(lr, step, scale), weights, gradients, decay, moments)


def start(optimizer: Optimizer, weights: Arrays) -> dict[str, dict[str, Array]]:
    """The initial optimizer state, moment -> name -> zeros in the memory layout of the weight."""
    return {moment: {name: np.zeros_like(w) for name, w in weights.items()} for moment in optimizer.moments}


@checked
@dataclass(frozen=True, slots=True)
class SGD(Optimizer):
    """Stochastic gradient descent, as torch.optim.SGD with dampening 0.

    g += weight_decay w; without momentum w -= lr g; with it m = momentum m + g (m = g at the first step) and
    w -= lr m, or with nesterov w -= lr (g + momentum m). decay_matrices_only: no weight decay of norms and
    biases.
    """

    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    decay_matrices_only: bool = False

    def __post_init__(self) -> None:
        _check_range(self, momentum=(0, 1), weight_decay=(0, math.inf))
        if self.nesterov and not self.momentum:
            raise InputError("nesterov requires a momentum above 0")

    @property
    def moments(self) -> tuple[str, ...]:
        return ("momentum",) if self.momentum else ()

    def change(self, lr: float, step: int, scale: float) -> Callable[..., None]:
        def change(w: Array, g: Array, scratch: Array, decay: float, m: Array | None = None) -> None:
            np.multiply(g, scale, out=scratch)
            if decay:
                scratch += decay * w
            if m is not None:
                m *= self.momentum
                m += scratch
                if self.nesterov:
                    scratch += self.momentum * m
                else:
                    scratch = m * lr
                    w -= scratch
                    return
            scratch *= lr
            w -= scratch

        return change


@checked
@dataclass(frozen=True, slots=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019; torch.optim.AdamW), with t = step + 1:

    w -= lr weight_decay w; m = beta1 m + (1 - beta1) g; v = beta2 v + (1 - beta2) g^2;
    w -= lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps). decay_matrices_only: no weight decay of norms
    and biases.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    decay_matrices_only: bool = False

    def __post_init__(self) -> None:
        _check_range(self, beta1=(0, 1), beta2=(0, 1), eps=(0, math.inf), weight_decay=(0, math.inf))

    @property
    def moments(self) -> tuple[str, ...]:
        return "m", "v"

    def change(self, lr: float, step: int, scale: float) -> Callable[..., None]:
        step_size = lr / (1 - self.beta1 ** (step + 1))
        root = 1 / math.sqrt(1 - self.beta2 ** (step + 1))

        def change(w: Array, g: Array, scratch: Array, decay: float, m: Array, v: Array) -> None:
            np.multiply(g, scale * (1 - self.beta1), out=scratch)
            m *= self.beta1
            m += scratch
            np.multiply(g, scale * math.sqrt(1 - self.beta2), out=scratch)
            scratch *= scratch
            v *= self.beta2
            v += scratch
            np.sqrt(v, out=scratch)
            scratch *= root
            scratch += self.eps
            np.divide(m, scratch, out=scratch)
            scratch *= step_size
            if decay:
                w *= 1 - lr * decay
            w -= scratch

        return change


OPTIMIZERS: dict[str, type[SGD] | type[AdamW]] = {"sgd": SGD, "adamw": AdamW}


def global_norm(gradients: Arrays) -> float:
    """The L2 norm of all gradients, summed in float64 in a fixed order; not finite if any gradient is not."""
    squares: dict[tuple[str, int], float] = {}

    def add(name: str, start: int, piece: Array) -> None:
        squares[name, start] = _sum_of_squares(piece)

    tasks = [
        (name, start, flat[start : start + _TASK])
        for name, flat in ((name, _in_memory_order(g)) for name, g in gradients.items())
        for start in range(0, len(flat), _TASK)
    ]
    with np.errstate(over="ignore"):
        for_each(add, tasks, coarse=len(tasks) > 1)
    return math.sqrt(math.fsum(squares[name, start] for name, start, _ in tasks))


def _sum_of_squares(piece: Array) -> float:
    """Sum squares in the precision of the array within short rows, and the rows in float64; all in float64
    where float32 underflows or overflows."""
    rows = piece[: len(piece) // _ROW * _ROW].reshape(-1, _ROW)
    rest = piece[rows.size :]
    total = float(np.sum(einsum("td,td->t", rows, rows), dtype=np.float64)) + float(np.sum(rest * rest))
    if piece.dtype == np.float64 or _EXACT[0] < total < _EXACT[1] or not piece.any():
        return total
    return _sum_of_squares(piece.astype(np.float64))


def is_matrix(name: str) -> bool:
    """Whether a weight is neither of a norm nor a bias, by its name, as in transformers' Trainer."""
    return "norm" not in name and not name.endswith("bias")


def _by_pieces(
    change: Callable[..., None],
    weights: Arrays,
    gradients: Arrays,
    decay: Mapping[str, float],
    moments: list[Arrays],
) -> None:
    """Call `change(w, g, scratch, decay, *moments)` for flat pieces of every weight in memory order."""
    tasks: list[tuple[Any, ...]] = []
    for name, w in weights.items():
        lines = _line_length(w)
        given = [w, _like(gradients[name], w), *(each[name] for each in moments)]
        flat = [_in_memory_order(array, lines) for array in given]
        step = max(1, _TASK // (w.size // max(1, len(flat[0]))) if w.size else 1)
        for start in range(0, len(flat[0]), step):
            tasks.append((decay[name], *(array[start : start + step] for array in flat)))

    def task(decay: float, w: Array, g: Array, *rest: Array) -> None:
        step = max(1, _PIECE * len(w) // max(1, w.size))
        scratch = np.empty((min(step, len(w)), *w.shape[1:]), w.dtype)
        for begin in range(0, len(w), step):
            end = min(begin + step, len(w))
            moments = (m[begin:end] for m in rest)
            change(w[begin:end], g[begin:end], scratch[: end - begin], decay, *moments)

    for_each(task, tasks, coarse=sum(w.size for w in weights.values()) > _TASK)


def _line_length(array: Array) -> int | None:
    """Number of elements that follow each other in memory; None for all, in an array without gaps."""
    axes, length = _axes(array), 1
    for axis in reversed(axes):
        if array.shape[axis] > 1 and array.strides[axis] != length * array.itemsize:
            return length
        length *= array.shape[axis]
    return None


def _in_memory_order(array: Array, length: int | None = None) -> Array:
    """A view in memory order: flat, of an array without gaps, or as lines of this length."""
    view = array.transpose(_axes(array)).reshape((-1,) if length is None else (-1, length))
    assert view.size == 0 or np.may_share_memory(view, array)
    return view


def _axes(array: Array) -> list[int]:
    """The axes from the outermost to the innermost; those of size 1, whose strides are arbitrary, first."""
    return sorted(range(array.ndim), key=lambda axis: (array.shape[axis] != 1, -array.strides[axis]))


def _like(array: Array, weight: Array) -> Array:
    """The array in the memory layout and dtype of the weight; a copy only where they differ."""
    if _axes(array) == _axes(weight) and array.dtype == weight.dtype:
        return array
    copied = np.empty_like(weight)
    np.copyto(copied, array)
    return copied


def _check_range(settings: Any, **bounds: tuple[float, float]) -> None:
    for name, (low, high) in bounds.items():
        value = getattr(settings, name)
        if not low <= value < high:
            raise InputError(f"`{name}` is {value}: expected a number from {low} to below {high}")
