"""Generation: prefill in chunks, then one token at a time, with the same forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from einsum_transformer.components.kv_cache import KVCache
from einsum_transformer.engine import phase
from einsum_transformer.errors import InputError
from einsum_transformer.generation.rows import (
    PREFILL_CHUNK,
    Generation,
    Row,
    Settings,
    StopMatcher,
    end_tokens,
    lengthen,
    prefill,
)
from einsum_transformer.generation.sampling import Sampling
from einsum_transformer.generation.speculative import Speculation, speculation
from einsum_transformer.models.config import Keys
from einsum_transformer.models.model import Model

__all__ = [
    "PREFILL_CHUNK",
    "Generation",
    "Settings",
    "StopMatcher",
    "encode",
    "end_tokens",
    "generate",
    "prefill",
    "stream",
]

Array = np.ndarray


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
    draft_model: Model | None = None,
    draft_layers: int | None = None,
    prompt_lookup: int | bool = False,
    num_draft_tokens: int | None = None,
    **settings: Any,
) -> Any:
    """Continue a prompt: text, token ids, or a list of either (a batch).

    Returns a Generation (its str() is the text), or a list of them for a batch. What is None comes from the
    model's generation_config.json, or is greedy. settings: stop, ctx_size, prefill_step_size, ignore_eos (see
    `Settings`).

    draft_model, draft_layers or prompt_lookup: speculative decoding of one prompt, whose text is distributed
    as without (see `speculation`); what it did is in the Generation.
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
    drafting = speculation(model, draft_model, draft_layers, prompt_lookup, num_draft_tokens)
    for _ in stream(model, results, sampling, Settings(budget, seed=seed, **settings), speculation=drafting):
        pass
    return results[0] if single else results


def stream(
    model: Model,
    results: list[Generation],
    sampling: Sampling,
    settings: Settings,
    cache: KVCache | None = None,
    speculation: Speculation | None = None,
) -> Iterator[tuple[int, str]]:
    """Fill the `results` of a batch, yielding (row, new text) as it comes; "" where no whole character is
    ready.

    Each row draws from a random stream of its own, so a prompt's continuation does not depend on the batch
    around it. A given cache is continued: its tokens precede the prompts'. speculation: of one row.
    """
    if speculation is not None and len(results) > 1:
        raise InputError(f"speculative decoding takes one prompt at a time, here are {len(results)}")
    with phase("setup"):
        rows = [Row(model, result, sampling, settings, index) for index, result in enumerate(results)]
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
            slack = 0 if speculation is None else speculation.drafts + 1
            capacity = min(longest + settings.max_new_tokens, limit)
            cache = model.cache(capacity, pads if pads.any() else None, slack=slack)
        elif pads.any():
            raise InputError("prompts that continue a cache must have the same length")
    cache.horizon = max(cache.horizon, start + longest)
    with phase("prefill"):
        lengthen(model, cache, longest)
        logits = prefill(model, tokens, cache, settings.prefill_step_size)
    if speculation is not None:
        if cache.slack <= speculation.drafts and any(model.config.windows):
            raise InputError("speculative decoding needs a cache with slack")
        for text in speculation.continue_(model, rows[0], logits[0], cache, limit):
            results[0].kv_cache_bytes = cache.nbytes
            results[0].speculation = speculation.statistics.to_dict()
            yield 0, text
        return
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
            lengthen(model, cache, 1)
            logits = model.decoder.forward(np.array(next_tokens)[:, None], cache, "last")[0][:, -1]


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
