"""Logits processors: functions that change the logits before the next token is chosen, as in transformers.

Most functions here return a processor. It gets the logits (v,), float64, and the tokens so far, and changes
the logits in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from einsum_transformer.errors import InputError

Array = np.ndarray
Processor = Callable[[Array, Sequence[int]], None]

_FLOAT32 = np.finfo(np.float32)


def biased(name: str, biases: Sequence[tuple[tuple[int, ...], float]]) -> Processor:
    """Add each bias to the logit of its sequence's last token if the text ends with the tokens before it.

    The biases of one token are summed before they are added to its logit.
    """
    following: dict[int, dict[tuple[int, ...], list[tuple[int, float]]]] = {}
    for (*before, last), bias in biases:
        following.setdefault(len(before), {}).setdefault(tuple(before), []).append((last, bias))
    largest = max(max(tokens) for tokens, _ in biases)

    def process(scores: Array, history: Sequence[int]) -> None:
        if largest >= len(scores):
            raise InputError(f"{name}: token {largest} is outside the vocabulary of {len(scores)} tokens")
        total: dict[int, float] = {}
        for length, found in following.items():
            ending = tuple(history[len(history) - length :]) if length <= len(history) else None
            for token, bias in found.get(ending, ()) if ending is not None else ():
                total[token] = total.get(token, 0.0) + bias
        for token, bias in total.items():
            scores[token] += bias

    return process


def penalized(penalty: float) -> Processor:
    """Divide positive and multiply negative logits of the tokens in the text by the penalty (Keskar et al.,
    2019, CTRL)."""

    def process(scores: Array, history: Sequence[int]) -> None:
        _penalize(scores, np.unique(np.asarray(history, np.int64)), penalty)

    return process


def prompt_favoured(penalty: float, prompt: Sequence[int]) -> Processor:
    """Apply the inverse penalty to the tokens of the prompt: a penalty above 1 makes them more likely."""
    seen = np.unique(np.asarray(prompt, np.int64))

    def process(scores: Array, history: Sequence[int]) -> None:
        _penalize(scores, seen, 1 / penalty)

    return process


def _penalize(scores: Array, seen: Array, penalty: float) -> None:
    seen = seen[seen < len(scores)]
    old = scores[seen]
    with np.errstate(over="ignore", under="ignore"):
        scores[seen] = np.where(old > 0, old / penalty, old * penalty)


def no_repeated_ngram(size: int) -> Processor:
    """Exclude each token that would complete a sequence of `size` tokens that already occurs in the text."""

    def process(scores: Array, history: Sequence[int]) -> None:
        if len(history) < size:
            return
        text = np.asarray(history)
        windows = np.lib.stride_tricks.sliding_window_view(text, size)
        same = (windows[:, :-1] == text[len(text) - size + 1 :]).all(axis=1)
        scores[_inside(windows[same, -1], scores)] = -np.inf

    return process


def no_ngram_of_prompt(size: int, prompt: Sequence[int]) -> Processor:
    """Exclude each token that would complete a sequence of `size` tokens that occurs in the prompt."""
    following: dict[tuple[int, ...], list[int]] = {}
    for start in range(len(prompt) - size + 1):
        following.setdefault(tuple(prompt[start : start + size - 1]), []).append(prompt[start + size - 1])

    def process(scores: Array, history: Sequence[int]) -> None:
        if len(history) >= size - 1:
            ending = tuple(history[len(history) - size + 1 :])
            scores[_inside(np.array(following.get(ending, []), np.int64), scores)] = -np.inf

    return process


def suppressed(tokens: Sequence[int], when: Callable[[int], bool] = lambda length: True) -> Processor:
    """Exclude these tokens while `when` is true for the length of the text."""
    ids = np.array([token for token in tokens if 0 <= token < 1 << 62], np.int64)

    def process(scores: Array, history: Sequence[int]) -> None:
        if when(len(history)):
            scores[_inside(ids, scores)] = -np.inf

    return process


def forced(name: str, tokens: Sequence[int], length: int) -> Processor:
    """Allow only these tokens after exactly `length` tokens."""

    def process(scores: Array, history: Sequence[int]) -> None:
        if len(history) == length:
            if not 0 <= min(tokens) <= max(tokens) < len(scores):
                raise InputError(f"{name} is {list(tokens)}: the vocabulary has {len(scores)} tokens")
            scores[:] = -np.inf
            scores[list(tokens)] = 0

    return process


def finite(scores: Array, history: Sequence[int]) -> None:
    """Replace NaN by 0, and infinite logits by the largest or smallest float32."""
    np.nan_to_num(scores, copy=False, nan=0.0, posinf=float(_FLOAT32.max), neginf=float(_FLOAT32.min))


def decaying(start: int, factor: float, ends: Sequence[int]) -> Processor:
    """Add `abs(logit) * (factor**n - 1)` to the end tokens' logits if the text has `start + n` tokens."""
    ids = np.array(ends, np.int64)

    def process(scores: Array, history: Sequence[int]) -> None:
        if len(history) > start:
            old = scores[ids]
            with np.errstate(over="ignore", invalid="ignore"):
                grown = np.abs(old) * (np.float64(factor) ** (len(history) - start) - 1)
            # Bounded, so that a later softmax is finite.
            scores[ids] = np.where(np.isfinite(old), np.minimum(old + np.nan_to_num(grown), 1e300), old)

    return process


def _inside(tokens: Array, scores: Array) -> Array:
    return tokens[(tokens >= 0) & (tokens < len(scores))]
