"""From scores to the next token: penalty, temperature, top-k, top-p, min-p, in the order of Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from einsum_transformer.errors import InputError
from einsum_transformer.models.config import Keys
from einsum_transformer.numerics.softmax import softmax

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn. temperature 0 takes the best one (greedy); 0 and 1 switch the filters
    off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        bounds = {
            "temperature": self.temperature >= 0,
            "top_k": self.top_k >= 0 and self.top_k == int(self.top_k),
            "top_p": 0 <= self.top_p <= 1,
            "min_p": 0 <= self.min_p <= 1,
            "repetition_penalty": self.repetition_penalty > 0,
        }
        ranges = {
            "top_k": "a whole number from 0 on",
            "top_p": "from 0 to 1",
            "min_p": "from 0 to 1",
            "repetition_penalty": "above 0",
        }
        for name, fits in bounds.items():
            if not (fits and np.isfinite(getattr(self, name))):
                raise InputError(
                    f"{name} is {getattr(self, name)}: it must be {ranges.get(name, '0 or more')}"
                )

    @staticmethod
    def from_generation_config(settings: Mapping[str, Any] | None, **given: Any) -> Sampling:
        """What `given` says where it is not None, else what generation_config.json says, else greedy."""
        keys = Keys(settings or {}, "generation_config.json")
        stated = {
            "temperature": keys.get("temperature", float, 1.0) if keys.get("do_sample", bool, False) else 0.0,
            "top_k": keys.get("top_k", int, 0),
            "top_p": keys.get("top_p", float, 1.0),
            "min_p": keys.get("min_p", float, 0.0),
            "repetition_penalty": keys.get("repetition_penalty", float, 1.0),
        }
        return Sampling(**stated | {name: value for name, value in given.items() if value is not None})

    def choose(self, logits: Array, history: Sequence[int], rng: np.random.Generator) -> int:
        """The next token's id, from its scores (v,) and the tokens so far."""
        if self.temperature == 0:
            return int(np.argmax(self._penalized(logits, history)))
        p = self.probabilities(logits, history)
        # Inverting the cumulative sum in float64 draws exactly these probabilities and never a token of
        # probability 0.
        cumulative = np.cumsum(p, dtype=np.float64)
        return int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))

    def probabilities(self, logits: Array, history: Sequence[int]) -> Array:
        """The distribution (v,) that `choose` draws from."""
        scores = self._penalized(logits, history)
        if self.temperature == 0:
            return (np.arange(len(scores)) == np.argmax(scores)).astype(scores.dtype)
        # In float64, from the top down: a tiny temperature ends in exp(-inf) = 0 for all others, its limit.
        scores = scores.astype(np.float64)
        with np.errstate(over="ignore"):
            scores = (scores - scores.max()) / self.temperature
        if 0 < self.top_k < len(scores):
            kth = np.partition(scores, -self.top_k)[-self.top_k]
            scores = np.where(scores < kth, -np.inf, scores)
        p = softmax(scores)
        if self.top_p < 1:
            p = self._nucleus(p)
        if self.min_p > 0:
            p = np.where(p < self.min_p * p.max(), 0, p)
        return p / p.sum()

    def _nucleus(self, p: Array) -> Array:
        """The smallest set of most likely tokens whose probabilities reach top_p; at least one."""
        order = np.argsort(p)
        tail = np.cumsum(p[order]) <= 1 - self.top_p
        tail[-1] = False
        kept = p.copy()
        kept[order[tail]] = 0
        return kept / kept.sum()

    def _penalized(self, logits: Array, history: Sequence[int]) -> Array:
        """Scores of tokens that occurred: divided by the penalty if positive, multiplied if negative (CTRL,
        2019)."""
        if self.repetition_penalty == 1 or not len(history):
            return logits
        scores = logits.astype(np.float64)
        seen = np.unique(np.asarray(history))
        old = scores[seen]
        scores[seen] = np.where(old > 0, old / self.repetition_penalty, old * self.repetition_penalty)
        return scores
