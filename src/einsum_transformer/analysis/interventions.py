"""The effect of replaced values on a logit: heads without their output, and values of one prompt in another.

All heads of a layer, or all positions, are rows of one batch, so that a layer needs one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from einsum_transformer.analysis.capture import capture, ids_of, rows_of, texts_of
from einsum_transformer.analysis.plots import plot_maps
from einsum_transformer.arguments import checked
from einsum_transformer.displays import as_html, heat_map
from einsum_transformer.engine import Recorder, blas
from einsum_transformer.errors import InputError
from einsum_transformer.models.model import Model
from einsum_transformer.tables import as_text, columns

Array = np.ndarray
Place = Literal["resid_pre", "attn_out", "mlp_out"]
Progress = Callable[[int, int], object]
"""Called with the number of layers that are done, and of all."""

_ROWS = 32
"""Rows of a batch."""


@checked
@dataclass(frozen=True, slots=True)
class Effects:
    """The change of a logit, or of the difference of two, by replacing a value."""

    model: str
    token: tuple[int, ...]
    value: str
    """What is replaced: "z" of each head, or the value of each layer and position."""
    columns: tuple[str, ...]
    """The heads, or the texts of the positions."""
    layers: tuple[int, ...]
    plain: float
    """The logit without a replacement."""
    target: float | None
    """The logit of the other prompt, where its values are taken from."""
    effects: Array
    """(layers, columns): logit with the replacement - `plain`."""

    @property
    def recovered(self) -> Array | None:
        """The effects as shares of `target` - `plain`: 1 if the replacement restores the other logit. None
        without another prompt, and if its logit is the same."""
        if self.target is None or self.target == self.plain:
            return None
        return self.effects / (self.target - self.plain)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields in JSON types."""
        found = asdict(self) | {"effects": self.effects.tolist()}
        shares = self.recovered
        return found | {"recovered": None if shares is None else shares.tolist()}

    def tables(self) -> Iterator[str]:
        """Yield one line per layer."""
        rows = [[self.value, *self.columns]]
        for i, layer in enumerate(self.layers):
            rows.append([f"layer {layer}", *(f"{value:+.2f}" for value in self.effects[i])])
        yield "\n".join(columns(rows, range(1, len(self.columns) + 1)))
        other = "" if self.target is None else f", of the other prompt {self.target:.3f}"
        yield f"change of the logit; without replacement {self.plain:.3f}{other}"

    def plot(self, path: str | Path) -> None:
        """Plot the effects by layer and column to a PNG file (needs matplotlib)."""
        rows, title = [f"layer {layer}" for layer in self.layers], f"change of the logit by {self.value}"
        plot_maps(path, {title: self.effects}, rows, self.columns, signed=True)

    def __str__(self) -> str:
        return as_text(*self.tables())

    def _repr_html_(self) -> str:
        rows, title = [f"layer {layer}" for layer in self.layers], f"change of the logit by {self.value}"
        return as_html(heat_map(self.effects, rows, self.columns, title), *self.tables())


def ablate_heads(
    model: Model,
    prompt: Any,
    token: Any = None,
    layers: Sequence[int] | None = None,
    progress: Progress = lambda done, total: None,
) -> Effects:
    """See `api.look_inside.ablate_heads`."""
    tokens = _one_row(model, prompt)
    chosen = _layers(model, layers)
    plain = capture(model, tokens, ()).logits[0]
    ids = ids_of(model, token, plain)
    before = float(_metric(plain[None], ids)[0])
    heads = model.config.num_attention_heads
    effects = np.zeros((len(chosen), heads))
    for n, layer in enumerate(chosen):
        progress(n, len(chosen))
        for first in range(0, heads, _ROWS):
            rows = range(first, min(first + _ROWS, heads))

            def without(name: str, z: Array, first: int = first) -> Array:
                z = np.array(z)
                flat = z.reshape(*z.shape[:2], -1, z.shape[-1])
                for row in range(len(z)):
                    flat[row, :, first + row] = 0
                return flat.reshape(z.shape)

            copies = np.repeat(tokens, len(rows), axis=0)
            logits = _last(model, copies, without, f"layers.{layer}.self_attn.z")
            effects[n, first : rows.stop] = _metric(logits, ids) - before
    progress(len(chosen), len(chosen))
    names = tuple(f"head {h}" for h in range(heads))
    return Effects(model.source, ids, "z = 0", names, chosen, before, None, effects)


def patch_positions(
    model: Model,
    prompt: Any,
    other: Any,
    token: Any = None,
    value: Place = "resid_pre",
    layers: Sequence[int] | None = None,
    progress: Progress = lambda done, total: None,
) -> Effects:
    """See `api.look_inside.patch_positions`."""
    tokens, sources = _pair(model, prompt, other)
    chosen = _layers(model, layers)
    names = [f"layers.{i}.{value}" for i in chosen]
    given = capture(model, sources, names)
    plain = capture(model, tokens, ()).logits[0]
    ids = ids_of(model, token, given.logits[0])
    count = tokens.shape[1]
    effects = np.zeros((len(chosen), count))
    for n, name in enumerate(names):
        progress(n, len(chosen))
        for first in range(0, count, _ROWS):
            stop = min(first + _ROWS, count)

            def patched(_: str, x: Array, first: int = first, name: str = name) -> Array:
                x = np.array(x)
                for row in range(len(x)):
                    x[row, first + row] = given[name][0, first + row]
                return x

            logits = _last(model, np.repeat(tokens, stop - first, axis=0), patched, name)
            effects[n, first:stop] = _metric(logits, ids) - _metric(plain[None], ids)[0]
    progress(len(chosen), len(chosen))
    return _effects(model, tokens, ids, value, chosen, plain, given.logits[0], effects)


def attribute_positions(
    model: Model,
    prompt: Any,
    other: Any,
    token: Any = None,
    value: Place = "resid_pre",
    layers: Sequence[int] | None = None,
) -> Effects:
    """See `api.look_inside.attribute_positions`."""
    tokens, sources = _pair(model, prompt, other)
    chosen = _layers(model, layers)
    names = [f"layers.{i}.{value}" for i in chosen]
    given = capture(model, sources, names)
    ids = ids_of(model, token, given.logits[0])
    own = capture(model, tokens, names, gradient_of=ids)
    effects = np.stack(
        [
            ((given[name] - own[name]) * own.gradients[name]).sum(axis=-1)[0].astype(np.float64)
            for name in names
        ]
    )
    return _effects(model, tokens, ids, value, chosen, own.logits[0], given.logits[0], effects)


def _effects(
    model: Model,
    tokens: Array,
    ids: tuple[int, ...],
    value: str,
    chosen: tuple[int, ...],
    plain: Array,
    other: Array,
    effects: Array,
) -> Effects:
    texts = texts_of(model, tokens)
    names = texts[0] if texts else tuple(map(str, tokens[0].tolist()))
    logits = float(_metric(plain[None], ids)[0]), float(_metric(other[None], ids)[0])
    return Effects(model.source, ids, value, names, chosen, *logits, effects)


def _last(model: Model, tokens: Array, reader: Callable[[str, Array], Array], name: str) -> Array:
    """The logits (b, v) after the last token, with a value replaced."""
    with blas.fixed_threads(), Recorder(spans=False).on_value(reader, name):
        logits, _ = model.decoder.forward(tokens, None, "last")
    return logits[:, -1]


def _metric(logits: Array, ids: tuple[int, ...]) -> Array:
    """The logit (b,) of a token, or the difference of those of two."""
    first = logits[:, ids[0]].astype(np.float64)
    return first - logits[:, ids[1]] if len(ids) > 1 else first


def _one_row(model: Model, prompt: Any, name: str = "prompt") -> Array:
    tokens = rows_of(model, prompt, name)
    if len(tokens) > 1:
        raise InputError(f"`{name}` has {len(tokens)} rows: expected one")
    return tokens


def _pair(model: Model, prompt: Any, other: Any) -> tuple[Array, Array]:
    tokens, sources = _one_row(model, prompt), _one_row(model, other, "other")
    if tokens.shape != sources.shape:
        counts = tokens.shape[1], sources.shape[1]
        raise InputError(
            f"`prompt` has {counts[0]} tokens and `other` {counts[1]}: expected equal lengths, so that "
            "positions correspond"
        )
    return tokens, sources


def _layers(model: Model, given: Sequence[int] | None) -> tuple[int, ...]:
    count = len(model.decoder.layers)
    if given is None:
        return tuple(range(count))
    if wrong := [layer for layer in given if not 0 <= layer < count]:
        raise InputError(f"`layers` contains {wrong[0]}, but the model has layers 0 to {count - 1}")
    return tuple(given)
