"""`perplexity` and `divergence`: how well a model predicts a text, and how a quantized one changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from einsum_transformer.analysis import evaluate
from einsum_transformer.analysis.evaluate import Divergence, Perplexity
from einsum_transformer.api.sources import AnySource, model_of
from einsum_transformer.arguments import checked


@checked
def perplexity(
    source: AnySource,
    text: str | Path,
    ctx_size: int = 512,
    chunks: int | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Perplexity:
    """Return the perplexity of a model on a text: exp(mean of -log p(token | tokens before it)).

    The convention is llama.cpp's: chunks of `ctx_size` tokens, each beginning with BOS if the tokenizer adds
    one; the tokens of the second half of each chunk are scored. The log-probabilities are computed in
    float64.
    source: a model, or any source that `load` takes. text: the text, or the Path of a file in UTF-8. chunks:
    only this many; default all. progress: called with the number of finished chunks and their total.
    Raises InputError for a text that is shorter than a chunk and a model without tokenizer.
    """
    return evaluate.perplexity(model_of(source), text, ctx_size, chunks, progress)


@checked
def divergence(
    source: AnySource,
    reference: AnySource,
    text: str | Path,
    ctx_size: int = 512,
    chunks: int | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Divergence:
    """Return how much the predictions of a model differ from those of a reference model on a text.

    The KL divergence KL(reference || model) of each scored token, its mean and quantiles, and how often both
    models find the same token most probable, in float64. text, ctx_size, chunks, progress: as in
    `perplexity`, which scores the same tokens. The models need the same vocabulary: typically, `source` is a
    quantized form of `reference`.
    """
    own = model_of(source)
    return evaluate.divergence(own, model_of(reference), text, ctx_size, chunks, progress)
