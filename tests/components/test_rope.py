"""RoPE at the ends of its range: far positions, long contexts, odd settings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from einsum_transformer.components.rope import ROPE_TYPES, RopeConfig, inverse_frequencies, rotation
from einsum_transformer.errors import ConfigError

FAR = np.array([[0, 1, 4095, 65_537, 131_071, 1_048_575]])
TYPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"factor": 4.0},
    "longrope": {"factor": 4.0, "short_factor": (1.0, 1.1, 1.2, 1.5), "long_factor": (1.0, 3.0, 7.0, 9.0)},
}


def config(kind: str, **settings: Any) -> RopeConfig:
    return RopeConfig(**{"rope_type": kind, "original_max_position_embeddings": 64} | TYPES[kind] | settings)


def test_every_type_is_tried_here() -> None:
    assert set(TYPES) == set(ROPE_TYPES)


@pytest.mark.parametrize("head_dim", [2, 6, 64, 128])
@pytest.mark.parametrize("theta", [1e4, 5e5, 1e6])
def test_far_angles_are_those_of_float64(theta: float, head_dim: int) -> None:
    """Also at position 131,071, where a float32 angle is off by 0.004."""
    turn = rotation(RopeConfig(rope_theta=theta), head_dim, FAR, np.dtype(np.float32))
    for pair in range(head_dim // 2):
        angles = [float(p) * theta ** (-2 * pair / head_dim) for p in FAR[0]]
        np.testing.assert_allclose(turn.cos[0, :, pair], np.cos(angles), rtol=0, atol=1e-6)
        np.testing.assert_allclose(turn.sin[0, :, pair], np.sin(angles), rtol=0, atol=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("kind", TYPES)
def test_scores_depend_on_the_distance_alone(kind: str, interleaved: bool) -> None:
    """q at p + n and k at p have one product for every p, also beyond the context that was trained on."""
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, 1, 3, 8))
    rope, scores = config(kind), []
    for start in (0, 5, 60, 64, 500, 900):
        # The longest position decides the frequencies of `dynamic`, so it is in all of them.
        places = np.array([[start + 7, start, 1000]])
        turn = rotation(replace(rope, interleaved=interleaved), 8, places, np.dtype(np.float64))
        turned_q, turned_k = (turn.forward(np.repeat(a, 3, axis=1)) for a in (q, k))
        scores.append(np.sum(turned_q[0, 0] * turned_k[0, 1], axis=-1))
    np.testing.assert_allclose(scores, np.broadcast_to(scores[0], np.shape(scores)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", TYPES)
def test_a_rotation_keeps_lengths_up_to_its_factor(kind: str) -> None:
    x = np.random.default_rng(1).standard_normal((1, 6, 2, 8))
    turn = rotation(config(kind), 8, FAR, np.dtype(np.float64))
    factor = inverse_frequencies(config(kind), 8)[1]
    assert (factor == 1) == (kind not in ("yarn", "longrope"))
    np.testing.assert_allclose(np.linalg.norm(turn.forward(x), axis=-1), factor * np.linalg.norm(x, axis=-1))


@pytest.mark.parametrize("partial", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("interleaved", [False, True])
def test_dimensions_that_are_not_rotated_pass(partial: float, interleaved: bool) -> None:
    x = np.random.default_rng(2).standard_normal((1, 4, 2, 8))
    rope = RopeConfig(partial_rotary_factor=partial)
    y = rotation(replace(rope, interleaved=interleaved), 8, np.array([[0, 1, 2, 90]]), x.dtype).forward(x)
    rotated = int(8 * partial)
    np.testing.assert_array_equal(y[..., rotated:], x[..., rotated:])
    np.testing.assert_array_equal(y[:, 0], x[:, 0])
    assert (y[:, 1:, :, :rotated] != x[:, 1:, :, :rotated]).all()


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_pair_is_turned_as_a_complex_number(interleaved: bool) -> None:
    """(a + ib) e^(i angle), with pairs (i, i + r/2) or, interleaved, (2i, 2i + 1)."""
    x, places = np.random.default_rng(4).standard_normal((1, 3, 2, 8)), np.array([[0, 1, 5]])
    y = rotation(RopeConfig(rope_theta=100.0, interleaved=interleaved), 8, places, x.dtype).forward(x)
    for pair in range(4):
        a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + 4)
        angles = places[0, :, None] * 100.0 ** (-2 * pair / 8)
        turned = (x[0, ..., a] + 1j * x[0, ..., b]) * np.exp(1j * angles)
        np.testing.assert_allclose(y[0, ..., a], turned.real, atol=1e-14)
        np.testing.assert_allclose(y[0, ..., b], turned.imag, atol=1e-14)


def test_rows_of_a_batch_have_positions_of_their_own() -> None:
    x = np.random.default_rng(3).standard_normal((2, 3, 1, 4))
    places = np.array([[0, 1, 2], [0, 0, 1]])
    both = rotation(RopeConfig(), 4, places, x.dtype).forward(x)
    for row in range(2):
        alone = rotation(RopeConfig(), 4, places[row : row + 1], x.dtype).forward(x[row : row + 1])
        np.testing.assert_array_equal(both[row : row + 1], alone)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("head_dim", [2, 4])
def test_small_heads(kind: str, head_dim: int) -> None:
    """One or two pairs: finite angles, or an error that says what is wrong; and no ZeroDivisionError."""
    try:
        turn = rotation(config(kind), head_dim, FAR, np.dtype(np.float64))
    except ConfigError:
        return
    assert np.isfinite(turn.cos).all()
    assert np.isfinite(turn.sin).all()


NUMBERS = [float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 1e-320, 1e-30, 1e30, 1e308, 1.0, 2.0]
SETTINGS = {
    "default": ["rope_theta", "partial_rotary_factor"],
    "linear": ["factor"],
    "dynamic": ["factor", "rope_theta"],
    "llama3": ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"],
    "yarn": ["factor", "beta_fast", "beta_slow", "attention_factor", "rope_theta"],
}


@pytest.mark.parametrize("value", NUMBERS)
@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, names in SETTINGS.items() for name in names]
)
def test_any_number_gives_finite_angles_or_an_error(kind: str, name: str, value: float) -> None:
    """A setting is refused when the config is made, or its cosines and sines are numbers."""
    number = int(value) if name.startswith("original") and np.isfinite(value) else value
    try:
        rope = config(kind, **{name: number})
        with np.errstate(all="ignore"):
            turn = rotation(rope, 8, FAR, np.dtype(np.float64))
    except ConfigError:
        return
    assert np.isfinite(turn.cos).all()
    assert np.isfinite(turn.sin).all()
