# pyright: reportUnnecessaryIsInstance=false
"""Generation: prefill in chunks, then one token per step, with the same forward pass."""

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
from einsum_transformer.generation.rows import Generation, Row, Settings, lengthen, next_logits, prefill
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
    come from the model's generation_config.json. Decoding is greedy by default, and samples with a
    temperature above 0 or `do_sample`.

    Options: `max_new_tokens`, `do_sample`, `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty` and
    `seed`, as in transformers. `stop`: one or several texts, or special tokens, that end the answer and are
    not part of it. `ctx_size`: maximum number of tokens of prompt and answer together.
    `prefill_step_size`: prompt tokens per forward pass. `ignore_eos`: continue after end tokens.
    `GenerationOptions` lists the other options of transformers, such as `min_new_tokens`, `bad_words_ids` or
    `max_length`.

    Speculative decoding of one prompt, with the same distribution of texts: `draft_model` (a smaller model
    with the same vocabulary), `draft_layers` (the first layers of the model itself) or `prompt_lookup` (the
    continuation of the same tokens earlier in the text; True, or the number of tokens to look up), with
    `num_draft_tokens` drafts per round.

    Raises InputError for an option that is unknown, not supported, or has a wrong value.
    """
    job = request(model, prompt, options)
    for _ in job.run(model):
        pass
    return job.results[0] if job.single else job.results


@checked
def stream(model: Model, prompt: Any, **options: Unpack[GenerationOptions]) -> Iterator[str]:
    """Continue one prompt and yield its text in pieces as they are generated.

    Prompt and options are as in `generate`. Raises InputError for a batch, and for a model without tokenizer.
    """
    if model.tokenizer is None:
        raise InputError(f"{model.source}: has no tokenizer to stream text with; use generate")
    job = request(model, prompt, options)
    if not job.single:
        raise InputError("stream: expected one prompt, not a batch; use generate")
    return (text for _, text in job.run(model) if text)


@dataclass(frozen=True, slots=True)
class Request:
    """The prompts and settings of a call of `generate`."""

    results: list[Generation]
    single: bool
    """Whether one prompt was given rather than a batch."""
    sampling: Sampling
    settings: Settings
    speculation: Speculation | None

    def run(self, model: Model) -> Iterator[tuple[int, str]]:
        """Generate the results and yield (row, new text)."""
        return decode_batch(model, self.results, self.sampling, self.settings, speculation=self.speculation)

    def counters(self) -> dict[str, int]:
        """Return the number of generated tokens, and the bytes of the KV cache at the newest of them."""
        found = {"generated tokens": sum(len(result.tokens) for result in self.results)}
        if cache_bytes := max(result.kv_cache_bytes for result in self.results):
            found["KV cache bytes"] = cache_bytes
        return found


def request(
    model: Model, prompt: Any, given: GenerationOptions, stated: Mapping[str, Any] | None = None
) -> Request:
    """Return the prompts and settings of a call; stated: as in `settings_of`."""
    settings = settings_of(model, given, stated)
    prompts, single = prompts_of(model, prompt)
    return Request([Generation(tokens) for tokens in prompts], single, *settings)


def settings_of(
    model: Model, given: GenerationOptions, stated: Mapping[str, Any] | None = None
) -> tuple[Sampling, Settings, Speculation | None]:
    """Return the settings for these options. stated: replaces the contents of generation_config.json."""
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
                f"{config.source}: speculative needs draft_layers, the number of layers of the draft model"
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
    """Return the options that generation_config.json and the model's run config set; the latter wins."""
    config, stated = model.run_config, dict(model.generation_config or {})
    if config is not None:
        stated |= {"do_sample": config.temperature > 0, "temperature": config.temperature}
        stated |= {"top_k": config.top_k_sample, "max_new_tokens": config.max_new_tokens}
    return stated


def options(
    model: Model, given: Mapping[str, Any], stated: Mapping[str, Any] | None = None
) -> tuple[Sampling, Settings]:
    """Return the settings from `given`, or for absent options from generation_config.json.

    given: keywords of `generate` without those of speculative decoding; None is absent. stated: replaces the
    contents of generation_config.json.
    """
    values = merged(model.generation_config if stated is None else stated, given, model.source)
    if model.tokenizer is None and "stop_strings" in values and given.get("stop_strings") is None:
        note_once(f"{FILE}: stop_strings are not used: {model.source} has no tokenizer to find texts with")
        del values["stop_strings"]
    if given.get("eos_token_id") is None:
        values.pop("eos_token_id", None)  # those of the file are among the model's end tokens
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
    """Generate the `results` of a batch and yield (row, new text); "" if no whole character is ready.

    Each row has its own random stream, so the continuation of a prompt does not depend on the other rows.
    The tokens of a given cache precede the prompts and belong to the text, also for penalties and lengths.
    speculation: for one row only. passed: notes once if the text exceeds the trained length; default: for
    this call.
    """
    if speculation is not None and len(results) > 1:
        raise InputError(f"speculative decoding: expected one prompt, got {len(results)}")
    with phase("setup"):
        limit = context_limit(model.config, settings.ctx_size)
        longest = max(len(result.prompt_tokens) for result in results)
        start = 0 if cache is None else cache.length
        if start + longest > limit:
            raise InputError(
                f"the prompt has {start + longest} tokens, expected at most {limit} (the context)"
            )
        tokens, pads = left_padded([result.prompt_tokens for result in results])
        model.checked(tokens)
        earlier: list[list[int]] = (
            [[] for _ in results] if cache is None else _cached_tokens(cache, len(results))
        )
        rows = [
            Row(model, result, sampling, settings, index, earlier[index], limit)
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
    """Continue all rows token by token, from the logits (b, v) of their last prompt tokens."""
    live = list(range(len(rows)))
    while True:
        next_tokens: list[int] = []
        keep: list[int] = []
        texts: list[tuple[int, str]] = []
        with phase("sampling"):
            for position, index in enumerate(live):
                padding = 0 if cache.pads is None else int(cache.pads[position])
                token, text = rows[index].step(logits[position], capacity=limit + padding - cache.length)
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
            logits = next_logits(model, np.array(next_tokens)[:, None], cache, "last", rows[0].repairs)[:, -1]
        passed.grown(cache.length if cache.pads is None else cache.length - int(cache.pads.min()))


def _cached_tokens(cache: KVCache, rows: int) -> list[list[int]]:
    """Return the tokens of each row in a cache, without padding."""
    if not cache.length:
        return [[] for _ in range(rows)]
    pads = [0] * rows if cache.pads is None else cache.pads.tolist()
    return [row[pad:] for row, pad in zip(cache.tokens.tolist(), pads, strict=True)]


def prompts_of(model: Model, prompt: Sequence[Any] | Array) -> tuple[list[list[int]], bool]:
    """Return the token ids of each row, and whether one prompt was given instead of a batch."""
    if isinstance(prompt, str):
        return [encode(model, prompt)], True
    items: Sequence[Any] = prompt.tolist() if isinstance(prompt, np.ndarray) else prompt
    if not isinstance(items, Sequence) or isinstance(items, (bytes, bytearray)):
        kinds = "text, token ids, a list of messages, or a list of these"
        raise InputError(f"`prompt` has type {type(prompt).__name__}, expected {kinds}")
    if not items:
        raise InputError("the prompt is empty: give at least one token")
    if not isinstance(items[0], (str, Sequence, np.ndarray)):  # one prompt: messages or token ids
        return [_row(model, items)], True
    rows = [_row(model, item) for item in items]
    if not all(rows):
        raise InputError(f"prompt {rows.index([])} of the batch is empty")
    return rows, False


def _row(model: Model, item: Sequence[Any] | Array) -> list[int]:
    if isinstance(item, str):
        return encode(model, item)
    if isinstance(item, Sequence) and item and isinstance(item[0], Mapping):
        return _chat(model, item)
    return _token_row(item)


def _chat(model: Model, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the token ids of a chat; a last assistant message is continued, as in transformers."""
    if model.tokenizer is None:
        raise InputError(f"{model.source}: has no tokenizer; give token ids instead of messages")
    last = messages[-1]
    if isinstance(last, Mapping) and last.get("role") == "assistant":
        return model.tokenizer.apply_chat_template(
            messages, add_generation_prompt=False, continue_final_message=True
        )
    return model.tokenizer.apply_chat_template(messages)


def _token_row(items: Sequence[Any] | Array) -> list[int]:
    """Return one row of token ids; InputError unless all are integers."""
    row: Sequence[Any] = items.tolist() if isinstance(items, np.ndarray) else items
    integers = isinstance(row, Sequence) and not isinstance(row, (bytes, bytearray))
    if not integers or not all(isinstance(i, (int, np.integer)) and not isinstance(i, bool) for i in row):
        raise InputError("`prompt` contains an item that is neither a text nor an integer token id")
    return [int(each) for each in row]


def encode(model: Model, text: str) -> list[int]:
    """Return the token ids of a prompt with the tokenizer's special tokens, but without a second BOS.

    An empty text gives BOS if the tokenizer adds one, else InputError.
    """
    if model.tokenizer is None:
        raise InputError(
            f"{model.source}: has no tokenizer; give token ids instead of text (--tokens FILE.npy)"
        )
    tokens = model.tokenizer.encode_once(text)
    if not tokens:
        raise InputError("the prompt is empty: give at least one character")
    return tokens


def left_padded(prompts: list[list[int]]) -> tuple[Array, Array]:
    """Return prompts as one array, padded on the left, and the padding of each."""
    longest = max(map(len, prompts))
    pads = np.array([longest - len(prompt) for prompt in prompts])
    return np.array([[0] * int(pad) + prompt for pad, prompt in zip(pads, prompts)]), pads
