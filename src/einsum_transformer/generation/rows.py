"""One row of a batch while it grows, and how a prompt gets into the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from einsum_transformer.components.kv_cache import KVCache
from einsum_transformer.errors import InputError
from einsum_transformer.generation.sampling import Sampling
from einsum_transformer.models.families.family import token_ids
from einsum_transformer.models.model import Model

Array = np.ndarray

PREFILL_CHUNK = 512
"""Tokens per forward of the prefill: more use more memory and gain no speed."""


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
    """What speculative decoding did, if there was any (see `speculative.Statistics`)."""

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Settings:
    """What a generation obeys besides the sampling; lengths in tokens."""

    max_new_tokens: int = 128
    stop: Sequence[str] = ()
    seed: int | None = None
    ctx_size: int | None = None
    prefill_step_size: int = PREFILL_CHUNK
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 0), ("prefill_step_size", 1), ("ctx_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} is {value}: it must be at least {least}")
        if self.seed is not None and self.seed < 0:
            raise InputError(f"seed is {self.seed}: it must be at least 0")
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        if any(not each for each in self.stop):
            raise InputError("stop: an empty stop string would stop everything")


def prefill(model: Model, tokens: Array, cache: KVCache, chunk: int = PREFILL_CHUNK) -> Array:
    """Put the prompt (b, t) into the cache, `chunk` tokens at a time; returns the scores (b, v) after its
    last token."""
    for start in range(0, tokens.shape[1] - chunk, chunk):
        model.decoder.forward(tokens[:, start : start + chunk], cache, "none")
    last = (tokens.shape[1] - 1) // chunk * chunk
    return model.decoder.forward(tokens[:, last:], cache, "last")[0][:, -1]


def lengthen(model: Model, cache: KVCache, new: int) -> None:
    """Fill the cache again if with so many new tokens some row passes the length that longrope changes at:
    the keys that it holds were turned by the factors of shorter texts."""
    limits = _longrope_lengths(model)
    if not limits or cache.length == 0:
        return
    before = cache.length - (np.zeros(1, int) if cache.pads is None else cache.pads)
    if not any(((before <= limit) & (before + new > limit)).any() for limit in limits):
        return
    fresh = model.cache(pads=cache.pads, horizon=cache.length + new, slack=cache.slack)
    tokens = cache.tokens
    for start in range(0, tokens.shape[1], PREFILL_CHUNK):
        model.decoder.forward(tokens[:, start : start + PREFILL_CHUNK], fresh, "none")
    cache.become(fresh)


def until_longrope_changes(model: Model, cache: KVCache) -> int:
    """How many more tokens a cache can take before some row passes such a length; from there on, as many as
    there may be."""
    before = cache.length - (np.zeros(1, int) if cache.pads is None else cache.pads)
    left = [limit - length for limit in _longrope_lengths(model) for length in before.tolist()]
    return min((more for more in left if more >= 0), default=1 << 30)


def _longrope_lengths(model: Model) -> list[int]:
    ropes = [rope for rope in model.config.ropes if rope.rope_type == "longrope"]
    return [rope.original_max_position_embeddings for rope in ropes]


def end_tokens(model: Model) -> frozenset[int]:
    """Every id that ends a text: of the config, of generation_config.json and of the tokenizer."""
    stated = token_ids((model.generation_config or {}).get("eos_token_id"))
    ids = {*model.config.eos_token_id, *stated}
    if model.tokenizer is not None:
        ids |= model.tokenizer.end_of_generation_ids
    return frozenset(ids)


class Row:
    """One row of a batch while it grows."""

    def __init__(
        self, model: Model, result: Generation, sampling: Sampling, settings: Settings, index: int
    ) -> None:
        self.result, self.sampling, self.settings = result, sampling, settings
        self.ends = frozenset() if settings.ignore_eos else end_tokens(model)
        self.history = list(result.prompt_tokens)
        seed = settings.seed
        self.rng = np.random.default_rng(None if seed is None else [seed, index])
        self.decoder = model.tokenizer.stream() if model.tokenizer is not None else None
        self.matcher = StopMatcher(settings.stop)

    def step(self, logits: Array, room: int) -> tuple[int, str]:
        """Choose the next token; returns it and the text that is ready. room: tokens the context can still
        take."""
        if len(self.result.tokens) >= self.settings.max_new_tokens:
            return -1, self._finish("length")
        token = self.sampling.choose(logits, self.history, self.rng)
        return token, self.take(token, room)

    def take(self, token: int, room: int) -> str:
        """Continue with this token; returns the text that is ready."""
        result = self.result
        if token in self.ends:
            return self._finish("stop")
        result.tokens.append(token)
        self.history.append(token)
        text, stopped = self.matcher.put(self.decoder.put(token) if self.decoder else "")
        result.text += text
        if stopped:
            result.finish_reason = "stop"
            return text
        if len(result.tokens) >= self.settings.max_new_tokens or room < 1:
            text += self._finish("length")
        return text

    def _finish(self, reason: str) -> str:
        text, stopped = self.matcher.put(self.decoder.end() if self.decoder else "", last=True)
        self.result.text += text
        self.result.finish_reason = "stop" if stopped else reason
        return text


class StopMatcher:
    """Passes text through until a stop string appears; holds back what could still become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = stops
        self.held = ""

    def put(self, text: str, last: bool = False) -> tuple[str, bool]:
        """(text that is safe to show, whether a stop string was met; it and what follows are dropped)."""
        self.held += text
        # The one that is complete first counts, so that it does not matter in what pieces the text comes.
        found = [(at + len(stop), at) for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            return self.held[: min(found)[1]], True
        keep = 0 if last else max((self._partial(stop) for stop in self.stops), default=0)
        ready, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return ready, False

    def _partial(self, stop: str) -> int:
        """Length of the longest end of the held text that begins the stop string."""
        longest = min(len(stop) - 1, len(self.held))
        return next((n for n in range(longest, 0, -1) if self.held.endswith(stop[:n])), 0)
