"""Read the golden files of tools/make_golden.py, and write the Hugging Face folders that tests load."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

import einsum_transformer as et
from einsum_transformer.formats.folder import write_safetensors_folder
from einsum_transformer.tree import named_leaves

Folders = Callable[[str], Path]
"""The fixture golden_folder."""
Models = Callable[..., et.Model]
"""The fixture golden_model."""
FOLDER = Path(__file__).parent / "golden"
MODELS = (
    "llama_gqa",
    "llama_mqa_headdim",
    "llama_mha_tied",
    "llama_bias",
    "llama_rope_linear",
    "llama_rope_dynamic",
    "llama_rope_llama3",
    "llama_rope_yarn",
    "llama_rope_yarn_keys",
    "mistral_full",
    "mistral_window",
    "mistral_headdim",
    "qwen2_tied",
    "qwen2_window",
    "qwen3_tied",
    "qwen3_window",
    "gemma_mqa",
    "gemma_untied",
    "gemma2_caps",
    "gemma2_mqa",
    "gemma3_text",
    "gemma3_text_mqa",
    "phi_half",
    "phi_gqa",
    "phi3_window",
    "phi3_longrope",
    "phi3_partial",
    "gpt2_plain",
    "gpt2_scaled",
    "gpt_neox_parallel",
    "gpt_neox_sequential",
    "mpt_alibi",
    "mpt_clip",
    "olmo2_gqa",
    "olmo2_mqa",
    "olmo3_yarn",
    "olmo3_two_ropes",
    "smollm3_nope",
    "smollm3_window",
    "granite_gqa",
    "granite_tied",
    "mixtral_window",
    "mixtral_mqa",
    "qwen2_moe_dense_layer",
    "qwen2_moe_window",
    "qwen3_moe_normalized",
    "qwen3_moe_window",
    "deepseek_plain",
    "deepseek_normalized",
    "deepseek_v2_direct",
    "deepseek_v2_groups",
)
ADAPTERS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "embed_tokens",
    "lm_head",
    "all-linear",
    "regex",
    "patterns",
    "rslora",
    "bias",
    "tied embed_tokens",
    "tied lm_head",
    "tied both",
    "tied all-linear",
    "mistral",
    "bfloat16",
)
HEAD_ADAPTERS = ("heads gpt_neox", "heads phi", "heads gemma2", "heads gpt2", "heads mpt")
"""Adapters on the embedding and the head; their files have the layout of adapters on experts."""
EXPERT_ADAPTERS = (
    "mixtral all-linear",
    "mixtral parameters",
    "mixtral down",
    "mixtral rslora",
    "qwen2_moe all-linear",
    "qwen2_moe parameters",
    "qwen3_moe all-linear",
    "qwen3_moe patterns",
    "deepseek_v2 all-linear",
)
OLD_ADAPTERS = ("mixtral old", "qwen3_moe old")
IGNORED = -100


@dataclass(frozen=True, slots=True)
class Golden:
    """A tiny model with results of transformers; see tools/golden_models.py."""

    config: dict[str, Any]
    config_v4: dict[str, Any]
    weights: dict[str, np.ndarray]
    tokens: np.ndarray
    targets: np.ndarray
    logits: np.ndarray
    short_logits: np.ndarray | None
    loss: float
    gradients: dict[str, np.ndarray]


@cache
def _arrays(name: str) -> dict[str, np.ndarray]:
    """The arrays of a golden file, cached and read-only, because tests share them."""
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = dict(file)
    for array in arrays.values():
        array.flags.writeable = False
    return arrays


def load_golden(name: str) -> Golden:
    """Load a golden model; the config and the dicts are new objects."""
    arrays = _arrays(name)
    gradients = {key.removeprefix("grad/"): arrays[key] for key in arrays if key.startswith("grad/")}
    return Golden(
        config=json.loads(str(arrays["config"])),
        config_v4=json.loads(str(arrays["config_v4"])),
        weights={key: arrays[key] for key in gradients},
        tokens=arrays["tokens"],
        targets=arrays["targets"],
        logits=arrays["logits"],
        short_logits=arrays.get("short_logits"),
        loss=float(arrays["loss"]),
        gradients=gradients,
    )


def read_only(model: et.Model) -> et.Model:
    """Make the weights of a model read-only, and return the model."""
    for _, weight in named_leaves(model.decoder):
        if isinstance(weight, np.ndarray):
            weight.flags.writeable = False
    return model


@dataclass(frozen=True, slots=True)
class GoldenAdapter:
    """An adapter that peft wrote for a golden model, with results of torch; see tools/golden_lora.py."""

    base: str
    settings: dict[str, Any]
    """The arguments of LoraConfig."""
    dtype: str
    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    """PEFT name -> matrix of the adapter."""
    copies: list[str]
    """Names of copies of the embedding in the folder."""
    logits: np.ndarray
    loss: float
    gradients: dict[str, np.ndarray]


def load_adapter(name: str) -> GoldenAdapter:
    """Load a golden adapter."""
    with np.load(FOLDER / "lora.npz") as file:
        arrays = {key.removeprefix(f"{name}/"): file[key] for key in file if key.startswith(f"{name}/")}

    def under(kind: str) -> dict[str, np.ndarray]:
        return {key.removeprefix(kind): arrays[key] for key in arrays if key.startswith(kind)}

    settings, config, copies = (json.loads(str(arrays[key])) for key in ("settings", "config", "copies"))
    return GoldenAdapter(
        base=str(arrays["base"]),
        settings=settings,
        dtype=str(arrays["dtype"]),
        config=config,
        tensors=under("adapter/"),
        copies=copies,
        logits=arrays["logits"],
        loss=float(arrays["loss"]),
        gradients=under("grad/"),
    )


def load_expert_adapter(name: str) -> GoldenAdapter:
    """Load a golden adapter on stacked experts, or on single experts (without gradients)."""
    with np.load(FOLDER / f"lora_{name.split()[0]}.npz") as file:
        arrays = {key.removeprefix(f"{name}/"): file[key] for key in file if key.startswith(f"{name}/")}

    def unpacked(kind: str) -> dict[str, np.ndarray]:
        shapes = json.loads(str(arrays[f"{kind} shapes"]))
        ends = np.cumsum([int(np.prod(shape)) for shape in shapes.values()])
        parts = np.split(arrays[kind], ends[:-1])
        return {key: part.reshape(shape) for (key, shape), part in zip(shapes.items(), parts)}

    return GoldenAdapter(
        base=str(arrays["base"]),
        settings=json.loads(str(arrays.get("settings", "{}"))),
        dtype="float32",
        config=json.loads(str(arrays["config"])),
        tensors=unpacked("adapter"),
        copies=json.loads(str(arrays.get("copies", "[]"))),
        logits=arrays["logits"],
        loss=float(arrays.get("loss", 0)),
        gradients=unpacked("grad"),
    )


def peft_fields() -> list[str]:
    """The fields of LoraConfig in peft 0.21.2."""
    with np.load(FOLDER / "lora_mixtral.npz") as file:
        return json.loads(str(file["fields"]))


def module_names() -> dict[str, list[str]]:
    """Golden model -> modules that a peft adapter can target; see tools/list_module_names.py."""
    return json.loads((FOLDER / "module_names.json").read_text(encoding="utf-8"))["models"]


def write_adapter_folder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Path:
    """Write a PEFT folder with the safetensors library."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(contiguous, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def load_parts(prefix: str) -> dict[str, np.ndarray]:
    """The arrays of parts.npz under `prefix/`, without the prefix in their names."""
    with np.load(FOLDER / "parts.npz") as file:
        return {key.removeprefix(f"{prefix}/"): file[key] for key in file if key.startswith(f"{prefix}/")}


def load_sinks() -> dict[str, np.ndarray]:
    """transformers' attention with sinks; see make_sinks in tools/golden_parts.py."""
    with np.load(FOLDER / "sinks.npz") as file:
        return dict(file)


def load_greedy() -> dict[str, Any]:
    """SmolLM2's greedy continuations; see tools/golden_smollm2.py."""
    return json.loads((FOLDER / "smollm2_greedy.json").read_text(encoding="utf-8"))


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Path:
    """Write a Hugging Face folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_safetensors_folder(folder, dict(tensors))
    return folder
