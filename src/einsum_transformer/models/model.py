"""Model: a decoder with its config, its tokenizer and the names its weights have in a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from einsum_transformer.components.kv_cache import KVCache
from einsum_transformer.engine import Leaf
from einsum_transformer.errors import InputError
from einsum_transformer.formats.folder import write_safetensors_folder
from einsum_transformer.formats.safetensors import atomic_file, sync
from einsum_transformer.models.config import ModelConfig
from einsum_transformer.models.decoder import Decoder, weights_of
from einsum_transformer.models.families import FAMILIES
from einsum_transformer.models.families.family import Family, unsaid
from einsum_transformer.numerics.softmax import IGNORE_INDEX
from einsum_transformer.text.tokenizer import Tokenizer
from einsum_transformer.tree import named_leaves

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class Model:
    """A decoder with its config, its tokenizer and the names its weights have in a checkpoint."""

    config: ModelConfig
    decoder: Decoder
    tokenizer: Tokenizer | None = None
    generation_config: Mapping[str, Any] | None = None
    """What generation_config.json says, or None."""
    source: str = "random weights"

    @property
    def family(self) -> Family:
        return FAMILIES[self.config.model_type]

    def logits(self, tokens: Any) -> Array:
        """tokens (b, t) ints -> next-token scores (b, t, v)."""
        return self.decoder.forward(self.checked(tokens))[0]

    def loss_and_gradients(self, tokens: Any, targets: Any) -> tuple[float, dict[str, Array]]:
        """Mean cross-entropy over the targets != -100, and its gradient by every parameter, in checkpoint
        layout.

        tokens, targets: (b, t) ints; targets[b, t] is the token that should follow tokens[b, t].
        """
        tokens, targets = self.checked(tokens), _integers(targets, "targets")
        if targets.shape != tokens.shape:
            raise InputError(
                f"targets have shape {targets.shape}, tokens {tokens.shape}: they must be the same"
            )
        self.checked(np.where(targets == IGNORE_INDEX, 0, targets), "targets")
        loss, gradient = self.decoder.loss_and_gradient(tokens, targets)
        return loss, dict(self._named(gradient))

    def named_parameters(self) -> dict[str, Array]:
        """Checkpoint name -> array in checkpoint layout (a view of the weight in use, where it is in
        memory)."""
        return dict(self._named(self.decoder))

    def cache(self, capacity: int = 0, pads: Array | None = None) -> KVCache:
        """An empty KV cache for this model; capacity in tokens avoids growth, pads (b,) counts left
        padding."""
        return KVCache(self.config.windows, capacity, pads)

    def save(self, folder: str | Path, max_shard_bytes: int = 5_000_000_000) -> None:
        """Write a Hugging Face folder that transformers loads: config, weights, tokenizer, generation
        settings."""
        folder = Path(folder)
        if lost := unsaid(self.family, self.config):
            value = getattr(self.config, lost)
            raise InputError(f"{folder}: a {self.family.model_type} config.json cannot say {lost} = {value}")
        config = self.family.write_config(self.config)
        head = {"architectures": [self.family.architecture], "model_type": self.config.model_type}
        parameters = self.named_parameters()
        dtype = str(next(iter(parameters.values())).dtype)
        folder.mkdir(parents=True, exist_ok=True)
        if self.tokenizer is not None:
            self.tokenizer.save(folder)
        if self.generation_config is not None:
            _write_json(folder / "generation_config.json", dict(self.generation_config))
        write_safetensors_folder(folder, parameters, max_shard_bytes)
        # Last: if the weights cannot be written, the folder still says what an earlier save's weights are.
        _write_json(folder / "config.json", head | config | {"dtype": dtype})

    def checked(self, tokens: Any, what: str = "tokens") -> Array:
        """`tokens` as a (b, t) array of ids that the vocabulary has."""
        tokens = _integers(tokens, what)
        if tokens.ndim != 2 or tokens.size == 0:
            raise InputError(f"{what} have shape {tokens.shape}: a non-empty (batch, time) array is expected")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.config.vocab_size:
            bad = low if low < 0 else high
            raise InputError(f"{what}: id {bad} is outside the vocabulary of {self.config.vocab_size}")
        return tokens

    def _named(self, decoder: Decoder) -> Iterator[tuple[str, Array]]:
        stored = {weight.path: weight.stored for weight in weights_of(self.config)}
        for path, leaf in named_leaves(decoder):
            array = leaf.array() if isinstance(leaf, Leaf) else leaf
            yield self.family.checkpoint_name(path), array.reshape(stored[path])


def _integers(values: Any, what: str) -> Array:
    """`values` as an array of whole numbers, or an error (also for rows of different lengths)."""
    try:
        array = np.asarray(values)
    except ValueError:
        raise InputError(f"{what}: rows of different lengths; generate() takes such batches") from None
    if array.size and array.dtype.kind not in "iu":
        raise InputError(f"{what} are {array.dtype}: token ids are integers")
    return array


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with atomic_file(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())
        sync(file)
