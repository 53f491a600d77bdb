"""Rotary position embedding (Su et al., 2021): the angle of pair i at position p is p * inv_freq[i].

Angles are computed in float64 and only their cosines and sines are cast, so position 131,071 is as accurate
as position 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

from einsum_transformer.choices import check_choices
from einsum_transformer.errors import ConfigError
from einsum_transformer.numerics.rotation import rotate

Array = np.ndarray

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]
ROPE_TYPES: tuple[RopeType, ...] = get_args(RopeType)


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Settings of RoPE, named as in Hugging Face's `rope_parameters`.

    factor: ratio of the extended context to the trained context, `original_max_position_embeddings` tokens.
    """

    rope_theta: float = 10000.0
    rope_type: RopeType = "default"
    partial_rotary_factor: float = 1.0
    factor: float = 1.0
    original_max_position_embeddings: int = 2048
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    """Factor of cosines and sines; None: computed from the other settings as defined by the rope_type."""
    mscale: float | None = None
    mscale_all_dim: float | None = None
    short_factor: tuple[float, ...] = ()
    """longrope: divisor of each pair's frequency for sequences up to the trained length."""
    long_factor: tuple[float, ...] = ()
    """longrope: divisor of each pair's frequency for longer sequences."""
    interleaved: bool = False
    """Whether pairs are dimensions (2i, 2i + 1) instead of (i, i + r/2)."""
    frequency_factors: tuple[float, ...] | None = None
    """Divisor of each pair's frequency, from the tensor rope_freqs of a GGUF file."""

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("frequency_factors", "short_factor", "long_factor"):
            if any(not (math.isfinite(factor) and factor > 0) for factor in getattr(self, name) or ()):
                shown = "rope_freqs" if name == "frequency_factors" else f"rope {name}"
                raise ConfigError(f"{shown} contains a factor that is not a positive number")
        for name in _POSITIVE:
            value = getattr(self, name)
            # No model comes near these bounds; they keep every formula below in the range of float64.
            if value is not None and not 1e-9 <= value <= 1e12:
                raise ConfigError(f"rope {name} is {value}: expected a number from 1e-9 to 1e12")
        if not 0 < self.partial_rotary_factor <= 1:
            raise ConfigError(
                f"rope partial_rotary_factor is {self.partial_rotary_factor}: expected a number in (0, 1]"
            )
        if self.rope_type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ConfigError(
                f"rope low_freq_factor {self.low_freq_factor} must be less than high_freq_factor"
            )
        if self.rope_type == "longrope" and self.original_max_position_embeddings < 2:
            raise ConfigError("rope original_max_position_embeddings is 1: longrope needs at least 2")
        if self.rope_type == "yarn" and self.rope_theta <= 1:
            raise ConfigError(f"rope rope_theta is {self.rope_theta}: yarn needs a value above 1")


_POSITIVE = (
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
)


@dataclass(frozen=True, slots=True)
class Rotation:
    """The RoPE angles of a forward pass: cos (b, t, r/2), signed_sin (b, t, 2, r/2) = (-sin, sin); see
    `rotate`."""

    cos: Array
    signed_sin: Array
    interleaved: bool = False
    _views: dict[int, tuple[Array, Array]] = field(default_factory=dict, repr=False, compare=False)
    """Number of head axes -> (cos, signed_sin) with as many axes of size 1 for them."""

    @property
    def sin(self) -> Array:
        return self.signed_sin[..., 1, :]

    def forward(self, x: Array) -> Array:
        """x: (b, t, heads..., h) -> the same shape, with each pair rotated by the angle of its position."""
        cos, sin = self._over_heads(x.ndim - 3)
        return rotate(x, cos, sin, self.interleaved)

    def backward(self, dy: Array) -> Array:
        # The transpose of a rotation is the rotation by the negative angle.
        cos, sin = self._over_heads(dy.ndim - 3)
        return rotate(dy, cos, -sin, self.interleaved)

    def with_tables(self, cos: Array, signed_sin: Array) -> Rotation:
        """The rotation with other tables."""
        return Rotation(cos, signed_sin, self.interleaved)

    def _over_heads(self, heads: int) -> tuple[Array, Array]:
        views = self._views.get(heads)
        if views is None:
            index = (slice(None), slice(None), *(None,) * heads)
            views = self._views[heads] = self.cos[index], self.signed_sin[index]
        return views


def inverse_frequencies(rope: RopeConfig, head_dim: int, length: int = 0) -> tuple[Array, float]:
    """Return inv_freq, float64 (r/2,), and the factor of cos and sin; r = head_dim * partial_rotary_factor.

    default: theta^(-2i/r); the other types modify it as in their papers and in Hugging Face's implementation.
    length: the largest position of the pass + 1; used by `dynamic` and `longrope`.
    """
    r = int(head_dim * rope.partial_rotary_factor)
    if r < 2 or r % 2:
        raise ConfigError(f"rope rotates {r} of {head_dim} head dimensions: expected an even number >= 2")
    exponent = np.arange(0, r, 2, dtype=np.float64) / r
    inv_freq = rope.rope_theta**-exponent
    if rope.frequency_factors is not None:
        if len(rope.frequency_factors) != r // 2:
            raise ConfigError(
                f"rope_freqs contains {len(rope.frequency_factors)} factors, but {r // 2} pairs are rotated"
            )
        inv_freq /= np.asarray(rope.frequency_factors)
    if rope.rope_type == "longrope":
        factors = rope.long_factor if length > rope.original_max_position_embeddings else rope.short_factor
        if len(factors) != r // 2:
            raise ConfigError(f"longrope has {len(factors)} factors, but {r // 2} pairs are rotated")
        return inv_freq / np.asarray(factors), _longrope_attention_factor(rope)
    attention = 1.0 if rope.attention_factor is None else rope.attention_factor
    if rope.rope_type == "linear":
        return inv_freq / rope.factor, attention
    if rope.rope_type == "dynamic":
        if r == 2:
            raise ConfigError("rope_type 'dynamic' needs more than 2 rotated head dimensions")
        trained = rope.original_max_position_embeddings
        stretch = rope.factor * max(length, trained) / trained - (rope.factor - 1)
        return (rope.rope_theta * stretch ** (r / (r - 2))) ** -exponent, attention
    if rope.rope_type == "llama3":
        return _llama3(rope, inv_freq), attention
    if rope.rope_type == "yarn":
        return _yarn(rope, inv_freq, r), _yarn_attention_factor(rope)
    return inv_freq, attention


def _llama3(rope: RopeConfig, inv_freq: Array) -> Array:
    """Divide low frequencies by factor, keep high ones unchanged, interpolate between (Llama 3.1)."""
    wavelength = 2 * math.pi / inv_freq
    rotations = rope.original_max_position_embeddings / wavelength
    unscaled = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    unscaled = np.clip(unscaled, 0, 1)
    return (1 - unscaled) * inv_freq / rope.factor + unscaled * inv_freq


def _yarn(rope: RopeConfig, inv_freq: Array, r: int) -> Array:
    """Keep frequencies with more than beta_fast rotations in the trained context unchanged, divide those with
    fewer than beta_slow by factor, interpolate between."""

    def pair_with(rotations: float) -> float:
        trained = rope.original_max_position_embeddings
        return r * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, r - 1)
    high = high + 0.001 if low == high else high
    interpolated = np.clip((np.arange(r // 2) - low) / (high - low), 0, 1)
    return interpolated * inv_freq / rope.factor + (1 - interpolated) * inv_freq


def _yarn_attention_factor(rope: RopeConfig) -> float:
    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


def _longrope_attention_factor(rope: RopeConfig) -> float:
    """sqrt(1 + ln(factor) / ln(trained length)) (Ding et al., 2024)."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.factor <= 1:
        return 1.0
    return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_position_embeddings))


def rotation(
    rope: RopeConfig, head_dim: int, positions: Array, dtype: np.dtype, least: int | Array = 0
) -> Rotation:
    """The Rotation of tokens at `positions` (b, t). least: minimum sequence length of each row."""
    # Lengths are per row, so that a row does not depend on the rest of the batch.
    by_length = rope.rope_type in ("dynamic", "longrope")
    lengths = np.maximum(positions.max(axis=1) + 1, least) if by_length else [0]
    tables = [inverse_frequencies(rope, head_dim, int(length)) for length in lengths]
    inv_freq, factor = np.stack([table for table, _ in tables], axis=1), tables[0][1]
    # Built pair-major, so that positions are innermost in memory, as in all activations.
    angles = inv_freq[:, :, None] * positions[None].astype(np.float64)
    cos, sin = np.cos(angles) * factor, np.sin(angles) * factor
    pair_major = cos.astype(dtype), np.stack([-sin, sin]).astype(dtype)
    return Rotation(
        np.moveaxis(pair_major[0], 0, -1), np.moveaxis(pair_major[1], (0, 1), (-2, -1)), rope.interleaved
    )
