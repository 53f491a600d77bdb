"""Sampling draws from exactly the distribution that temperature, top-k, top-p, min-p and the penalty
describe."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from einsum_transformer.errors import InputError
from einsum_transformer.generation.keys import merged
from einsum_transformer.generation.sampling import Sampling

Array = np.ndarray
LOGITS = np.array([2.0, 1.0, 0.5, 0.0, -1.0, -3.0], np.float32)
# Chi-square exceeds this in one of 100,000 runs, by degrees of freedom.
CRITICAL = {1: 19.5, 2: 23.0, 3: 25.9, 4: 28.5, 5: 30.9}


def expected(
    logits: Array,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    history: tuple[int, ...] = (),
) -> Array:
    """The distribution, token by token, in Python."""
    scores = [float(x) for x in logits]
    for token in set(history):
        scores[token] *= repetition_penalty if scores[token] < 0 else 1 / repetition_penalty
    weights = [np.exp((score - max(scores)) / temperature) for score in scores]
    order = sorted(range(len(scores)), key=lambda token: -scores[token])
    kept = order[: top_k or len(order)]
    p = {token: weights[token] / sum(weights[other] for other in kept) for token in kept}
    nucleus, reached = [], 0.0
    for token in kept:
        if reached < top_p or not nucleus:
            nucleus.append(token)
        reached += p[token]
    kept = [token for token in nucleus if p[token] >= min_p * p[order[0]]]
    total = sum(p[token] for token in kept)
    return np.array([p[token] / total if token in kept else 0.0 for token in range(len(scores))])


def chi_square(counts: Array, probabilities: Array) -> float:
    """Infinite if a token of probability 0 was drawn."""
    live = probabilities > 0
    if counts[~live].any():
        return float("inf")
    wanted = probabilities[live] * counts.sum()
    return float(((counts[live] - wanted) ** 2 / wanted).sum())


def draw(sampling: Sampling, count: int, history: tuple[int, ...] = (), seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    tokens = [sampling.sampler(history).choose(LOGITS, history, rng) for _ in range(count)]
    return np.bincount(tokens, minlength=len(LOGITS))


CASES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 3},
    {"top_k": 6},
    {"top_k": 100},
    {"top_p": 0.7},
    {"top_p": 0.95},
    {"top_p": 1e-9},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"repetition_penalty": 2.0, "history": (0, 4, 4)},
    {"repetition_penalty": 0.5, "history": (1, 5)},
    {
        "temperature": 2.0,
        "top_k": 5,
        "top_p": 0.9,
        "min_p": 0.15,
        "repetition_penalty": 1.3,
        "history": (0, 2),
    },
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_draws(case: dict[str, Any]) -> None:
    probabilities = expected(LOGITS, **case)
    options: dict[str, Any] = {"temperature": 1.0} | {
        key: value for key, value in case.items() if key != "history"
    }
    sampling = Sampling(**options)
    history = case.get("history", ())
    np.testing.assert_allclose(
        sampling.sampler(history).probabilities(LOGITS, history), probabilities, rtol=0, atol=1e-6
    )
    counts = draw(sampling, 5000, history)
    freedom = int((probabilities > 0).sum()) - 1
    assert chi_square(counts, probabilities) <= CRITICAL.get(freedom, 0.0)


def test_the_chi_square_test_can_fail() -> None:
    """A temperature that is off by a tenth, or one token too many, is seen."""
    counts = draw(Sampling(temperature=1.0), 5000)
    assert chi_square(counts, expected(LOGITS, temperature=1.1)) > CRITICAL[5]
    assert chi_square(counts, expected(LOGITS, top_k=5)) > CRITICAL[4]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    logits=st.lists(st.integers(-80, 80), min_size=1, max_size=30, unique=True),
    temperature=st.floats(0.05, 20),
    top_k=st.integers(0, 40),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
    penalty=st.floats(0.5, 2),
)
def test_any_distribution(
    logits: list[int], temperature: float, top_k: int, top_p: float, min_p: float, penalty: float
) -> None:
    """Sums to 1, keeps the best token, and where no threshold is near, equals the plain computation."""
    scores = np.array(logits, np.float64) / 8
    got = Sampling(temperature, top_k, top_p, min_p, penalty).sampler([0]).probabilities(scores, [0])
    assert got.sum() == pytest.approx(1)
    assert (got >= 0).all()
    slightly = [(top_p * (1 + e), min_p * (1 + e)) for e in (-1e-9, 1e-9)]
    first, second = (expected(scores, temperature, top_k, min(p, 1), m, penalty, (0,)) for p, m in slightly)
    if np.array_equal(first > 0, second > 0):
        np.testing.assert_allclose(got, first, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("temperature", [1e-3, 1e-8, 1e-30, 1e-38, 1e-40, 1e-45, 1e-60, 1e-300])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_tiny_temperature_is_greedy(temperature: float, dtype: type) -> None:
    """Not an overflow: the limit of the softmax is the best token."""
    sampler = Sampling(temperature=temperature).sampler()
    logits = LOGITS.astype(dtype)
    assert sampler.probabilities(logits, ())[0] == 1
    assert {sampler.choose(logits, (), np.random.default_rng(seed)) for seed in range(5)} == {0}


@pytest.mark.parametrize("penalty", [1e-40, 1e-3, 1e3, 1e40, 1e300])
def test_an_extreme_penalty_gives_a_distribution(penalty: float) -> None:
    sampling = Sampling(temperature=1.0, repetition_penalty=penalty)
    p = sampling.sampler([0, 4]).probabilities(LOGITS, [0, 4])
    assert np.isfinite(p).all()
    assert p.sum() == pytest.approx(1)


def test_greedy_takes_the_first_of_equals_after_the_penalty() -> None:
    rng = np.random.default_rng(0)
    assert Sampling().sampler().choose(np.array([1.0, 3.0, 3.0]), (), rng) == 1
    penalized = Sampling(repetition_penalty=2.0)
    assert penalized.sampler([1]).choose(np.array([1.0, 3.0, 2.9]), [1], rng) == 2
    assert penalized.sampler([0, 0]).choose(np.array([-1.0, -1.5]), [0, 0], rng) == 1


def test_choosing_changes_no_logits() -> None:
    logits = LOGITS.copy()
    Sampling(0.7, 3, 0.9, 0.1, 1.5).sampler([0, 1]).choose(logits, [0, 1], np.random.default_rng(0))
    np.testing.assert_array_equal(logits, LOGITS)


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    """Not even where the random number is the smallest or the largest there is."""

    class Fixed:
        def __init__(self, value: float) -> None:
            self.value = value

        def random(self) -> float:
            return self.value

    scores = np.array([-np.inf, 0.0, -np.inf, 0.0, -np.inf], np.float32)
    sampler = Sampling(temperature=1.0).sampler()
    for value in (0.0, np.nextafter(1.0, 0.0)):
        assert sampler.choose(scores, (), Fixed(value)) in (1, 3)  # type: ignore[arg-type]


WRONG = {
    "temperature": [-1, -1e-9, float("nan"), float("inf")],
    "top_k": [-1, float("nan"), 2.5],
    "top_p": [-0.1, 1.1, float("nan")],
    "min_p": [-0.1, 1.1, float("nan")],
    "repetition_penalty": [0, -1, float("nan"), float("inf")],
}
MISTYPED = {
    "temperature": ["hot", [1], True],
    "top_k": ["x", [1], True],
    "top_p": ["x", {"a": 1}],
    "min_p": ["x", [0.1]],
    "repetition_penalty": ["x", [1]],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG.items() for value in values]
)
def test_numbers_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=name) as caught:
        Sampling(**{"temperature": 1.0, name: value})
    assert "\n" not in str(caught.value)


def said(settings: dict[str, Any] | None, **given: Any) -> Sampling:
    """What generation_config.json says, and what is given instead."""
    return Sampling.of(merged(settings, given))


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in MISTYPED.items() for value in values]
)
def test_wrong_types_in_generation_config(name: str, value: Any) -> None:
    """The file comes from outside, so its values may be of any type."""
    with pytest.raises(InputError, match=name) as caught:
        said({"do_sample": True, name: value})
    assert "\n" not in str(caught.value)


def test_what_generation_config_says() -> None:
    stated = {
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
    }
    assert said(stated) == Sampling(0.6, 20, 0.9, 0.1, 1.2)
    assert said(stated, temperature=0.0, top_k=0) == Sampling(0.0, 0, 0.9, 0.1, 1.2)
    assert said(stated | {"do_sample": False}).temperature == 0
    assert said({"do_sample": True}).temperature == 1
    assert said({"temperature": 0.6}).temperature == 0
    assert said(None) == said({}) == Sampling()
