"""The state of one row of a batch during generation, and the prefill of the cache."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from einsum_transformer.arguments import checked
from einsum_transformer.components.kv_cache import KVCache
from einsum_transformer.errors import InputError
from einsum_transformer.generation.context import UNBOUNDED
from einsum_transformer.generation.keys import OWN, SETTINGS, parsed
from einsum_transformer.generation.sampling import Sampling
from einsum_transformer.generation.stopping import StopMatcher
from einsum_transformer.models.decoder import Positions
from einsum_transformer.models.families.family import token_ids
from einsum_transformer.models.finite import is_finite
from einsum_transformer.models.model import Model

Array = np.ndarray

PREFILL_CHUNK = 512
"""Tokens per forward pass of the prefill: more tokens use more memory and are not faster."""
DEFAULT_BUDGET = 128
"""Default maximum of new tokens."""


@checked
@dataclass(slots=True)
class Generation:
    """One prompt's continuation. finish_reason: "stop" (end token or stop string) or "length" (budget or
    context)."""

    prompt_tokens: list[int]
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    kv_cache_bytes: int = 0
    speculation: dict[str, Any] | None = None
    """Statistics of speculative decoding (see `speculative.Statistics`); None without it."""

    def __str__(self) -> str:
        return self.text

    def to_dict(self) -> dict[str, Any]:
        """The result in JSON types."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a generation other than sampling; lengths in tokens."""

    max_new_tokens: int | None = None
    """Default: max_length minus the prompt, or DEFAULT_BUDGET without max_length."""
    stop: Sequence[str] = ()
    seed: int | None = None
    ctx_size: int | None = None
    prefill_step_size: int = PREFILL_CHUNK
    ignore_eos: bool = False
    max_length: int | None = None
    """Maximum tokens of prompt and answer together; ignored if max_new_tokens is given."""
    max_time: float | None = None
    """Seconds after which the next token ends the text."""
    eos_token_id: Sequence[int] | None = None
    """Ids that end the text; replace those of the model."""

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if value is not each.default and value is not None:
                object.__setattr__(self, each.name, parsed(each.name, value, (SETTINGS | OWN)[each.name]))

    @staticmethod
    def of(values: Mapping[str, Any]) -> Settings:
        """Return the settings in the values of `keys.merged`."""
        found = dict(values)
        if "stop_strings" in found:
            found["stop"] = found.pop("stop_strings")
        names = {each.name for each in fields(Settings)}
        return Settings(**{name: value for name, value in found.items() if name in names})

    def budget(self, prompt_length: int) -> int:
        """Return the maximum number of new tokens; raises InputError if max_length does not allow any."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if self.max_length is None:
            return DEFAULT_BUDGET
        if self.max_length <= prompt_length:
            raise InputError(
                f"the prompt has {prompt_length} tokens and max_length is {self.max_length}: "
                "give max_new_tokens (--max-tokens) or a larger max_length"
            )
        return self.max_length - prompt_length


def prefill(
    model: Model, tokens: Array, cache: KVCache, chunk: int = PREFILL_CHUNK, repaired: bool = False
) -> Array:
    """Extend the cache by the prompt (b, t), `chunk` tokens at a time; returns the logits (b, v) of its last
    token. repaired: allow logits that are not finite (see `scores`)."""
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, tokens.shape[1] - chunk, chunk):
            model.decoder.forward(tokens[:, start : start + chunk], cache, "none")
    last = (tokens.shape[1] - 1) // chunk * chunk
    return scores(model, tokens[:, last:], cache, "last", repaired)[:, -1]


def scores(
    model: Model, tokens: Array, cache: KVCache, positions: Positions, repaired: bool = False
) -> Array:
    """Return the logits of new tokens (b, t) and extend the cache; positions as in `Decoder.forward`.

    Raises InputError if logits are not finite, naming the operation or weight that causes it, unless the
    caller repairs them (`remove_invalid_values`).
    """
    with np.errstate(over="ignore", invalid="ignore"):
        logits = model.decoder.forward(tokens, cache, positions)[0]
    if not repaired and not is_finite(logits):
        raise model.not_finite(cache.tokens, cache.pads)
    return logits


def lengthen(model: Model, cache: KVCache, new: int) -> None:
    """Rebuild the cache if `new` tokens take a row across longrope's switch length: the cached keys are
    rotated with the factors of shorter texts."""
    limits = _longrope_lengths(model)
    if not limits or cache.length == 0:
        return
    before = cache.before
    if not any(((before <= limit) & (before + new > limit)).any() for limit in limits):
        return
    fresh = model.cache(pads=cache.pads, horizon=cache.length + new, slack=cache.slack)
    tokens = cache.tokens
    for start in range(0, tokens.shape[1], PREFILL_CHUNK):
        model.decoder.forward(tokens[:, start : start + PREFILL_CHUNK], fresh, "none")
    cache.replace_by(fresh)


def until_rope_changes(model: Model, cache: KVCache) -> int:
    """Return the number of tokens that can be added before the RoPE frequencies of a row change.

    longrope changes once; dynamic changes with every token beyond the trained length, where this is 0.
    """
    before = cache.before
    left = [limit - length for limit in _longrope_lengths(model) for length in before.tolist()]
    left = [count for count in left if count >= 0]
    for rope in model.config.ropes:
        if rope.rope_type == "dynamic":
            left.append(max(0, rope.original_max_position_embeddings - int(before.max())))
    return min(left, default=1 << 30)


def _longrope_lengths(model: Model) -> list[int]:
    ropes = [rope for rope in model.config.ropes if rope.rope_type == "longrope"]
    return [rope.original_max_position_embeddings for rope in ropes]


def end_tokens(model: Model, instead: Sequence[int] | None = None) -> frozenset[int]:
    """Return all ids that end a text, from the config, generation_config.json and the tokenizer, or `instead`
    if given."""
    if instead is not None:
        return frozenset(instead)
    stated = token_ids((model.generation_config or {}).get("eos_token_id"))
    ids = {*model.config.eos_token_id, *stated}
    if model.tokenizer is not None:
        ids |= model.tokenizer.end_of_generation_ids
    return frozenset(ids)


class Row:
    """The state of one row of a batch.

    before: tokens in a continued cache, which are part of the text. limit: maximum context in tokens.
    """

    def __init__(
        self,
        model: Model,
        result: Generation,
        sampling: Sampling,
        settings: Settings,
        index: int,
        before: Sequence[int] = (),
        limit: int = UNBOUNDED,
    ) -> None:
        self.result = result
        self.history = [*before, *result.prompt_tokens]
        start = len(self.history)
        self.budget = settings.budget(start)
        self.ends = frozenset() if settings.ignore_eos else end_tokens(model, settings.eos_token_id)
        ends = sorted(end for end in self.ends if 0 <= end < model.config.vocab_size)
        self.repairs = sampling.remove_invalid_values
        # The last token is not stored in the cache and does not count towards the context.
        self.sampling = sampling.sampler(self.history, ends, min(start + self.budget, limit + 1))
        self.deadline = None if settings.max_time is None else time.monotonic() + settings.max_time
        seed = settings.seed
        self.rng = np.random.default_rng(None if seed is None else [seed, index])
        tokenizer = model.tokenizer
        if tokenizer is None and settings.stop:
            raise InputError(f"stop: {model.source} has no tokenizer, so text cannot be matched; omit stop")
        self.decoder = None if tokenizer is None else tokenizer.stream()
        self.raw = None if tokenizer is None or not settings.stop else tokenizer.stream(False)
        self.matcher = StopMatcher(settings.stop)

    def step(self, logits: Array, space: int) -> tuple[int, str]:
        """Choose the next token; returns it and the text that is ready. space: tokens left in the context."""
        if len(self.result.tokens) >= self.budget:
            return -1, self._finish("length")
        token = self.sampling.choose(logits, self.history, self.rng)
        return token, self.take(token, space)

    def take(self, token: int, space: int) -> str:
        """Append this token; returns the text that is ready."""
        result = self.result
        if token in self.ends:
            return self._finish("stop", token)
        result.tokens.append(token)
        self.history.append(token)
        shown = self.decoder.put(token) if self.decoder else ""
        text, stopped = self.matcher.put(shown, self.raw.put(token) if self.raw else shown)
        result.text += text
        if stopped:
            result.finish_reason = "stop"
            return text
        late = self.deadline is not None and time.monotonic() > self.deadline
        if len(result.tokens) >= self.budget or space < 1 or late:
            text += self._finish("length")
        return text

    def _finish(self, reason: str, end: int | None = None) -> str:
        """Return the rest of the text; an end token is not part of it, but can complete a stop string."""
        shown = self.decoder.end() if self.decoder else ""
        raw = shown
        if self.raw:
            raw = ("" if end is None else self.raw.put(end)) + self.raw.end()
        text, stopped = self.matcher.put(shown, raw, last=True)
        self.result.text += text
        self.result.finish_reason = "stop" if stopped else reason
        return text
