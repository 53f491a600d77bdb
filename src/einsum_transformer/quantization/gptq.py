"""GPTQ: round the columns of a matrix one by one, each time correcting the columns that are left.

It minimizes the change of the outputs, sum_n e_n H e_n^T with e = w - q and H = sum_m x_m^T x_m of the
inputs x. If column k of w is rounded, the best correction of the columns l > k that are left is
-e_k U[k, l] / U[k, k], where U is the upper Cholesky factor of the inverse: H^-1 = U^T U.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022.
"""

from __future__ import annotations

import numpy as np

from einsum_transformer.engine import einsum
from einsum_transformer.numerics.uniform import Quantized, code_range, quantize

Array = np.ndarray

DAMPING = 0.01
"""Share of the mean of H's diagonal that is added to the diagonal, so that H has an inverse."""
_BLOCK = 128
"""Columns that are corrected at once in the columns after them."""


def gptq(weight: Array, factor: Array, bits: int, group: int | None, symmetric: bool = True) -> Quantized:
    """Return a matrix w (n, k), rounded to codes of `bits` bits.

    factor: U (k, k), see `inverse_factor`. group: elements per group, None: the whole matrix; the scales of
    a group are those of its columns after the corrections by the columns before it.
    """
    w = np.ascontiguousarray(weight.T, np.float64)  # (k, n): a column of the matrix is contiguous
    width, n = w.shape
    size = width if group is None else group
    lowest, highest = code_range(bits, symmetric)
    found = quantize(weight, bits, group, symmetric)
    codes, scales = np.empty((width, n), np.int8), found.scales.copy()
    zeros = None if found.zeros is None else found.zeros.copy()
    for start in range(0, width, _BLOCK):
        stop = min(start + _BLOCK, width)
        errors = np.empty((stop - start, n))
        for k in range(start, stop):
            if group is not None and k and k % size == 0:
                # Groups are as long as a block or divide it, so the whole group is corrected.
                own = quantize(w[k : k + size].T, bits, size, symmetric)
                scales[:, k // size] = own.scales[:, 0]
                if zeros is not None and own.zeros is not None:
                    zeros[:, k // size] = own.zeros[:, 0]
            scale = scales[:, k // size].astype(np.float64)
            zero = 0.0 if zeros is None else zeros[:, k // size].astype(np.float64)
            code = np.clip(np.rint(w[k] / scale) + zero, lowest, highest)
            codes[k] = code
            error = errors[k - start] = (w[k] - (code - zero) * scale) / factor[k, k]
            w[k + 1 : stop] -= einsum("l,n->ln", factor[k, k + 1 : stop], error)
        w[stop:] -= einsum("kl,kn->ln", factor[start:stop, stop:], errors)
    return Quantized(np.ascontiguousarray(codes.T), scales, zeros, size)


def inverse_factor(hessian: Array) -> Array:
    """Return U (k, k), upper triangular with H^-1 = U^T U, for the damped H (k, k).

    An input that is always 0 does not change an output: its diagonal element is set to 1.
    """
    h = hessian.astype(np.float64)
    i = np.arange(len(h))
    h[i, i] += DAMPING * h.diagonal().mean()
    h[i, i] = np.where(h.diagonal() == 0, 1, h.diagonal())
    # With J, which reverses rows and columns: J H J = L L^T, so H = (J L J)(J L J)^T = R R^T with R upper
    # triangular, and H^-1 = R^-T R^-1: U = R^-1.
    upper = np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    return np.linalg.inv(upper)
