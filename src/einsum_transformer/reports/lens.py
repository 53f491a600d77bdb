"""What a forward pass reveals about each token: attention weights and predictions after every layer."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from einsum_transformer.analysis.lens import most_probable, probabilities, project
from einsum_transformer.engine import Recorder
from einsum_transformer.models.model import Model

Array = np.ndarray

TOP = 5
"""Predictions of each layer at each position."""
NEXT = 10
"""Predictions of each new token."""


@dataclass(frozen=True, slots=True)
class Attention:
    """The attention weights of all layers and heads over the shown tokens."""

    tokens: int
    heads: tuple[int, ...]
    """The number of heads of each layer."""
    layers: tuple[bytes, ...]
    """For each layer: head by head and query by query, the weight of each key up to the query's own position
    as an integer, 0 to 255 for 0 to 1."""

    def to_dict(self) -> dict[str, Any]:
        """Return the weights as base64."""
        encoded = [base64.b64encode(each).decode() for each in self.layers]
        return {"tokens": self.tokens, "heads": list(self.heads), "layers": encoded}


@dataclass(frozen=True, slots=True)
class Prediction:
    """The most probable next tokens at one position."""

    ids: tuple[int, ...]
    probabilities: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Lens:
    """The logit lens: final norm and output head applied to the output of each layer."""

    layers: tuple[tuple[Prediction, ...], ...]
    """Layer -> shown position -> its most probable next tokens."""

    def to_dict(self) -> dict[str, Any]:
        """Return ids and probabilities as lists."""
        ids = [[list(each.ids) for each in layer] for layer in self.layers]
        numbers = [[[_digits(p) for p in each.probabilities] for each in layer] for layer in self.layers]
        return {"ids": ids, "probabilities": numbers}


@dataclass(frozen=True, slots=True)
class NextToken:
    """The prediction of one new token of the text."""

    position: int
    """The position of the token."""
    chosen: int
    probability: float
    """The model's probability of the chosen token, before sampling changes it."""
    predicted: Prediction

    def to_dict(self) -> dict[str, Any]:
        """Return the fields in JSON types."""
        found = asdict(self)
        found["predicted"] = {
            "ids": list(self.predicted.ids),
            "probabilities": [_digits(p) for p in self.predicted.probabilities],
        }
        return found | {"probability": _digits(self.probability)}


def looked_at(model: Model, tokens: Sequence[int]) -> tuple[Attention, Lens]:
    """Run the tokens; returns the attention weights, and the predictions after each layer."""
    patterns: dict[int, Array] = {}
    outputs: dict[int, Array] = {}

    def read(name: str, value: Array) -> None:
        layer = int(name.split(".")[1])
        if name.endswith(".pattern"):
            patterns[layer] = value.reshape(-1, *value.shape[-2:]).copy()
        else:
            outputs[layer] = value.copy()

    count = model.config.num_hidden_layers
    names = [f"layers.{layer}" for layer in range(count)]
    with Recorder(spans=False).on_value(read, "layers.*.self_attn.pattern", *names):
        model.decoder.forward(np.array([tokens]), positions="none")
    layers = tuple(predictions(project(model, outputs[layer])[0], TOP) for layer in range(count))
    return _packed(patterns, len(tokens)), Lens(layers)


def next_tokens(model: Model, tokens: Sequence[int], new: int) -> tuple[NextToken, ...]:
    """Return the predictions of the last `new` of the tokens."""
    if not new:
        return ()
    found: list[Array] = []
    first = len(tokens) - new
    last = f"layers.{model.config.num_hidden_layers - 1}"
    with Recorder(spans=False).on_value(lambda _, x: found.append(x[:, first - 1 : -1].copy()), last):
        model.decoder.forward(np.array([tokens]), positions="none")
    logits = project(model, found[0])[0]
    p = probabilities(logits)
    chosen = tokens[first:]
    pairs = zip(chosen, predictions(logits, NEXT))
    return tuple(
        NextToken(first + i, token, float(p[i, token]), each) for i, (token, each) in enumerate(pairs)
    )


def predictions(logits: Array, most: int) -> tuple[Prediction, ...]:
    """Return the most probable tokens of each row of the logits (t, v), the most probable first."""
    ids, values, _ = most_probable(probabilities(logits), min(most, logits.shape[-1]))
    return tuple(Prediction(tuple(map(int, i)), tuple(map(float, v))) for i, v in zip(ids, values))


def _packed(patterns: dict[int, Array], tokens: int) -> Attention:
    below = np.tril_indices(tokens)
    layers = [patterns[layer] for layer in sorted(patterns)]
    codes = [np.rint(255 * np.clip(each[:, *below], 0, 1)).astype(np.uint8).tobytes() for each in layers]
    return Attention(tokens, tuple(len(each) for each in layers), tuple(codes))


def _digits(p: float) -> float | None:
    return float(f"{p:.4g}") if math.isfinite(p) else None
