# pyright: reportUnnecessaryIsInstance=false
"""Adapter folders of PEFT: adapter_config.json and adapter_model.safetensors.

Tensors are named `base_model.model.<module>.lora_A.weight` [r, in] and `.lora_B.weight` [out, r], those of an
embedding `.lora_embedding_A` [r, in] and `.lora_embedding_B` [out, r] (https://github.com/huggingface/peft).
stacked.py describes those of stacked experts, mlx_adapter.py reads the folders of mlx-lm.
"""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from einsum_transformer.arguments import checked
from einsum_transformer.errors import ConfigError, FormatError, InputError
from einsum_transformer.formats.files import write_json
from einsum_transformer.formats.mapped import quoted
from einsum_transformer.formats.safetensors import SafetensorsFile, write_safetensors
from einsum_transformer.models import mlx_adapter
from einsum_transformer.models.adapters import Planned, add_adapters, matrices_of, no_matrix, planned_stack
from einsum_transformer.models.lora_config import LoRAConfig
from einsum_transformer.models.model import EMBEDDING, HEAD, Model
from einsum_transformer.models.peft_config import CONFIG, config_dict, note_base, read_config
from einsum_transformer.models.peft_names import PREFIX, names_in
from einsum_transformer.models.stacked import Pair, Stack, stacks_of

Array = np.ndarray

TENSORS = "adapter_model.safetensors"
_TENSOR = re.compile(
    r"(?P<module>.+?)(?P<inner>(\.base_layer)*)\.lora_(?P<embedding>embedding_)?(?P<part>[AB])(\.weight)?"
)
_COPY = re.compile(r"(?P<module>.+?)(\.base_layer)?\.(?P<kind>weight|bias)")
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


def adapter_digest(folder: str | Path) -> str:
    """The sha256 of an adapter: of its tensors and its config."""
    folder = _checked_folder(folder)
    names = (TENSORS, CONFIG)
    if mlx_adapter.is_mlx(folder):
        names = (mlx_adapter.TENSORS, CONFIG)
    else:
        read_config(folder)
    found = hashlib.sha256()
    for name in names:
        path = folder / name
        if not path.is_file():
            raise InputError(f"{folder}: does not contain {name}")
        found.update(path.read_bytes())
    return found.hexdigest()


def with_adapter(model: Model, folder: str | Path) -> Model:
    """The model with the adapter of a PEFT or mlx-lm folder, converted to the model's dtype.

    Errors: InputError for a method other than LoRA, an adapter of another base model, or damaged files.
    """
    folder = _checked_folder(folder)
    try:
        if mlx_adapter.is_mlx(folder):
            config, pairs = mlx_adapter.read(folder, places_of(model), model.family.ignored_tensors)
            planned = {path: Planned(*config.rank_and_scaling(path)) for path in pairs}
        else:
            config = read_config(folder)
            note_base(folder, model.source)
            planned, pairs = _read_pairs(folder, model, config)
        matrices = matrices_of(model)
        for path, own in planned.items():
            outputs, inputs = matrices[path].stored
            module = model.family.module_name(path)
            _check_shapes(module, pairs[path], (own.rank, inputs), (outputs, own.rank))
        return add_adapters(model, config, planned, lambda path, _planned, _spec: pairs[path])
    except (ConfigError, FormatError):
        raise
    except InputError as error:
        raise error if str(folder) in str(error) else InputError(f"{folder}: {error}") from None


def _checked_folder(folder: str | Path) -> Path:
    """The path of an adapter folder. Errors: InputError that describes what the path is instead."""
    if not str(folder):
        raise InputError("`adapter` is an empty path: expected the folder of an adapter")
    folder = Path(folder)
    if not folder.exists():
        hint = ""
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)) and not str(folder).startswith("."):
            hint = "; adapters are not downloaded from the hub: use `hf download` and give the local folder"
        raise InputError(f"{folder}: no such folder{hint}")
    if not folder.is_dir():
        raise InputError(
            f"{folder}: is a file; an adapter is a folder with {CONFIG} and {TENSORS}"
            + (" (GGUF adapters are not supported)" if folder.suffix.lower() == ".gguf" else "")
        )
    if not (folder / CONFIG).is_file():
        whole = ", it is a whole model: give it as the model" if (folder / "config.json").is_file() else ""
        raise InputError(
            f"{folder}: does not contain {CONFIG}{whole}; expected a folder written by PEFT or `etx train`"
        )
    return folder


def places_of(model: Model) -> dict[str, str]:
    """Every name that a module may have in an adapter -> the path of its matrix, or of a layer's experts.

    Names have any prefix of the family's files, or none if the adapted model had no head (AutoModel).
    """
    family = model.family
    found: dict[str, str] = {}
    matrices = matrices_of(model)
    experts: set[str] = (
        {path.rpartition(".")[0] for path in stacks_of(matrices)} if family.stacked_experts else set()
    )
    for prefix in family.prefixes:
        other = replace(family, prefix=prefix)
        outer = re.sub(r"(^|\.)model\.$", r"\1", prefix)
        for path in (*matrices, *sorted(experts)):
            for name in (other.checkpoint_name(path).removesuffix(".weight"), other.module_name(path)):
                found.setdefault(name, path)
                if path == HEAD:
                    found.setdefault(f"{outer}{name}", path)
    return found


@dataclass(frozen=True, slots=True)
class _Half:
    """One of the two matrices of an adapter, as stored in the file."""

    module: str
    """The module's name in the file."""
    path: str
    """The path of the weight, or of the experts."""
    depth: int
    """Nesting depth of this PEFT wrapper of the experts; 0: the outermost."""
    part: str
    array: Array


def _read_pairs(folder: Path, model: Model, config: LoRAConfig) -> tuple[dict[str, Planned], dict[str, Pair]]:
    """Path -> planned adapter, and path -> its matrices in W + scaling * B A: A (r, in), B (out, r)."""
    path = folder / TENSORS
    if not path.is_file():
        hint = (
            " (adapter_model.bin, a pickle, is not read)" if (folder / "adapter_model.bin").exists() else ""
        )
        raise InputError(f"{folder}: does not contain {TENSORS}{hint}")
    whole: dict[tuple[str, int], dict[str, _Half]] = {}
    for half in _halves(path, model):
        parts = whole.setdefault((half.path, half.depth), {})
        if half.part in parts:
            raise FormatError(
                f"{path}: contains lora_{half.part} of {quoted(half.module)} twice, under two names"
            )
        parts[half.part] = half
    for parts in whole.values():
        if parts.keys() != {"A", "B"}:
            module = next(iter(parts.values())).module
            raise FormatError(f"{path}: {quoted(module)} has only one of lora_A and lora_B")
    if not whole:
        raise FormatError(f"{path}: does not contain LoRA matrices")
    planned: dict[str, Planned] = {}
    pairs: dict[str, Pair] = {}
    matrices = matrices_of(model)
    stacks = stacks_of(matrices)
    for (target, depth), parts in whole.items():
        pair, module = (parts["A"].array, parts["B"].array), parts["A"].module
        if target in matrices:
            name = f"{module}.weight" if config.targets_parameter(f"{module}.weight") else module
            planned[target], pairs[target] = Planned(*config.rank_and_scaling(name)), pair
            continue
        wrappers = [d for other, d in whole if other == target]
        stack, name = _stack_at(path, target, module, depth, wrappers, stacks, config)
        rank, alpha = config.rank_and_alpha(name)
        outputs, inputs = matrices[stack.paths[0]].stored
        experts, all_ranks = len(stack.experts), rank * len(stack.experts)
        wanted = (all_ranks, inputs), (outputs * len(stack.experts[0]), all_ranks)
        _check_shapes(f"{name}, {experts} experts", pair, *wanted)
        planned |= planned_stack(stack, config, rank, alpha)
        pairs |= stack.split(*pair)
    return planned, pairs


def _halves(path: Path, model: Model) -> Iterable[_Half]:
    """All matrices of an adapter file."""
    paths, file = places_of(model), SafetensorsFile(path)
    matrices = matrices_of(model)
    try:
        for name in names_in(file, model.family.ignored_tensors):
            plain = name.removeprefix(PREFIX)
            match = _TENSOR.fullmatch(plain)
            target = paths.get(match["module"]) if match else None
            # PEFT uses the names lora_embedding_A and lora_embedding_B for embeddings only.
            if match is None or bool(match["embedding"]) != (target == EMBEDDING):
                _check_copy(file, name, paths, model)
                continue
            depth = match["inner"].count(".base_layer")
            if target is None or (depth and target in matrices):
                raise no_matrix(model, [match["module"] + match["inner"]])
            if file.info(name).dtype not in _FLOATS:
                raise FormatError(
                    f"{path}: tensor {quoted(name)} has dtype {file.info(name).dtype}, expected a float"
                )
            array = file.read(name).astype(np.float64 if file.info(name).dtype == "F64" else np.float32)
            if array.ndim != 2:
                raise FormatError(f"{path}: tensor {quoted(name)} has {array.ndim} axes, expected a matrix")
            # PEFT's A of an embedding has a column per token; transposed, it is B here.
            part = match["part"] if not match["embedding"] else "BA"["AB".index(match["part"])]
            yield _Half(match["module"], target, depth, part, array.T if match["embedding"] else array)
    finally:
        file.close()


def _stack_at(
    path: Path,
    target: str,
    module: str,
    depth: int,
    wrappers: list[int],
    stacks: dict[str, Stack],
    config: LoRAConfig,
) -> tuple[Stack, str]:
    """The stacked parameter whose adapter is the wrapper of a layer's experts at this depth, and its name:
    PEFT wraps gate_up_proj first, if it is a target, and down_proj around it."""
    parameters = ("gate_up_proj", "down_proj")
    targets = [name for name in parameters if config.targets_parameter(f"{module}.{name}")]
    if sorted(wrappers) != list(range(len(targets))):
        raise FormatError(
            f"{path}: {quoted(module)} has adapters on {len(wrappers)} stacked parameters, "
            f"but target_parameters names {len(targets)} of {' and '.join(parameters)}"
        )
    name = targets[-1 - depth]
    return stacks[f"{target}.{name}"], f"{module}.{name}"


def _check_shapes(what: str, pair: Pair, a: tuple[int, int], b: tuple[int, int]) -> None:
    if (pair[0].shape, pair[1].shape) != (a, b):
        raise InputError(
            f"the adapter of {what} has shapes {list(pair[0].shape)} and {list(pair[1].shape)}, its config "
            f"and the model require {list(a)} and {list(b)}: is it for another base model?"
        )


def _check_copy(file: SafetensorsFile, name: str, paths: dict[str, str], model: Model) -> None:
    """Check a base weight in an adapter file: PEFT stores the whole embedding or head (with bias) with an
    adapter on it, and it must be equal to the model's."""
    match = _COPY.fullmatch(name.removeprefix(PREFIX))
    path = paths.get(match["module"], "") if match else ""
    if match is None or path not in (EMBEDDING, HEAD):
        raise FormatError(f"{file.path}: tensor {quoted(name)} is not part of a supported LoRA adapter")
    parameters, own = model.named_parameters(), model.family.checkpoint_name(path)
    if match["kind"] == "bias":
        weight = parameters.get(f"{own.removesuffix('weight')}bias")
    else:
        weight = parameters.get(own, parameters[model.family.checkpoint_name(EMBEDDING)])
    if weight is None:
        raise FormatError(f"{file.path}: tensor {quoted(name)} is a bias, which the base model does not have")
    shape = file.info(name).shape
    if shape != weight.shape:
        raise FormatError(
            f"{file.path}: tensor {quoted(name)} has shape {list(shape)}, the base model's "
            f"{list(weight.shape)}: the vocabulary was resized; resize the base with transformers, or merge "
            "the adapter with PEFT"
        )
    # A dry run has only shapes, no values to compare with.
    if isinstance(weight, Array) and not np.array_equal(file.read(name).astype(weight.dtype), weight):
        raise FormatError(
            f"{file.path}: tensor {quoted(name)} differs from the base model's; merge the adapter with PEFT"
        )


@checked
def save_adapter(model: Model, folder: str | Path) -> None:
    """Write the adapters of a model as a folder that PEFT loads; each file is replaced atomically.

    model: a model with adapters, from `with_lora`, `train` or `load(adapter=...)`. folder: created if it does
    not exist. `Model.save` writes whole models.
    """
    folder = Path(folder)
    if model.lora is None:
        raise InputError(f"{folder}: the model has no adapter to write")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{PREFIX}{name}": array for name, array in model.adapter_parameters().items()}
    write_safetensors(folder / TENSORS, tensors)
    write_json(folder / CONFIG, config_dict(model))
