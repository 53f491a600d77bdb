"""The decoder: tokens, embedding, blocks of attention and feed-forward, norm, head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from einsum_transformer.components.context import Context
from einsum_transformer.components.embedding import Embedding
from einsum_transformer.components.head import Head
from einsum_transformer.components.kv_cache import KVCache
from einsum_transformer.components.rope import RopeConfig, Rotation, rotation
from einsum_transformer.engine import Leaf, phase, tap
from einsum_transformer.engine.recorder import know_weights
from einsum_transformer.errors import InputError
from einsum_transformer.models.blocks import AnyBlock, Norm
from einsum_transformer.numerics.softmax import cross_entropy, cross_entropy_backward
from einsum_transformer.tree import named_leaves, static

Array = np.ndarray
Positions = Literal["all", "last", "none"]
_KEPT: dict[Positions, slice] = {"all": slice(None), "last": slice(-1, None), "none": slice(0)}


class Saved(NamedTuple):
    """What the backward pass needs of each part."""

    embed_tokens: Any
    places: Array
    """(b, t): the position of each token in its own text."""
    layers: list[Any]
    """Of each block, or what entered it if it is to be run again."""
    norm: Any
    lm_head: Any
    contexts: list[Context]
    """Of each layer."""
    recompute: bool


@dataclass(frozen=True, slots=True)
class Decoder:
    """All weights of a model. A gradient is another Decoder; `lm_head` is None where the embedding serves as
    the head."""

    embed_tokens: Embedding
    layers: tuple[AnyBlock, ...]
    norm: Norm
    lm_head: Head | None
    embed_positions: Embedding | None = None
    """A learned row for each position, added to the tokens' rows."""
    ropes: tuple[RopeConfig, ...] = static(default=())
    """The rotations that the layers choose from."""
    head_dim: int = static(default=64)
    logit_scale: float = static(default=1.0)
    """What the logits of a head that is the embedding are multiplied by, and their soft cap."""
    logit_cap: float | None = static(default=None)

    def forward(
        self,
        tokens: Array,
        cache: KVCache | None = None,
        positions: Positions = "all",
        keep: bool = False,
        recompute: bool = False,
    ) -> tuple[Array, Any]:
        """tokens (b, t) -> logits of "all" positions (b, t, v), of the "last" (b, 1, v), or of "none" (b, 0,
        v).

        cache: keys and values of earlier tokens, extended by these. keep: also return what `backward` needs.
        recompute: keep only what enters each block; `backward` runs the block again for the rest.
        """
        know_weights(self, self._weights)
        with phase("embedding"):
            places, contexts = self._contexts(tokens, cache)
            x, saved_embedding = self.embed_tokens.forward(tokens)
            x = tap("embed_tokens", x)
            if self.embed_positions is not None:
                self._check_places(places)
                x = x + tap("embed_positions", self.embed_positions.forward(places)[0])
        saved_layers = []
        for i, block in enumerate(self.layers):
            with phase("layer", layer=i):
                y, saved = block.forward(x, contexts[i])
                y = tap("", y)
            if keep:
                saved_layers.append(x if recompute else saved)
            x = y
            del saved, y
        with phase("head"):
            if positions != "all":
                x = x[:, _KEPT[positions]]
            x, saved_norm = self.norm.forward(x)
            x = tap("norm", x)
            logits, saved_head = self.head.forward(x, keep)
            logits = tap("logits", logits)
        if not keep:
            return logits, None
        return logits, Saved(
            saved_embedding, places, saved_layers, saved_norm, saved_head, contexts, recompute
        )

    def loss_and_gradient(
        self, tokens: Array, targets: Array, count: int | None = None, recompute: bool = False
    ) -> tuple[float, Decoder]:
        """The cross-entropy of targets (b, t) after tokens (b, t), divided by `count` (see `cross_entropy`),
        and its gradient by every weight."""
        with phase("forward"):
            logits, saved = self.forward(tokens, keep=True, recompute=recompute)
        with phase("loss"):
            loss, saved_loss = cross_entropy(logits, targets, count)
            dlogits = cross_entropy_backward(saved_loss)
        with phase("backward"):
            return loss, self.backward(dlogits, saved)

    def backward(self, dlogits: Array, saved: Saved) -> Decoder:
        """The gradient of a loss by every weight, from its gradient by the logits (b, t, v)."""
        know_weights(self, self._weights)
        with phase("head"):
            dx, dhead = self.head.backward(dlogits, saved.lm_head)
            dx, dnorm = self.norm.backward(dx, saved.norm)
        dlayers: list[AnyBlock] = []
        for i in reversed(range(len(self.layers))):
            with phase("layer", layer=i):
                # Popped, so that a layer's activations are free as soon as its gradient is there.
                saved_block = saved.layers.pop()
                if saved.recompute:
                    with phase("recomputed"):
                        _, saved_block = self.layers[i].forward(saved_block, saved.contexts[i])
                dx, dblock = self.layers[i].backward(dx, saved_block, saved.contexts[i])
            dlayers.append(dblock)
        with phase("embedding"):
            dembed = self.embed_tokens.backward(dx, saved.embed_tokens)
            dpositions = None
            if self.embed_positions is not None:
                dpositions = self.embed_positions.backward(dx, saved.places)
            if self.lm_head is None and dembed.weight is not None:
                # One matrix in two roles: its gradient is the sum of both.
                np.add(dembed.weight, dhead.weight, out=dembed.weight)
        return Decoder(
            embed_tokens=dembed,
            layers=tuple(reversed(dlayers)),
            norm=dnorm,
            lm_head=None if self.lm_head is None else dhead,
            embed_positions=dpositions,
            ropes=self.ropes,
            head_dim=self.head_dim,
            logit_scale=self.logit_scale,
            logit_cap=self.logit_cap,
        )

    @property
    def head(self) -> Head:
        """The output head; where the embedding serves as one, a Head on the same matrix."""
        if self.lm_head is not None:
            return self.lm_head
        return Head(self.embed_tokens.weight, scale=self.logit_scale, cap=self.logit_cap)

    def _contexts(self, tokens: Array, cache: KVCache | None) -> tuple[Array, list[Context]]:
        """The position of each token in its own text (b, t), and the context of each layer."""
        start, pads, ahead = 0, None, 0
        if cache is not None:
            start, pads = cache.length, cache.pads
            ahead = cache.horizon - (0 if pads is None else pads)
            cache.add_tokens(tokens)
        positions = np.arange(start, start + tokens.shape[1])
        places = np.broadcast_to(positions, tokens.shape)
        if pads is not None:
            # Padding is before the text: each row counts its own tokens from 0.
            places = np.maximum(positions - pads[:, None], 0)
        dtype = self.embed_tokens.weight.dtype
        rotations = [rotation(rope, self.head_dim, places, dtype, ahead) for rope in self.ropes]

        def context(i: int) -> Context:
            rope = self.layers[i].self_attn.rope
            own: Rotation | None = None if rope is None else rotations[rope]
            return Context(positions, own, pads, None if cache is None else cache.layers[i])

        return places, [context(i) for i in range(len(self.layers))]

    def _check_places(self, places: Array) -> None:
        assert self.embed_positions is not None
        known, last = self.embed_positions.weight.shape[0], int(places.max())
        if last >= known:
            raise InputError(
                f"{last + 1} tokens are more than the {known} positions that this model has learned"
            )

    def _weights(self) -> Iterator[tuple[str, Any]]:
        """(path, weight) of every weight, and of the parts of those that are leaves."""
        for path, weight in named_leaves(self):
            yield path, weight
            if isinstance(weight, Leaf):
                trained = weight.trained_parts(path)
                yield from ((trained.get(name, path), part) for name, part in weight.parts().items())
