"""Check that a checkpoint has the tensors that its config requires, and that its text files are text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from einsum_transformer.errors import FormatError
from einsum_transformer.formats import TensorInfo, TensorSource
from einsum_transformer.formats.gguf import GGUFFile
from einsum_transformer.formats.links import BROKEN_LINK, is_broken_link
from einsum_transformer.formats.mapped import quoted
from einsum_transformer.formats.quantized_methods import METHODS
from einsum_transformer.formats.unsupported import check_kind
from einsum_transformer.loading.gguf import gguf_place
from einsum_transformer.loading.places import Place, folder_place
from einsum_transformer.models.builder import weights_of
from einsum_transformer.models.config import ModelConfig
from einsum_transformer.models.families import FAMILIES, gguf
from einsum_transformer.models.families.family import Family
from einsum_transformer.tables import first_names

_FEW_EXPERTS = 256
_TEXT_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json"),
)
_INTEGERS = frozenset({"I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64", "BOOL"})
_QUANTIZED = re.compile(
    r".*(\.(qweight|qzeros|scales|biases|g_idx|weight_packed|weight_scale(_inv|_2)?|input_scale|SCB|W_q)"
    r"|\.weight[._:](absmax|quant_map|quant_state.*|_data|_scale|qdata|scale)|_(blocks|scales))"
)
_WRAPPERS = {
    "module.": "saved from DistributedDataParallel: save model.module instead",
    "_orig_mod.": "saved from a model of torch.compile: save model._orig_mod instead",
    "_fsdp_wrapped_module.": "saved from FSDP without gathering: save a full state dict",
    "base_model.model.": "saved from a PEFT model: merge the adapter (merge_and_unload) before saving",
    "tok_embeddings.": "a name of Meta's or Mistral's format: use the model in Hugging Face format",
    "language_model.encoder.": "a name of Megatron-LM: convert the model to the Hugging Face format first",
    "score.": "a head for classification or rewards: such models have no next-token logits",
    "classifier.": "a head for classification: such models have no next-token logits",
    "qa_outputs.": "a head for question answering: such models have no next-token logits",
    "v_head.": "a value head of reinforcement learning: save the model without it",
}
"""Prefix of an unexpected tensor name -> its meaning."""


def places_of(config: ModelConfig, tensors: TensorSource) -> tuple[Family, dict[str, Place]]:
    """Return the family with the names of these tensors, and the location of each weight by its path.

    Raises FormatError if the config has more layers or experts than the tensors can contain, before any
    names are generated.
    """
    _check_counts(config, tensors)
    family = FAMILIES[config.model_type]
    if isinstance(tensors, GGUFFile):
        place = gguf_place
    else:
        place, family = folder_place, family.found_in(tensors.names())
    return family, {weight.path: place(weight, family, config, tensors) for weight in weights_of(config)}


def _check_counts(config: ModelConfig, tensors: TensorSource) -> None:
    count, layers = len(tensors.names()), config.num_hidden_layers
    if layers > count:
        raise FormatError(f"{tensors.path}: {layers} layers in the config, only {count} tensors in the file")
    if config.moe is None:
        return
    experts = config.moe.num_experts
    layers = sum(config.has_experts(i) for i in range(layers))
    if layers * experts <= max(count, _FEW_EXPERTS):
        return
    shapes = [tensors.info(name).shape for name in tensors.names()]
    stacks = sum(len(shape) == 3 and shape[0] == experts for shape in shapes)
    if stacks < layers:
        raise FormatError(
            f"{tensors.path}: {experts} experts in each of {layers} layers in the config, but only {count} "
            f"tensors in the file, {stacks} of them stacks of {experts} experts"
        )


def tensor_problems(
    config: ModelConfig,
    family: Family,
    places: Mapping[str, Place],
    tensors: TensorSource,
    infos: Mapping[str, TensorInfo],
) -> list[str]:
    """List the differences between the tensors and the weights that the config requires, a sentence each.

    infos: information on all tensors that can be read.
    """
    stored = {name: shape for place in places.values() for name, shape in place.shapes.items()}
    is_gguf = isinstance(tensors, GGUFFile)
    ignored = gguf.FACTORS if is_gguf else family.ignored_tensors
    spare = family.checkpoint_name("lm_head.weight") if config.tie_word_embeddings and not is_gguf else ""
    found = {name for name in tensors.names() if not re.fullmatch(ignored, name)}
    missing = [name for name in stored if name not in found]
    unexpected = sorted(name for name in found if name not in stored and name != spare)
    held = {name: infos[name] for name in stored if name in infos}
    return [
        *_meaning(config, family, missing, unexpected, held),
        *_named("missing from the file", missing),
        *_named("in the file but not in the model", unexpected),
        *_wrong_types(held),
        *_wrong_shapes(held, stored),
        *_transposed(held, places, config.model_type),
        *(_other_head(tensors, spare, places["embed_tokens.weight"]) if spare in found else ()),
    ]


def check_beside(folder: Path) -> None:
    """Raise FormatError for tokenizer and generation files that are broken links or not text."""
    for name in _TEXT_FILES:
        path = folder / name
        if is_broken_link(path):
            raise FormatError(f"{path}: {BROKEN_LINK}")
        if path.is_file():
            check_kind(path, "JSON", "text", *(("empty",) if name.endswith((".txt", ".jinja")) else ()))


def _meaning(
    config: ModelConfig,
    family: Family,
    missing: Sequence[str],
    unexpected: Sequence[str],
    held: Mapping[str, TensorInfo],
) -> list[str]:
    """Return the probable cause of missing, unexpected or empty tensors in one sentence, or []."""
    if empty := [name for name, info in held.items() if 0 in info.shape]:
        return [
            f"{len(empty)} tensors, such as {_name(empty[0])}, are empty: saved by DeepSpeed ZeRO-3 without "
            "gathering the weights; create them with zero_to_fp32.py"
        ]
    if packed := [name for name in unexpected if _QUANTIZED.fullmatch(name)]:
        return [
            f"quantized weights ({_name(packed[0])}), which are not supported; use the unquantized checkpoint"
        ]
    for start, meaning in _WRAPPERS.items():
        if other := [name for name in unexpected if name.startswith(start)]:
            return [f"{_name(other[0])}: {meaning}"]
    head = family.checkpoint_name("lm_head.weight")
    if head in missing and not config.tie_word_embeddings and not unexpected:
        return [
            f"{_name(head)} is missing, and tie_word_embeddings is false: a base model without its head "
            "(AutoModel); save it with AutoModelForCausalLM, or set tie_word_embeddings to true in "
            "config.json if the embedding is the head"
        ]
    return []


def _named(what: str, names: Sequence[str]) -> list[str]:
    return [f"{what}: {first_names([_name(name) for name in names], 8)}"] if names else []


def _name(name: str) -> str:
    """Return a tensor's name, quoted if it is long or has unusual characters."""
    return name if name.isprintable() and " " not in name and 0 < len(name) <= 80 else quoted(name)


def _wrong_types(held: Mapping[str, TensorInfo]) -> list[str]:
    packed = [name for name, info in held.items() if info.dtype in _INTEGERS]
    return [
        f"tensor {_name(name)} is {held[name].dtype}: expected a floating-point tensor" for name in packed[:1]
    ]


def _wrong_shapes(held: Mapping[str, TensorInfo], stored: Mapping[str, tuple[int, ...]]) -> list[str]:
    wrong = [
        f"{_name(name)} is {list(info.shape)} in the file, the config requires {list(stored[name])}"
        for name, info in held.items()
        if info.shape != stored[name] and 0 not in info.shape  # `_meaning` reports empty tensors
    ]
    return [first_names(wrong, 8, "; ")] if wrong else []


def _transposed(held: Mapping[str, TensorInfo], places: Mapping[str, Place], model_type: str) -> list[str]:
    """Report quantized tensors whose rows are the inputs: the formats describe rows of outputs."""
    labels = {method.label for method in METHODS.values()}
    names = [place.stored.name for place in places.values() if place.stored.in_file_order is not None]
    found = [name for name in names if name in held and held[name].dtype in labels]
    return [f"{_name(found[0])}: quantized matrices of {model_type} are not supported"] if found else []


def _other_head(tensors: TensorSource, head: str, embedding: Place) -> list[str]:
    """Report if the unused head of a tied model differs from the embedding, which would replace it."""
    own = embedding.stored.name
    if own not in tensors.names():
        return []
    same = tensors.info(head).shape == tensors.info(own).shape
    same = same and np.array_equal(tensors.read(head).view(np.uint8), tensors.read(own).view(np.uint8))
    tensors.release(head)
    return [] if same else [f"tie_word_embeddings is true, but {_name(head)} differs from {_name(own)}"]
