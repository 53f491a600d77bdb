"""Perplexity of a model on a text, and the divergence of its predictions from those of another model.

The convention is llama.cpp's: the text is divided into chunks of `ctx_size` tokens, the first token of each
chunk is replaced by BOS if the tokenizer adds one, and only the tokens of the second half of a chunk are
scored, each after all tokens of the chunk before it. Tokens after the last whole chunk are not used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from einsum_transformer.analysis.quantization import lines_of_types, stored_types
from einsum_transformer.arguments import checked
from einsum_transformer.engine.parallel import for_each
from einsum_transformer.errors import InputError
from einsum_transformer.models.finite import is_finite
from einsum_transformer.models.model import Model
from einsum_transformer.text.chunks import token_chunks

Array = np.ndarray
Progress = Callable[[int, int], object]

CONVENTION = "llamacpp"
_ROWS = 32
"""Rows of logits that are converted to float64 at once."""


@checked
@dataclass(frozen=True, slots=True)
class Perplexity:
    """The perplexity of the scored tokens of a text: exp(mean negative log-likelihood)."""

    model: str
    quantization: str | None
    kv_cache: tuple[str, str]
    """The types of cached keys and values."""
    convention: str
    ctx_size: int
    chunks: int
    tokens: int
    """The number of scored tokens."""
    perplexity: float
    standard_error: float
    negative_log_likelihood: float
    """The mean, in nats per token."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields in JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"perplexity {self.perplexity:.4f} +/- {self.standard_error:.4f}\n"
            f"{_settings(self)}, {self.tokens:,} scored tokens"
        )


@checked
@dataclass(frozen=True, slots=True)
class Divergence:
    """How much the predictions of a model differ from those of a reference on a text.

    KL(p || q) = sum_v p_v (log p_v - log q_v) in nats, where p are the probabilities of the reference and q
    those of the model after the same tokens.
    """

    model: str
    quantization: str | None
    kv_cache: tuple[str, str]
    reference: str
    convention: str
    ctx_size: int
    chunks: int
    tokens: int
    kl_mean: float
    kl_standard_error: float
    kl_median: float
    kl_p99: float
    kl_max: float
    same_top: float
    """Share of tokens for which both models find the same token most probable."""
    perplexity: float
    reference_perplexity: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields in JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"KL divergence: mean {self.kl_mean:.5f} +/- {self.kl_standard_error:.5f}, median "
            f"{self.kl_median:.5f}, 99 % {self.kl_p99:.5f}, maximum {self.kl_max:.5f}\n"
            f"same most probable token: {self.same_top:.2%}\n"
            f"perplexity {self.perplexity:.4f}, of the reference {self.reference_perplexity:.4f}\n"
            f"{_settings(self)}, {self.tokens:,} scored tokens; reference: {self.reference}"
        )


def perplexity(
    model: Model, text: str | Path, ctx_size: int, chunks: int | None, progress: Progress
) -> Perplexity:
    """Return the perplexity of a model; see `api.evaluate.perplexity`."""
    windows = _windows(model, text, ctx_size, chunks)
    losses: list[Array] = []
    for i, window in enumerate(windows):
        log_likelihood = np.empty(len(window) - 1 - len(window) // 2)
        for rows, (own,) in _log_probabilities(window, model):
            log_likelihood[rows] = own[np.arange(len(own)), _targets(window)[rows]]
        losses.append(-log_likelihood)
        progress(i + 1, len(windows))
    every = np.concatenate(losses)
    mean, error = _mean(every)
    value = math.exp(mean)
    return Perplexity(
        model.source,
        *stored_types(model),
        CONVENTION,
        ctx_size,
        len(windows),
        every.size,
        value,
        value * error,
        mean,
    )


def divergence(
    model: Model, reference: Model, text: str | Path, ctx_size: int, chunks: int | None, progress: Progress
) -> Divergence:
    """Return the divergence of a model from a reference; see `api.evaluate.divergence`."""
    if model.config.vocab_size != reference.config.vocab_size:
        raise InputError(
            f"{model.source} has {model.config.vocab_size:,} tokens, {reference.source} "
            f"{reference.config.vocab_size:,}: a divergence needs the same vocabulary"
        )
    windows = _windows(model, text, ctx_size, chunks)
    if not np.array_equal(windows, _windows(reference, text, ctx_size, chunks)):
        raise InputError(
            f"{model.source} and {reference.source} encode the text differently: a divergence needs the same "
            "vocabulary"
        )
    found: list[Array] = []
    for i, window in enumerate(windows):
        # KL, whether the most probable tokens are equal, log-likelihoods of the model and of the reference.
        scores = np.empty((4, len(window) - 1 - len(window) // 2))
        targets = _targets(window)
        for rows, (q, p) in _log_probabilities(window, model, reference):
            every = np.arange(len(q)), targets[rows]
            scores[0, rows] = np.vecdot(np.exp(p), p - q)
            scores[1, rows] = p.argmax(axis=1) == q.argmax(axis=1)
            scores[2, rows], scores[3, rows] = q[every], p[every]
        found.append(scores)
        progress(i + 1, len(windows))
    kl, same, own, expected = np.concatenate(found, axis=1)
    return Divergence(
        model.source, *stored_types(model), reference.source, CONVENTION, ctx_size, len(windows), kl.size,
        *_mean(kl), float(np.median(kl)), float(np.quantile(kl, 0.99)), float(kl.max()),
        float(same.mean()), math.exp(-own.mean()), math.exp(-expected.mean()),
    )  # fmt: skip


def _windows(model: Model, text: str | Path, ctx_size: int, chunks: int | None) -> Array:
    """The chunks of the text, (n, ctx_size)."""
    if model.tokenizer is None:
        raise InputError(f"{model.source}: no tokenizer, which an evaluation on a text needs")
    if ctx_size < 4 or ctx_size > model.config.max_position_embeddings:
        raise InputError(
            f"`ctx_size` is {ctx_size}: expected 4 to the positions of the model, "
            f"{model.config.max_position_embeddings:,}"
        )
    if chunks is not None and chunks < 1:
        raise InputError(f"`chunks` is {chunks}: expected 1 or more")
    windows = token_chunks(model.tokenizer, text, ctx_size, chunks)
    if len(windows) * (ctx_size - 1 - ctx_size // 2) < 2:
        raise InputError("only one token would be scored: use a larger `ctx_size` or more text")
    return model.checked(windows, "the tokens of the text")


def _targets(window: Array) -> Array:
    """The scored tokens of a chunk."""
    return window[len(window) // 2 + 1 :]


def _log_probabilities(window: Array, *models: Model) -> Iterator[tuple[slice, list[Array]]]:
    """Yield slices of the scored tokens and, for each model, their log-probabilities (rows, v) in float64."""
    logits = [_logits(model, window) for model in models]
    for start in range(0, len(logits[0]), _ROWS):
        rows = slice(start, min(start + _ROWS, len(logits[0])))
        found = [np.empty((rows.stop - start, each.shape[1])) for each in logits]

        def run(i: int, j: int, start: int = start, found: list[Array] = found) -> None:
            row = found[i][j]
            row[...] = logits[i][start + j]
            row -= row.max()
            row -= np.log(np.exp(row).sum())

        pairs = [(i, j) for i in range(len(logits)) for j in range(rows.stop - start)]
        for_each(run, pairs, coarse=found[0].size > 1 << 16)
        yield rows, found


def _logits(model: Model, window: Array) -> Array:
    """The logits after all tokens of the second half but the last, through the KV cache of the model."""
    half, cache = len(window) // 2, model.cache(len(window), horizon=len(window))
    tokens = window[None]
    with np.errstate(over="ignore", invalid="ignore"):
        model.decoder.forward(tokens[:, :half], cache, "none")
        logits = model.decoder.forward(tokens[:, half:-1], cache)[0][0]
    if not is_finite(logits):
        raise model.not_finite(tokens)
    return logits


def _mean(values: Array) -> tuple[float, float]:
    """The mean and its standard error."""
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(values.size))


def _settings(found: Perplexity | Divergence) -> str:
    """The settings of an evaluation in a line."""
    parts = [f"convention {found.convention}", f"{found.chunks} chunks of {found.ctx_size}"]
    return ", ".join(parts + lines_of_types(found.quantization, found.kv_cache))
