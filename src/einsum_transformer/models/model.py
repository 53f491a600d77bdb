"""Model: a decoder with its config, its tokenizer and the checkpoint names of its weights."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from einsum_transformer.arguments import checked
from einsum_transformer.components.cache_types import UNCHANGED, CacheType
from einsum_transformer.components.kv_cache import KVCache
from einsum_transformer.engine import Gradients, Leaf, blas
from einsum_transformer.errors import InputError
from einsum_transformer.formats.codes import METHOD
from einsum_transformer.formats.files import write_json
from einsum_transformer.formats.folder import write_safetensors_folder
from einsum_transformer.formats.safetensors import float32_to_bf16
from einsum_transformer.leaves.lora import LoRA, adapters_of
from einsum_transformer.models.builder import WeightSpec, weights_of
from einsum_transformer.models.compressed_tensors import compressed
from einsum_transformer.models.config import ModelConfig
from einsum_transformer.models.decoder import Decoder
from einsum_transformer.models.families import FAMILIES
from einsum_transformer.models.families.config_keys import unapplied_settings, with_training_keys
from einsum_transformer.models.families.family import Family, unwritten_field
from einsum_transformer.models.finite import LOGITS, is_finite, origin
from einsum_transformer.models.lora_config import LoRAConfig
from einsum_transformer.models.peft_names import EMBEDDING, HEAD, POSITIONS, named_pairs, wrapper_names
from einsum_transformer.models.run_config import RunConfig
from einsum_transformer.models.scheme import Quantization
from einsum_transformer.models.stacked import stacks_of
from einsum_transformer.notes import note_once
from einsum_transformer.numerics.softmax import IGNORE_INDEX
from einsum_transformer.text.tokenizer import Tokenizer
from einsum_transformer.tree import named_leaves

Array = np.ndarray

__all__ = ["EMBEDDING", "HEAD", "POSITIONS", "Model"]


@checked
@dataclass(frozen=True, slots=True)
class Model:
    """A decoder with its config, its tokenizer and the checkpoint names of its weights."""

    config: ModelConfig
    decoder: Decoder
    tokenizer: Tokenizer | None = None
    generation_config: Mapping[str, Any] | None = None
    """The contents of generation_config.json, or None."""
    source: str = "random weights"
    lora: LoRAConfig | None = None
    """The settings of the LoRA adapters on the weights; None: no adapters."""
    run_config: RunConfig | None = None
    """The run config that it was loaded from: its keys are the defaults of `profile`, `Chat` and `train`."""
    quantization: Quantization | None = None
    """How the weights are quantized; None: they are not."""
    cache_types: tuple[CacheType, CacheType] = (UNCHANGED, UNCHANGED)
    """How cached keys and values are stored."""

    @property
    def family(self) -> Family:
        """How checkpoints of this architecture are read and written."""
        return FAMILIES[self.config.model_type]

    @property
    def weights(self) -> dict[str, WeightSpec]:
        """Path -> spec of every weight of the decoder. Tied embeddings have two entries if one of the roles
        has an adapter."""
        config = replace(self.config, tie_word_embeddings=self.decoder.lm_head is None)
        return {weight.path: weight for weight in weights_of(config)}

    @checked
    def module(self, path: str) -> str:
        """Checkpoint name of the module whose weight is at `path`, such as "model.layers.0.mlp.up_proj"."""
        return self.family.checkpoint_name(path).removesuffix(".weight")

    @checked
    def logits(self, tokens: Any) -> Array:
        """Token ids (b, t) -> next-token logits (b, t, v), without a KV cache: its types have no effect.
        Errors: InputError for logits with nan or inf; it names the step that first produces them."""
        tokens = self.checked(tokens)
        with np.errstate(over="ignore", invalid="ignore"):
            logits = self.decoder.forward(tokens)[0]
        if not is_finite(logits):
            raise self.not_finite(tokens)
        return logits

    def not_finite(self, tokens: Array, pads: Array | None = None) -> InputError:
        """The error for logits of tokens (b, t) with nan or inf: it names the first step that produces one,
        and the weight that contains one, if any. pads (b,): left padding."""
        found = origin(self.decoder, self.config.windows, tokens, pads)
        if not found.place:
            return InputError(
                f"{self.source}: the logits are nan or inf, but finite when they are recomputed: a reader of "
                "the recorder has replaced a value"
            )
        step = "the output head" if found.place == LOGITS else self.module(found.place)
        step = f"the input of {step}" if found.of_input else step
        if found.weight:
            reason = f"the weight {self.family.checkpoint_name(found.weight)} contains nan or inf"
        else:
            reason = "its weights are finite, so values overflowed (`dtype` float64 has a larger range)"
        return InputError(f"{self.source}: {'nan' if found.nan else 'inf'} appears first in {step}: {reason}")

    @checked
    def loss_and_gradients(self, tokens: Any, targets: Any) -> tuple[float, dict[str, Array]]:
        """Mean cross-entropy over the targets != -100, and parameter name -> gradient, in checkpoint layout.
        For a model with adapters: of the adapters' matrices only, with PEFT's names and layout. A router's
        load-balancing loss (`output_router_logits`) is not included; a note names it.

        tokens, targets: (b, t) token ids; `targets[b, t]` is the token that follows `tokens[b, t]`.
        """
        tokens, targets = self.checked_pair(tokens, targets)
        if added := unapplied_settings(self.config, losses_only=True):
            note_once(f"{self.source}: the loss excludes the load-balancing loss of {', '.join(added)}")
        with blas.fixed_threads():
            loss, gradient = self.decoder.loss_and_gradient(tokens, targets)
        return loss, self._named(gradient)

    def checked_pair(self, tokens: Any, targets: Any) -> tuple[Array, Array]:
        """`tokens` and `targets` as (b, t) arrays; targets may be -100."""
        tokens, targets = self.checked(tokens), _integers(targets, "`targets`")
        if targets.shape != tokens.shape:
            raise InputError(
                f"`targets` have shape {targets.shape}, `tokens` {tokens.shape}: expected equal shapes"
            )
        self.checked(np.where(targets == IGNORE_INDEX, 0, targets), "`targets`")
        return tokens, targets

    def named_parameters(self) -> dict[str, Array]:
        """Checkpoint name -> array in checkpoint layout (a view of the weight in use, if it is in memory),
        and the adapters' matrices under PEFT's names."""
        return self._named(self.decoder)

    def adapter_parameters(self) -> dict[str, Array]:
        """PEFT's name -> array of the adapters' matrices only: views of the arrays in use, except for stacked
        experts, which are copies (see `set_adapter_parameters`)."""
        return self._pairs({path: _own_pair(leaf) for path, leaf in self.adapters.items()})

    @checked
    def set_adapter_parameters(self, arrays: Mapping[str, Array]) -> None:
        """Copy arrays into the adapters in use; names and shapes are those of `adapter_parameters`."""
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
        """Path -> LoRA adapter of every weight that has one."""
        return adapters_of(self.decoder)

    @checked
    def cache(
        self, capacity: int = 0, pads: Array | None = None, horizon: int = 0, slack: int = 0
    ) -> KVCache:
        """An empty KV cache for this model. capacity: initial size in tokens; pads (b,): left padding;
        horizon: minimum final length of the sequence; slack: number of tokens that can be removed at any
        time."""
        return KVCache(self.config.windows, capacity, pads, horizon, slack, self.cache_types)

    @checked
    def save(
        self,
        folder: str | Path,
        max_shard_bytes: int = 5_000_000_000,
        dtype: str | None = None,
        save_format: str = "einsum_transformer",
    ) -> None:
        """Write a folder that transformers loads: config, weights, tokenizer, generation settings.

        dtype: storage dtype of the weights ("float32", "bfloat16"), by default the computation dtype. The
        codes and scales of quantized weights are written as they are; only this package reads them, unless
        `save_format` is "compressed-tensors", which vLLM and transformers load, with the embedding and the
        output head as floats. Errors: InputError for a model with adapters: merge them, or write only them
        (`save_adapter`).
        """
        folder = Path(folder)
        if self.lora is not None:
            raise InputError(f"{folder}: the model has an adapter: merge it first, or save only the adapter")
        if self.quantization is not None and self.quantization.simulated:
            raise InputError(f"{folder}: simulated quantization is not saved: quantize with mode real")
        if field := unwritten_field(self.family, self.config):
            value, kind = getattr(self.config, field), self.family.model_type
            raise InputError(f"{folder}: a {kind} config.json cannot represent {field} = {value}")
        config = with_training_keys(self.family.write_config(self.config), self.config.training)
        head = {"architectures": [self.family.architecture], "model_type": self.config.model_type}
        if save_format not in (METHOD, "compressed-tensors"):
            raise InputError(f"`save_format` is {save_format!r}: expected {METHOD} or compressed-tensors")
        quantized: Mapping[str, Any] = {}
        if save_format == METHOD:
            codes, quantized = self._codes()
            parameters = self._named(self.decoder, quantized)
        else:
            codes, names, config["quantization_config"] = compressed(
                self.decoder, self.family, self.quantization, self.source
            )
            parameters = self._named(self.decoder, names)
        if self.quantization is not None and save_format == METHOD:
            config["quantization_config"] = {
                "quant_method": METHOD,
                "scheme": str(self.quantization.scheme),
                "activation_bits": self.quantization.scheme.activation_bits,
                "exclude": list(self.quantization.exclude),
                "by_name": {name: str(scheme) for name, scheme in self.quantization.by_name},
                "weights": quantized,
            }
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
        write_safetensors_folder(folder, parameters | codes, max_shard_bytes)
        # Last: if the weights cannot be written, config.json still describes the weights of an earlier save.
        write_json(folder / "config.json", head | config | {"dtype": dtype})

    def _codes(self) -> tuple[dict[str, Array], dict[str, list[int]]]:
        """The parts of the quantized weights by tensor name, and the weights as `formats.codes` describes
        them: checkpoint name -> [rows, columns, bits, group, transposed]."""
        arrays: dict[str, Array] = {}
        described: dict[str, list[int]] = {}
        for path, leaf in named_leaves(self.decoder):
            packed = leaf.packed() if isinstance(leaf, Leaf) else None
            if packed is not None:
                name = self.family.checkpoint_name(path)
                arrays |= {f"{name}.{part}": array for part, array in packed[0].items()}
                described[name] = [*packed[1], int(self.family.is_transposed(path))]
        return arrays, described

    def checked(self, tokens: Any, what: str = "`tokens`") -> Array:
        """`tokens` as a (b, t) array of ids that are in the vocabulary."""
        tokens = _integers(tokens, what)
        if tokens.ndim != 2 or tokens.size == 0:
            raise InputError(f"{what} have shape {tokens.shape}: expected a non-empty (batch, time) array")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.config.vocab_size:
            bad = low if low < 0 else high
            raise InputError(f"{what}: id {bad} is outside the vocabulary of {self.config.vocab_size}")
        return tokens

    def _named(self, decoder: Decoder, skipped: Collection[str] = ()) -> dict[str, Array]:
        """The leaves of a decoder, or of a gradient, by checkpoint name, without the names `skipped`."""
        specs, adapters = self.weights, self.adapters
        found: dict[str, Array] = {}
        pairs: dict[str, tuple[Array | None, Array]] = {}
        for path, leaf in named_leaves(decoder):
            if isinstance(leaf, Gradients):
                pairs[path] = leaf.parts["lora_A"], leaf.parts["lora_B"]
                continue
            if path in adapters and leaf is adapters[path]:
                pairs[path] = _own_pair(adapters[path])
            base = leaf.base_weight() if isinstance(leaf, Leaf) else leaf
            # With tied embeddings the head exists only for adapters; it is not a separate parameter.
            name = self.family.checkpoint_name(path)
            if name not in skipped and (path != HEAD or not self.config.tie_word_embeddings):
                array = base.array() if isinstance(base, Leaf) else base
                stored = array.reshape(specs[path].stored)
                transposed = self.family.is_transposed(path)
                found[name] = stored.T if transposed else stored
        return found | self._pairs(pairs)

    def _pairs(self, pairs: Mapping[str, tuple[Array | None, Array]]) -> dict[str, Array]:
        """A and B by path, or their gradients, under PEFT's names and in PEFT's layout."""
        flat = {
            path: (None if a is None else a.reshape(len(a), -1), b.reshape(-1, b.shape[-1]))
            for path, (a, b) in pairs.items()
        }
        return named_pairs(self.family, self.adapters, flat)


def _own_pair(leaf: LoRA) -> tuple[Array | None, Array]:
    """A and B of an adapter; A is None if another weight owns it."""
    return None if leaf.owner else leaf.a, leaf.b


def _integers(values: Any, what: str) -> Array:
    """`values` as an integer array. Errors: InputError for other types and for rows of different lengths."""
    try:
        array = np.asarray(values)
    except ValueError:
        raise InputError(f"{what}: rows of different lengths; generate() accepts such batches") from None
    if array.size and array.dtype.kind not in "iu":
        raise InputError(f"{what} are {array.dtype}: expected integer token ids")
    return array
