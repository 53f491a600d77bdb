"""ModelConfig: everything that decides a model's shapes and arithmetic, with the names of Hugging Face's
configs."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from einsum_transformer.components.rope import RopeConfig
from einsum_transformer.errors import ConfigError

_MOST_LAYERS = 1 << 12
FARTHEST = 1 << 62
_LARGEST = 1 << 24
"""No size of a real model comes near this; a config beyond it is a mistake or an attack."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder's dimensions and switches. Sizes are counts; windows and lengths are in tokens."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    rope: RopeConfig = field(default_factory=RopeConfig)
    sliding_window: int | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    attention_block: int = 128
    """Queries per tile of the attention; changes speed and memory, not results."""
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    defaulted: tuple[str, ...] = field(default=(), compare=False)
    """Keys the source did not have."""
    ignored: tuple[str, ...] = field(default=(), compare=False)
    """Keys of the source that change nothing here."""

    def __post_init__(self) -> None:
        for name in _SIZES:
            _check_count(name, getattr(self, name), _MOST_LAYERS if name == "num_hidden_layers" else _LARGEST)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"config keys disagree: num_attention_heads {self.num_attention_heads} is no multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.sliding_window is not None:
            _check_count("sliding_window", self.sliding_window, 1 << 31)
        for name, most in (("rms_norm_eps", 1), ("initializer_range", 100)):
            if not 0 <= getattr(self, name) <= most:
                raise ConfigError(
                    f"config key {name!r} is {getattr(self, name)}: it must lie from 0 to {most}"
                )
        if self.hidden_act not in ("silu", "swish"):
            raise ConfigError(f"hidden_act {self.hidden_act!r} is not supported; supported: silu")
        rotated = int(self.head_dim * self.rope.partial_rotary_factor)
        if rotated < 2 or rotated % 2:
            raise ConfigError(
                f"head_dim {self.head_dim}: RoPE rotates {rotated} dimensions, an even number >= 2 is needed"
            )
        for name, tokens in (
            ("bos", (self.bos_token_id,)),
            ("eos", self.eos_token_id),
            ("pad", (self.pad_token_id,)),
        ):
            for token in tokens:
                if token is not None and not -1 <= token < _LARGEST:
                    raise ConfigError(f"config key '{name}_token_id' is {token}: no token")

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each letter of the legend that a weight's shape can have."""
        return {
            "v": self.vocab_size,
            "d": self.hidden_size,
            "f": self.intermediate_size,
            "k": self.num_key_value_heads,
            "g": self.num_attention_heads // self.num_key_value_heads,
            "h": self.head_dim,
        }

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The sliding window of each layer, None where a layer sees all."""
        return (self.sliding_window,) * self.num_hidden_layers


def _check_count(name: str, value: Any, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ConfigError(
            f"config key {name!r} is {shown(value)}: it must be a whole number from 1 to {most}"
        )


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "attention_block",
)


def shown(value: Any) -> str:
    """A value for a message: its repr, cut short."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        text = "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."


class Keys:
    """Typed reads from a JSON object that remember what was read, what was missing and what is left over."""

    def __init__(self, raw: Mapping[str, Any], source: str) -> None:
        self.raw, self.source = raw, source
        self.seen: set[str] = set()
        self.defaulted: list[str] = []
        self.unused: list[str] = []
        """Keys of objects inside this one that nobody read, as `rope_scaling.x`."""

    def get(self, name: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
        """The value of `name`; `default` where it is absent or null, an error where there is no default."""
        self.seen.add(name)
        value = self.raw.get(name)
        if value is None:
            if default is ...:
                raise ConfigError(f"{self.source}: key {name!r} is missing")
            self.defaulted.append(name)
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        as_float = float in kinds and isinstance(value, int)
        if not (isinstance(value, kinds) or as_float) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join(each.__name__ for each in kinds)
            raise ConfigError(f"{self.source}: key {name!r} is {shown(value)}, expected {names}")
        if isinstance(value, (int, float)) and not -FARTHEST < value < FARTHEST:
            raise ConfigError(
                f"{self.source}: key {name!r} is {shown(value)}: no such number makes sense here"
            )
        return float(value) if as_float else value

    def left_over(self) -> tuple[str, ...]:
        return (*sorted(set(self.raw) - self.seen), *self.unused)


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: `; did you mean 'x'?`, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
