"""`perplexity`, `divergence` and `evaluate`: how well a model predicts a text, and its scores on tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from einsum_transformer.analysis import evaluate as texts
from einsum_transformer.analysis import tasks as harness
from einsum_transformer.analysis.evaluate import Divergence, Perplexity
from einsum_transformer.analysis.tasks import Evaluation
from einsum_transformer.api.sources import AnySource, model_of, results_path
from einsum_transformer.arguments import checked
from einsum_transformer.errors import InputError


@checked
def perplexity(
    source: AnySource,
    text: str | Path,
    ctx_size: int | None = None,
    chunks: int | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
    convention: str = "llamacpp",
    stride: int | None = None,
    results: str | Path | None = None,
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
    their total. results: a file of JSON lines, written after each window; a second call with the same file
    continues, also with more windows, and returns the same result as an uninterrupted one.
    Raises InputError for a text that is shorter than a window and a model without tokenizer.
    """
    selection, path = texts.Selection(convention, ctx_size, stride, chunks), results_path(results)
    return texts.perplexity(model_of(source), text, selection, progress, path)


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
    results: str | Path | None = None,
) -> Divergence:
    """Return how much the predictions of a model differ from those of a reference model on a text.

    The KL divergence KL(reference || model) of each scored token, its mean and quantiles, how often both
    models find the same token most probable, and the root mean square of the change of the probabilities of
    the scored tokens, in float64. text, ctx_size, chunks, progress, convention, stride, results: as in
    `perplexity`, which scores the same tokens. The models need the same vocabulary: typically, `source` is a
    quantized form of `reference`.
    """
    path, own = results_path(results), model_of(source)
    selection = texts.Selection(convention, ctx_size, stride, chunks)
    return texts.divergence(own, model_of(reference), text, selection, progress, path)


@checked
def evaluate(
    source: AnySource,
    tasks: str | Sequence[str],
    num_fewshot: int | None = None,
    limit: float | None = None,
    batch_size: int = 8,
    include_path: str | Path | None = None,
    apply_chat_template: bool | str = False,
    system_instruction: str | None = None,
    gen_kwargs: Mapping[str, Any] | None = None,
    max_length: int | None = None,
    add_bos_token: bool | None = None,
    prefix_token_id: int | None = None,
    use_cache: str | Path | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Evaluation:
    """Return the scores of a model on tasks of lm-evaluation-harness (`lm_eval`, the extra `eval`).

    Texts are encoded, truncated and divided into windows as by the harness's own model class for
    transformers, so that scores can be compared. Log-probabilities are computed in float64.
    source: a model, or any source that `load` takes. tasks: names, patterns such as `mmlu_*`, or paths of
    YAML files. num_fewshot: examples in each prompt; default those of the task. limit: only the first
    documents of each task; below 1, this share of them. batch_size: requests per forward pass. include_path:
    a folder with further tasks. apply_chat_template: write prompts as conversations; a text is the name of
    one of several templates. system_instruction: the system message. gen_kwargs: options of `generate` that
    replace those of the task. max_length: maximum tokens of a request, whose beginning is removed; default
    the positions of the model. add_bos_token: begin texts with BOS; None: as the tokenizer does.
    prefix_token_id: precedes texts without context; default BOS, or EOS. use_cache: a path at which answers
    are stored, and read in later calls. progress: called with the number of finished
    requests of a kind and their total.
    Raises InputError if the harness is not installed and for an unknown task, before the model is loaded.
    """
    if limit is not None and limit <= 0:
        raise InputError(f"`limit` is {limit}: expected a number above 0")
    if num_fewshot is not None and num_fewshot < 0:
        raise InputError(f"`num_fewshot` is {num_fewshot}: expected 0 or more")
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    settings = {
        "batch_size": batch_size,
        "max_length": max_length,
        "add_bos_token": add_bos_token,
        "prefix_token_id": prefix_token_id,
        "progress": progress,
    }
    options = {
        "num_fewshot": num_fewshot,
        "limit": limit,
        "apply_chat_template": apply_chat_template,
        "system_instruction": system_instruction,
        "gen_kwargs": None if gen_kwargs is None else dict(gen_kwargs),
        "use_cache": None if use_cache is None else str(use_cache),
        "log_samples": False,
    }
    return harness.evaluate(lambda: model_of(source), names, include_path, settings, options)
