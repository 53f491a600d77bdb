"""Training batches: random tokens, or examples from data files. A batch depends on the step number only, so
that a resumed run continues with the next batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Protocol, runtime_checkable

import numpy as np

from einsum_transformer.arguments import checked
from einsum_transformer.engine import blas
from einsum_transformer.errors import InputError
from einsum_transformer.models.model import Model
from einsum_transformer.notes import note
from einsum_transformer.numerics.softmax import IGNORE_INDEX, cross_entropy
from einsum_transformer.text.tokenizer import Tokenizer
from einsum_transformer.training.records import Example

Array = np.ndarray
Batch = tuple[Array, Array]
"""tokens and targets, both (b, t) ints; targets[b, t] is the token after tokens[b, t], or -100."""


@runtime_checkable
class BatchSource(Protocol):
    """What a training needs of its batches."""

    def batch(self, step: int) -> list[Batch]:
        """Return the micro-batches of a step; their gradients are summed."""
        ...


class Batches(BatchSource, Protocol):
    """A source of batches, one for each step, whose training can be saved and resumed."""

    def description(self) -> dict[str, Any]:
        """Return everything that determines the batches, in JSON types."""
        ...


@checked
@dataclass(frozen=True, slots=True)
class RandomTokens:
    """Uniformly random tokens with next-token targets, so a model can only memorize them.

    vocab_size: ids are smaller than it. batch_size, length: rows of a batch and tokens of a row.
    accumulation: number of micro-batches of a step. seed and step determine the batch. fixed: use the same
    batch at every step; the loss must then fall if the optimizer works.
    """

    vocab_size: int
    batch_size: int
    length: int
    seed: int = 0
    fixed: bool = False
    accumulation: int = 1

    def __post_init__(self) -> None:
        _check_counts(self.batch_size, self.accumulation, self.seed)
        _check_positive(length=self.length)

    def batch(self, step: int) -> list[Batch]:
        """Return the micro-batches of a step."""
        rng = np.random.default_rng([self.seed, 0 if self.fixed else step])
        tokens = rng.integers(0, self.vocab_size, (self.batch_size, self.length + 1))
        parts = np.array_split(tokens, self.accumulation)
        return [(part[:, :-1], part[:, 1:]) for part in parts]

    def description(self) -> dict[str, Any]:
        """Return everything that determines the batches, in JSON types."""
        return {"kind": "random tokens"} | asdict(self)


@dataclass(frozen=True, slots=True)
class Rows:
    """Sequences of equal length: tokens and targets, (n, t) int32; targets that the loss ignores are -100."""

    tokens: Array
    targets: Array

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def target_count(self) -> int:
        return int(np.sum(self.targets != IGNORE_INDEX))

    def batch(self, indices: Array) -> Batch:
        """Return these rows without the trailing columns in which no row has a target."""
        tokens, targets = self.tokens[indices], self.targets[indices]
        used = np.flatnonzero((targets != IGNORE_INDEX).any(axis=0))
        width = int(used[-1]) + 1 if len(used) else 1
        return tokens[:, :width], targets[:, :width]


def arrange(examples: Sequence[Example], length: int, pack: bool = True, split_long: bool = True) -> Rows:
    """Arrange examples in rows of `length` tokens.

    pack: concatenate the examples and split them every `length` tokens; attention crosses the boundaries of
    examples. Otherwise every example starts a row, and its last row is padded.
    split_long: split an example of more than length + 1 tokens into several rows instead of raising
    InputError.
    """
    _check_positive(length=length)
    for example in examples:
        if len(example.tokens) > length + 1 and not split_long:
            raise InputError(
                f"{example.place}: {len(example.tokens)} tokens do not fit in rows of {length}; split it"
            )
    if pack and examples:
        tokens = np.concatenate([example.tokens for example in examples])
        examples = [Example(tokens, np.concatenate([example.trained for example in examples]), "")]
    rows = [row for example in examples for row in _split(example, length)]
    if not rows:
        raise InputError("the data contains no targets: a row needs at least two tokens")
    return Rows(np.stack([tokens for tokens, _ in rows]), np.stack([targets for _, targets in rows]))


def _split(example: Example, length: int) -> Iterator[Batch]:
    """Rows of tokens and their targets; rows without a target are dropped."""
    following = np.where(example.trained, example.tokens, IGNORE_INDEX)
    for start in range(0, len(example.tokens) - 1, length):
        tokens, targets = np.zeros(length, np.int32), np.full(length, IGNORE_INDEX, np.int32)
        part = following[start + 1 : start + 1 + length]
        tokens[: len(part)], targets[: len(part)] = example.tokens[start : start + len(part)], part
        if (part != IGNORE_INDEX).any():
            yield tokens, targets


def held_out(examples: Sequence[Example], share: float, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """Split examples into (training, validation): a random share of them, or the end of a single text.

    A single conversation or completion is not split: nothing is held out, and a note reports it.
    """
    if not 0 < share < 1:
        raise InputError(f"the validation share is {share}: expected a number between 0 and 1")
    if len(examples) > 1:
        count = min(len(examples) - 1, max(1, round(share * len(examples))))
        chosen = set(np.random.default_rng([seed, 0x5E1D]).permutation(len(examples))[:count].tolist())
        train = [example for i, example in enumerate(examples) if i not in chosen]
        return train, [example for i, example in enumerate(examples) if i in chosen]
    whole = examples[0]
    if not whole.divisible:
        note(f"{whole.place}: the only example, so nothing is held out for validation")
        return [whole], []
    cut = min(len(whole.tokens) - 2, round((1 - share) * len(whole.tokens)))
    if cut < 2:
        raise InputError(
            f"{whole.place}: too short to hold out a part for validation; `valid_share` 0 holds out nothing"
        )
    first, rest = slice(None, cut), slice(cut, None)
    return [replace(whole, tokens=whole.tokens[first], trained=whole.trained[first])], [
        replace(whole, tokens=whole.tokens[rest], trained=whole.trained[rest])
    ]


@checked
@dataclass(frozen=True)
class TextBatches:
    """Batches of rows, shuffled by seed in every epoch; the step number alone determines the batch.

    rows: the tokens and targets, from `arrange`. batch_size: rows of a batch. accumulation: number of
    micro-batches of a step. fixed: use the first batch at every step.
    """

    rows: Rows
    batch_size: int
    seed: int = 0
    accumulation: int = 1
    fixed: bool = False

    @classmethod
    @checked
    def from_texts(
        cls, texts: Sequence[str], tokenizer: Tokenizer, batch_size: int, seq_len: int, seed: int = 0
    ) -> TextBatches:
        """Return the batches of some texts, packed into rows of `seq_len` tokens.

        texts: each ends with the EOS token of the tokenizer, if it has one. batch_size: rows of a step. seed:
        seed of the order of the rows.
        """
        ids = [np.array(tokenizer.encode_once(text, end=True), np.int32) for text in texts]
        examples = [Example(each, np.ones(len(each), bool), f"text {i}") for i, each in enumerate(ids)]
        return cls(arrange(examples, seq_len), batch_size, seed)

    def __post_init__(self) -> None:
        _check_counts(self.batch_size, self.accumulation, self.seed)
        if self.batch_size > len(self.rows):
            raise InputError(
                f"`batch_size` is {self.batch_size}: expected at most the rows of the data, {len(self.rows)}"
            )

    def batch(self, step: int) -> list[Batch]:
        """Return the micro-batches of a step."""
        start = 0 if self.fixed else step * self.batch_size
        positions = [divmod(index, len(self.rows)) for index in range(start, start + self.batch_size)]
        orders = {epoch: _order(self.seed, epoch, len(self.rows)) for epoch, _ in positions}
        indices = np.array([orders[epoch][position] for epoch, position in positions])
        return [self.rows.batch(part) for part in np.array_split(indices, self.accumulation)]

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256(np.ascontiguousarray(self.rows.tokens).data)
        digest.update(np.ascontiguousarray(self.rows.targets).data)
        return digest.hexdigest()

    def description(self) -> dict[str, Any]:
        """Return everything that determines the batches, in JSON types."""
        settings = {name: getattr(self, name) for name in ("batch_size", "seed", "accumulation", "fixed")}
        return {"kind": "text", "sha256": self._digest, "rows": list(self.rows.tokens.shape)} | settings


@lru_cache(maxsize=2)  # a batch at the end of an epoch contains rows of the next one
def _order(seed: int, epoch: int, rows: int) -> Array:
    """The shuffled row indices of an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


@blas.fixed_threads()
def mean_loss(model: Model, rows: Rows, batch_size: int) -> float:
    """The mean cross-entropy of a model over all targets of the rows."""
    total, loss = rows.target_count, 0.0
    for start in range(0, len(rows), batch_size):
        tokens, targets = rows.batch(np.arange(start, min(start + batch_size, len(rows))))
        loss += cross_entropy(model.logits(tokens), targets, total)[0]
    return loss


def _check_counts(batch_size: int, accumulation: int, seed: int) -> None:
    _check_positive(batch_size=batch_size, accumulation=accumulation)
    if seed < 0:
        raise InputError(f"`seed` is {seed}: expected 0 or more")
    if batch_size < accumulation:
        raise InputError(f"`accumulation` is {accumulation}: expected at most the batch size, {batch_size}")


def _check_positive(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise InputError(f"`{name}` is {value}: expected 1 or more")
