"""The decoder: tokens, embedding, blocks of attention and feed-forward, norm, head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from einsum_transformer.components.context import Context
from einsum_transformer.components.embedding import Embedding
from einsum_transformer.components.head import Head
from einsum_transformer.components.kv_cache import KVCache
from einsum_transformer.components.masks import Mask
from einsum_transformer.components.rope import RopeConfig, Rotation, rotation
from einsum_transformer.engine import Leaf, phase, tap, tap_gradient
from einsum_transformer.engine.parallel import LARGE, for_each
from einsum_transformer.engine.recorder import name_weights, reads_arrays, reads_values
from einsum_transformer.errors import InputError
from einsum_transformer.models.blocks import AnyBlock, Norm
from einsum_transformer.numerics.softmax import cross_entropy, cross_entropy_backward
from einsum_transformer.tree import named_leaves, static

Array = np.ndarray
Positions = Literal["all", "last", "none"]
_SLICES: dict[Positions, slice] = {"all": slice(None), "last": slice(-1, None), "none": slice(0)}


class Saved(NamedTuple):
    """Activations saved for `Decoder.backward`."""

    embed_tokens: Any
    token_positions: Array
    """(b, t): the position of each token in its row, without padding."""
    layers: list[Any]
    """Saved activations of each block, or its input if it is recomputed."""
    norm: Any
    lm_head: Any
    contexts: list[Context]
    """The context of each layer."""
    recompute: bool


@dataclass(frozen=True, slots=True)
class Decoder:
    """All weights of a model. Gradients are returned as a Decoder; `lm_head` is None for tied embeddings."""

    embed_tokens: Embedding
    layers: tuple[AnyBlock, ...]
    norm: Norm
    lm_head: Head | None
    embed_positions: Embedding | None = None
    """Learned position embeddings, which are added to the token embeddings."""
    ropes: tuple[RopeConfig, ...] = static(default=())
    """The RoPE settings that `Attention.rope` indexes."""
    head_dim: int = static(default=64)
    logit_scale: float = static(default=1.0)
    """Factor of the logits with tied embeddings; `logit_cap` is their soft cap."""
    logit_cap: float | None = static(default=None)

    def forward(
        self,
        tokens: Array,
        cache: KVCache | None = None,
        positions: Positions = "all",
        keep: bool = False,
        recompute: bool = False,
    ) -> tuple[Array, Any]:
        """Token ids (b, t) -> logits of "all" positions (b, t, v), the "last" (b, 1, v), or "none" (b, 0, v).

        cache: KV cache of earlier tokens, to which these are appended. keep: also return the activations that
        `backward` needs. recompute: save only the input of each block; `backward` recomputes the rest.
        """
        name_weights(self, self._weights)
        start = 0 if cache is None else cache.length
        with phase("embedding"):
            token_positions, rotations = self._rotations(tokens, cache)
            x, saved_embedding = self._embedded(tokens, token_positions)
        one_token = tokens.shape[1] == 1 and positions != "none" and not keep
        is_read = reads_values() or reads_arrays()
        if one_token and cache is not None and isinstance(x, Array) and not is_read:
            return self._step(x, rotations, cache), None
        contexts = self._contexts(start, tokens.shape[1], rotations, cache)
        logits, saved = self._layers(x, contexts, positions, keep, recompute)
        if not keep:
            return logits, None
        return logits, Saved(saved_embedding, token_positions, *saved, contexts, recompute)

    def rebuilt(
        self,
        batches: Sequence[Array],
        rebuild: Callable[[int, AnyBlock, Callable[[AnyBlock], None]], AnyBlock],
    ) -> Decoder:
        """The decoder with rebuild(i, block, run) in place of each block, in order.

        run(block) runs a block on its inputs for the tokens (b, t) of all batches: the outputs of the
        rebuilt blocks before it.
        """
        states: list[tuple[Array, list[Context]]] = []
        for tokens in batches:
            token_positions, rotations = self._rotations(tokens, None)
            x = self._embedded(tokens, token_positions)[0]
            states.append((x, self._contexts(0, tokens.shape[1], rotations, None)))
        layers: list[AnyBlock] = []
        for i, block in enumerate(self.layers):

            def run(block: AnyBlock, i: int = i, inputs: Sequence[Any] = states) -> None:
                for x, contexts in inputs:
                    block.forward(x, contexts[i])

            layers.append(rebuild(i, block, run))
            states = [(layers[i].forward(x, contexts[i])[0], contexts) for x, contexts in states]
        return replace(self, layers=tuple(layers))

    def _embedded(self, tokens: Array, token_positions: Array) -> tuple[Array, Any]:
        """The input of the first block, and the activations of the embedding."""
        x, saved = self.embed_tokens.forward(tokens)
        x = tap("embed_tokens", x)
        if self.embed_positions is not None:
            self._check_token_positions(token_positions)
            x = x + tap("embed_positions", self.embed_positions.forward(token_positions)[0])
        return x, saved

    def _step(self, x: Array, rotations: list[Rotation], cache: KVCache) -> Array:
        """The logits after one more token per row, embedded as x (b, 1, d)."""
        start = cache.length

        def logits(x: Array, *tables: Array) -> Array:
            pairs = zip(tables[::2], tables[1::2])
            given = [each.with_tables(*pair) for each, pair in zip(rotations, pairs)]
            return self._layers(x, self._contexts(start, 1, given, cache), "all", False, False)[0]

        inputs = [x, *(table for each in rotations for table in (each.cos, each.signed_sin))]
        left, memory = cache.steps_left(), cache.allocations
        return cache.steps.run(logits, inputs, start, left, self, memory, cache.advance)

    def _layers(
        self, x: Array, contexts: list[Context], positions: Positions, keep: bool, recompute: bool
    ) -> tuple[Array, tuple[list[Any], Any, Any]]:
        """The logits, and the saved activations of the blocks, of the norm and of the head."""
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
                x = x[:, _SLICES[positions]]
            x, saved_norm = self.norm.forward(x)
            x = tap("norm", x)
            logits, saved_head = self.head.forward(x, keep)
            logits = tap("logits", logits)
        return logits, (saved_layers, saved_norm, saved_head)

    def loss_and_gradient(
        self, tokens: Array, targets: Array, count: int | None = None, recompute: bool = False
    ) -> tuple[float, Decoder]:
        """The cross-entropy of targets (b, t) after tokens (b, t), divided by `count` (see `cross_entropy`),
        and its gradient with respect to every weight."""
        with phase("forward"):
            logits, saved = self.forward(tokens, keep=True, recompute=recompute)
        with phase("loss"):
            run = partial(for_each, coarse=logits.size >= LARGE)
            loss, saved_loss = cross_entropy(logits, targets, count, run)
            dlogits = cross_entropy_backward(saved_loss, run)
        with phase("backward"):
            return loss, self.backward(dlogits, saved)

    def backward(self, dlogits: Array, saved: Saved) -> Decoder:
        """The gradient of a loss with respect to every weight, given that of the logits (b, t, v)."""
        name_weights(self, self._weights)
        with phase("head"):
            tap_gradient("logits", dlogits)
            dx, dhead = self.head.backward(dlogits, saved.lm_head)
            tap_gradient("norm", dx)
            dx, dnorm = self.norm.backward(dx, saved.norm)
        dlayers: list[AnyBlock] = []
        for i in reversed(range(len(self.layers))):
            with phase("layer", layer=i):
                # Popped, so that a layer's activations are freed as soon as its gradient is computed.
                saved_block = saved.layers.pop()
                tap_gradient("", dx)
                if saved.recompute:
                    with phase("recomputed"):
                        _, saved_block = self.layers[i].forward(saved_block, saved.contexts[i])
                dx, dblock = self.layers[i].backward(dx, saved_block, saved.contexts[i])
            dlayers.append(dblock)
        with phase("embedding"):
            tap_gradient("embed_tokens", dx)
            # Tied embeddings: the gradient is the sum of both uses.
            tied = dhead.weight if self.lm_head is None else None
            dembed = self.embed_tokens.backward(dx, saved.embed_tokens, tied)
            dpositions = None
            if self.embed_positions is not None:
                tap_gradient("embed_positions", dx)
                dpositions = self.embed_positions.backward(dx, saved.token_positions)
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
        """The output head; with tied embeddings, a Head on the embedding's matrix."""
        if self.lm_head is not None:
            return self.lm_head
        return Head(self.embed_tokens.weight, scale=self.logit_scale, cap=self.logit_cap)

    def _rotations(self, tokens: Array, cache: KVCache | None) -> tuple[Array, list[Rotation]]:
        """The position of each token in its row without padding (b, t), and the rotation of each RoPE."""
        start, pads, min_length = 0, None, 0
        if cache is not None:
            start, pads = cache.length, cache.pads
            min_length = cache.horizon - (0 if pads is None else pads)
            cache.add_tokens(tokens)
        positions = np.arange(start, start + tokens.shape[1])
        token_positions = np.broadcast_to(positions, tokens.shape)
        if pads is not None:
            # Left padding: the first token of each row that is not padding has position 0.
            token_positions = np.maximum(positions - pads[:, None], 0)
        dtype = self.embed_tokens.weight.dtype
        rotations = [rotation(rope, self.head_dim, token_positions, dtype, min_length) for rope in self.ropes]
        return token_positions, rotations

    def _contexts(
        self, start: int, count: int, rotations: list[Rotation], cache: KVCache | None
    ) -> list[Context]:
        """The context of each layer for `count` tokens from position `start` on, padding included."""
        positions, pads = np.arange(start, start + count), None if cache is None else cache.pads
        masks: dict[Any, Mask] = {}

        def context(i: int) -> Context:
            rope = self.layers[i].self_attn.rope
            layer_rotation: Rotation | None = None if rope is None else rotations[rope]
            layer_cache = None if cache is None else cache.layers[i]
            return Context(positions, layer_rotation, pads, layer_cache, masks)

        return [context(i) for i in range(len(self.layers))]

    def _check_token_positions(self, token_positions: Array) -> None:
        assert self.embed_positions is not None
        known, last = self.embed_positions.weight.shape[0], int(token_positions.max())
        if last >= known:
            raise InputError(
                f"{last + 1} tokens exceed the {known} learned position embeddings of this model"
            )

    def _weights(self) -> Iterator[tuple[str, Any]]:
        """(path, weight) of every weight, and of the parts of those that are leaves."""
        for path, weight in named_leaves(self):
            yield path, weight
            if isinstance(weight, Leaf):
                trained = weight.trained_parts(path)
                yield from ((trained.get(name, path), part) for name, part in weight.parts().items())
