"""AWQ: scale the columns of a matrix by their activations before it is rounded, and limit large weights.

Columns with large activations matter more for the outputs. Multiplied by s_i > 1 before they are rounded, and
divided by it afterwards, their error is smaller; s_i = r_i^a, where r_i is the root mean square of input i,
and a is the best of a grid. Then each group's range is limited to the share of its maximum that changes the
outputs least.

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", 2023.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from einsum_transformer.engine import einsum
from einsum_transformer.numerics.uniform import Quantized, code_range, dequantize, quantize, short, spread

Array = np.ndarray

EXPONENTS = tuple(i / 20 for i in range(20))
LIMITS = tuple(1 - i / 20 for i in range(11))
"""Shares of a group's maximum to which its range is limited."""


def awq(
    weights: Sequence[Array], hessian: Array, bits: int, group: int | None, symmetric: bool = True
) -> list[Quantized]:
    """Return matrices w (o, i) with the same inputs, rounded to codes of `bits` bits, with the same divisor.

    hessian: H, the sum of x_i x_l over the calibration tokens. With the error e, the outputs change by
    sum e_oi H_il e_ol.
    """
    root = np.sqrt(hessian.diagonal())
    root = np.where(root > 0, root, root[root > 0].min(initial=1))
    h = hessian.astype(np.float32)
    best, divisor = np.inf, np.ones(len(root), np.float32)
    for exponent in EXPONENTS:
        s = root**exponent
        s = (s / np.sqrt(s.max() * s.min())).astype(np.float32)
        change = 0.0
        for w in weights:
            error = dequantize(quantize(w * s, bits, group, symmetric)) / s - w
            change += float(einsum("ol,ol->", einsum("oi,il->ol", error, h), error))
        if change < best:
            best, divisor = change, s
    h /= divisor[:, None] * divisor
    return [_limited(w * divisor, h, bits, group, symmetric, divisor) for w in weights]


def _limited(w: Array, h: Array, bits: int, group: int | None, symmetric: bool, divisor: Array) -> Quantized:
    """Round w (o, i) with the range of each group limited to the best of `LIMITS`.

    The change of the outputs by a group is measured alone: the sum of e_oi H_il e_ol over i and l in
    the group.
    """
    found = quantize(w, bits, group, symmetric)
    if group is None:
        return Quantized(found.codes, found.scales, found.zeros, found.group, divisor)
    lowest, highest = code_range(bits, symmetric)
    width = w.shape[1]
    zeros = 0 if found.zeros is None else spread(found.zeros, found.group, width).astype(np.float32)
    best, share = np.full(found.scales.shape, np.inf), np.ones(found.scales.shape, np.float32)
    for limit in LIMITS:
        scale = spread(found.scales, found.group, width) * np.float32(limit)
        error = (np.clip(np.rint(w / scale) + zeros, lowest, highest) - zeros) * scale - w
        for i, start in enumerate(range(0, width, found.group)):
            columns = slice(start, start + found.group)
            e = error[:, columns]
            change = einsum("ol,ol->o", einsum("oi,il->ol", e, h[columns, columns]), e)
            better = change < best[:, i]
            best[better, i], share[better, i] = change[better], limit
    scales = found.scales * share
    scales = short(scales) if found.scales.dtype == np.float16 else scales
    scale = spread(scales, found.group, width).astype(np.float32)
    codes = np.clip(np.rint(w / scale) + zeros, lowest, highest)
    return Quantized(codes.astype(np.int8), scales, found.zeros, found.group, divisor)
