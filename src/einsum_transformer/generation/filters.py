"""Filters of a distribution (transformers' logits warpers): each sets some of the probabilities (v,) to 0 and
renormalizes the others. Every filter keeps the most probable token."""

from __future__ import annotations

import numpy as np

Array = np.ndarray

_TOP_H_TOKENS = 100


def _renormalized(p: Array, keep: Array) -> Array:
    p = np.where(keep, p, 0)
    return p / p.sum()


def _entropy_terms(p: Array) -> Array:
    """Return -p log p, with 0 for p = 0."""
    return -p * np.log(np.where(p > 0, p, 1))


def top_h(p: Array, share: float) -> Array:
    """Keep the most probable tokens whose entropy terms sum to at most this share of the entropy of the 100
    most probable tokens."""
    order = np.argsort(-p, kind="stable")[:_TOP_H_TOKENS]
    top = p[order] / p[order].sum()
    terms = _entropy_terms(top)
    chosen = (np.cumsum(terms) <= terms.sum() * share) & (top > 0)
    chosen[0] = True
    keep = np.zeros(len(p), bool)
    keep[order[chosen]] = True
    return _renormalized(p, keep)


def top_k(p: Array, count: int) -> Array:
    """Keep the `count` most probable tokens, and tokens that tie with the last of them."""
    if count >= len(p):
        return p
    return _renormalized(p, p >= np.partition(p, -count)[-count])


def top_p(p: Array, mass: float) -> Array:
    """Keep the smallest set of most probable tokens whose probabilities sum to at least `mass`."""
    tokens = np.flatnonzero(p)  # few after another filter
    order = tokens[np.argsort(p[tokens])]
    tail = np.cumsum(p[order]) <= 1 - mass
    tail[-1] = False
    keep = np.ones(len(p), bool)
    keep[order[tail]] = False
    return _renormalized(p, keep)


def min_p(p: Array, share: float) -> Array:
    """Keep tokens with at least this share of the largest probability."""
    return _renormalized(p, p >= share * p.max())


def typical(p: Array, mass: float) -> Array:
    """Keep the tokens whose surprisal is closest to the entropy, up to a total probability of `mass` (Meister
    et al., 2022)."""
    with np.errstate(divide="ignore"):
        distance = np.abs(-np.log(p) - _entropy_terms(p).sum())
    order = np.argsort(distance, kind="stable")
    last = min(int((np.cumsum(p[order]) < mass).sum()), len(p) - 1)
    return _renormalized(p, distance <= distance[order[last]])


def epsilon(p: Array, least: float) -> Array:
    """Keep tokens with at least this probability (Hewitt et al., 2022)."""
    return _renormalized(p, (p >= least) | (p == p.max()))


def eta(p: Array, cutoff: float) -> Array:
    """Keep tokens with a probability of at least min(cutoff, sqrt(cutoff) exp(-entropy))."""
    return epsilon(p, min(cutoff, cutoff**0.5 * float(np.exp(-_entropy_terms(p).sum()))))
