"""Generation: prefill in chunks, then one token at a time, with the same forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from einsum_transformer.components.kv_cache import KVCache
from einsum_transformer.engine import phase
from einsum_transformer.errors import InputError
from einsum_transformer.generation.sampling import Sampling
from einsum_transformer.models.config import Keys
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


def generate(
    model: Model,
    prompt: str | Sequence[Any] | Array,
    *,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int | None = None,
    **settings: Any,
) -> Any:
    """Continue a prompt: text, token ids, or a list of either (a batch).

    Returns a Generation (its str() is the text), or a list of them for a batch. What is None comes from the
    model's generation_config.json, or is greedy. settings: stop, ctx_size, prefill_step_size, ignore_eos (see
    `Settings`).
    """
    stated = model.generation_config or {}
    budget = max_new_tokens
    if budget is None:
        budget = Keys(stated, "generation_config.json").get("max_new_tokens", int, 128)
    sampling = Sampling.from_generation_config(
        stated,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    prompts, single = _prompts(model, prompt)
    results = [Generation(tokens) for tokens in prompts]
    for _ in stream(model, results, sampling, Settings(budget, seed=seed, **settings)):
        pass
    return results[0] if single else results


def stream(
    model: Model,
    results: list[Generation],
    sampling: Sampling,
    settings: Settings,
    cache: KVCache | None = None,
) -> Iterator[tuple[int, str]]:
    """Fill the `results` of a batch, yielding (row, new text) as it comes; "" where no whole character is
    ready.

    Each row draws from a random stream of its own, so a prompt's continuation does not depend on the batch
    around it. A given cache is continued: its tokens precede the prompts'.
    """
    with phase("setup"):
        rows = [_Row(model, result, sampling, settings, index) for index, result in enumerate(results)]
        limit = min(
            settings.ctx_size or model.config.max_position_embeddings, model.config.max_position_embeddings
        )
        longest = max(len(result.prompt_tokens) for result in results)
        start = 0 if cache is None else cache.length
        if start + longest > limit:
            raise InputError(f"the prompt has {start + longest} tokens, the context is {limit}: shorten it")
        tokens, pads = _left_padded([result.prompt_tokens for result in results])
        model.checked(tokens)
        if cache is None:
            cache = model.cache(min(longest + settings.max_new_tokens, limit), pads if pads.any() else None)
        elif pads.any():
            raise InputError("prompts that continue a cache must have the same length")
    with phase("prefill"):
        logits = prefill(model, tokens, cache, settings.prefill_step_size)
    live = list(range(len(rows)))
    while True:
        next_tokens, keep, texts = [], [], []
        with phase("sampling"):
            for position, index in enumerate(live):
                padding = 0 if cache.pads is None else int(cache.pads[position])
                token, text = rows[index].step(logits[position], room=limit + padding - cache.length)
                if text:
                    texts.append((index, text))
                if rows[index].result.finish_reason is None:
                    next_tokens.append(token)
                    keep.append(position)
        for result in results:
            result.kv_cache_bytes = cache.nbytes
        yield from texts
        if not keep:
            return
        if len(keep) < len(live):
            cache.select(keep)
            live = [live[position] for position in keep]
        with phase("decode"):
            logits = model.decoder.forward(np.array(next_tokens)[:, None], cache, "last")[0][:, -1]


def prefill(model: Model, tokens: Array, cache: KVCache, chunk: int = PREFILL_CHUNK) -> Array:
    """Put the prompt (b, t) into the cache, `chunk` tokens at a time; returns the scores (b, v) after its
    last token."""
    for start in range(0, tokens.shape[1] - chunk, chunk):
        model.decoder.forward(tokens[:, start : start + chunk], cache, "none")
    last = (tokens.shape[1] - 1) // chunk * chunk
    return model.decoder.forward(tokens[:, last:], cache, "last")[0][:, -1]


def end_tokens(model: Model) -> frozenset[int]:
    """Every id that ends a text: of the config, of generation_config.json and of the tokenizer."""
    stated = token_ids((model.generation_config or {}).get("eos_token_id"))
    ids = {*model.config.eos_token_id, *stated}
    if model.tokenizer is not None:
        ids |= model.tokenizer.end_of_generation_ids
    return frozenset(ids)


class _Row:
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
        result = self.result
        if len(result.tokens) >= self.settings.max_new_tokens:
            return -1, self._finish("length")
        token = self.sampling.choose(logits, self.history, self.rng)
        if token in self.ends:
            return token, self._finish("stop")
        result.tokens.append(token)
        self.history.append(token)
        text, stopped = self.matcher.put(self.decoder.put(token) if self.decoder else "")
        result.text += text
        if stopped:
            result.finish_reason = "stop"
            return token, text
        if len(result.tokens) >= self.settings.max_new_tokens or room < 1:
            text += self._finish("length")
        return token, text

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


def _prompts(model: Model, prompt: Any) -> tuple[list[list[int]], bool]:
    """(token ids of each row, whether one prompt was given rather than a batch)."""
    if isinstance(prompt, str):
        return [encode(model, prompt)], True
    items = prompt.tolist() if isinstance(prompt, np.ndarray) else prompt
    if not isinstance(items, Sequence):
        raise InputError(f"the prompt is {type(prompt).__name__}: give text, token ids, or a list of either")
    if not items:
        raise InputError("the prompt is empty: give at least one token")
    if not isinstance(items[0], (str, Sequence, np.ndarray)):
        return [_token_row(items)], True
    rows = [encode(model, item) if isinstance(item, str) else _token_row(item) for item in items]
    if not all(rows):
        raise InputError(f"prompt {rows.index([])} of the batch is empty")
    return rows, False


def _token_row(items: Any) -> list[int]:
    """One row of token ids, all of them integers."""
    row = items.tolist() if isinstance(items, np.ndarray) else items
    if not isinstance(row, Sequence) or not all(isinstance(each, (int, np.integer)) for each in row):
        raise InputError("the prompt holds what is neither text nor a token id: token ids are integers")
    return [int(each) for each in row]


def encode(model: Model, text: str) -> list[int]:
    """The prompt's token ids, special tokens added as the tokenizer is configured to."""
    if model.tokenizer is None:
        raise InputError(
            f"{model.source}: has no tokenizer; give token ids instead of text (--tokens FILE.npy)"
        )
    tokens = model.tokenizer.encode(text)
    if not tokens:
        raise InputError("the prompt is empty: give at least one character")
    return tokens


def _left_padded(prompts: list[list[int]]) -> tuple[Array, Array]:
    """Prompts of any lengths as one array, padded at the left, and how much padding each has."""
    longest = max(map(len, prompts))
    pads = np.array([longest - len(prompt) for prompt in prompts])
    return np.array([[0] * int(pad) + prompt for pad, prompt in zip(pads, prompts)]), pads
