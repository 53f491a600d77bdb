"""`sensitivity`: how much each part of a model suffers from quantization, and a mixed scheme."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from einsum_transformer.analysis import sensitivity as analysis
from einsum_transformer.analysis.sensitivity import Sensitivity
from einsum_transformer.api.sources import AnySource, model_of, results_path
from einsum_transformer.arguments import checked

SCHEMES = ("W8A16", "W4A16g32", "W4A16g128")


@checked
def sensitivity(
    source: AnySource,
    text: str | Path,
    schemes: Sequence[str] = SCHEMES,
    by: str = "kind",
    budget: int | None = None,
    ctx_size: int = 512,
    chunks: int | None = 4,
    results: str | Path | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Sensitivity:
    """Quantize each part of a model alone, and return how much the predictions of the model change.

    source: a model without quantization, or any source that `load` takes. text: the text, or the Path of a
    file in UTF-8. schemes: see `quantize`; they may differ in the bits, groups and zero points of the weights
    only. by: a part is a "tensor", the matrices of a "layer", or all matrices of a "kind" ("down_proj").
    budget: also propose a mixed scheme whose weights have at most so many bytes, and measure it. Each part
    begins with its smallest scheme; the steps that reduce the sum of the divergences of the parts most per
    byte are taken, as long as the weights fit. `found.mixed.by_name` is the argument `by_name` of `quantize`.
    ctx_size, chunks: as in `divergence`, whose measure this is. results: a file of JSON lines, written after
    each measurement; a second call with the same file continues, also with more schemes, parts or chunks.
    progress: called with the number of measurements that are done and their total.

    The codes of all schemes are in memory at once. Raises InputError for a budget below the smallest schemes,
    and for a file of results of another model or text.
    """
    path, model = results_path(results), model_of(source)
    return analysis.sensitivity(model, text, schemes, by, budget, ctx_size, chunks, path, progress)
