"""Choose the next token from logits: processors, temperature and filters, in the order of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from einsum_transformer.errors import InputError
from einsum_transformer.generation import filters, processors
from einsum_transformer.generation.keys import SAMPLING, parsed
from einsum_transformer.generation.processors import Processor
from einsum_transformer.numerics.softmax import softmax

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class Sampling:
    """Settings of the choice of the next token, with the names and meanings of transformers.

    With temperature 0 the most probable token is chosen (greedy), without filters. The defaults disable
    everything else.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    top_h: float | None = None
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    sequence_bias: Sequence[tuple[tuple[int, ...], float]] = ()
    encoder_repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    bad_words_ids: Sequence[Sequence[int]] = ()
    min_length: int = 0
    min_new_tokens: int = 0
    forced_bos_token_id: int | None = None
    forced_eos_token_id: Sequence[int] = ()
    remove_invalid_values: bool = False
    exponential_decay_length_penalty: tuple[int, float] | None = None
    suppress_tokens: Sequence[int] = ()
    begin_suppress_tokens: Sequence[int] = ()

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if value is not each.default:
                object.__setattr__(self, each.name, parsed(each.name, value, SAMPLING[each.name]))

    @staticmethod
    def of(values: Mapping[str, Any]) -> Sampling:
        """Return the settings in the values of `keys.merged`."""
        return Sampling(**{name: value for name, value in values.items() if name in SAMPLING})

    def sampler(
        self, prompt: Sequence[int] = (), ends: Sequence[int] = (), max_length: int | None = None
    ) -> Sampler:
        """Return the sampler for one text.

        prompt: its first tokens; ends: the ids that end it; max_length: tokens of prompt and answer together.
        """
        return Sampler(self, _processors(self, list(prompt), ends, max_length))


def _processors(
    sampling: Sampling, prompt: list[int], ends: Sequence[int], max_length: int | None
) -> tuple[Processor, ...]:
    """Return the enabled processors, in the order of transformers' `_get_logits_processor`."""
    s, start = sampling, len(prompt)
    enabled: list[Processor] = []
    if s.sequence_bias:
        enabled.append(processors.biased("sequence_bias", s.sequence_bias))
    if s.encoder_repetition_penalty != 1:
        enabled.append(processors.prompt_favoured(s.encoder_repetition_penalty, prompt))
    if s.repetition_penalty != 1:
        enabled.append(processors.penalized(s.repetition_penalty))
    if s.no_repeat_ngram_size:
        enabled.append(processors.no_repeated_ngram(s.no_repeat_ngram_size))
    if s.encoder_no_repeat_ngram_size:
        enabled.append(processors.no_ngram_of_prompt(s.encoder_no_repeat_ngram_size, prompt))
    if bad := [(tuple(each), -np.inf) for each in s.bad_words_ids if [*each] not in [[end] for end in ends]]:
        enabled.append(processors.biased("bad_words_ids", bad))
    least = max(s.min_length, s.min_new_tokens and start + s.min_new_tokens)
    if ends and least > start:
        enabled.append(processors.suppressed(ends, lambda length: length < least))
    if s.forced_bos_token_id is not None:
        enabled.append(processors.forced("forced_bos_token_id", [s.forced_bos_token_id], 1))
    if s.forced_eos_token_id and max_length is not None:
        enabled.append(processors.forced("forced_eos_token_id", s.forced_eos_token_id, max_length - 1))
    if s.remove_invalid_values:
        enabled.append(processors.finite)
    if s.exponential_decay_length_penalty is not None and ends:
        after, factor = s.exponential_decay_length_penalty
        enabled.append(processors.decaying(start + after, factor, ends))
    if s.suppress_tokens:
        enabled.append(processors.suppressed(s.suppress_tokens))
    if s.begin_suppress_tokens:
        begin = start + (s.forced_bos_token_id is not None and start <= 1)
        enabled.append(processors.suppressed(s.begin_suppress_tokens, lambda length: length == begin))
    return tuple(enabled)


@dataclass(frozen=True, slots=True)
class Sampler:
    """Chooses the tokens of one text."""

    sampling: Sampling
    processors: tuple[Processor, ...] = ()

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is chosen."""
        return self.sampling.temperature == 0

    def scores(self, logits: Array, history: Sequence[int]) -> Array:
        """Return the logits (v,) after the processors; raises InputError if every token is excluded."""
        if not self.processors:
            return logits
        scores = np.array(logits, np.float64)
        for process in self.processors:
            process(scores, history)
        if scores.max() == -np.inf:
            raise InputError("the settings suppress every token: no token is left to choose")
        return scores

    def choose(self, logits: Array, history: Sequence[int], rng: np.random.Generator) -> int:
        """Choose the id of the next token from the logits (v,) and the tokens so far."""
        if self.greedy:
            return int(np.argmax(self.scores(logits, history)))
        return draw(self.probabilities(logits, history), rng)

    def probabilities(self, logits: Array, history: Sequence[int]) -> Array:
        """Return the distribution (v,) from which `choose` samples."""
        s, scores = self.sampling, self.scores(logits, history)
        if self.greedy:
            return (np.arange(len(scores)) == np.argmax(scores)).astype(scores.dtype)
        # In float64, relative to the maximum: with a tiny temperature all others become exp(-inf) = 0.
        scores = scores.astype(np.float64)
        with np.errstate(over="ignore"):
            scores = (scores - scores.max()) / s.temperature
        p = softmax(scores)
        if s.top_h is not None:
            p = filters.top_h(p, s.top_h)
        if s.top_k:
            p = filters.top_k(p, s.top_k)
        if s.top_p < 1:
            p = filters.top_p(p, s.top_p)
        if s.min_p > 0:
            p = filters.min_p(p, s.min_p)
        if s.typical_p < 1:
            p = filters.typical(p, s.typical_p)
        if 0 < s.epsilon_cutoff < 1:
            p = filters.epsilon(p, s.epsilon_cutoff)
        if 0 < s.eta_cutoff < 1:
            p = filters.eta(p, s.eta_cutoff)
        return p / p.sum()


def draw(p: Array, rng: np.random.Generator) -> int:
    """Sample a token with probabilities proportional to p (v,)."""
    # Inverting the cumulative sum in float64 samples from exactly these probabilities, and never a token with
    # probability 0.
    cumulative = np.cumsum(p, dtype=np.float64)
    return int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
