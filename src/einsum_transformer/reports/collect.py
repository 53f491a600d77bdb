"""Run a model on a prompt and collect what a page shows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from einsum_transformer.analysis.explain import explain
from einsum_transformer.analysis.quantization import QuantizationReport, quantization_report, stored_types
from einsum_transformer.generation.rows import Generation
from einsum_transformer.models.model import Model
from einsum_transformer.reports.arrays import MOST, ArrayReader
from einsum_transformer.reports.cascade import Stage, stage_of
from einsum_transformer.reports.data import Arrays, Run, Token
from einsum_transformer.reports.lens import Lens, NextToken, looked_at, next_tokens
from einsum_transformer.reports.measure import (
    Measured,
    Requested,
    TrainingRun,
    arrays_of,
    memory_of,
    timed,
    training_of,
)

TOKENS_SHOWN = 64
"""Default number of tokens in attention and lens."""


def collect(
    model: Model,
    requested: Requested,
    tokens_shown: int = TOKENS_SHOWN,
    training: bool = False,
    seed: int = 0,
    reference: Model | None = None,
) -> Run:
    """Run the model on the prompt of a request; see `api.report.report`."""
    measured, timings, job = timed(model, requested)
    (result,) = job.results
    tokens = [*result.prompt_tokens, *result.tokens]
    memory = memory_of(model, requested, measured.planned)
    trained = training_of(model, tokens, seed) if training else None
    reader = arrays_of(model, tokens, len(result.tokens), measured.planned, training)
    attention, lens = looked_at(model, tokens[:tokens_shown])
    following = next_tokens(model, tokens, len(result.tokens))[:tokens_shown]
    quantization, kv_cache = stored_types(model)
    return Run(
        model=model.source,
        quantization=quantization,
        kv_cache=kv_cache,
        program=explain(model, 1, len(result.prompt_tokens), backward=model.quantization is None),
        stages=tuple(_stages(model, measured, trained)),
        tokens=tuple(Token(id_, _text(model, id_)) for id_ in tokens[:tokens_shown]),
        vocabulary={id_: _text(model, id_) for id_ in sorted(set(_ids(lens, following)))},
        prompt_tokens=len(result.prompt_tokens),
        new_tokens=len(result.tokens),
        text=_shown_text(model, result, tokens_shown),
        left_out=tuple(_left_out(model, result, tokens_shown, reader)),
        measured=measured,
        timings=timings,
        memory=memory,
        arrays=Arrays(tuple(reader.samples), reader.calls),
        attention=attention,
        lens=lens,
        next_tokens=following,
        quantization_report=_errors(model, reference),
        training=trained,
    )


def _stages(model: Model, measured: Measured, trained: TrainingRun | None) -> Iterable[Stage]:
    blocks = model.decoder.layers
    prefill, decode = measured.planned
    yield stage_of(prefill, "prefill", blocks)
    yield stage_of(decode, "decode", blocks)
    if trained is not None:
        (step,) = trained.measured.planned
        yield stage_of(step, "forward", blocks)
        yield stage_of(step, "backward", blocks)


def _errors(model: Model, reference: Model | None) -> QuantizationReport | None:
    return None if model.quantization is None else quantization_report(model, reference)


def _text(model: Model, id_: int) -> str:
    return str(id_) if model.tokenizer is None else model.tokenizer.decode([id_], False)


def _shown_text(model: Model, result: Generation, tokens_shown: int) -> str:
    if model.tokenizer is None:
        return " ".join(map(str, result.tokens[:tokens_shown]))
    if len(result.tokens) <= tokens_shown:
        return result.text
    return model.tokenizer.decode(result.tokens[:tokens_shown], False)


def _ids(lens: Lens, following: Sequence[NextToken]) -> Iterable[int]:
    for layer in lens.layers:
        for each in layer:
            yield from each.ids
    for new in following:
        yield new.chosen
        yield from new.predicted.ids


def _left_out(model: Model, result: Generation, shown: int, reader: ArrayReader) -> Iterable[str]:
    prompt, new = len(result.prompt_tokens), len(result.tokens)
    if prompt + new > shown:
        yield (
            f"attention and logit lens show the first {shown} of {prompt + new} tokens; "
            f"the {prompt + new - shown} tokens after them are left out"
        )
    if new > shown:
        yield f"continuation and next-token probabilities show the first {shown} of {new} new tokens"
    count = model.config.num_hidden_layers
    layers = sorted({layer for _, layer, *_ in reader.calls if layer is not None})
    if len(layers) < count:
        names = ", ".join(map(str, layers))
        yield f"arrays are those of layers {names} of {count}, and of at most {MOST} rows and {MOST} columns"
