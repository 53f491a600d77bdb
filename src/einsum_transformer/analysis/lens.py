"""What the residual stream predicts after each layer, which components a logit is the sum of, and what the
heads attend to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from einsum_transformer.analysis.capture import capture, ids_of, rows_of, texts_of, token_id
from einsum_transformer.analysis.plots import plot_maps
from einsum_transformer.arguments import checked
from einsum_transformer.components.attention import Attention, FusedAttention
from einsum_transformer.components.layernorm import LayerNorm
from einsum_transformer.components.rmsnorm import norm_scale
from einsum_transformer.displays import as_html, heat_map
from einsum_transformer.engine import Recorder, blas, einsum
from einsum_transformer.engine.contract import take_rows
from einsum_transformer.errors import InputError
from einsum_transformer.models.blocks import PostNormBlock
from einsum_transformer.models.model import Model
from einsum_transformer.tables import as_text, columns

Array = np.ndarray

_POSITIONS = 64
"""Positions whose logits are computed at once."""


def project(model: Model, stream: Array) -> Array:
    """Return the logits (b, t, v) of a residual stream (b, t, d): the final norm, then the output head."""
    normed, _ = model.decoder.norm.forward(stream)
    return model.decoder.head.forward(normed, keep=False)[0]


@checked
@dataclass(frozen=True, slots=True)
class LogitLens:
    """The prediction of the next token from the residual stream before the first and after each layer.

    Arrays have one entry per layer, first that of the embeddings; `str()` is a table of the last position."""

    model: str
    tokens: Array
    """(b, t)"""
    token_texts: tuple[tuple[str, ...], ...]
    top_tokens: Array
    """(layers + 1, b, t, top): the most probable tokens."""
    top_probabilities: Array
    top_texts: tuple[tuple[tuple[str, ...], ...], ...]
    """The texts of `top_tokens` in the first row, by layer and position; empty without a tokenizer."""
    entropy: Array
    """(layers + 1, b, t): entropy of the distribution in nats."""
    target: Array
    """(b, t): the token whose probability is listed: the prediction of the whole model, or the given one."""
    target_probabilities: Array
    """(layers + 1, b, t)"""
    target_ranks: Array
    """(layers + 1, b, t): number of tokens that are more probable."""

    def to_dict(self) -> dict[str, Any]:
        """Return the arrays as lists."""
        return _lists(asdict(self))

    def tables(self) -> Iterator[str]:
        """Yield the last position of the first row: one line per layer."""
        rows = [["after", "entropy", "rank", "probability", "most probable"]]
        for i in range(len(self.entropy)):
            names = self.top_texts[i][-1] if self.top_texts else map(str, self.top_tokens[i, 0, -1])
            shares = self.top_probabilities[i, 0, -1]
            best = ", ".join(f"{text!r} {share:.3f}" for text, share in zip(names, shares))
            numbers = f"{self.entropy[i, 0, -1]:.2f}", str(self.target_ranks[i, 0, -1])
            layer = f"layer {i - 1}" if i else "embedding"
            rows.append([layer, *numbers, f"{self.target_probabilities[i, 0, -1]:.4f}", best])
        yield "\n".join(columns(rows, (1, 2, 3)))
        yield "rank and probability: of the token that the whole model predicts, or of the given token"

    def plot(self, path: str | Path) -> None:
        """Plot the probability of the most probable token of the first row by layer and position, and that of
        the target, to a PNG file (needs matplotlib)."""
        layers, tokens = self._labels()
        maps = {"most probable token": self.top_probabilities[:, 0, :, 0]}
        plot_maps(path, maps | {"target": self.target_probabilities[:, 0]}, layers, tokens)

    def _labels(self) -> tuple[list[str], list[str]]:
        layers = ["embedding", *(f"layer {i}" for i in range(len(self.entropy) - 1))]
        return layers, list(self.token_texts[0] if self.token_texts else map(str, self.tokens[0].tolist()))

    def __str__(self) -> str:
        return as_text(*self.tables())

    def _repr_html_(self) -> str:
        layers, tokens = self._labels()
        title = "probability of the most probable next token after each layer"
        return as_html(heat_map(self.top_probabilities[:, 0, :, 0], layers, tokens, title), *self.tables())


def logit_lens(model: Model, prompt: Any, token: Any = None, top: int = 5) -> LogitLens:
    """See `api.look_inside.logit_lens`."""
    tokens = rows_of(model, prompt)
    top = min(top, model.config.vocab_size)
    layers = len(model.decoder.layers)
    shape = layers + 1, *tokens.shape
    best = np.zeros((*shape, top), np.int64)
    shares = np.zeros((*shape, top), np.float32)
    entropy, found = np.zeros(shape), np.zeros(shape)
    ranks = np.zeros(shape, np.int64)
    if token is None:
        target = _predictions(model, tokens)
    else:
        target = np.full(tokens.shape, token_id(model, token))

    def read(name: str, stream: Array) -> None:
        i = 0 if name.endswith("resid_pre") else int(name.partition(".")[2]) + 1
        for start in range(0, tokens.shape[1], _POSITIONS):
            part = slice(start, start + _POSITIONS)
            p = probabilities(project(model, stream[:, part]))
            best[i, :, part], shares[i, :, part], entropy[i, :, part] = most_probable(p, top)
            own = np.take_along_axis(p, target[:, part, None], axis=-1)
            found[i, :, part] = own[..., 0]
            ranks[i, :, part] = (p > own).sum(axis=-1)

    recorder = Recorder(spans=False).on_value(read, "layers.0.resid_pre", *_outputs(layers))
    with blas.fixed_threads(), recorder:
        model.decoder.forward(tokens, None, "none")
    texts = () if model.tokenizer is None else tuple(texts_of(model, each[0]) for each in best)
    return LogitLens(
        model.source, tokens, texts_of(model, tokens), best, shares, texts, entropy, target, found, ranks
    )


def _outputs(layers: int) -> list[str]:
    return [f"layers.{i}" for i in range(layers)]


def _predictions(model: Model, tokens: Array) -> Array:
    """The most probable next token at each position (b, t)."""
    with blas.fixed_threads():
        logits, _ = model.decoder.forward(tokens)
    return logits.argmax(axis=-1)


def probabilities(logits: Array) -> Array:
    """Return the softmax of the logits (..., v) in float64."""
    p = logits.astype(np.float64)
    p -= p.max(axis=-1, keepdims=True)
    np.exp(p, out=p)
    p /= p.sum(axis=-1, keepdims=True)
    return p


@checked
@dataclass(frozen=True, slots=True)
class NextTokens:
    """The most probable next tokens at each position. `str()` is a table of the first row."""

    model: str
    tokens: Array
    """(b, t)"""
    token_texts: tuple[tuple[str, ...], ...]
    top_tokens: Array
    """(b, t, top)"""
    top_texts: tuple[tuple[str, ...], ...]
    """The texts of `top_tokens` of the first row; empty without a tokenizer."""
    top_probabilities: Array
    entropy: Array
    """(b, t): entropy of the distribution in nats."""

    def to_dict(self) -> dict[str, Any]:
        """Return the arrays as lists."""
        return _lists(asdict(self))

    def tables(self) -> Iterator[str]:
        """Yield one line per position of the first row."""
        rows = [["after", "entropy", "most probable next tokens"]]
        for i, token in enumerate(self.tokens[0]):
            names = self.top_texts[i] if self.top_texts else map(str, self.top_tokens[0, i])
            shares = self.top_probabilities[0, i]
            best = ", ".join(f"{text!r} {share:.3f}" for text, share in zip(names, shares))
            text = repr(self.token_texts[0][i]) if self.token_texts else str(token)
            rows.append([text, f"{self.entropy[0, i]:.2f}", best])
        yield "\n".join(columns(rows, (1,)))

    def __str__(self) -> str:
        return as_text(*self.tables())

    def _repr_html_(self) -> str:
        return as_html(*self.tables())


def next_tokens(model: Model, prompt: Any, top: int = 5) -> NextTokens:
    """See `api.look_inside.next_tokens`."""
    tokens = rows_of(model, prompt)
    top = min(top, model.config.vocab_size)
    best, shares = np.zeros((*tokens.shape, top), np.int64), np.zeros((*tokens.shape, top), np.float32)
    entropy = np.zeros(tokens.shape)
    with blas.fixed_threads():
        logits, _ = model.decoder.forward(tokens)
    for start in range(0, tokens.shape[1], _POSITIONS):
        part = slice(start, start + _POSITIONS)
        p = probabilities(logits[:, part])
        best[:, part], shares[:, part], entropy[:, part] = most_probable(p, top)
    texts = texts_of(model, tokens), texts_of(model, best[0])
    return NextTokens(model.source, tokens, texts[0], best, texts[1], shares, entropy)


def most_probable(p: Array, top: int) -> tuple[Array, Array, Array]:
    """Return the most probable tokens (..., top), the most probable first, their probabilities, and the
    entropy (...), of probabilities (..., v)."""
    order = np.argpartition(-p, top - 1, axis=-1)[..., :top]
    values = np.take_along_axis(p, order, axis=-1)
    by_value = np.argsort(-values, axis=-1, kind="stable")
    entropy = -(p * np.log(np.maximum(p, 1e-30))).sum(axis=-1)
    best = np.take_along_axis(order, by_value, axis=-1)
    return best, np.take_along_axis(values, by_value, axis=-1), entropy


@checked
@dataclass(frozen=True, slots=True)
class Attribution:
    """The logit of a token as a sum of the outputs of components (direct logit attribution)."""

    model: str
    token: tuple[int, ...]
    """The token, or a pair of tokens: the difference of their logits."""
    position: int
    names: tuple[str, ...]
    """"embedding", "layers.0.attn", "layers.0.head.3", "layers.0.mlp", ..., and "bias" of norm and head."""
    contributions: Array
    """(names, b)"""
    logit: Array
    """(b,): their sum, the logit before a soft cap."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields in JSON types."""
        return _lists(asdict(self))

    def tables(self) -> Iterator[str]:
        """Yield the components with the largest contributions to the first row."""
        order = np.argsort(-np.abs(self.contributions[:, 0]))
        rows = [["component", "logit"]]
        rows += [[self.names[i], f"{self.contributions[i, 0]:+.4f}"] for i in order[:20]]
        yield "\n".join(columns(rows, (1,)))
        rest = float(self.contributions[order[20:], 0].sum())
        more = f"; {len(order) - 20} others {rest:+.4f}" if len(order) > 20 else ""
        yield f"sum {float(self.logit[0]):.4f}{more}"

    def __str__(self) -> str:
        return as_text(*self.tables())

    def _repr_html_(self) -> str:
        return as_html(*self.tables())


def attribution(
    model: Model, prompt: Any, token: Any = None, position: int = -1, heads: bool = False
) -> Attribution:
    """See `api.look_inside.logit_attribution`."""
    tokens = rows_of(model, prompt)
    count = tokens.shape[1]
    if not -count <= position < count:
        raise InputError(f"`position` is {position}, but the prompt has {count} tokens")
    place = slice(position % count, position % count + 1)
    tokens = tokens[:, : place.stop]
    parts, layers = {"embedding": "layers.0.resid_pre"}, model.decoder.layers
    for i, block in enumerate(layers):
        if heads and _has_heads(block):
            parts[f"layers.{i}.head"] = f"blocks.{i}.attn.hook_result"
        else:
            parts[f"layers.{i}.attn"] = f"layers.{i}.attn_out"
        parts[f"layers.{i}.mlp"] = f"layers.{i}.mlp_out"
    found = capture(model, tokens, [*parts.values(), f"layers.{len(layers) - 1}"])
    x = found[f"layers.{len(layers) - 1}"][:, place].astype(np.float64)
    ids = ids_of(model, token, found.logits[0])
    direction, constant = _direction(model, ids)
    norm = model.decoder.norm
    centred = x - x.mean(axis=-1, keepdims=True) if isinstance(norm, LayerNorm) else x
    rstd = 1 / np.sqrt(np.square(centred).mean(axis=-1) + norm.eps)
    direction = direction - direction.mean() if isinstance(norm, LayerNorm) else direction
    names: list[str] = []
    values: list[Array] = []
    for name, value in parts.items():
        array = found[value][:, place].astype(np.float64)[:, 0]
        by_name = {name: array}
        if array.ndim == 3:
            i = int(name.split(".")[1])
            multiplier = layers[i].residual_multiplier
            by_name = {f"{name}.{h}": multiplier * array[:, h] for h in range(array.shape[1])}
            bias = layers[i].self_attn.o_bias
            if bias is not None:
                every = multiplier * np.asarray(bias, np.float64)
                by_name[f"layers.{i}.attn.bias"] = np.broadcast_to(every, array[:, 0].shape)
        names += by_name
        values += [einsum("bd,d->b", each, direction) * rstd[:, 0] for each in by_name.values()]
    names.append("bias")
    values.append(np.full(len(tokens), constant))
    contributions = np.stack(values)
    return Attribution(model.source, ids, place.start, tuple(names), contributions, contributions.sum(axis=0))


def _has_heads(block: Any) -> bool:
    """Whether the output of attention is a sum over its heads: no norm follows."""
    return isinstance(block.self_attn, (Attention, FusedAttention)) and not isinstance(block, PostNormBlock)


def _direction(model: Model, ids: Sequence[int]) -> tuple[Array, float]:
    """What a normalized stream is multiplied with for the logit of a token, or for the difference of two
    logits, and the part that does not depend on the stream."""
    head, norm = model.decoder.head, model.decoder.norm
    direction, constant = np.zeros(model.config.hidden_size), 0.0
    for sign, token in zip((1, -1), ids):
        row = take_rows(head.weight, np.array([[token]]))[0, 0].astype(np.float64) * head.scale
        if head.bias is not None:
            constant += sign * head.scale * float(np.asarray(head.bias)[token])
        if isinstance(norm, LayerNorm):
            scale: Array = np.asarray(norm.weight, np.float64)
            if norm.bias is not None:
                constant += sign * float(einsum("d,d->", row, np.asarray(norm.bias, np.float64)))
        else:
            scale = np.asarray(norm_scale(norm.weight, norm.offset, row), np.float64)
        direction += sign * row * scale
    return direction, constant


@checked
@dataclass(frozen=True, slots=True)
class HeadSummary:
    """What each head attends to, as means over the queries (layers, heads)."""

    model: str
    entropy: Array
    """Entropy of the attention weights of a query in nats; 0: all weight on one key."""
    first: Array
    """Weight on the first token."""
    previous: Array
    """Weight on the token before the query; queries from the second one on."""
    itself: Array
    """Weight on the query's own token."""

    def to_dict(self) -> dict[str, Any]:
        """Return the arrays as lists."""
        return _lists(asdict(self))

    def tables(self) -> Iterator[str]:
        """Yield the entropy of each head, one line per layer."""
        heads = self.entropy.shape[1]
        rows = [["entropy", *(f"head {h}" for h in range(heads)), "first", "previous", "itself"]]
        for i in range(len(self.entropy)):
            means = [each[i].mean() for each in (self.first, self.previous, self.itself)]
            rows.append([f"layer {i}", *(f"{value:.2f}" for value in (*self.entropy[i], *means))])
        yield "\n".join(columns(rows, range(1, heads + 4)))
        yield "first, previous, itself: mean weight of the heads of a layer on these tokens"

    def plot(self, path: str | Path) -> None:
        """Plot entropy and weights by layer and head to a PNG file (needs matplotlib)."""
        rows, heads, values = self._maps()
        plot_maps(path, values, rows, heads)

    def _maps(self) -> tuple[list[str], list[str], dict[str, Array]]:
        rows = [f"layer {i}" for i in range(len(self.entropy))]
        heads = [f"head {h}" for h in range(self.entropy.shape[1])]
        values = {"entropy in nats": self.entropy, "first token": self.first}
        return rows, heads, values | {"previous token": self.previous, "own token": self.itself}

    def __str__(self) -> str:
        return as_text(*self.tables())

    def _repr_html_(self) -> str:
        rows, heads, values = self._maps()
        return as_html(*(heat_map(each, rows, heads, name) for name, each in values.items()))


def head_summary(model: Model, prompt: Any) -> HeadSummary:
    """See `api.look_inside.head_summary`."""
    tokens = rows_of(model, prompt)
    found: dict[int, list[Array]] = {}

    def read(name: str, pattern: Array) -> None:
        p = pattern.reshape(pattern.shape[0], -1, *pattern.shape[3:]).astype(np.float64)
        entropy = -(p * np.log(np.maximum(p, 1e-30))).sum(axis=-1).mean(axis=(0, 2))
        own = np.diagonal(p, axis1=2, axis2=3).mean(axis=(0, 2))
        before = np.diagonal(p, -1, axis1=2, axis2=3)
        previous = before.mean(axis=(0, 2)) if before.shape[-1] else np.zeros(p.shape[1])
        found[int(name.split(".")[1])] = [entropy, p[..., 0].mean(axis=(0, 2)), previous, own]

    with blas.fixed_threads(), Recorder(spans=False).on_value(read, "layers.*.self_attn.pattern"):
        model.decoder.forward(tokens, None, "none")
    arrays = [np.stack([found[i][n] for i in sorted(found)]) for n in range(4)]
    return HeadSummary(model.source, *arrays)


def _lists(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields with lists in place of arrays."""
    return {name: each.tolist() if isinstance(each, np.ndarray) else each for name, each in fields.items()}
