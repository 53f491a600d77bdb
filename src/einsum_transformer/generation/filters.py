"""Filters of a distribution: each takes probabilities (v,) and gives those of the tokens that it keeps, which
sum to 1. They are transformers' warpers, and every one keeps the likeliest token."""

from __future__ import annotations

import numpy as np

Array = np.ndarray

_TOP_H_TOKENS = 100


def _kept(p: Array, keep: Array) -> Array:
    p = np.where(keep, p, 0)
    return p / p.sum()


def _entropy_terms(p: Array) -> Array:
    """-p log p, 0 where p is."""
    return -p * np.log(np.where(p > 0, p, 1))


def top_h(p: Array, share: float) -> Array:
    """The likeliest tokens whose entropy adds up to at most this share of that of the 100 likeliest."""
    order = np.argsort(-p, kind="stable")[:_TOP_H_TOKENS]
    likeliest = p[order] / p[order].sum()
    terms = _entropy_terms(likeliest)
    chosen = (np.cumsum(terms) <= terms.sum() * share) & (likeliest > 0)
    chosen[0] = True
    keep = np.zeros(len(p), bool)
    keep[order[chosen]] = True
    return _kept(p, keep)


def top_k(p: Array, count: int) -> Array:
    """The `count` likeliest tokens, and those as likely as the last of them."""
    if count >= len(p):
        return p
    return _kept(p, p >= np.partition(p, -count)[-count])


def top_p(p: Array, mass: float) -> Array:
    """The smallest set of likeliest tokens whose probabilities reach `mass`."""
    tokens = np.flatnonzero(p)  # few, if another filter came before
    order = tokens[np.argsort(p[tokens])]
    tail = np.cumsum(p[order]) <= 1 - mass
    tail[-1] = False
    keep = np.ones(len(p), bool)
    keep[order[tail]] = False
    return _kept(p, keep)


def min_p(p: Array, share: float) -> Array:
    """Tokens with at least this share of the likeliest one's probability."""
    return _kept(p, p >= share * p.max())


def typical(p: Array, mass: float) -> Array:
    """The tokens whose surprise is closest to the entropy, up to a probability of `mass` (Meister et al.,
    2022)."""
    with np.errstate(divide="ignore"):
        distance = np.abs(-np.log(p) - _entropy_terms(p).sum())
    order = np.argsort(distance, kind="stable")
    last = min(int((np.cumsum(p[order]) < mass).sum()), len(p) - 1)
    return _kept(p, distance <= distance[order[last]])


def epsilon(p: Array, least: float) -> Array:
    """Tokens with at least this probability (Hewitt et al., 2022)."""
    return _kept(p, (p >= least) | (p == p.max()))


def eta(p: Array, cutoff: float) -> Array:
    """The same with a bound that falls with the entropy: min(cutoff, sqrt(cutoff) exp(-entropy))."""
    return epsilon(p, min(cutoff, cutoff**0.5 * float(np.exp(-_entropy_terms(p).sum()))))
