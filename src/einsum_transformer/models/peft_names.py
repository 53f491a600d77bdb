"""PEFT's names and layout of the matrices of adapters."""

import re
from collections.abc import Mapping
from typing import Any

from einsum_transformer.errors import FormatError
from einsum_transformer.formats.mapped import quoted
from einsum_transformer.formats.safetensors import SafetensorsFile
from einsum_transformer.leaves.lora import LoRA
from einsum_transformer.models.families.family import Family
from einsum_transformer.models.stacked import EXPERT, Array, stacks_of
from einsum_transformer.notes import note

PREFIX = "base_model.model."
"""The prefix of all tensor names in PEFT's files."""
EMBEDDING, POSITIONS, HEAD = "embed_tokens.weight", "embed_positions.weight", "lm_head.weight"


def named_pairs(
    family: Family, leaves: Mapping[str, LoRA], pairs: Mapping[str, tuple[Any, Array]]
) -> dict[str, Array]:
    """PEFT's name -> array. pairs: path -> A (r, in) and B (out, r) of each of the leaves, or their
    gradients; A is None if another weight owns it."""
    stacks, wrappers = stacks_of(leaves), wrapper_names(family, {leaf.stack for leaf in leaves.values()})
    found: dict[str, Array] = {}
    for path, (a, b) in pairs.items():
        if not (stack := leaves[path].stack):
            found |= _pair(path, adapter_module(family, leaves, path), a, b)
        elif path == stacks[stack].paths[0]:
            found |= _pair(stack, wrappers[stack], *stacks[stack].joined(pairs))
    return found


def _pair(path: str, module: str, a: Array, b: Array) -> dict[str, Array]:
    if path == EMBEDDING:  # W (v, d) += scaling (A^T B^T), where PEFT's A is (r, v)
        return {f"{module}.lora_embedding_A": b.T, f"{module}.lora_embedding_B": a.T}
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}


def adapter_module(family: Family, leaves: Mapping[str, LoRA], path: str) -> str:
    """The module name of a weight in an adapter: that of transformers 5, or of transformers 4, which has a
    module for each expert, if single experts have adapters."""
    if any(EXPERT.fullmatch(other) and not leaf.stack for other, leaf in leaves.items()):
        return family.checkpoint_name(path).removesuffix(".weight")
    return family.module_name(path)


def stack_name(family: Family, stack: str) -> str:
    """The name of a stacked parameter in transformers 5, by its path."""
    experts, _, name = stack.rpartition(".")
    return f"{family.module_name(experts)}.{name}"


def wrapper_names(family: Family, stacks: set[str]) -> dict[str, str]:
    """Path of a stacked parameter -> the module of its adapter. PEFT wraps the experts once for each
    parameter, `down_proj` outermost, so the inner module has `.base_layer` in its name."""
    found = {}
    for stack in stacks - {""}:
        experts, _, name = stack.rpartition(".")
        inner = name != "down_proj" and f"{experts}.down_proj" in stacks
        found[stack] = family.module_name(experts) + ".base_layer" * inner
    return found


def names_in(file: SafetensorsFile, ignored: str) -> list[str]:
    """The tensors of an adapter file that belong to the text model; a note counts those of other parts.

    ignored: the pattern of the tensors of a checkpoint that do not belong to the text model. Errors:
    FormatError for empty tensors.
    """
    names = list(file.names())
    others = [name for name in names if re.fullmatch(ignored, name.removeprefix(PREFIX))]
    if others:
        note(
            f"{file.path}: ignored {len(others)} tensors, such as {quoted(others[0])}, of parts of the model "
            "that are not supported"
        )
    used = [name for name in names if name not in set(others)] if others else names
    if empty := [name for name in used if 0 in file.info(name).shape]:
        raise FormatError(
            f"{file.path}: {len(empty)} tensors, such as {quoted(empty[0])}, are empty: saved by DeepSpeed "
            "ZeRO-3 without gathering the weights; save the adapter with "
            "stage3_gather_16bit_weights_on_model_save, or create it from the output of zero_to_fp32.py"
        )
    return used
