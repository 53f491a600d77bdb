"""Model: a decoder with its config, its tokenizer and the names its weights have in a checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from einsum_transformer.components.kv_cache import KVCache
from einsum_transformer.engine import Gradients, Leaf
from einsum_transformer.errors import InputError
from einsum_transformer.formats.files import write_json
from einsum_transformer.formats.folder import write_safetensors_folder
from einsum_transformer.formats.safetensors import float32_to_bf16
from einsum_transformer.leaves.lora import LoRA, adapters_of
from einsum_transformer.models.builder import WeightSpec, weights_of
from einsum_transformer.models.config import ModelConfig
from einsum_transformer.models.decoder import Decoder
from einsum_transformer.models.families import FAMILIES
from einsum_transformer.models.families.config_keys import unapplied_settings, with_training_keys
from einsum_transformer.models.families.family import Family, unsaid
from einsum_transformer.models.finite import LOGITS, is_finite, origin
from einsum_transformer.models.lora_config import LoRAConfig
from einsum_transformer.models.peft_names import EMBEDDING, HEAD, POSITIONS, named_pairs, wrapper_names
from einsum_transformer.models.run_config import RunConfig
from einsum_transformer.models.stacked import stacks_of
from einsum_transformer.notes import note_once
from einsum_transformer.numerics.softmax import IGNORE_INDEX
from einsum_transformer.text.tokenizer import Tokenizer
from einsum_transformer.tree import named_leaves

Array = np.ndarray

__all__ = ["EMBEDDING", "HEAD", "POSITIONS", "Model"]


@dataclass(frozen=True, slots=True)
class Model:
    """A decoder with its config, its tokenizer and the names its weights have in a checkpoint."""

    config: ModelConfig
    decoder: Decoder
    tokenizer: Tokenizer | None = None
    generation_config: Mapping[str, Any] | None = None
    """What generation_config.json says, or None."""
    source: str = "random weights"
    lora: LoRAConfig | None = None
    """What the adapters on the weights are, or None if there are none."""
    run_config: RunConfig | None = None
    """The run config that it was loaded from: its keys are the defaults of `profile`, `Chat` and `train`."""

    @property
    def family(self) -> Family:
        return FAMILIES[self.config.model_type]

    @property
    def weights(self) -> dict[str, WeightSpec]:
        """Path -> place of everything the decoder holds. A tied matrix has two places if an adapter is on
        one."""
        held = replace(self.config, tie_word_embeddings=self.decoder.lm_head is None)
        return {weight.path: weight for weight in weights_of(held)}

    def module(self, path: str) -> str:
        """The name in a checkpoint of the module whose weight is at `path`: "model.layers.0.mlp.up_proj"."""
        return self.family.checkpoint_name(path).removesuffix(".weight")

    def logits(self, tokens: Any) -> Array:
        """tokens (b, t) ints -> next-token scores (b, t, v), all finite: else an InputError names the step
        in which the first that is not appears."""
        tokens = self.checked(tokens)
        with np.errstate(over="ignore", invalid="ignore"):
            logits = self.decoder.forward(tokens)[0]
        if not is_finite(logits):
            raise self.not_finite(tokens)
        return logits

    def not_finite(self, tokens: Array, pads: Array | None = None) -> InputError:
        """The error for scores of the text tokens (b, t) that are nan or inf: the first step that makes one,
        and the weight that holds one, if any does. pads (b,): the text's left padding."""
        found = origin(self.decoder, self.config.windows, tokens, pads)
        if not found.place:
            return InputError(
                f"{self.source}: the scores are nan or inf, but finite when they are computed again: what "
                "reads values has replaced one"
            )
        step = "the output head" if found.place == LOGITS else self.module(found.place)
        step = f"the input of {step}" if found.of_input else step
        if found.weight:
            reason = f"the weight {self.family.checkpoint_name(found.weight)} holds nan or inf"
        else:
            reason = "its weights are finite, so numbers grew too large (--dtype float64 has more room)"
        return InputError(f"{self.source}: {'nan' if found.nan else 'inf'} appears first in {step}: {reason}")

    def loss_and_gradients(self, tokens: Any, targets: Any) -> tuple[float, dict[str, Array]]:
        """Mean cross-entropy over the targets != -100, and its gradient by every parameter, in checkpoint
        layout; of a model with adapters by their matrices alone, which have PEFT's names and layout. A
        router's load-balancing loss (`output_router_logits`) is not part of it, which a note says.

        tokens, targets: (b, t) ints; targets[b, t] is the token that should follow tokens[b, t].
        """
        tokens, targets = self.checked(tokens), _integers(targets, "targets")
        if targets.shape != tokens.shape:
            raise InputError(
                f"targets have shape {targets.shape}, tokens {tokens.shape}: they must be the same"
            )
        self.checked(np.where(targets == IGNORE_INDEX, 0, targets), "targets")
        if added := unapplied_settings(self.config, losses_alone=True):
            note_once(f"{self.source}: the loss is without the load-balancing loss of {', '.join(added)}")
        loss, gradient = self.decoder.loss_and_gradient(tokens, targets)
        return loss, self._named(gradient)

    def named_parameters(self) -> dict[str, Array]:
        """Checkpoint name -> array in checkpoint layout (a view of the weight in use, where it is in
        memory); adapters' matrices under PEFT's names, beside the weights they are on."""
        return self._named(self.decoder)

    def adapter_parameters(self) -> dict[str, Array]:
        """PEFT's name -> array of the adapters' matrices alone: views of those in use, but for those of
        stacked experts, which are copies (see `set_adapter_parameters`)."""
        return self._pairs({path: _own_pair(leaf) for path, leaf in self.adapters.items()})

    def set_adapter_parameters(self, arrays: Mapping[str, Array]) -> None:
        """Write arrays into the adapters in use; names and shapes are those of `adapter_parameters`."""
        for name, array in self.adapter_parameters().items():
            np.copyto(array, arrays[name])
        leaves = self.adapters
        stacks = stacks_of(leaves)
        for path, module in wrapper_names(self.family, {leaf.stack for leaf in leaves.values()}).items():
            pair = arrays[f"{module}.lora_A.weight"], arrays[f"{module}.lora_B.weight"]
            for each, (a, b) in stacks[path].split(*pair).items():
                leaf = leaves[each]
                np.copyto(leaf.a, a.reshape(leaf.a.shape))
                np.copyto(leaf.b, b.reshape(leaf.b.shape))

    @property
    def adapters(self) -> dict[str, LoRA]:
        """Path -> adapter of every weight that has one."""
        return adapters_of(self.decoder)

    def cache(
        self, capacity: int = 0, pads: Array | None = None, horizon: int = 0, slack: int = 0
    ) -> KVCache:
        """An empty KV cache for this model; capacity in tokens avoids growth, pads (b,) counts left padding,
        horizon is the length that the text will have at least, slack how many tokens can be taken back."""
        return KVCache(self.config.windows, capacity, pads, horizon, slack)

    def save(
        self, folder: str | Path, max_shard_bytes: int = 5_000_000_000, dtype: str | None = None
    ) -> None:
        """Write a Hugging Face folder that transformers loads: config, weights, tokenizer, generation
        settings.

        dtype: what the weights are stored in ("float32", "bfloat16"); default what is computed in. A model
        with adapters is refused: merge them, or write them alone (`write_adapter`).
        """
        folder = Path(folder)
        if self.lora is not None:
            raise InputError(f"{folder}: the model has an adapter: merge it first, or save the adapter alone")
        if lost := unsaid(self.family, self.config):
            value = getattr(self.config, lost)
            raise InputError(f"{folder}: a {self.family.model_type} config.json cannot say {lost} = {value}")
        config = with_training_keys(self.family.write_config(self.config), self.config.training)
        head = {"architectures": [self.family.architecture], "model_type": self.config.model_type}
        parameters = self.named_parameters()
        if dtype == "bfloat16":
            parameters = {name: float32_to_bf16(np.asarray(w, np.float32)) for name, w in parameters.items()}
        elif dtype is not None:
            parameters = {name: w.astype(dtype, copy=False) for name, w in parameters.items()}
        dtype = dtype or str(next(iter(parameters.values())).dtype)
        folder.mkdir(parents=True, exist_ok=True)
        if self.tokenizer is not None:
            self.tokenizer.save(folder, self.config.model_type)
        if self.generation_config is not None:
            write_json(folder / "generation_config.json", dict(self.generation_config))
        write_safetensors_folder(folder, parameters, max_shard_bytes)
        # Last: if the weights cannot be written, the folder still says what an earlier save's weights are.
        write_json(folder / "config.json", head | config | {"dtype": dtype})

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

    def _named(self, decoder: Decoder) -> dict[str, Array]:
        """The leaves of a decoder, or of a gradient, by the names they have in files."""
        places, adapters, found = self.weights, self.adapters, {}
        pairs: dict[str, tuple[Array | None, Array]] = {}
        for path, leaf in named_leaves(decoder):
            if isinstance(leaf, Gradients):
                pairs[path] = leaf.parts["lora_A"], leaf.parts["lora_B"]
                continue
            if path in adapters and leaf is adapters[path]:
                pairs[path] = _own_pair(adapters[path])
            base = leaf.bare() if isinstance(leaf, Leaf) else leaf
            # A tied matrix in its second role is there to have an adapter or none, and is no other parameter.
            if path != HEAD or not self.config.tie_word_embeddings:
                array = base.array() if isinstance(base, Leaf) else base
                stored = array.reshape(places[path].stored)
                turned = self.family.is_transposed(path)
                found[self.family.checkpoint_name(path)] = stored.T if turned else stored
        return found | self._pairs(pairs)

    def _pairs(self, pairs: Mapping[str, tuple[Array | None, Array]]) -> dict[str, Array]:
        """Path -> A and B, or their gradients, under PEFT's names and in its layout."""
        flat = {
            path: (None if a is None else a.reshape(len(a), -1), b.reshape(-1, b.shape[-1]))
            for path, (a, b) in pairs.items()
        }
        return named_pairs(self.family, self.adapters, flat)


def _own_pair(leaf: LoRA) -> tuple[Array | None, Array]:
    """A and B, None for an A that another weight owns."""
    return None if leaf.owner else leaf.a, leaf.b


def _integers(values: Any, what: str) -> Array:
    """`values` as an array of whole numbers, or an error (also for rows of different lengths)."""
    try:
        array = np.asarray(values)
    except ValueError:
        raise InputError(f"{what}: rows of different lengths; generate() takes such batches") from None
    if array.size and array.dtype.kind not in "iu":
        raise InputError(f"{what} are {array.dtype}: token ids are integers")
    return array
