"""Reads the golden files of tools/make_golden.py, and writes the Hugging Face folders that tests load."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from einsum_transformer.formats.folder import write_safetensors_folder

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
)
IGNORED = -100


@dataclass(frozen=True, slots=True)
class Golden:
    """A tiny model and what transformers computes for it; see tools/golden_models.py."""

    config: dict[str, Any]
    config_v4: dict[str, Any]
    weights: dict[str, np.ndarray]
    tokens: np.ndarray
    targets: np.ndarray
    logits: np.ndarray
    short_logits: np.ndarray | None
    loss: float
    gradients: dict[str, np.ndarray]


def load_golden(name: str) -> Golden:
    """The golden model of that name."""
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = dict(file)
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


def load_parts(prefix: str) -> dict[str, np.ndarray]:
    """The arrays of parts.npz under `prefix/`, without it."""
    with np.load(FOLDER / "parts.npz") as file:
        return {key.removeprefix(f"{prefix}/"): file[key] for key in file if key.startswith(f"{prefix}/")}


def load_greedy() -> dict[str, Any]:
    """SmolLM2's greedy continuations: see tools/golden_smollm2.py."""
    return json.loads((FOLDER / "smollm2_greedy.json").read_text(encoding="utf-8"))


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Path:
    """A Hugging Face folder of one config and its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_safetensors_folder(folder, dict(tensors))
    return folder
