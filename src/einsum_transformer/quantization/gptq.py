"""GPTQ: round the columns of a matrix one by one, each time correcting the columns that are left.

It minimizes the change of the outputs, the sum of e_oi H_il e_ol with e = w - q and H_il = sum_t x_ti x_tl
over the inputs x. If column i of w is rounded, the best correction of the columns l > i that are left is
-e_oi U_il / U_ii, where U is the upper Cholesky factor of the inverse: H^-1 = U^T U.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from einsum_transformer.engine import einsum
from einsum_transformer.numerics.uniform import Quantized, code_range, quantize, short

Array = np.ndarray

DAMPING = 0.01
"""Share of the mean of H's diagonal that is added to the diagonal, so that H has an inverse."""
_BLOCK = 128
"""Columns that are corrected at once in the columns after them."""


def gptq(weight: Array, factor: Array, bits: int, group: int | None, symmetric: bool = True) -> Quantized:
    """Return a matrix w (o, i), rounded to codes of `bits` bits.

    factor: U (i, i), see `inverse_factor`. group: elements per group, None: the whole matrix; the scales of
    a group are those of its columns after the corrections by the columns before it.
    """
    w = np.ascontiguousarray(weight.T, np.float64)  # (i, o): a column of the matrix is contiguous
    width, rows = w.shape
    size = width if group is None else group
    lowest, highest = code_range(bits, symmetric)
    found = quantize(weight, bits, group, symmetric)
    codes, scales = np.empty((width, rows), np.int8), found.scales.copy()
    zeros = None if found.zeros is None else found.zeros.copy()
    for start in range(0, width, _BLOCK):
        stop = min(start + _BLOCK, width)
        errors = np.empty((stop - start, rows))
        for i in range(start, stop):
            if group is not None and i and i % size == 0:
                # Groups are as long as a block or divide it, so the whole group is corrected.
                own = quantize(w[i : i + size].T, bits, size, symmetric)
                if scales.dtype == np.float16:
                    rounded = short(own.scales)
                    scales = scales.astype(rounded.dtype, copy=False)
                    own = replace(own, scales=rounded)
                scales[:, i // size] = own.scales[:, 0]
                if zeros is not None and own.zeros is not None:
                    zeros[:, i // size] = own.zeros[:, 0]
            scale = scales[:, i // size].astype(np.float64)
            zero = 0.0 if zeros is None else zeros[:, i // size].astype(np.float64)
            code = np.clip(np.rint(w[i] / scale) + zero, lowest, highest)
            codes[i] = code
            error = errors[i - start] = (w[i] - (code - zero) * scale) / factor[i, i]
            w[i + 1 : stop] -= einsum("l,o->lo", factor[i, i + 1 : stop], error)
        w[stop:] -= einsum("il,io->lo", factor[start:stop, stop:], errors)
    return Quantized(np.ascontiguousarray(codes.T), scales, zeros, size)


def inverse_factor(hessian: Array) -> Array:
    """Return U (i, i), upper triangular with H^-1 = U^T U, for the damped H (k, k).

    An input that is always 0 does not change an output: its diagonal element is set to 1.
    """
    h = hessian.astype(np.float64)
    diagonal = h.diagonal() + DAMPING * h.diagonal().mean()
    np.fill_diagonal(h, np.where(diagonal == 0, 1, diagonal))
    # With J, which reverses rows and columns: J H J = L L^T, so H = (J L J)(J L J)^T = R R^T with R upper
    # triangular, and H^-1 = R^-T R^-1: U = R^-1.
    upper = np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    return np.linalg.inv(upper)
