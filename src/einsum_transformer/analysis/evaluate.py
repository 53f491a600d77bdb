"""Perplexity of a model on a text, and the divergence of its predictions from those of another model.

The text is divided into windows of tokens by a named convention (`text.windows`). The last tokens of a window
are scored, each after all tokens of the window before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from einsum_transformer.analysis.measurements import ResultFile, Scores, weights_digest
from einsum_transformer.analysis.quantization import lines_of_types, stored_types
from einsum_transformer.arguments import checked
from einsum_transformer.engine.parallel import for_each
from einsum_transformer.errors import InputError
from einsum_transformer.models.finite import is_finite
from einsum_transformer.models.model import Model
from einsum_transformer.text.windows import CONVENTIONS, DEFAULT_STRIDE, STRIDED, Window, Windows, windows_of

Array = np.ndarray
Progress = Callable[[int, int], object]

_ROWS = 32
"""Rows of logits that are converted to float64 at once."""
_PIECE = 512
"""Tokens of a forward pass: the logits of more would take too much memory."""


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
    stride: int | None
    """Tokens between the beginnings of windows; None: they do not overlap."""
    chunks: int
    """The number of windows."""
    tokens: int
    """The number of scored tokens."""
    perplexity: float
    standard_error: float
    negative_log_likelihood: float
    """The mean, in nats per token."""
    bits_per_byte: float
    """The mean in bits, times the tokens per byte of the whole text."""
    word_perplexity: float
    """exp(the mean times the tokens per word of the whole text); words are separated by white space."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields in JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"perplexity {self.perplexity:.4f} +/- {self.standard_error:.4f}; {self.bits_per_byte:.4f} bits "
            f"per byte, perplexity of words {self.word_perplexity:.4g}\n"
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
    stride: int | None
    chunks: int
    tokens: int
    kl_mean: float
    kl_standard_error: float
    kl_median: float
    kl_p90: float
    """90 % of the tokens have at most this divergence; kl_p99: 99 %."""
    kl_p99: float
    kl_max: float
    probability_rms: float
    """Root of the mean squared difference of the probabilities of the scored tokens."""
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
            f"{self.kl_median:.5f}, 90 % {self.kl_p90:.5f}, 99 % {self.kl_p99:.5f}, maximum "
            f"{self.kl_max:.5f}\n"
            f"same most probable token: {self.same_top:.2%}; difference of probabilities: RMS "
            f"{self.probability_rms:.2%}\n"
            f"perplexity {self.perplexity:.4f}, of the reference {self.reference_perplexity:.4f}\n"
            f"{_settings(self)}, {self.tokens:,} scored tokens; reference: {self.reference}"
        )


@dataclass(frozen=True, slots=True)
class Selection:
    """The windows of a text that are evaluated; None: the default of the convention."""

    convention: str = "llamacpp"
    ctx_size: int | None = None
    stride: int | None = None
    chunks: int | None = None

    def size(self, model: Model) -> int:
        """The tokens of a window. Raises InputError for settings that are not possible."""
        if self.convention not in CONVENTIONS:
            raise InputError(f"`convention` is {self.convention!r}: expected {', '.join(CONVENTIONS)}")
        most = model.config.max_position_embeddings
        size = self.ctx_size
        if size is None:
            size = min(512 if self.convention.startswith("llamacpp") else 2048, most)
        longest = size + (self.step // 2 if self.convention == "llamacpp-stride" else 0)
        if size < 4 or longest > most:
            raise InputError(f"`ctx_size` is {size}: expected 4 to the positions of the model, {most:,}")
        if self.chunks is not None and self.chunks < 1:
            raise InputError(f"`chunks` is {self.chunks}: expected 1 or more")
        if self.stride is not None and self.convention not in STRIDED:
            raise InputError(f"`stride` is used by {' and '.join(STRIDED)}, not by {self.convention}")
        if not 0 < self.step <= size:
            raise InputError(f"`stride` is {self.step}: expected 1 to `ctx_size`, {size}")
        return size

    @property
    def step(self) -> int:
        """The stride of conventions that have one."""
        if self.stride is None:
            return min(DEFAULT_STRIDE, self.ctx_size or DEFAULT_STRIDE)
        return self.stride

    def windows(self, model: Model, text: str | Path) -> Windows:
        """The windows of a text. Raises InputError for a model without tokenizer and a short text."""
        if model.tokenizer is None:
            raise InputError(f"{model.source}: no tokenizer, which an evaluation on a text needs")
        size = self.size(model)
        found = windows_of(model.tokenizer, text, self.convention, size, self.step, self.chunks)
        if sum(window.scored for window in found.windows) < 2:
            raise InputError("only one token would be scored: use a larger `ctx_size` or more text")
        for window in found.windows:
            model.checked(window.tokens[None], "the tokens of the text")
        return found


def perplexity(
    model: Model, text: str | Path, selection: Selection, progress: Progress, results: Path | None = None
) -> Perplexity:
    """Return the perplexity of a model; see `api.evaluate.perplexity`."""
    found = selection.windows(model, text)

    def score(window: Window) -> Array:
        log_likelihood = np.empty((1, window.scored))
        for rows, (own,) in _scored(window, model):
            log_likelihood[0, rows] = own[np.arange(len(own)), _targets(window)[rows]]
        return log_likelihood

    scores = _every(found.windows, 1, score, results, selection, progress, model)
    losses = [-each[0] for each in scores]
    every = np.concatenate(losses)
    weights = [window.weight for window in found.windows]
    mean = float(np.average([each.mean() for each in losses], weights=weights))
    value, error = math.exp(mean), _mean(every)[1]
    return Perplexity(
        model.source,
        *stored_types(model),
        selection.convention,
        selection.size(model),
        selection.step if selection.convention in STRIDED else None,
        len(found.windows),
        every.size,
        value,
        value * error,
        mean,
        mean / math.log(2) * found.tokens / found.nbytes,
        _exp(mean * found.tokens / found.words),
    )


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def divergence(
    model: Model,
    reference: Model,
    text: str | Path,
    selection: Selection,
    progress: Progress,
    results: Path | None = None,
) -> Divergence:
    """Return the divergence of a model from a reference; see `api.evaluate.divergence`."""
    if model.config.vocab_size != reference.config.vocab_size:
        raise InputError(
            f"{model.source} has {model.config.vocab_size:,} tokens, {reference.source} "
            f"{reference.config.vocab_size:,}: a divergence needs the same vocabulary"
        )
    windows = selection.windows(model, text).windows
    others = selection.windows(reference, text).windows
    same = len(windows) == len(others)
    if not same or not all(np.array_equal(a.tokens, b.tokens) for a, b in zip(windows, others)):
        raise InputError(
            f"{model.source} and {reference.source} encode the text differently: a divergence needs the same "
            "vocabulary"
        )

    def score(window: Window) -> Array:
        # KL, whether the most probable tokens are equal, log-likelihoods of the model and of the reference.
        scores = np.empty((4, window.scored))
        targets = _targets(window)
        for rows, (q, p) in _scored(window, model, reference):
            at = np.arange(len(q)), targets[rows]
            scores[0, rows], scores[1, rows] = row_divergences(p, q)
            scores[2, rows], scores[3, rows] = q[at], p[at]
        return scores

    found = _every(windows, 4, score, results, selection, progress, model, reference)
    kl, tops, own, expected = np.concatenate(found, axis=1)
    changes: Array = np.exp(own) - np.exp(expected)
    return Divergence(
        model.source, *stored_types(model), reference.source, selection.convention, selection.size(model),
        selection.step if selection.convention in STRIDED else None, len(windows), kl.size,
        *_mean(kl), float(np.median(kl)), float(np.quantile(kl, 0.9)), float(np.quantile(kl, 0.99)),
        float(kl.max()), float(np.sqrt(np.mean(np.square(changes, dtype=np.float64)))), float(tops.mean()),
        math.exp(-own.mean()), math.exp(-expected.mean()),
    )  # fmt: skip


def _every(
    windows: Sequence[Window],
    rows: int,
    score: Callable[[Window], Array],
    results: Path | None,
    selection: Selection,
    progress: Progress,
    *models: Model,
) -> list[Array]:
    """Return the scores (rows, tokens) of each window; those that the file `results` contains are not
    computed again."""

    def header() -> dict[str, Any]:
        types = [stored_types(each) for each in models]
        return {
            "models": [each.source for each in models],
            "weights": [weights_digest(each) for each in models],
            "quantization": [quantization for quantization, _ in types],
            "kv_cache": [list(names) for _, names in types],
            "convention": selection.convention,
        }

    known = Scores(ResultFile(results, header), rows, windows)
    found: list[Array] = []
    for i, window in enumerate(windows):
        scores = known.get(i)
        if scores is None:
            scores = score(window)
            known.add(i, scores)
        found.append(scores)
        progress(i + 1, len(windows))
    return found


def row_divergences(p: Array, q: Array) -> tuple[Array, Array]:
    """Return KL(p || q) of each row of log-probabilities, and whether the most probable tokens are equal."""
    return np.vecdot(np.exp(p), p - q), p.argmax(axis=1) == q.argmax(axis=1)


def _targets(window: Window) -> Array:
    """The scored tokens of a window."""
    return window.tokens[len(window.tokens) - window.scored :]


def _scored(window: Window, *models: Model) -> Iterator[tuple[slice, list[Array]]]:
    """Yield slices of the scored tokens and, for each model, their log-probabilities (rows, v) in float64."""
    done = 0
    for pieces in zip(*(_logits(model, window) for model in models)):
        for rows, found in log_probabilities(*pieces):
            yield slice(done + rows.start, done + rows.stop), found
        done += len(pieces[0])


def log_probabilities(*logits: Array) -> Iterator[tuple[slice, list[Array]]]:
    """Yield slices of rows and, for each of the logits (n, v), log-probabilities (rows, v) in float64."""
    for start in range(0, len(logits[0]), _ROWS):
        rows = slice(start, min(start + _ROWS, len(logits[0])))
        found = [np.empty((rows.stop - start, each.shape[1])) for each in logits]

        def run(i: int, j: int, start: int = start, found: list[Array] = found) -> None:
            log_softmax(logits[i][start + j], found[i][j])

        pairs = [(i, j) for i in range(len(logits)) for j in range(rows.stop - start)]
        for_each(run, pairs, coarse=found[0].size > 1 << 16)
        yield rows, found


def log_softmax(logits: Array, out: Array) -> None:
    """Write the log-probabilities of a row of logits (v,) to `out`, in its type."""
    out[...] = logits
    out -= out.max()
    out -= np.log(np.exp(out).sum())


def scored_logits(model: Model, window: Window) -> Array:
    """Return the logits (n, v) before the scored tokens of a window."""
    return np.concatenate(list(_logits(model, window)))


def _logits(model: Model, window: Window) -> Iterator[Array]:
    """Yield the logits before the scored tokens in pieces, through the KV cache of the model."""
    tokens, cache = window.tokens[None], model.cache(len(window.tokens), horizon=len(window.tokens))
    first, last = len(window.tokens) - window.scored - 1, len(window.tokens) - 1
    for start in (*range(0, first, _PIECE), *range(first, last, _PIECE)):
        stop = min(start + _PIECE, first if start < first else last)
        with np.errstate(over="ignore", invalid="ignore"):
            positions = "none" if stop <= first else "all"
            logits = model.decoder.forward(tokens[:, start:stop], cache, positions)[0]
        if stop > first:
            if not is_finite(logits):
                raise model.not_finite(tokens)
            yield logits[0]


def _mean(values: Array) -> tuple[float, float]:
    """The mean and its standard error."""
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(values.size))


def _settings(found: Perplexity | Divergence) -> str:
    """The settings of an evaluation in a line."""
    stride = "" if found.stride is None else f", stride {found.stride}"
    parts = [f"convention {found.convention}", f"{found.chunks} chunks of {found.ctx_size} tokens{stride}"]
    return ", ".join(parts + lines_of_types(found.quantization, found.kv_cache))
