"""Tiny random models of every family with logits, loss and gradients computed by transformers."""

import copy
import json
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dump_reference import activations
from golden_cases import CASES, Case
from reference_deepseek import EXPERT_KEYS, build_deepseek
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModelForCausalLM

IGNORED = -100
# Multiples of 1/64 below 4 compress well, and are exact in bfloat16, so that tests can convert goldens to it.
GRID = 64
LEAST_MARGIN = 1e-3
"""Minimum gap of the last selected expert to the next one, so that rounding cannot change the selection."""


def fewer_bits(array: np.ndarray) -> np.ndarray:
    """Round float32 to 17 significant bits (relative error below 8e-6), which compress better."""
    return ((np.ascontiguousarray(array).view(np.uint32) + np.uint32(64)) & np.uint32(0xFFFFFF80)).view(
        np.float32
    )


def random_weights(model: torch.nn.Module, seed: int, offset_norms: bool) -> dict[str, np.ndarray]:
    """Random weights for every parameter: norms scale by about 1, biases are nonzero, matrices have about
    unit gain. offset_norms: norms multiply by 1 + weight."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, parameter in model.named_parameters():
        noise = rng.standard_normal(tuple(parameter.shape))
        if parameter.ndim == 1 and name.endswith("weight"):
            value = (0.0 if offset_norms else 1.0) + 0.2 * noise
        elif name.split(".")[-2] in ("embed_tokens", "wte", "wpe", "embed_in"):
            value = 0.3 * noise
        else:
            value = 0.2 * noise
        weights[name] = (np.round(value * GRID) / GRID).astype(np.float32)
    return weights


def build(case: Case, seed: int, changes: dict[str, Any]) -> Any:
    """The transformers model of a case with random weights; `changes` override config keys."""
    rope = {} if case.rope is None else {"rope_parameters": case.rope}
    length = {} if case.rope is None else {"max_position_embeddings": 256}
    # A copy, because transformers modifies its argument.
    keys = json.loads(json.dumps({**rope, **length, **case.config, **changes}))
    if case.family == "deepseek":
        model = build_deepseek(keys).eval()
    else:
        model = from_config(AutoConfig.for_model(case.family, **keys, dtype="float32"))
    with torch.no_grad():
        parameters = dict(model.named_parameters())
        for name, value in random_weights(model, seed, case.family.startswith("gemma")).items():
            parameters[name].copy_(torch.from_numpy(value))
    return model


def from_config(config: Any) -> Any:
    """The model of a config with eager attention and experts."""
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_config(config, **eager).float().eval()


def draw_tokens(case: Case, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (2, t) with repeats, and next-token targets, of which a prompt and some others are ignored."""
    rng = np.random.default_rng(seed + 1)
    stream = rng.integers(0, case.config["vocab_size"], size=(2, case.length + 1))
    stream[1, 2:5] = stream[0, 3]
    targets = stream[:, 1:].copy()
    targets[rng.random(targets.shape) < 0.15] = IGNORED
    targets[1, :4] = IGNORED
    return stream[:, :-1].copy(), targets


def forward(model: torch.nn.Module, tokens: np.ndarray) -> torch.Tensor:
    """Logits (b, t, v) of a full pass without a cache."""
    return model(input_ids=torch.from_numpy(tokens), use_cache=False).logits


def saved_folder(model: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The config.json and the tensors that transformers saves."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = json.loads((Path(folder) / "config.json").read_text())
        return config, load_file(Path(folder) / "model.safetensors")


def gradients_on_disk(model: Any) -> dict[str, np.ndarray]:
    """The gradients under the names and in the shapes of the weights on disk."""
    gradients = copy.deepcopy(model)
    with torch.no_grad():
        for gradient, parameter in zip(gradients.parameters(), model.parameters(), strict=True):
            assert parameter.grad is not None, "a parameter has no gradient"
            gradient.copy_(parameter.grad)
    return saved_folder(gradients)[1]


def as_version_4(config: dict[str, Any]) -> dict[str, Any]:
    """The same config in the keys of transformers 4, without its default values."""
    old = {key: value for key, value in config.items() if key not in ("dtype", "rope_parameters")}
    kind = old["model_type"]
    old |= {"torch_dtype": "float32", "transformers_version": "4.46.0"}
    if kind == "gemma3_text":
        return _gemma3_as_version_4(old, config["rope_parameters"])
    if kind == "olmo3":
        return _olmo3_as_version_4(old, config["rope_parameters"])
    if "rope_parameters" in config:
        old |= _rope_as_version_4(kind, config["rope_parameters"])
    if (old.get("head_dim") or 0) * old.get("num_attention_heads", 0) == old.get("hidden_size"):
        del old["head_dim"]
    if kind in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "smollm3", "qwen2_moe"):
        old.pop("layer_types", None) if "full_attention" in old.get("layer_types", []) else None
    if kind in ("llama", "phi", "olmo2") and old["num_key_value_heads"] == old["num_attention_heads"]:
        del old["num_key_value_heads"]
    if kind == "gemma":
        # The first Gemma files set hidden_act to "gelu", but the model uses the tanh approximation.
        old |= {"hidden_act": "gelu", "hidden_activation": None}
    if not kind.startswith(("gemma", "gpt2", "mpt", "smollm3")) and not old["tie_word_embeddings"]:
        del old["tie_word_embeddings"]
    return old


def _rope_as_version_4(kind: str, parameters: dict[str, Any]) -> dict[str, Any]:
    rope = dict(parameters)
    theta, scaling = rope.pop("rope_theta"), rope.pop("rope_type")
    partial = rope.pop("partial_rotary_factor", None)
    if kind == "gpt_neox":
        return {"rotary_emb_base": theta, "rotary_pct": partial}
    default = theta == 10000.0 and kind not in ("mixtral", "smollm3")
    old: dict[str, Any] = {} if default else {"rope_theta": theta}
    if partial is not None:
        old["partial_rotary_factor"] = partial
    if scaling == "longrope":
        # The factor is the ratio of two lengths, which the config contains.
        rope = {key: rope[key] for key in ("short_factor", "long_factor")}
    # Llama 3.1 introduced the key rope_type; older files use type.
    kind_key = "rope_type" if scaling == "llama3" else "type"
    old["rope_scaling"] = None if scaling == "default" else {kind_key: scaling, **rope}
    return old


def _gemma3_as_version_4(old: dict[str, Any], ropes: dict[str, Any]) -> dict[str, Any]:
    full = dict(ropes["full_attention"])
    theta, kind = full.pop("rope_theta"), full.pop("rope_type")
    kinds = old.pop("layer_types")
    old["sliding_window_pattern"] = kinds.index("full_attention") + 1
    old["rope_theta"], old["rope_local_base_freq"] = theta, ropes["sliding_attention"]["rope_theta"]
    old["rope_scaling"] = None if kind == "default" else {"rope_type": kind, **full}
    return old


def _olmo3_as_version_4(old: dict[str, Any], ropes: dict[str, Any]) -> dict[str, Any]:
    full = dict(ropes["full_attention"])
    theta, kind = full.pop("rope_theta"), full.pop("rope_type")
    if theta != ropes["sliding_attention"]["rope_theta"]:
        return old | {"rope_parameters": ropes}  # the old keys cannot express two thetas
    return old | {"rope_theta": theta, "rope_scaling": {"rope_type": kind, **full}}


def check_version_4(
    case: Case, old: dict[str, Any], model: Any, tokens: np.ndarray, logits: np.ndarray
) -> None:
    """Check that transformers reads both configs as the same model."""
    if case.family == "deepseek":
        return
    keys = json.loads(json.dumps({key: value for key, value in old.items() if key != "model_type"}))
    other = from_config(AutoConfig.for_model(case.family, **keys))
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert np.array_equal(forward(other, tokens).numpy(), logits), "the configs give different logits"


def least_margin(case: Case, model: Any, tokens: np.ndarray) -> float:
    """The smallest gap between the last selected expert, or group of experts, and the next one."""
    gaps = [1.0]

    def gap(p: torch.Tensor, chosen: int) -> float:
        best = p.sort(dim=-1, descending=True).values
        return float((best[..., chosen - 1] - best[..., chosen]).min()) if chosen < p.shape[-1] else 1.0

    def watch(module: Any, inputs: Any, output: Any) -> None:
        logits = output[0] if isinstance(output, tuple) else output
        p = torch.softmax(logits, dim=-1)
        groups = case.config.get("n_group", 1)
        if groups > 1:
            in_groups = p.unflatten(-1, (groups, -1))
            gaps.append(gap(in_groups.max(dim=-1).values, case.config["topk_group"]))
        gaps.append(gap(p, case.config["num_experts_per_tok"]))

    routers = [module for name, module in model.named_modules() if name.endswith(".gate")]
    hooks = [module.register_forward_hook(watch) for module in routers]
    with torch.no_grad():
        forward(model, tokens)
    for hook in hooks:
        hook.remove()
    return min(gaps)


def check_contrasts(case: Case, seed: int, tokens: np.ndarray, logits: np.ndarray) -> None:
    """Check that every contrast changes the logits far more than the tolerance of the tests."""
    for changes in case.contrasts:
        with torch.no_grad():
            other = forward(build(case, seed, changes), tokens).numpy()
        change = float(np.abs(other - logits).max())
        assert change > 1e-2, f"{changes} changes the logits by only {change:.1e}"


def build_golden(name: str) -> tuple[Any, int, np.ndarray, np.ndarray]:
    """(model, seed of its weights, tokens, targets) of a golden file."""
    case, seed = CASES[name], zlib.crc32(name.encode())
    tokens, targets = draw_tokens(case, seed)
    model = build(case, seed, {})
    while least_margin(case, model, tokens) < LEAST_MARGIN:
        seed += 1
        model = build(case, seed, {})
    return model, seed, tokens, targets


def make_reference(name: str) -> dict[str, np.ndarray]:
    """The activations of a golden model for its first tokens, as dump_reference.py writes them."""
    model, _, tokens, _ = build_golden(name)
    found = activations(model, tokens[:, :5])
    return {key: array if key == "tokens" else fewer_bits(array) for key, array in found.items()}


def make_model(name: str) -> dict[str, np.ndarray]:
    """The arrays of one golden model file."""
    case = CASES[name]
    model, seed, tokens, targets = build_golden(name)
    logits = forward(model, tokens)
    flat, counted = logits.reshape(-1, logits.shape[-1]), torch.from_numpy(targets).reshape(-1)
    loss = torch.nn.functional.cross_entropy(flat, counted, ignore_index=IGNORED, reduction="mean")
    loss.backward()
    config, weights = saved_folder(model)
    if case.family == "deepseek":
        config |= {key: case.config[key] for key in EXPERT_KEYS}
        config |= {"model_type": "deepseek", "architectures": ["DeepseekForCausalLM"]}
        del config["experts"]
    gradients = gradients_on_disk(model)
    assert set(gradients) == set(weights), "a tensor has no gradient"
    old, logits = as_version_4(config), logits.detach().numpy()
    check_version_4(case, old, model, tokens, logits)
    check_contrasts(case, seed, tokens, logits)
    arrays = {
        "config": np.array(json.dumps(config)),
        "config_v4": np.array(json.dumps(old)),
        "tokens": tokens,
        "logits": logits,
        "targets": targets,
        "loss": loss.detach().numpy(),
        **weights,
        **{f"grad/{key}": fewer_bits(value) for key, value in gradients.items()},
    }
    if case.short_length:
        with torch.no_grad():
            # A new model, because transformers keeps the RoPE frequencies of the longest sequence.
            short = forward(build(case, seed, {}), tokens[:, : case.short_length])
        arrays["short_logits"] = short.numpy()
    return arrays
