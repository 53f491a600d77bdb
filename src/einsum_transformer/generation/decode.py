"""Generation: prefill in chunks, then one token at a time, with the same forward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack, overload

import numpy as np

from einsum_transformer.arguments import check_type, checked
from einsum_transformer.components.kv_cache import KVCache
from einsum_transformer.engine import phase
from einsum_transformer.errors import InputError
from einsum_transformer.generation.context import LengthNote, context_limit
from einsum_transformer.generation.keys import FILE, merged
from einsum_transformer.generation.options import GenerationOptions
from einsum_transformer.generation.rows import Generation, Row, Settings, lengthen, prefill, scores
from einsum_transformer.generation.sampling import Sampling
from einsum_transformer.generation.speculative import Speculation, speculation
from einsum_transformer.models.model import Model
from einsum_transformer.notes import note_once

Array = np.ndarray


@overload
def generate(model: Model, prompt: str, **options: Unpack[GenerationOptions]) -> Generation: ...
@overload
def generate(model: Model, prompt: Any, **options: Unpack[GenerationOptions]) -> Any: ...
@checked
def generate(model: Model, prompt: Any, **options: Unpack[GenerationOptions]) -> Any:
    """Continue a prompt: a text, token ids, a list of messages, or a list of these (a batch).

    Returns a Generation, whose str() is the text, or a list of them for a batch. Options that are not given
    come from the model's generation_config.json. Without any, decoding is greedy; a temperature above 0 or
    `do_sample` samples.

    Options: `max_new_tokens`, `do_sample`, `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty` and
    `seed`, as in transformers. `stop`: one or several texts that end the answer and are not part of it
    (special tokens count). `ctx_size`: maximum number of tokens of prompt and answer together.
    `prefill_step_size`: prompt tokens per forward pass. `ignore_eos`: continue after end tokens.
    Transformers' other names, such as `min_new_tokens`, `bad_words_ids` or `max_length`, are listed in
    `GenerationOptions`.

    Speculative decoding of one prompt, with the same distribution of texts: `draft_model` (a smaller model of
    the same vocabulary), `draft_layers` (the model's own first layers) or `prompt_lookup` (what followed the
    same tokens earlier in the text; True, or the number of tokens to look up), with `num_draft_tokens` drafts
    a round.

    Raises InputError for an option that is unknown, not supported, or has a wrong value.
    """
    job = request(model, prompt, options)
    for _ in job.run(model):
        pass
    return job.results[0] if job.single else job.results


@checked
def stream(model: Model, prompt: Any, **options: Unpack[GenerationOptions]) -> Iterator[str]:
    """Continue one prompt and yield its text in pieces as they are generated.

    Prompt and options are those of `generate`. Raises InputError for a batch, and for a model without
    tokenizer.
    """
    if model.tokenizer is None:
        raise InputError(f"{model.source}: has no tokenizer, so there is no text to stream; use generate")
    job = request(model, prompt, options)
    if not job.single:
        raise InputError("stream takes one prompt, not a batch; use generate")
    return (text for _, text in job.run(model) if text)


@dataclass(frozen=True, slots=True)
class Request:
    """The prompts of a call of `generate` and its settings."""

    results: list[Generation]
    single: bool
    """Whether one prompt was given rather than a batch."""
    sampling: Sampling
    settings: Settings
    speculation: Speculation | None

    def run(self, model: Model) -> Iterator[tuple[int, str]]:
        """Fill the results, yielding (row, new text)."""
        return decode_batch(model, self.results, self.sampling, self.settings, speculation=self.speculation)


def request(
    model: Model, prompt: Any, given: GenerationOptions, stated: Mapping[str, Any] | None = None
) -> Request:
    """The prompts and settings of a call; stated as in `settings_of`."""
    settings = settings_of(model, given, stated)
    prompts, single = _prompts(model, prompt)
    return Request([Generation(tokens) for tokens in prompts], single, *settings)


def settings_of(
    model: Model, given: GenerationOptions, stated: Mapping[str, Any] | None = None
) -> tuple[Sampling, Settings, Speculation | None]:
    """The settings for these options. stated: replaces the contents of generation_config.json."""
    own: dict[str, Any] = {**given}
    drafting = {name: own.pop(name, None) for name in _DRAFTING}
    for name, value in drafting.items():
        check_type("generate", name, value, _DRAFTING[name])
    sampling, settings = options(model, own, stated)
    others = {name: value for name, value in own.items() if value is not None}
    lookup = drafting["prompt_lookup"] or "prompt_lookup_num_tokens" in others
    config = model.run_config
    if (
        stated is not None
        and config is not None
        and config.speculative
        and not (lookup or drafting["draft_model"])
    ):
        drafting["draft_layers"] = drafting["draft_layers"] or config.draft_layers
        if drafting["draft_layers"] is None:
            raise InputError(
                f"{config.source}: speculative needs draft_layers, the number of layers that draft"
            )
    names = {**(model.generation_config or {}), **others}
    found = speculation(
        model, drafting["draft_model"], drafting["draft_layers"], lookup, drafting["num_draft_tokens"], names
    )
    return sampling, settings, found


_DRAFTING = {
    "draft_model": Model | None,
    "draft_layers": int | None,
    "prompt_lookup": int | bool | None,
    "num_draft_tokens": int | None,
}
"""The options of speculative decoding, with their types."""


def stated_options(model: Model) -> dict[str, Any]:
    """What generation_config.json and the run config that the model was loaded from set, the latter first."""
    config, stated = model.run_config, dict(model.generation_config or {})
    if config is not None:
        stated |= {"do_sample": config.temperature > 0, "temperature": config.temperature}
        stated |= {"top_k": config.top_k_sample, "max_new_tokens": config.max_new_tokens}
    return stated


def options(
    model: Model, given: Mapping[str, Any], stated: Mapping[str, Any] | None = None
) -> tuple[Sampling, Settings]:
    """The given values that are not None, otherwise those of generation_config.json (or `stated`, if given).

    given: keywords of `generate`, except those of speculative decoding.
    """
    values = merged(model.generation_config if stated is None else stated, given, model.source)
    if model.tokenizer is None and "stop_strings" in values and given.get("stop_strings") is None:
        note_once(f"{FILE}: stop_strings are not used: {model.source} has no tokenizer to find texts with")
        del values["stop_strings"]
    if given.get("eos_token_id") is None:
        values.pop("eos_token_id", None)  # the file's are among the model's own
    return Sampling.of(values), Settings.of(values)


def decode_batch(
    model: Model,
    results: list[Generation],
    sampling: Sampling,
    settings: Settings,
    cache: KVCache | None = None,
    speculation: Speculation | None = None,
    passed: LengthNote | None = None,
) -> Iterator[tuple[int, str]]:
    """Fill the `results` of a batch, yielding (row, new text) as it comes; "" where no whole character is
    ready.

    Each row draws from a random stream of its own, so a prompt's continuation does not depend on the batch
    around it. A given cache is continued: its tokens precede the prompts' and belong to the text, for
    penalties and lengths too. speculation: for one row only. passed: notes once if the text exceeds the
    trained length; default: a new one for this call.
    """
    if speculation is not None and len(results) > 1:
        raise InputError(f"speculative decoding takes one prompt at a time, here are {len(results)}")
    with phase("setup"):
        limit = context_limit(model.config, settings.ctx_size)
        longest = max(len(result.prompt_tokens) for result in results)
        start = 0 if cache is None else cache.length
        if start + longest > limit:
            raise InputError(f"the prompt has {start + longest} tokens, the context is {limit}: shorten it")
        tokens, pads = _left_padded([result.prompt_tokens for result in results])
        model.checked(tokens)
        held = [[] for _ in results] if cache is None else _held(cache, len(results))
        rows = [
            Row(model, result, sampling, settings, index, held[index], limit)
            for index, result in enumerate(results)
        ]
        if cache is None:
            slack = 0 if speculation is None else speculation.drafts + 1
            most = longest + max(row.budget for row in rows)
            capacity = min(most, limit, max(longest, model.config.max_position_embeddings))
            cache = model.cache(capacity, pads if pads.any() else None, slack=slack)
        elif pads.any():
            raise InputError("prompts that continue a cache must have the same length")
        passed = LengthNote(model.config, start) if passed is None else passed
        passed.grown(start + longest)
    cache.expect(start + longest)
    with phase("prefill"):
        lengthen(model, cache, longest)
        logits = prefill(model, tokens, cache, settings.prefill_step_size, sampling.remove_invalid_values)
    if speculation is None:
        yield from _steps(model, rows, cache, logits, limit, passed)
        return
    if cache.slack <= speculation.drafts and any(model.config.windows):
        raise InputError("speculative decoding needs a cache with slack")
    for text in speculation.continue_(model, rows[0], logits[0], cache, limit):
        results[0].kv_cache_bytes = cache.nbytes
        results[0].speculation = speculation.statistics.to_dict()
        passed.grown(cache.length)
        yield 0, text


def _steps(
    model: Model, rows: list[Row], cache: KVCache, logits: Array, limit: int, passed: LengthNote
) -> Iterator[tuple[int, str]]:
    """Continue all rows token by token, from the scores (b, v) after their prompts."""
    live = list(range(len(rows)))
    while True:
        next_tokens, keep, texts = [], [], []
        with phase("sampling"):
            for position, index in enumerate(live):
                padding = 0 if cache.pads is None else int(cache.pads[position])
                token, text = rows[index].step(logits[position], space=limit + padding - cache.length)
                if text:
                    texts.append((index, text))
                if rows[index].result.finish_reason is None:
                    next_tokens.append(token)
                    keep.append(position)
        for row in rows:
            row.result.kv_cache_bytes = cache.nbytes
        yield from texts
        if not keep:
            return
        if len(keep) < len(live):
            cache.select(keep)
            live = [live[position] for position in keep]
        with phase("decode"):
            lengthen(model, cache, 1)
            logits = scores(model, np.array(next_tokens)[:, None], cache, "last", rows[0].repairs)[:, -1]
        passed.grown(cache.length if cache.pads is None else cache.length - int(cache.pads.min()))


def _held(cache: KVCache, rows: int) -> list[list[int]]:
    """The tokens of each row that a cache holds, without padding."""
    if not cache.length:
        return [[] for _ in range(rows)]
    pads = [0] * rows if cache.pads is None else cache.pads.tolist()
    return [row[pad:] for row, pad in zip(cache.tokens.tolist(), pads, strict=True)]


def _prompts(model: Model, prompt: Any) -> tuple[list[list[int]], bool]:
    """(token ids of each row, whether one prompt was given rather than a batch)."""
    if isinstance(prompt, str):
        return [encode(model, prompt)], True
    items = prompt.tolist() if isinstance(prompt, np.ndarray) else prompt
    if not isinstance(items, Sequence) or isinstance(items, (bytes, bytearray)):
        kinds = "text, token ids, a list of messages, or a list of these"
        raise InputError(f"`prompt` is {type(prompt).__name__}: give {kinds}")
    if not items:
        raise InputError("the prompt is empty: give at least one token")
    if not isinstance(items[0], (str, Sequence, np.ndarray)):  # of one prompt: messages or token ids
        return [_row(model, items)], True
    rows = [_row(model, item) for item in items]
    if not all(rows):
        raise InputError(f"prompt {rows.index([])} of the batch is empty")
    return rows, False


def _row(model: Model, item: Any) -> list[int]:
    if isinstance(item, str):
        return encode(model, item)
    if isinstance(item, Sequence) and item and isinstance(item[0], Mapping):
        return _chat(model, item)
    return _token_row(item)


def _chat(model: Model, messages: Sequence[Any]) -> list[int]:
    """Token ids of a chat; as in transformers' pipelines, a last message of the assistant is continued."""
    if model.tokenizer is None:
        raise InputError(f"{model.source}: has no tokenizer; give token ids instead of messages")
    last = messages[-1]
    if isinstance(last, Mapping) and last.get("role") == "assistant":
        return model.tokenizer.apply_chat_template(
            messages, add_generation_prompt=False, continue_final_message=True
        )
    return model.tokenizer.apply_chat_template(messages)


def _token_row(items: Any) -> list[int]:
    """One row of token ids, all of them integers."""
    row = items.tolist() if isinstance(items, np.ndarray) else items
    integers = isinstance(row, Sequence) and not isinstance(row, (bytes, bytearray))
    if not integers or not all(isinstance(i, (int, np.integer)) and not isinstance(i, bool) for i in row):
        raise InputError(
            "`prompt` contains an element that is neither text nor a token id: token ids are integers"
        )
    return [int(each) for each in row]


def encode(model: Model, text: str) -> list[int]:
    """The prompt's token ids, special tokens added as the tokenizer is configured to, but no second BOS.

    An empty text is the BOS of a tokenizer that adds one, and refused with any other.
    """
    if model.tokenizer is None:
        raise InputError(
            f"{model.source}: has no tokenizer; give token ids instead of text (--tokens FILE.npy)"
        )
    tokens = model.tokenizer.encode_once(text)
    if not tokens:
        raise InputError("the prompt is empty: give at least one character")
    return tokens


def _left_padded(prompts: list[list[int]]) -> tuple[Array, Array]:
    """Prompts of any lengths as one array, padded at the left, and how much padding each has."""
    longest = max(map(len, prompts))
    pads = np.array([longest - len(prompt) for prompt in prompts])
    return np.array([[0] * int(pad) + prompt for pad, prompt in zip(pads, prompts)]), pads
