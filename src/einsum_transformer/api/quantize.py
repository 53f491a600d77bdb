"""`quantize`: the weights of a model as integers of a few bits."""

from __future__ import annotations

from collections.abc import Sequence

from einsum_transformer.api.sources import AnySource
from einsum_transformer.arguments import checked
from einsum_transformer.errors import InputError
from einsum_transformer.loading.load import load
from einsum_transformer.models.model import Model
from einsum_transformer.models.quantization import quantized
from einsum_transformer.models.scheme import Quantization


@checked
def quantize(source: AnySource, scheme: str, mode: str = "real", exclude: Sequence[str] = ()) -> Model:
    """Quantize the weights of a model: round(w / scale), with one scale per group, row or tensor.

    source: a model, or any source that `load` takes, whose weights are then never in memory as floats all at
    once. scheme: `W{2,3,4,8}A{4,8,16}`, optionally `g{32,64,128}`, the elements of a row that share a scale.
    Without it, 8 bits have one scale per row and fewer bits one per 64 elements. Options follow a comma:
    `tensor` or `channel` (one scale per tensor or per row), `asymmetric` (with zero points). A8 and A4 round
    the input of each quantized product to integers with one scale per token, A16 to float16.
    mode: "real" stores integer codes and scales, and dequantizes them in blocks inside a product; "simulated"
    stores the rounded weights as floats. Both have the same values.
    exclude: names of modules ("down_proj", "lm_head") or regular expressions (RE2) for whole names. Norms,
    biases, learned positions and routers are never quantized; embedding and head have at least 8 bits.

    The quantized weights have no gradient; adapters can be added to them. Raises InputError for an unknown
    scheme, weights with nan or inf, and a model that is already quantized or has an adapter.
    """
    quantization = Quantization.of(scheme, mode, exclude)
    if quantization is None:
        raise InputError("`scheme` is 'none': expected a scheme such as W8A16")
    if isinstance(source, Model):
        return quantized(source, quantization)
    return load(
        source, quantization=scheme, quantization_mode=mode, quantization_exclude=quantization.exclude
    )
