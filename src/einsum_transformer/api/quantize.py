"""`quantize`: the weights of a model as integers of a few bits; `quantization_report`: bytes and errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from einsum_transformer.analysis import quantization as analysis
from einsum_transformer.analysis.quantization import QuantizationReport
from einsum_transformer.api.sources import AnySource, model_of
from einsum_transformer.arguments import checked
from einsum_transformer.errors import InputError
from einsum_transformer.loading.load import load
from einsum_transformer.models.model import Model
from einsum_transformer.models.quantization import quantized
from einsum_transformer.models.scheme import Quantization
from einsum_transformer.notes import note
from einsum_transformer.quantization.calibrate import METHODS, calibrated
from einsum_transformer.text.chunks import token_chunks

_CHUNK = 512
"""Tokens of a chunk of the calibration text."""


@checked
def quantize(
    source: AnySource,
    scheme: str,
    mode: str = "real",
    exclude: Sequence[str] = (),
    method: str = "rtn",
    calibration: str | Path | None = None,
    calibration_chunks: int = 32,
    progress: Callable[[int, int], object] = lambda done, total: None,
    by_name: Mapping[str, str] | None = None,
) -> Model:
    """Quantize the weights of a model: round(w / scale), with one scale per group, row or tensor.

    source: a model, or any source that `load` takes, whose weights are then never in memory as floats all at
    once. scheme: `W{2,3,4,8}A{4,8,16}`, optionally `KV{4,8,16}`, the type of cached keys and values, and
    `g{32,64,128}`, the elements of a row that share a scale. Without it, 8 bits have one scale per row and
    fewer bits one per 64 elements. Options follow a comma: `tensor` or `channel` (one scale per tensor or per
    row), `asymmetric` (with zero points). A8 and A4 round the input of each quantized product to integers
    with one scale per token, A16 to float16.
    mode: "real" stores integer codes and scales; "simulated" stores the rounded weights as floats. Both have
    the same values.
    exclude: names of modules ("down_proj", "lm_head") or regular expressions (RE2) for whole names. Norms,
    biases, learned positions and routers are never quantized; embedding and head have at least 8 bits.
    by_name: names of modules or regular expressions, as in `exclude`, with the scheme that they have instead
    of `scheme`; the first that matches applies ({"down_proj": "W8A16"}). It may differ in the weights only.
    method: "rtn" rounds to nearest. "gptq" and "awq" round the matrices of the blocks so that their outputs
    on the text `calibration` (a text, or the Path of a file) change less: GPTQ corrects the columns that are
    not rounded yet, AWQ scales columns with large activations and limits the ranges of groups. They use the
    first `calibration_chunks` chunks of 512 tokens. progress: called with the number of finished blocks and
    their total.

    The quantized weights have no gradient; adapters can be added to them. Raises InputError for an unknown
    scheme, weights with nan or inf, and a model that is already quantized or has an adapter.
    """
    quantization = Quantization.of(scheme, mode, exclude, by_name)
    if quantization is None:
        raise InputError("`scheme` is 'none': expected a scheme such as W8A16")
    if method not in METHODS:
        raise InputError(f"`method` is {method!r}: expected {', '.join(METHODS)}")
    if (method == "rtn") != (calibration is None):
        needs = "is used by gptq and awq only" if method == "rtn" else f"is needed by {method}: give a text"
        raise InputError(f"`calibration` {needs}")
    if calibration is not None:
        model = model_of(source)
        if model.tokenizer is None:
            raise InputError(f"{model.source}: no tokenizer, which a calibration text needs")
        if calibration_chunks < 1:
            raise InputError(f"`calibration_chunks` is {calibration_chunks}: expected 1 or more")
        size = min(_CHUNK, model.config.max_position_embeddings)
        chunks = token_chunks(model.tokenizer, calibration, size, calibration_chunks)
        if len(chunks) < calibration_chunks:
            note(
                f"the calibration text has {len(chunks)} chunks of {size} tokens, fewer than the "
                f"{calibration_chunks} to use"
            )
        batches = [chunk[None] for chunk in model.checked(chunks, "the tokens of the text")]
        return calibrated(model, quantization, method, batches, progress)
    if isinstance(source, Model):
        return quantized(source, quantization)
    return load(
        source,
        quantization=scheme,
        quantization_mode=mode,
        quantization_exclude=quantization.exclude,
        quantization_by_name=by_name,
    )


@checked
def quantization_report(model: Model, reference: AnySource | None = None) -> QuantizationReport:
    """Return the bytes of a quantized model by operation, and the error of each quantized weight.

    model: a model that `quantize` or `load` quantized. reference: the model without quantization, or any
    source that `load` takes; without it, no errors are listed.

    Raises InputError for a model that is not quantized.
    """
    return analysis.quantization_report(model, None if reference is None else model_of(reference))
