"""Read and replace the values of a pass through a model, and the gradients by them."""

from __future__ import annotations

import numbers
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from einsum_transformer.analysis.values import Letters, Value, Values, as_array
from einsum_transformer.arguments import checked
from einsum_transformer.displays import Markup, as_html, heat_map
from einsum_transformer.engine import Recorder, blas
from einsum_transformer.errors import InputError
from einsum_transformer.generation.decode import prompts_of
from einsum_transformer.leaves.frozen import Frozen
from einsum_transformer.leaves.watched import watched
from einsum_transformer.models.model import Model
from einsum_transformer.tables import as_text, columns
from einsum_transformer.tree import map_named

Array = np.ndarray
Replacement = Any
"""An array, a number, or a function of the array that returns one of these."""
Scalar = Any
"""A scalar of the logits: see `capture`."""
_PICTURES = 4
"""Values that a notebook draws."""


@checked
@dataclass(frozen=True, slots=True)
class Capture:
    """The values of a pass by name. `capture[name]` accepts any name of a value; `str()` is a table."""

    model: str
    """The source of the model."""
    tokens: Array
    """(b, t)"""
    logits: Array
    """(b, v): the logits of the token after the last one."""
    values: dict[str, Array]
    """Name as requested -> array."""
    letters: dict[str, Letters]
    """Name -> the letter of each axis."""
    gradients: dict[str, Array] = field(default_factory=dict[str, Array])
    """Name -> gradient of the scalar `gradient_of` by the value; without values that are computed from
    others, and without products of fused matrices."""
    scalar: float | None = None
    """The value of `gradient_of`, if it is a logit or a difference of logits."""
    token_texts: tuple[tuple[str, ...], ...] = ()
    """The text of each token; empty for a model without tokenizer."""
    steps: tuple[Capture, ...] = ()
    """With `max_new_tokens`: one capture per generated token, of the pass over it."""

    def __getitem__(self, name: str) -> Array:
        if name not in self.values:
            captured = ", ".join(list(self.values)[:4]) or "nothing"
            raise InputError(f"{name!r} was not captured, only {captured}")
        return self.values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def __len__(self) -> int:
        return len(self.values)

    def to_dict(self) -> dict[str, Any]:
        """Return shapes, letters, and mean and largest magnitude of each value, in JSON types."""
        return {
            "model": self.model,
            "tokens": self.tokens.tolist(),
            "token_texts": [list(row) for row in self.token_texts],
            "scalar": self.scalar,
            "values": {name: self._summary(name) for name in self.values},
            "steps": [step.to_dict() for step in self.steps],
        }

    def _summary(self, name: str) -> dict[str, Any]:
        array = self.values[name]
        finite = array[np.isfinite(array)]
        found: dict[str, Any] = {
            "letters": list(self.letters[name]),
            "shape": list(array.shape),
            "dtype": str(array.dtype),
            "mean": float(finite.mean()) if finite.size else None,
            "largest": float(np.abs(finite).max()) if finite.size else None,
        }
        if name in self.gradients:
            found["gradient_norm"] = float(np.linalg.norm(self.gradients[name]))
        return found

    def tables(self) -> Iterator[str]:
        """Yield the values as a table of text."""
        rows = [["value", "axes", "shape", "mean", "largest", *(["gradient"] if self.gradients else [])]]
        for name in self.values:
            found = self._summary(name)
            numbers = ["" if found[key] is None else f"{found[key]:.4g}" for key in ("mean", "largest")]
            norm = f"{found['gradient_norm']:.4g}" if name in self.gradients else ""
            gradient = [norm] if self.gradients else []
            shape = " x ".join(map(str, found["shape"]))
            rows.append([name, " ".join(found["letters"]), shape, *numbers, *gradient])
        yield "\n".join(columns(rows, (3, 4, 5)))
        if self.steps:
            yield f"and {len(self.steps)} generated tokens, each with its values in `steps`"

    def __str__(self) -> str:
        return as_text(*self.tables())

    def _repr_html_(self) -> str:
        return as_html(*self.tables(), *map(self._picture, list(self.values)[:_PICTURES]))

    def _picture(self, name: str) -> str:
        """A heat map of the first row: one per head for attention, else positions by the last axis."""
        array, letters = self.values[name][0], self.letters[name]
        tokens = list(self.token_texts[0]) if self.token_texts else list(map(str, self.tokens[0].tolist()))
        if letters[-2:] == ("t", "s"):
            heads = array.reshape(-1, *array.shape[-2:])
            keys = [str(i) for i in range(heads.shape[2])] if heads.shape[2] != len(tokens) else tokens
            maps = (heat_map(each, tokens, keys, f"{name}, head {h}") for h, each in enumerate(heads))
            return Markup("".join(maps))
        if letters[:2] != ("b", "t"):
            return Markup("")
        flat = array.reshape(len(array), -1)
        return heat_map(flat, tokens, list(map(str, range(flat.shape[1]))), name)


def capture(
    model: Model,
    prompt: Any,
    names: str | Sequence[str] = (),
    gradient_of: Scalar = None,
    max_new_tokens: int = 0,
    patches: Mapping[str, Replacement] | None = None,
) -> Capture:
    """See `api.capture`."""
    values, all_values = [], Values(model)
    if names:
        values = all_values.find(names)
    tokens = rows_of(model, prompt)
    replaced = _Replacing(all_values, patches or {})
    if gradient_of is not None and (max_new_tokens or replaced.by_own):
        raise InputError("`gradient_of` excludes `max_new_tokens` and replaced values")
    paths = {value.own for value in (*values, *replaced.values) if value.output_of_matrix}
    if paths:
        model = replace(model, decoder=watched(model.decoder, paths=paths))
    if max_new_tokens:
        return _generated(model, tokens, values, replaced, max_new_tokens)
    if gradient_of is not None:
        return _with_gradients(model, tokens, values, gradient_of)
    reading = _Reading(values)
    used = (*values, *replaced.values)
    positions = "all" if any(value.own in ("norm", "logits") for value in used) else "last"
    with blas.fixed_threads(), _recorder(reading, replaced):
        logits, _ = model.decoder.forward(tokens, None, positions)
    replaced.check_used()
    return _captured(model, tokens, logits[:, -1], reading)


def rows_of(model: Model, prompt: Any, name: str = "prompt") -> Array:
    """Return the token ids (b, t) of a text, of token ids, of messages, or of a batch of equal lengths.

    name: the argument, for messages.
    """
    try:
        rows, _ = prompts_of(model, prompt)
    except InputError as error:
        raise InputError(str(error).replace("`prompt`", f"`{name}`")) from None
    if len(set(map(len, rows))) > 1:
        raise InputError(f"`{name}`: the rows have {sorted(set(map(len, rows)))} tokens: expected one length")
    return model.checked(np.array(rows), f"`{name}`")


class _Reading:
    """A reader that copies values and gradients under the names that were asked for."""

    def __init__(self, values: Sequence[Value]) -> None:
        self.names: dict[str, list[Value]] = {}
        for value in values:
            self.names.setdefault(value.own, []).append(value)
        self.letters = {value.name: value.letters for value in values}
        self.order = [value.name for value in values]
        self._found: dict[str, Array] = {}
        self._gradients: dict[str, Array] = {}

    @property
    def found(self) -> dict[str, Array]:
        """The values, in the order in which they were asked for."""
        return {name: self._found[name] for name in self.order if name in self._found}

    @property
    def gradients(self) -> dict[str, Array]:
        """The gradients of values that are not computed from others."""
        return {name: self._gradients[name] for name in self.order if name in self._gradients}

    def __call__(self, own: str, array: Array) -> None:
        # One copy of the program's array for all of its names.
        copy = np.array(array)
        for value in self.names.get(own, ()):
            self._found[value.name] = value.of_program(copy)

    def gradient(self, own: str, array: Array) -> None:
        """Copy the gradient of a value."""
        copy = np.array(array)
        for value in self.names.get(own, ()):
            if not value.is_computed:
                self._gradients[value.name] = value.of_program(copy)


class _Replacing:
    """A reader that returns the replacements of values."""

    def __init__(self, values: Values, patches: Mapping[str, Replacement]) -> None:
        self.by_own: dict[str, list[tuple[Value, Replacement]]] = {}
        self.values: list[Value] = []
        self.used: set[str] = set()
        for name, replacement in patches.items():
            for value in values.find(name):
                if value.is_computed:
                    raise InputError(
                        f"`values`: {value.name} is computed from {value.own} and cannot be replaced"
                    )
                self.values.append(value)
                self.by_own.setdefault(value.own, []).append((value, replacement))

    def __call__(self, own: str, array: Array) -> Array:
        for value, replacement in self.by_own.get(own, ()):
            self.used.add(value.name)
            given = replacement
            if callable(replacement):
                given = replacement(np.array(value.of_program(array)))
            if given is not None:
                array = as_array(given, value, array)
        return array

    def check_used(self) -> None:
        """Raise InputError for values that the pass did not compute."""
        if unused := [value.name for value in self.values if value.name not in self.used]:
            raise InputError(f"`values`: {unused[0]} was not computed in this pass, so nothing was replaced")


def _recorder(reading: _Reading, replaced: _Replacing) -> Recorder:
    recorder = Recorder(spans=False)
    # Replaced first, so that the captured values are those that the program uses.
    if replaced.by_own:
        recorder.on_value(replaced, *replaced.by_own)
    if reading.names:
        recorder.on_value(reading, *reading.names)
    return recorder


def _captured(model: Model, tokens: Array, logits: Array, reading: _Reading, **more: Any) -> Capture:
    texts = texts_of(model, tokens)
    found = reading.found
    letters = {name: reading.letters[name] for name in found}
    return Capture(model.source, tokens, np.array(logits), found, letters, token_texts=texts, **more)


def texts_of(model: Model, tokens: Array) -> tuple[tuple[str, ...], ...]:
    """Return the text of each token (b, t); empty without a tokenizer."""
    if model.tokenizer is None:
        return ()
    texts = {int(token): model.tokenizer.decode([int(token)], False) for token in np.unique(tokens)}
    return tuple(tuple(texts[int(token)] for token in row) for row in tokens)


def _with_gradients(model: Model, tokens: Array, values: Sequence[Value], gradient_of: Scalar) -> Capture:
    reading = _Reading(values)
    recorder = _recorder(reading, _Replacing(Values(model), {}))
    if reading.names:
        recorder.on_gradient(reading.gradient, *reading.names)
    # No gradient of a weight is computed.
    decoder = map_named(lambda _, weight: Frozen(weight), model.decoder)
    with blas.fixed_threads(), recorder:
        logits, saved = decoder.forward(tokens, keep=True)
        last = np.array(logits[:, -1])
        dlogits, scalar = _scalar(model, logits, gradient_of)
        decoder.backward(dlogits, saved)
    return _captured(model, tokens, last, reading, gradients=reading.gradients, scalar=scalar)


def _scalar(model: Model, logits: Array, given: Scalar) -> tuple[Array, float | None]:
    """The gradient of a scalar by the logits (b, t, v), and the scalar if it is known."""
    if callable(given):
        given = given(np.array(logits))
    if isinstance(given, np.ndarray) and given.ndim:
        array = np.asarray(given, logits.dtype)
        if array.shape != logits.shape:
            raise InputError(f"`gradient_of` has shape {array.shape}, but the logits have {logits.shape}")
        return array, None
    dlogits, scalar = np.zeros_like(logits), 0.0
    for sign, i in zip((1, -1), ids_of(model, given, logits[0, -1], "gradient_of")):
        dlogits[:, -1, i] += sign
        scalar += sign * float(logits[:, -1, i].sum())
    return dlogits, scalar


def ids_of(model: Model, token: Any, logits: Array, name: str = "token") -> tuple[int, ...]:
    """Return the ids of a token or of a pair of tokens; None: the most probable token of logits (v,).

    name: the argument, for messages.
    """
    if token is None:
        return (int(logits.argmax()),)
    given: list[Any] = [*token] if isinstance(token, (tuple, list)) else [token]
    if not 1 <= len(given) <= 2:
        raise InputError(f"`{name}`: expected a token or a pair of tokens, got {len(given)}")
    return tuple(token_id(model, each, name) for each in given)


def token_id(model: Model, token: Any, name: str = "token") -> int:
    """Return the id of a token that is given as id or as text. Raises InputError if it is not one token."""
    if isinstance(token, str):
        if model.tokenizer is None:
            raise InputError(f"`{name}`: {model.source} has no tokenizer; give the id of a token")
        ids = model.tokenizer.encode(token, add_special_tokens=False)
        if len(ids) != 1:
            raise InputError(f"`{name}`: {token!r} is {len(ids)} tokens, expected one: {ids}")
        return ids[0]
    size = model.config.vocab_size
    if not isinstance(token, numbers.Integral) or not 0 <= int(token) < size:
        raise InputError(f"`{name}`: expected a token, as text or as an id below {size}, got {token!r}")
    return int(token)


def _generated(
    model: Model, tokens: Array, values: Sequence[Value], replaced: _Replacing, count: int
) -> Capture:
    """The prompt, then the most probable token of each row, one at a time."""
    cache = model.cache(tokens.shape[1] + count, horizon=tokens.shape[1] + count)
    captures: list[Capture] = []
    given = tokens
    for _ in range(count + 1):
        reading = _Reading(values)
        with blas.fixed_threads(), _recorder(reading, replaced):
            logits, _ = model.decoder.forward(given, cache, "last")
        captures.append(_captured(model, given, logits[:, -1], reading))
        given = logits[:, -1].argmax(axis=-1)[:, None]
    replaced.check_used()
    return replace(captures[0], steps=tuple(captures[1:]))
