"""A text as windows of tokens whose last tokens are scored: the conventions of perplexity.

Windows differ in their length, their overlap and the tokens that begin them, and so do the results.

- llamacpp: llama.cpp's `llama-perplexity`. Disjoint windows of `ctx_size` tokens, each beginning with BOS if
  the tokenizer adds one; the tokens of the second half are scored.
- llamacpp-stride: its `--ppl-stride`. Windows of ctx_size + stride // 2 tokens, one every `stride` tokens,
  whose last `stride` tokens are scored.
- hf-stride: the loop of the documentation of transformers ("Perplexity of fixed-length models"). Windows of
  `ctx_size` tokens, one every `stride` tokens, in which the n tokens after the previous window are scored;
  the mean of each window has the weight n - 1, as there.
- gptq: the evaluation of the GPTQ paper's code. Disjoint windows of `ctx_size` tokens; all tokens but the
  first of each are scored.
- lm-eval: `loglikelihood_rolling` of lm-evaluation-harness for the text as one document. All tokens are
  scored, the first one after a prefix (BOS, or else EOS), in windows of `ctx_size` tokens with one token of
  context.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from einsum_transformer.errors import InputError
from einsum_transformer.text.chunks import read_text
from einsum_transformer.text.tokenizer import Tokenizer

Array = np.ndarray

CONVENTIONS = ("llamacpp", "llamacpp-stride", "hf-stride", "gptq", "lm-eval")
STRIDED = ("llamacpp-stride", "hf-stride")
DEFAULT_STRIDE = 512


class Window(NamedTuple):
    """Tokens of a window. scored: number of tokens at the end that are scored. weight: of their mean."""

    tokens: Array
    scored: int
    weight: float


@dataclass(frozen=True, slots=True)
class Windows:
    """The windows of a text, and the numbers of its tokens, words and bytes."""

    windows: tuple[Window, ...]
    tokens: int
    words: int
    nbytes: int


def windows_of(
    tokenizer: Tokenizer,
    text: str | Path,
    convention: str,
    ctx_size: int,
    stride: int = DEFAULT_STRIDE,
    most: int | None = None,
) -> Windows:
    """Return the windows of a text, or of a file in UTF-8. most: number of windows; default all.

    Raises InputError for a text that is shorter than a window.
    """
    content, name = (read_text(text), str(text)) if isinstance(text, Path) else (text, "the text")
    adds_bos = tokenizer.bos_id is not None and tokenizer.encode("a")[:1] == [tokenizer.bos_id]
    ids = np.array(tokenizer.encode(content, add_special_tokens=False), np.int64)
    start = [tokenizer.bos_id] if adds_bos and tokenizer.bos_id is not None else []
    whole = np.concatenate([np.array(start, np.int64), ids])
    needed = {"llamacpp": ctx_size, "llamacpp-stride": 2 * (ctx_size + stride // 2), "gptq": ctx_size}
    if len(whole) < (least := needed.get(convention, 2)):
        raise InputError(f"{name} has {len(whole):,} tokens: at least {least:,} are needed")
    if convention == "llamacpp":
        found = _halves(whole, ctx_size, start)
    elif convention == "llamacpp-stride":
        found = _strided(whole, ctx_size + stride // 2, stride, start)
    elif convention == "hf-stride":
        found = _overlapping(whole, ctx_size, stride)
    elif convention == "gptq":
        found = (Window(each, ctx_size - 1, 1.0) for each in _disjoint(whole, ctx_size))
    else:
        prefix = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
        if prefix is None:
            raise InputError(
                f"the tokenizer has neither BOS nor EOS, which {convention} needs before the text"
            )
        found = (
            Window(np.array([*before, *own], np.int64), len(own), len(own))
            for before, own in rolling_windows(ids.tolist(), prefix, ctx_size)
        )
    chosen = tuple(window for _, window in zip(range(most or len(whole)), found))
    return Windows(chosen, len(whole), len(re.split(r"\s+", content)), len(content.encode()))


def _disjoint(tokens: Array, size: int) -> Array:
    count = len(tokens) // size
    return tokens[: count * size].reshape(count, size)


def _halves(tokens: Array, size: int, start: list[int]) -> Iterator[Window]:
    for chunk in _disjoint(tokens, size):
        own = chunk.copy()
        own[: len(start)] = start
        scored = size - 1 - size // 2
        yield Window(own, scored, scored)


def _strided(tokens: Array, size: int, stride: int, start: list[int]) -> Iterator[Window]:
    for i in range(-(-(len(tokens) - size) // stride)):
        own = tokens[i * stride : i * stride + size].copy()
        own[: len(start)] = start
        yield Window(own, stride, stride)


def _overlapping(tokens: Array, size: int, stride: int) -> Iterator[Window]:
    previous = 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + size, len(tokens))
        new = end - previous
        own = tokens[begin:end]
        scored = min(new, len(own) - 1)
        if scored > 0:
            yield Window(own, scored, float(new - 1))
        previous = end
        if end == len(tokens):
            return


def rolling_windows(tokens: Sequence[int], prefix: int, length: int) -> Iterator[tuple[list[int], list[int]]]:
    """Yield (context, continuation) so that each token is in one continuation, in windows of `length` tokens
    before the last one. All but the last have a context of one token; the last has as many as fit."""
    for start in range(0, len(tokens), length):
        end = min(start + length, len(tokens))
        context = [prefix] if start == 0 else list(tokens[end - length - 1 : start])
        yield context, list(tokens[start:end])
