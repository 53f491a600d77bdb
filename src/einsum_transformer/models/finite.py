"""Find the step of a forward pass that first produces nan or inf."""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from einsum_transformer.components.kv_cache import KVCache
from einsum_transformer.engine import Recorder
from einsum_transformer.engine.recorder import tap_at
from einsum_transformer.leaves.watched import Watched, watched
from einsum_transformer.models.decoder import Decoder
from einsum_transformer.tree import named_leaves

Array = np.ndarray

LOGITS = "logits"
_INPUT = " (its input)"


@dataclass(frozen=True, slots=True)
class Origin:
    """The first step of a forward pass that produces nan or inf."""

    place: str
    """Path of the step ("layers.1.mlp.up_proj"); LOGITS: the output head; "": all values are finite."""
    of_input: bool
    """Whether the step is the input of the weight at this path, the output of attention or an activation."""
    nan: bool
    weight: str
    """The path of a weight of this step that contains nan or inf, "" if all are finite."""


def is_finite(array: Array) -> bool:
    """Whether no element is nan or inf, without a temporary array of the same size."""
    return array.size == 0 or bool(np.isfinite(array.min()) and np.isfinite(array.max()))


def origin(
    decoder: Decoder, windows: tuple[int | None, ...], tokens: Array, pads: Array | None = None
) -> Origin:
    """Repeat the pass over tokens (b, t), left-padded by pads (b,); return the first step with nan or inf."""
    found = FirstBad()
    cache = None if pads is None else KVCache(windows, tokens.shape[1], pads)
    with Recorder(spans=False).on_value(found), np.errstate(all="ignore"):
        watched(decoder, _WithInput).forward(tokens, cache)
        place, of_input = found.name.removesuffix(_INPUT), found.name.endswith(_INPUT)
        return Origin(place, of_input, found.nan, _bad_weight(decoder, place, of_input) if place else "")


class FirstBad:
    """A reader of values that stores the name of the first with nan or inf."""

    name: str = ""
    nan: bool = True

    def __call__(self, name: str, value: Array) -> None:
        if not self.name and not is_finite(value):
            self.name, self.nan = name, bool(np.isnan(value).any())


class _WithInput(Watched):
    """Also passes the input to readers: attention or an activation can overflow on finite values."""

    def contract(self, equation: str, operands: tuple[Any, ...], position: int, order: str = "K") -> Array:
        if len(operands) == 2:
            tap_at(f"{self.path}{_INPUT}", operands[1 - position])
        return super().contract(equation, operands, position, order)


def _bad_weight(decoder: Decoder, place: str, of_input: bool) -> str:
    """The path of the first weight of a step that contains nan or inf, or ""."""
    places = ["lm_head", "embed_tokens"] if place == LOGITS else [place, re.sub(r"_proj$", "_bias", place)]
    if of_input:  # the computation of the input may have weights too
        places.append(re.sub(r"[^.]+$", "sinks", place))
    for path, leaf in named_leaves(decoder):
        inside = any(path == each or path.startswith(f"{each}.") for each in places)
        if inside and not is_finite(np.asarray(leaf)):
            return path
    return ""
