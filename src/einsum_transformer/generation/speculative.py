"""Speculative decoding (Leviathan, Kalman and Matias, 2023): draft tokens cheaply, verify them in one pass.

A draft token x from a distribution q is accepted with probability min(1, p(x) / q(x)), where p is the model's
distribution; the first rejected token is replaced by a sample from the positive part of p - q. The output is
distributed as p (docs/concepts/derivations/speculative.md); with greedy decoding, the text is the same.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from einsum_transformer.components.kv_cache import KVCache
from einsum_transformer.engine import phase
from einsum_transformer.errors import InputError
from einsum_transformer.generation.context import context_limit
from einsum_transformer.generation.keys import FILE, parsed, whole
from einsum_transformer.generation.rows import Row, lengthen, next_logits, prefill, until_rope_changes
from einsum_transformer.generation.sampling import Sampler, draw
from einsum_transformer.models.config import shown
from einsum_transformer.models.model import Model

Array = np.ndarray

DRAFTS, LOOKUP = 4, 3
"""Defaults: tokens of a draft, and maximum length of the n-gram that prompt lookup searches for."""


@dataclass(frozen=True, slots=True)
class Draft:
    """Draft tokens and the distribution (v,) of each; None: a deterministic token, with probability 1."""

    tokens: list[int]
    probabilities: list[Array | None]


class Drafter(ABC):
    """A source of draft tokens."""

    @abstractmethod
    def propose(
        self, history: Sequence[int], count: int, sampling: Sampler, rng: np.random.Generator
    ) -> Draft:
        """Return at most `count` draft tokens that follow the history."""

    @abstractmethod
    def settle(self, length: int) -> None:
        """Discard state beyond the first `length` tokens of history and draft, which are part of the text."""


class PromptLookup(Drafter):
    """Drafts the tokens after an earlier occurrence of the text's last tokens (Saxena, 2023)."""

    def __init__(self, longest: int = LOOKUP) -> None:
        if longest < 1:
            raise InputError(f"`prompt_lookup` is {longest}: expected the length of an n-gram, 1 or more")
        self.longest = longest

    def propose(
        self, history: Sequence[int], count: int, sampling: Sampler, rng: np.random.Generator
    ) -> Draft:
        text = np.asarray(history)
        for n in range(min(self.longest, len(text) - 1), 0, -1):
            ending = text[-n:]
            # All earlier occurrences of the last n tokens.
            same = np.ones(len(text) - n, bool)
            for i in range(n):
                same &= text[i : len(text) - n + i] == ending[i]
            starts = np.flatnonzero(same) + n
            if len(starts):
                # The last occurrence with enough tokens after it: in a repetitive text, few follow the last.
                enough = starts[starts + count <= len(text)]
                start = int(enough[-1] if len(enough) else starts[0])
                found = text[start : start + count].tolist()
                return Draft(found, [None] * len(found))
        return Draft([], [])

    def settle(self, length: int) -> None:
        """Do nothing: there is no state."""


class ModelDrafter(Drafter):
    """Drafts with a smaller model of the same vocabulary, or with the first layers of the model itself.

    vocab_size: number of logits of the target model; default: of the draft model.
    """

    def __init__(self, model: Model, slack: int, vocab_size: int | None = None) -> None:
        self.model: Model = model
        self.slack: int = slack
        self.vocab_size: int = vocab_size or model.config.vocab_size
        self.cache: KVCache = model.cache(slack=slack)

    def propose(
        self, history: Sequence[int], count: int, sampling: Sampler, rng: np.random.Generator
    ) -> Draft:
        draft, text = Draft([], []), list(history)
        if self.cache.length and self.cache.tokens[0].tolist() != text[: self.cache.length]:
            self.cache = self.model.cache(slack=self.slack)  # another text
        # Drafts must fit in the context of the draft model.
        limit = context_limit(self.model.config) - len(text) + 1
        for _ in range(min(count, limit)):
            new = text[self.cache.length :]
            if max(new) >= self.model.config.vocab_size:
                break  # a padding id of a larger vocabulary, which this model does not have
            lengthen(self.model, self.cache, len(new))
            logits = _resized(prefill(self.model, np.array([new]), self.cache)[0], self.vocab_size)
            if sampling.greedy:
                token, p = sampling.choose(logits, text, rng), None
            else:
                p = sampling.probabilities(logits, text)
                token = draw(p, rng)
            text.append(token)
            draft.tokens.append(token)
            draft.probabilities.append(p)
        return draft

    def settle(self, length: int) -> None:
        self.cache.truncate(min(self.cache.length, length))


def _resized(logits: Array, size: int) -> Array:
    """Truncate or pad logits (v,) to another vocabulary size; padding is never drafted."""
    missing = max(0, size - len(logits))
    return np.pad(logits[:size], (0, missing), constant_values=-np.inf) if len(logits) != size else logits


def first_layers(model: Model, layers: int) -> Model:
    """Return the model's first layers with its embedding, norm and head as a draft model."""
    if not 1 <= layers < model.config.num_hidden_layers:
        most = model.config.num_hidden_layers - 1
        raise InputError(f"`draft_layers` is {layers}: expected 1 to {most}, fewer than the model has")
    decoder = replace(model.decoder, layers=model.decoder.layers[:layers])
    return replace(model, config=model.config.truncated(layers), decoder=decoder)


@dataclass(slots=True)
class Statistics:
    """Statistics of speculative decoding in one generation."""

    rounds: int = 0
    drafted: list[int] = field(default_factory=list)
    """Number of drafted tokens at each position of a draft."""
    accepted: list[int] = field(default_factory=list)
    """Number of accepted tokens at each position of a draft."""
    new_tokens: int = 0
    draft_seconds: float = 0.0
    check_seconds: float = 0.0
    step_seconds: float = 0.0
    """Seconds of the fastest step without a draft; the first step never has a draft."""

    @property
    def acceptance(self) -> list[float]:
        """Share of accepted tokens at each position of a draft."""
        return [accepted / drafted for accepted, drafted in zip(self.accepted, self.drafted)]

    @property
    def tokens_per_round(self) -> float:
        return self.new_tokens / self.rounds if self.rounds else 0.0

    @property
    def expected_speed_up(self) -> float | None:
        """`(1 - a^(k + 1)) / ((1 - a) (c k + 1))` with the acceptance rate a, the mean number k of drafted
        tokens and the cost c of one in steps, assuming that a verification costs as much as a step."""
        if not (self.rounds and sum(self.drafted) and self.step_seconds):
            return None
        a, k = sum(self.accepted) / sum(self.drafted), sum(self.drafted) / self.rounds
        c = self.draft_seconds / sum(self.drafted) / self.step_seconds
        return (k + 1 if a == 1 else (1 - a ** (k + 1)) / (1 - a)) / (c * k + 1)

    @property
    def speed_up(self) -> float | None:
        """Time of steps without drafts for the same tokens, divided by the time of the rounds."""
        spent = self.draft_seconds + self.check_seconds
        return self.new_tokens * self.step_seconds / spent if spent and self.step_seconds else None

    def to_dict(self) -> dict[str, Any]:
        """Return the statistics in JSON types."""
        names = ("rounds", "drafted", "accepted", "acceptance", "new_tokens", "tokens_per_round")
        names += ("draft_seconds", "check_seconds", "step_seconds", "expected_speed_up", "speed_up")
        return {name: getattr(self, name) for name in names}


@dataclass(slots=True)
class Speculation:
    """A drafter and its statistics. It has state: use one per text or conversation."""

    drafter: Drafter
    drafts: int = DRAFTS
    """Maximum tokens of a draft."""
    statistics: Statistics = field(default_factory=Statistics)

    def continue_(self, model: Model, row: Row, logits: Array, cache: KVCache, limit: int) -> Iterator[str]:
        """Continue a row from the logits (v,) of its prefill, yielding new text; the cache lacks only the
        row's last token. limit: maximum context in tokens."""
        with phase("sampling"):
            token, text = row.step(logits, limit - cache.length)
        yield text
        while row.result.finish_reason is None:
            started = time.perf_counter()
            # The whole text, including earlier turns in the cache.
            history = [*cache.tokens[0].tolist(), token]
            count = self._count(model, row, cache, limit)
            with phase("draft", scope="draft"):
                draft = self.drafter.propose(history, count, row.sampling, row.rng)
            drafted = time.perf_counter()
            with phase("decode"):
                base = cache.length
                lengthen(model, cache, 1)
                tokens = np.array([[token, *draft.tokens]])
                logits = next_logits(model, tokens, cache, "all", row.repairs)[0]
            with phase("sampling"):
                accepted, token, text = self._verify(row, draft, logits, base, limit)
            cache.truncate(base + 1 + accepted)
            self.drafter.settle(base + 1 + accepted)
            self._record(draft, accepted, drafted - started, time.perf_counter() - drafted)
            yield text

    def _count(self, model: Model, row: Row, cache: KVCache, limit: int) -> int:
        """Return the number of tokens to draft: at most as many as the text can still take, and none in the
        first round, which measures the time of a step without drafts."""
        if self.statistics.step_seconds == 0:
            return 0
        left = row.budget - len(row.result.tokens) - 1
        return max(0, min(self.drafts, left, limit - cache.length - 1, until_rope_changes(model, cache) - 1))

    def _verify(self, row: Row, draft: Draft, logits: Array, base: int, limit: int) -> tuple[int, int, str]:
        """Append tokens to the row until a draft token is rejected or the row ends; returns (number of
        accepted draft tokens, last token, new text).

        logits (k + 1, v): after the token before the draft, and after each draft token.
        """
        text = ""
        for accepted in range(len(draft.tokens) + 1):
            token = judged(row, draft, accepted, logits[accepted])
            text += row.take(token, limit - base - 1 - accepted)
            if (
                row.result.finish_reason is not None
                or accepted == len(draft.tokens)
                or token != draft.tokens[accepted]
            ):
                return accepted, token, text
        raise AssertionError("the loop ends with the last draft")

    def _record(self, draft: Draft, accepted: int, drafting: float, checking: float) -> None:
        found = self.statistics
        if not draft.tokens:
            found.step_seconds = min(found.step_seconds or checking, checking)
            return
        found.rounds += 1
        found.new_tokens += accepted + 1
        found.draft_seconds += drafting
        found.check_seconds += checking
        for i in range(len(draft.tokens)):
            if i == len(found.drafted):
                found.drafted.append(0)
                found.accepted.append(0)
            found.drafted[i] += 1
            found.accepted[i] += i < accepted


def judged(row: Row, draft: Draft, position: int, logits: Array) -> int:
    """Return the next token: the draft token at this position if it is accepted, else its replacement; after
    the draft, a token sampled from the model."""
    if position == len(draft.tokens) or row.sampling.greedy:
        return row.sampling.choose(logits, row.history, row.rng)
    p = row.sampling.probabilities(logits, row.history)
    token, q = draft.tokens[position], draft.probabilities[position]
    if row.rng.random() * (1.0 if q is None else q[token]) < p[token]:
        return token
    rest = p.copy()
    if q is None:
        rest[token] = 0
    else:
        rest = np.maximum(p - q, 0)
    return draw(rest, row.rng)


def speculation(
    model: Model,
    draft_model: Model | None = None,
    draft_layers: int | None = None,
    prompt_lookup: int | bool = False,
    num_draft_tokens: int | None = None,
    stated: Mapping[str, Any] | None = None,
) -> Speculation | None:
    """Return the speculation for these settings, or None if no method is selected.

    draft_model: a model of the same vocabulary; draft_layers: number of the model's own first layers;
    prompt_lookup: maximum length of the n-gram to look up, or True. num_draft_tokens: tokens of a draft.
    stated: mapping with num_assistant_tokens, prompt_lookup_num_tokens and max_matching_ngram_size; default:
    generation_config.json.
    """
    stated = (model.generation_config or {}) if stated is None else stated
    lookup = int(prompt_lookup)
    if prompt_lookup is True:
        lookup = _stated(model, stated, "max_matching_ngram_size", LOOKUP)
    ways = {"draft_model": draft_model, "draft_layers": draft_layers, "prompt_lookup": lookup or None}
    selected = [f"`{name}`" for name, value in ways.items() if value is not None]
    if len(selected) > 1:
        raise InputError(f"{' and '.join(selected)} are mutually exclusive: choose one")
    if not selected:
        if num_draft_tokens is not None:
            raise InputError("`num_draft_tokens` needs `draft_model`, `draft_layers` or `prompt_lookup`")
        return None
    name = "prompt_lookup_num_tokens" if lookup else "num_assistant_tokens"
    drafts = num_draft_tokens if num_draft_tokens is not None else _stated(model, stated, name, DRAFTS)
    if not isinstance(drafts, int) or not 1 <= drafts <= 256:
        raise InputError(f"`num_draft_tokens` is {drafts!r}: expected an integer from 1 to 256")
    if lookup:
        return Speculation(PromptLookup(lookup), drafts)
    drafting = draft_model if draft_model is not None else first_layers(model, draft_layers or 0)
    _check_vocabulary(model, drafting)
    return Speculation(ModelDrafter(drafting, drafts + 1, model.config.vocab_size), drafts)


def _stated(model: Model, stated: Mapping[str, Any], name: str, default: int) -> int:
    value = stated.get(name)
    from_file = value is (model.generation_config or {}).get(name)
    return default if value is None else parsed(name, value, whole(1), FILE if from_file else "")


def _check_vocabulary(model: Model, drafting: Model) -> None:
    """Raise InputError unless a token has the same id in both models; padding may differ in size."""
    own, other = model.tokenizer, drafting.tokenizer
    if own is None or other is None:
        if drafting.config.vocab_size != model.config.vocab_size:
            raise InputError(
                f"{drafting.source}: a draft model with a vocabulary of {drafting.config.vocab_size} tokens, "
                f"but {model.source} has {model.config.vocab_size}: both must have the same vocabulary"
            )
        return
    if own is other:
        return
    ids, drafted = (each.backend.get_vocab(with_added_tokens=True) for each in (own, other))
    tokens = {i: token for token, i in ids.items()}
    for token, i in drafted.items():
        if ids.get(token, i) != i or tokens.get(i, token) != token:
            raise InputError(
                f"{drafting.source}: its tokenizer differs from {model.source}: "
                f"token {i} is {shown(token)}, not {shown(tokens.get(i))}"
            )
