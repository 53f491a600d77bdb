"""peft's adapters on golden models: its files, and the logits, loss and gradients of torch with them."""

import dataclasses
import json
import tempfile
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from golden_models import CASES, GRID, IGNORED, build, build_golden, fewer_bits, forward, saved_folder
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class Adapter:
    """The name of a golden model of golden_models.py, and the settings of an adapter on it."""

    base: str
    settings: dict[str, Any]
    dtype: torch.dtype = torch.float32


def on(target: str | list[str], **settings: Any) -> dict[str, Any]:
    """The LoraConfig settings of an adapter with these target_modules."""
    return {"r": 2, "lora_alpha": 3.0, "target_modules": target, **settings}


MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PATTERNS = {
    "rank_pattern": {r"layers\.1\..*(q|v)_proj": 5, "k_proj": 1},
    "alpha_pattern": {r"layers\.[12]\.self_attn\.v_proj": 7.0, "k_proj": 4.0},
}
ADAPTERS: dict[str, Adapter] = {
    **{name: Adapter("llama_gqa", on([name])) for name in (*MATRICES, "embed_tokens", "lm_head")},
    "all-linear": Adapter("llama_gqa", on("all-linear")),
    "regex": Adapter("llama_gqa", on(r"model\.layers\.[02]\..*(q|down)_proj")),
    "patterns": Adapter("llama_gqa", on(["q_proj", "k_proj", "v_proj"], **PATTERNS)),
    "rslora": Adapter("llama_gqa", on(["v_proj", "up_proj"], r=7, use_rslora=True)),
    "bias": Adapter("llama_bias", on("all-linear")),
    "tied embed_tokens": Adapter("llama_mha_tied", on(["embed_tokens"])),
    "tied lm_head": Adapter("llama_mha_tied", on(["lm_head"])),
    "tied both": Adapter("llama_mha_tied", on(["embed_tokens", "lm_head", "q_proj"])),
    "tied all-linear": Adapter("llama_mha_tied", on("all-linear")),
    "mistral": Adapter("mistral_window", on(["q_proj", "v_proj"], r=8, lora_alpha=16.0)),
    "bfloat16": Adapter("mistral_headdim", on(["o_proj", "gate_proj"]), torch.bfloat16),
}


PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
EXPERT_ADAPTERS: dict[str, Adapter] = {
    "mixtral all-linear": Adapter("mixtral_window", on("all-linear")),
    "mixtral parameters": Adapter("mixtral_mqa", on(["q_proj"], target_parameters=PARAMETERS)),
    "mixtral down": Adapter("mixtral_mqa", on([], target_parameters=["experts.down_proj"])),
    "mixtral rslora": Adapter("mixtral_mqa", on(["w1", "w3", "gate"], use_rslora=True)),
    "qwen2_moe all-linear": Adapter("qwen2_moe_dense_layer", on("all-linear")),
    "qwen2_moe parameters": Adapter(
        "qwen2_moe_window",
        on(["v_proj", "shared_expert_gate"], r=3, target_parameters=[*PARAMETERS, "mlp.gate.weight"]),
    ),
    "qwen3_moe all-linear": Adapter("qwen3_moe_normalized", on("all-linear")),
    "qwen3_moe patterns": Adapter(
        "qwen3_moe_window",
        on(
            ["o_proj"],
            target_parameters=PARAMETERS,
            rank_pattern={r"layers\.1\..*gate_up_proj": 3, "down_proj": 1},
            alpha_pattern={r"model\.layers\.2\.mlp\.experts\.down_proj": 5.0},
        ),
    ),
    "deepseek_v2 all-linear": Adapter("deepseek_v2_direct", on("all-linear")),
}
"""Adapters on stacked experts."""
HEAD_ADAPTERS: dict[str, Adapter] = {
    "heads gpt_neox": Adapter("gpt_neox_parallel", on(["lm_head", "embed_in"])),
    "heads phi": Adapter("phi_half", on(["lm_head", "embed_tokens", "dense"])),
    "heads gemma2": Adapter("gemma2_caps", on(["lm_head", "embed_tokens"])),
    "heads gpt2": Adapter("gpt2_plain", on(["lm_head", "wte", "c_attn"])),
    "heads mpt": Adapter("mpt_alibi", on(["lm_head", "wte", "Wqkv"])),
}
"""Adapters on the embedding and the output head, whose full weights peft writes as well."""
PACKED = EXPERT_ADAPTERS | HEAD_ADAPTERS
OLD_ADAPTERS: dict[str, tuple[Adapter, dict[str, str]]] = {
    "mixtral old": (Adapter("mixtral_mqa", on(["w1", "w2", "w3", "gate"])), {".mlp.": ".block_sparse_moe."}),
    "qwen3_moe old": (Adapter("qwen3_moe_normalized", on(["gate_proj", "up_proj", "down_proj"])), {}),
}
"""Adapters of transformers 4, which has a module for each expert, and its names of other modules."""


def fill(model: Any, seed: int) -> None:
    """Set A and B to random nonzero values of few bits, which compress well."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                values = np.round(0.25 * rng.standard_normal(tuple(parameter.shape)) * GRID) / GRID
                parameter.copy_(torch.from_numpy(values))


def write(model: Any, adapter: Adapter, folder: Path) -> dict[str, torch.Tensor]:
    """Write the folder with peft, cast its tensors to the adapter's dtype, and return them."""
    model.save_pretrained(folder)
    tensors = {name: tensor.to(adapter.dtype) for name, tensor in load_file(folder / TENSORS).items()}
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    return tensors


def make_adapter(name: str) -> dict[str, np.ndarray]:
    """The arrays of one adapter: the files that peft writes, and results of torch after peft loaded them."""
    adapter = (ADAPTERS | PACKED)[name]
    case = CASES[adapter.base]
    _, seed, tokens, targets = build_golden(adapter.base)
    base: Any = build(case, seed, {})
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **adapter.settings))
    fill(adapted, zlib.crc32(name.encode()))
    with tempfile.TemporaryDirectory() as path:
        tensors = write(adapted, adapter, Path(path))
        config = json.loads((Path(path) / CONFIG).read_text())
        # peft stores a set, whose order differs between runs
        for key in ("target_modules", "target_parameters"):
            if isinstance(config[key], list):
                config[key].sort()
        fresh: Any = build(case, seed, {})
        model = PeftModel.from_pretrained(fresh, path, is_trainable=True)
    logits = forward(model.eval(), tokens)
    flat, counted = logits.reshape(-1, logits.shape[-1]), torch.from_numpy(targets).reshape(-1)
    loss = torch.nn.functional.cross_entropy(flat, counted, ignore_index=IGNORED, reduction="mean")
    loss.backward()
    gradients = {key.replace(".default", ""): value.grad for key, value in model.named_parameters()}
    trained = {key: fewer_bits(grad.numpy()) for key, grad in gradients.items() if grad is not None}
    # With an adapter on an embedding, peft also writes the embedding, which the base golden contains.
    copies = sorted(set(tensors) - set(trained))
    assert all(".lora_" in key for key in trained)
    assert trained.keys() <= tensors.keys()
    with torch.no_grad():
        change = float((forward(build(case, seed, {}), tokens) - logits).abs().max())
    assert change > 1e-2, f"{name} changes the logits by only {change:.1e}"
    return {
        "base": np.array(adapter.base),
        "settings": np.array(json.dumps(adapter.settings)),
        "dtype": np.array(str(adapter.dtype).removeprefix("torch.")),
        "config": np.array(json.dumps(config)),
        "copies": np.array(json.dumps(copies)),
        "logits": fewer_bits(logits.detach().numpy()),
        "loss": loss.detach().numpy(),
        **{f"adapter/{key}": tensors[key].float().numpy() for key in trained},
        **{f"grad/{key}": gradient for key, gradient in trained.items()},
    }


def make_adapters() -> dict[str, np.ndarray]:
    """The arrays of all adapters, each under `name/`."""
    # peft warns about adapters on tied weights and about saved embeddings, both of which are intended here.
    warnings.filterwarnings("ignore", module="peft")
    return {f"{name}/{key}": array for name in ADAPTERS for key, array in make_adapter(name).items()}


def make_old_adapter(name: str) -> dict[str, np.ndarray]:
    """The tensors of adapters on single experts, and the logits after peft converted them."""
    adapter, names = OLD_ADAPTERS[name]
    model, seed, tokens, _ = build_golden(adapter.base)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    _, weights = saved_folder(model)
    tensors = {}
    for weight, array in weights.items():
        module = weight.removesuffix(".weight")
        for now, then in names.items():
            module = module.replace(now, then)
        if module.rpartition(".")[2] in adapter.settings["target_modules"] and array.ndim == 2:
            for part, shape in (("A", (2, array.shape[1])), ("B", (array.shape[0], 2))):
                values = np.round(0.25 * rng.standard_normal(shape) * GRID) / GRID
                tensors[f"base_model.model.{module}.lora_{part}.weight"] = values.astype(np.float32)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", **adapter.settings}
    with tempfile.TemporaryDirectory() as path:
        (Path(path) / CONFIG).write_text(json.dumps(config))
        save_file({key: torch.from_numpy(array) for key, array in tensors.items()}, Path(path) / TENSORS)
        fresh: Any = build(CASES[adapter.base], seed, {})
        adapted = PeftModel.from_pretrained(fresh, path)
    with torch.no_grad():
        logits = forward(adapted.eval(), tokens).numpy()
    return {
        "base": np.array(adapter.base),
        "config": np.array(json.dumps(config)),
        "logits": fewer_bits(logits),
        **{f"adapter/{key}": array for key, array in tensors.items()},
    }


def make_expert_adapters(family: str) -> dict[str, np.ndarray]:
    """The arrays of the adapters whose names start with `family`, and the fields of LoraConfig."""
    warnings.filterwarnings("ignore", module="peft")
    fields = json.dumps([field.name for field in dataclasses.fields(LoraConfig)])
    made = {name: make_adapter(name) for name in PACKED if name.startswith(family)}
    made |= {name: make_old_adapter(name) for name in OLD_ADAPTERS if name.startswith(family)}
    found = {f"{name}/{key}": array for name, arrays in made.items() for key, array in packed(arrays).items()}
    return found | {"fields": np.array(fields)}


def packed(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Concatenate the arrays under `adapter/` and under `grad/`, and add their names and shapes."""
    found = {key: array for key, array in arrays.items() if "/" not in key}
    for kind in ("adapter", "grad"):
        own = {key: array for key, array in arrays.items() if key.startswith(f"{kind}/")}
        shapes = {key.removeprefix(f"{kind}/"): array.shape for key, array in own.items()}
        found[f"{kind} shapes"] = np.array(json.dumps(shapes))
        found[kind] = np.concatenate([array.ravel() for array in own.values()]) if own else np.zeros(0)
    return found
