"""`report`: a run of one or two models as one page."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from einsum_transformer.analysis.compare import compare
from einsum_transformer.analysis.rates import stored_rates
from einsum_transformer.api.profile import default_prompt
from einsum_transformer.api.sources import AnySource, model_of
from einsum_transformer.arguments import checked
from einsum_transformer.errors import InputError
from einsum_transformer.formats.files import check_writable
from einsum_transformer.generation.decode import request, stated_options
from einsum_transformer.generation.options import GenerationOptions
from einsum_transformer.loading.hub import DEFAULT_MODEL
from einsum_transformer.models.model import Model
from einsum_transformer.reports.collect import TOKENS_SHOWN, collect
from einsum_transformer.reports.data import Machine, Report, Run


@checked
def report(
    source: AnySource = DEFAULT_MODEL,
    prompt: Any = None,
    path: str | Path | None = None,
    *,
    other: AnySource | None = None,
    reference: AnySource | None = None,
    training: bool = False,
    tokens_shown: int = TOKENS_SHOWN,
    **options: Unpack[GenerationOptions],
) -> Report:
    """Continue a prompt and show the run as one HTML page: the program with its arrays, times, memory,
    attention and predictions.

    source: a model, or any source that `load` takes. prompt: as in `generate`, for one row; default: as in
    `profile`. path: write the page to this file. other: a second model, which continues the same prompt and
    is shown beside the first. reference: the model without quantization, for the errors of quantized weights.

    training: also train some steps on the tokens of the text; the weights are restored afterwards.
    tokens_shown: tokens whose attention and predictions are shown. options: as in `generate`; the default of
    max_new_tokens is 8.

    The model runs several times: for the times, for the memory, and for the arrays and predictions. If
    `machine` has measured this machine, the times are compared with its rates.
    """
    if path is not None:
        check_writable(Path(path), "path")
    if not 2 <= tokens_shown <= _MOST:
        raise InputError(f"`tokens_shown` is {tokens_shown}: expected 2 to {_MOST}")
    models = [model_of(each) for each in (source, other) if each is not None]
    original = None if reference is None else model_of(reference)
    given: GenerationOptions = {**options}
    if given.get("max_new_tokens") is None and given.get("max_length") is None:
        given["max_new_tokens"] = _NEW_TOKENS
    if prompt is None:
        prompt = default_prompt(models[0], 1, given.get("seed") or 0)
    runs = tuple(_run(model, prompt, given, tokens_shown, training, original) for model in models)
    found = Report(runs, Machine.current(stored_rates()))
    if len(models) == 2:
        names = found.names[0], found.names[1]
        found = replace(found, comparison=compare(models[0], models[1], 1, runs[0].prompt_tokens, names))
    if path is not None:
        found.write(path)
    return found


_NEW_TOKENS = 8
_MOST = 256
"""Maximum of `tokens_shown`: the weights of each head grow with its square."""


def _run(
    model: Model,
    prompt: Any,
    given: GenerationOptions,
    tokens_shown: int,
    training: bool,
    reference: Model | None,
) -> Run:
    """Check the settings before the first run, and collect."""
    if any(given.get(name) for name in ("draft_model", "draft_layers", "prompt_lookup")):
        raise InputError("a report shows one token per decode step: use it without speculative decoding")
    requested = partial(request, model, prompt, given, stated_options(model))
    job = requested()
    if len(job.results) != 1:
        raise InputError(f"a report shows one prompt, but {len(job.results)} are given")
    if training and model.quantization is not None and model.lora is None:
        raise InputError(
            f"{model.source}: weights that are quantized to {model.quantization} have no gradient: "
            "use a report without `training`"
        )
    budget = 0 if job.settings.max_new_tokens is None else job.settings.max_new_tokens
    if training and len(job.results[0].prompt_tokens) + budget < 2:
        raise InputError("`training` needs at least two tokens")
    return collect(model, requested, tokens_shown, training, given.get("seed") or 0, reference)
