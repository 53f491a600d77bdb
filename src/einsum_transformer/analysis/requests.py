"""Answers of a model to the requests of lm-evaluation-harness: log-likelihoods and generated texts.

The harness is not imported: a request is any object with `args`. Encoding, truncation, windows and stop
strings are those of the harness's model class for transformers (`HFLM` in lm_eval/models/huggingface.py,
version 0.4.13), so that the scores of the same weights are equal.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from einsum_transformer.analysis.evaluate import log_softmax
from einsum_transformer.engine.parallel import for_each
from einsum_transformer.errors import InputError
from einsum_transformer.generation.decode import generate, left_padded
from einsum_transformer.generation.rows import PREFILL_CHUNK
from einsum_transformer.models.families.family import token_ids
from einsum_transformer.models.finite import is_finite
from einsum_transformer.models.model import Model
from einsum_transformer.text.tokenizer import Tokenizer
from einsum_transformer.text.windows import rolling_windows

Array = np.ndarray
Item = TypeVar("Item")
Pair = tuple[list[int], list[int]]
"""The token ids of a context and of its continuation."""
Answer = tuple[float, bool]
"""The log-likelihood of a continuation, and whether all of its tokens are the most probable ones."""
Report = Callable[[str, tuple[Any, ...], Any], object]
"""Called with the kind of a request, its arguments and its answer."""

_LOGITS = 1 << 26
"""Logits that are computed at once."""
_MAX_GEN_TOKS = 256
_BUDGETS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of the maximum of new tokens, by precedence."""


class Request(Protocol):
    """A request of the harness, its `Instance`."""

    @property
    def args(self) -> tuple[Any, ...]: ...


@dataclass(frozen=True, slots=True)
class Answers:
    """A model that answers the requests of the harness."""

    model: Model
    tokenizer: Tokenizer
    batch_size: int
    max_length: int
    """Maximum tokens of context and continuation; the beginning of longer ones is removed."""
    prefix_token_id: int
    """The token that precedes a text without context."""
    add_bos_token: bool | None
    """Whether a text begins with BOS; None: if the tokenizer adds it."""

    @staticmethod
    def of(
        model: Model,
        batch_size: int = 1,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
    ) -> Answers:
        """Return the answers of a model. max_length: default the positions of the model; prefix_token_id:
        default BOS, or EOS without BOS. Raises InputError for a model without tokenizer, or a wrong value."""
        tokenizer = model.tokenizer
        if tokenizer is None:
            raise InputError(f"{model.source}: no tokenizer, which an evaluation on tasks needs")
        if batch_size < 1:
            raise InputError(f"`batch_size` is {batch_size}: expected 1 or more")
        most = model.config.max_position_embeddings
        if max_length is not None and (
            max_length < 2 or (model.config.learned_positions and max_length > most)
        ):
            bound = f" to the {most} learned positions" if model.config.learned_positions else " or more"
            raise InputError(f"`max_length` is {max_length}: expected 2{bound}")
        own = (prefix_token_id, tokenizer.bos_id, tokenizer.eos_id)
        prefix = next((each for each in own if each is not None), None)
        if prefix is None:
            raise InputError(f"{model.source}: has neither BOS nor EOS: give `prefix_token_id`")
        if not 0 <= prefix < model.config.vocab_size:
            raise InputError(f"`prefix_token_id` is {prefix}: expected an id below {model.config.vocab_size}")
        return Answers(model, tokenizer, batch_size, max_length or most, prefix, add_bos_token)

    def loglikelihood(
        self, requests: Sequence[Request], report: Report = lambda kind, args, answer: None
    ) -> list[Answer]:
        """Return log p(continuation | context) of requests (context, continuation), and whether greedy
        decoding of the context gives the continuation."""
        pairs = [self.pair(*request.args) for request in requests]
        return self._score(pairs, lambda i, found: report("loglikelihood", requests[i].args, found))

    def loglikelihood_rolling(
        self, requests: Sequence[Request], report: Report = lambda kind, args, answer: None
    ) -> list[float]:
        """Return log p(text) of requests (text,), in windows of `max_length` tokens."""
        windows = [
            list(rolling_windows(self.encode(request.args[0]), self.prefix_token_id, self.max_length))
            for request in requests
        ]
        left, sums = [len(each) for each in windows], [0.0] * len(requests)
        owners = [i for i, each in enumerate(windows) for _ in each]

        def add(window: int, found: Answer) -> None:
            i = owners[window]
            sums[i] += found[0]
            left[i] -= 1
            if not left[i]:
                report("loglikelihood_rolling", requests[i].args, sums[i])

        for request, each in zip(requests, windows):
            if not each:  # an empty text
                report("loglikelihood_rolling", request.args, 0.0)
        self._score([pair for each in windows for pair in each], add)
        return sums

    def generate_until(
        self, requests: Sequence[Request], report: Report = lambda kind, args, answer: None
    ) -> list[str]:
        """Return the continuation of requests (context, options), up to a stop string of the key `until`.

        The other options are those of `generate`, with the harness's names of the maximum of new tokens.
        """
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(i)
        options = {key: self.generation_options(requests[group[0]].args[1]) for key, group in groups.items()}
        for key, group in groups.items():
            until, settings = options[key]
            most = self.max_length - settings["max_new_tokens"]
            prompts = {i: self._prompt(requests[i].args[0])[-most:] for i in group}
            for batch in self._batches(sorted(group, key=lambda i: -len(prompts[i]))):
                if settings["do_sample"]:  # the harness sets the seed of NumPy
                    settings["seed"] = int(np.random.randint(1 << 31))
                found = generate(self.model, [prompts[i] for i in batch], **settings)
                for i, result in zip(batch, found):
                    texts[i] = before(self.tokenizer.decode(result.tokens), until)
                    report("generate_until", requests[i].args, texts[i])
        return texts

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, with BOS unless the text begins with it."""
        return self._encoded(text, self.tokenizer.decode([self.prefix_token_id], skip_special_tokens=False))

    def pair(self, context: str, continuation: str) -> Pair:
        """Return the token ids of a context and its continuation. White space at the end of the context
        belongs to the continuation, as tokens usually begin with it."""
        stripped = context.rstrip()
        whole = context + continuation
        if not stripped:
            ids = self.tokenizer.encode(whole, add_special_tokens=False)
            found = (ids[:1], ids[1:]) if ids[:1] == [self.prefix_token_id] else ([self.prefix_token_id], ids)
        else:
            ids = self.encode(stripped)
            found = ids, self.encode(whole)[len(ids) :]
        if not 0 < len(found[1]) <= self.max_length:
            raise InputError(
                f"the continuation {continuation[:40]!r} has {len(found[1])} tokens: expected 1 to "
                f"`max_length`, {self.max_length}"
            )
        return found

    def generation_options(self, given: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
        """Return the stop strings and the options of `generate` for the options of a request."""
        options = dict(given)
        until = options.pop("until", None) or []
        until = [until] if isinstance(until, str) else until
        if not isinstance(until, list) or not all(isinstance(each, str) for each in until):
            raise InputError(f"`until` is {until!r}: expected a text or a list of texts")
        budgets = [options.pop(name, None) for name in _BUDGETS]
        budget = int(next((each for each in budgets if each is not None), _MAX_GEN_TOKS))
        if not 0 < budget < self.max_length:
            raise InputError(f"`max_gen_toks` is {budget}: expected 1 to {self.max_length - 1}")
        if options.pop("max_length", None) is not None:
            raise InputError("`max_length` of a generation: use `max_gen_toks`")
        temperature = float(options.pop("temperature", None) or 0)
        sample = options.pop("do_sample", None)
        options["do_sample"] = temperature > 0 if sample is None else bool(sample)
        if options["do_sample"] and temperature:
            options["temperature"] = temperature
        ends = self._ends()
        stops = [text for text in until if text]
        if (eos := self.tokenizer.eos_id) is not None:
            stops.append(self.tokenizer.decode([eos], skip_special_tokens=False))
        found = {"max_new_tokens": budget, "eos_token_id": ends, "stop": stops}
        return stops, {name: value for name, value in (options | found).items() if value != []}

    def chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, name: str | None
    ) -> str:
        """Return a conversation as text. A template that rejects system messages gets the others only.
        name: of the template, if there are several."""

        def render(messages: Sequence[Mapping[str, Any]]) -> str:
            return self.tokenizer.render_chat(
                messages,
                add_generation_prompt,
                chat_template=name,
                continue_final_message=not add_generation_prompt,
            )

        try:
            return render(messages)
        except InputError:
            others = [each for each in messages if each["role"] != "system"]
            if len(others) == len(messages):
                raise
            return render(others)

    def _batches(self, items: Sequence[Item]) -> Iterator[Sequence[Item]]:
        yield from (items[i : i + self.batch_size] for i in range(0, len(items), self.batch_size))

    def _encoded(self, text: str, bos: str | None) -> list[int]:
        if bos is not None and text.startswith(bos):
            return self.tokenizer.encode(text, add_special_tokens=False)
        if self.add_bos_token is None:
            return self.tokenizer.encode(text)
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        start = self.tokenizer.bos_id if self.add_bos_token else None
        return ids if start is None else [start, *ids]

    def _prompt(self, text: str) -> list[int]:
        """The token ids of a prompt; those of an empty text are the prefix."""
        return self._encoded(text, self.tokenizer.named.get("bos_token")) or [self.prefix_token_id]

    def _ends(self) -> list[int]:
        """The ids that end a text for transformers: fewer than those of `generate`, which also stops at the
        ends of turns that only the tokenizer knows."""
        stated = token_ids((self.model.generation_config or {}).get("eos_token_id"))
        ends = {*(stated or self.model.config.eos_token_id)}
        return sorted(ends if self.tokenizer.eos_id is None else ends | {self.tokenizer.eos_id})

    def _score(self, pairs: Sequence[Pair], report: Callable[[int, Answer], object]) -> list[Answer]:
        """Return the answers to pairs of token ids. report: called with the index and the answer of each.

        Pairs that differ only in the last token, such as the choices of a question, share a row.
        """
        rows: dict[tuple[int, ...], list[int]] = {}
        for i, (context, continuation) in enumerate(pairs):
            rows.setdefault((*context, *continuation[:-1]), []).append(i)
        found: list[Answer] = [(0.0, False)] * len(pairs)
        for batch in self._batches(sorted(rows, key=lambda row: (-len(row), row))):
            counts = [max(len(pairs[i][1]) for i in rows[row]) for row in batch]
            scores = _log_probabilities(self.model, [list(row[-self.max_length :]) for row in batch], counts)
            for row, (inner, best, last) in zip(batch, scores):
                for i in rows[row]:
                    *_, token = pairs[i][1]
                    first = len(inner) - (len(pairs[i][1]) - 1)
                    total = float(inner[first:].sum() + last[token])
                    found[i] = total, bool(best[first:].all() and last.argmax() == token)
                    report(i, found[i])
        return found


def before(text: str, stops: Sequence[str]) -> str:
    """Return the text before the first stop string."""
    for stop in stops:
        text = text.split(stop)[0]
    return text


def _log_probabilities(
    model: Model, rows: Sequence[list[int]], counts: Sequence[int]
) -> list[tuple[Array, Array, Array]]:
    """Log-probabilities after the last tokens of each row of a batch, in float64.

    For each row, with n of `counts`: of its last n - 1 tokens, each after those before it (n - 1,), and
    whether they are the most probable ones; and of all tokens after the row (v,). Rows are padded on the
    left, so that their ends are the same columns: only these need logits.
    """
    tokens, pads = left_padded(list(rows))
    model.checked(tokens, "the tokens of a request")
    (b, length), v, tail = tokens.shape, model.config.vocab_size, max(counts)
    cache = model.cache(length, pads if pads.any() else None, horizon=length)
    inner, best, last = np.zeros((b, tail - 1)), np.ones((b, tail - 1), bool), np.empty((b, v))
    first = length - tail

    def score(i: int, column: int, logits: Array) -> None:
        row = np.empty(v)
        log_softmax(logits, row)
        if column == length - 1:
            last[i] = row
        else:
            target = tokens[i, column + 1]
            inner[i, column - first] = row[target]
            best[i, column - first] = row.argmax() == target

    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, first, PREFILL_CHUNK):
            model.decoder.forward(tokens[:, start : min(start + PREFILL_CHUNK, first)], cache, "none")
    step = max(1, min(PREFILL_CHUNK, _LOGITS // (b * v)))
    for start in range(first, length, step):
        with np.errstate(over="ignore", invalid="ignore"):
            logits = model.decoder.forward(tokens[:, start : start + step], cache)[0]
        columns = range(start, start + logits.shape[1])
        scored = [
            (i, column, logits[i, column - start])
            for column in columns
            for i in range(b)
            if column >= length - counts[i]
        ]
        if not all(is_finite(each) for _, _, each in scored):
            raise model.not_finite(tokens, pads if pads.any() else None)
        for_each(score, scored, coarse=len(scored) * v > 1 << 16)
    return [(inner[i, tail - n :], best[i, tail - n :], last[i]) for i, n in enumerate(counts)]
