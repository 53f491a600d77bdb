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
    ctx_size: int | None = None,
    chunks: int | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
    convention: str = "llamacpp",
    stride: int | None = None,
) -> Perplexity:
    """Return the perplexity of a model on a text: exp(mean of -log p(token | tokens before it)).

    Numbers of different conventions cannot be compared. The log-probabilities are computed in float64.

    source: a model, or any source that `load` takes. text: the text, or the Path of a file in UTF-8.
    convention: which tokens are scored, and after which: "llamacpp" (llama.cpp's: windows of 512 tokens that
    begin with BOS if the tokenizer adds one; the second half of each is scored), "llamacpp-stride" (its
    `--ppl-stride`), "hf-stride" (overlapping windows, the loop of the documentation of transformers), "gptq"
    (disjoint windows of 2,048 tokens), "lm-eval" (`loglikelihood_rolling` of lm-evaluation-harness, the text
    as one document).
    ctx_size: tokens of a window; default 512 for llama.cpp's, else 2,048 or the positions of the model.
    stride: tokens between the beginnings of windows of the two conventions with a stride; default 512.
    chunks: only this many windows; default all. progress: called with the number of finished windows and
    their total.
    Raises InputError for a text that is shorter than a window and a model without tokenizer.
    """
    selection = evaluate.Selection(convention, ctx_size, stride, chunks)
    return evaluate.perplexity(model_of(source), text, selection, progress)


@checked
def divergence(
    source: AnySource,
    reference: AnySource,
    text: str | Path,
    ctx_size: int | None = None,
    chunks: int | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
    convention: str = "llamacpp",
    stride: int | None = None,
) -> Divergence:
    """Return how much the predictions of a model differ from those of a reference model on a text.

    The KL divergence KL(reference || model) of each scored token, its mean and quantiles, how often both
    models find the same token most probable, and the root mean square of the change of the probabilities of
    the scored tokens, in float64. text, ctx_size, chunks, progress, convention, stride: as in `perplexity`,
    which scores the same tokens. The models need the same vocabulary: typically, `source` is a quantized form
    of `reference`.
    """
    own = model_of(source)
    selection = evaluate.Selection(convention, ctx_size, stride, chunks)
    return evaluate.divergence(own, model_of(reference), text, selection, progress)
