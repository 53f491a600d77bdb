"""`precision`: the error of each step of a model against float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from einsum_transformer.analysis import precision as analysis
from einsum_transformer.analysis.precision import Precision
from einsum_transformer.api.sources import AnySource, model_of
from einsum_transformer.arguments import checked


@checked
def precision(
    source: AnySource,
    text: str | Path | None = None,
    schemes: Sequence[str] = ("W8A16", "W8A8", "W4A16g64"),
    ctx_size: int = 128,
    seed: int = 0,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Precision:
    """Return the error of each step of a model in float32, in bfloat16 and in quantization schemes.

    The error of a step is ||y - y64|| / ||y64||, where y64 is its output in float64, from the same weights
    and tokens. `.logits` are the errors of the logits; `.drift` is what float32 adds if the same text is
    computed in a batch, in chunks, through the KV cache or token by token: the first step that differs in any
    bit.

    source: a model without quantization, or any source that `load` takes. text: a text, or the Path of a file
    in UTF-8, whose first `ctx_size` tokens are used; None: random tokens of this seed. schemes: see
    `quantize`. progress: called with the number of finished runs and their total.

    The weights and all values of the run in float64 are in memory. Raises InputError for a model that is
    quantized or has an adapter.
    """
    return analysis.precision(model_of(source), text, schemes, ctx_size, seed, progress)
