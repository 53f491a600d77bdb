"""Tiny random Llama and Mistral models with the logits, loss and gradients transformers computes for them."""

import json
import tempfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

IGNORED = -100
# Multiples of 1/64 below 4 compress well, and are exact in bfloat16: a golden may also be written in 16 bits.
GRID = 64
FAMILIES = {"llama": (LlamaConfig, LlamaForCausalLM), "mistral": (MistralConfig, MistralForCausalLM)}


@dataclass(frozen=True, slots=True)
class Case:
    """One golden model: its config, and changes to it that the logits must be able to tell from it."""

    family: str
    config: dict[str, Any]
    length: int = 19
    short_length: int = 0
    rope: dict[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    contrasts: tuple[dict[str, Any], ...] = ()


def sizes(hidden: int, heads: int, kv: int, inter: int, layers: int, vocab: int) -> dict[str, Any]:
    """The six sizes under the names config.json gives them."""
    return {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": inter,
        "num_hidden_layers": layers,
        "vocab_size": vocab,
    }


PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 512}
YARN_KEYS = {"beta_fast": 16.0, "beta_slow": 2.0, "mscale": 1.0, "mscale_all_dim": 0.4}

CASES: dict[str, Case] = {
    "llama_gqa": Case("llama", sizes(48, 6, 2, 80, 3, 97) | {"rms_norm_eps": 1e-5}, length=15),
    "llama_mqa_headdim": Case(
        "llama",
        sizes(30, 5, 1, 44, 3, 61) | {"head_dim": 16, "rms_norm_eps": 1e-2},
        rope={"rope_type": "default", "rope_theta": 500000.0},
        contrasts=({"rms_norm_eps": 1e-5}, PLAIN),
    ),
    "llama_mha_tied": Case(
        "llama", sizes(32, 4, 4, 52, 2, 83) | {"rms_norm_eps": 1e-6, "tie_word_embeddings": True}
    ),
    "llama_bias": Case(
        "llama", sizes(36, 6, 3, 50, 2, 67) | {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-5}
    ),
    "llama_rope_linear": Case(
        "llama",
        sizes(40, 4, 2, 36, 2, 59),
        rope={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
        contrasts=(PLAIN,),
    ),
    "llama_rope_dynamic": Case(
        "llama",
        sizes(40, 4, 2, 36, 2, 53) | {"max_position_embeddings": 16},
        length=37,
        short_length=13,
        rope={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0},
        contrasts=(PLAIN,),
    ),
    "llama_rope_llama3": Case(
        "llama",
        sizes(48, 2, 1, 36, 2, 59) | {"eos_token_id": [2, 5], "max_position_embeddings": 512},
        length=29,
        rope={"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, **LLAMA3},
        contrasts=(PLAIN,),
    ),
    "llama_rope_yarn": Case(
        "llama",
        sizes(48, 2, 1, 36, 2, 59) | {"max_position_embeddings": 2048},
        length=29,
        rope=YARN,
        contrasts=(PLAIN, {"rope_parameters": {**YARN, "attention_factor": 1.0}}),
    ),
    "llama_rope_yarn_keys": Case(
        "llama",
        sizes(48, 2, 2, 36, 2, 59) | {"max_position_embeddings": 2048},
        length=29,
        rope={**YARN, **YARN_KEYS},
        contrasts=(PLAIN, {"rope_parameters": YARN}, {"rope_parameters": {**YARN, "mscale": 1.0}}),
    ),
    "mistral_full": Case("mistral", sizes(40, 4, 2, 60, 2, 71) | {"sliding_window": None}, length=23),
    "mistral_window": Case(
        "mistral",
        sizes(40, 4, 2, 60, 2, 71) | {"sliding_window": 7},
        length=33,
        contrasts=({"sliding_window": None}, {"sliding_window": 6}, {"sliding_window": 8}),
    ),
    "mistral_headdim": Case(
        "mistral", sizes(28, 4, 2, 44, 3, 61) | {"head_dim": 10, "sliding_window": 4096}, length=21
    ),
}


def fewer_bits(array: np.ndarray) -> np.ndarray:
    """float32 rounded to 17 significant bits (error below 8e-6 relative), which compress better."""
    return ((np.ascontiguousarray(array).view(np.uint32) + np.uint32(64)) & np.uint32(0xFFFFFF80)).view(
        np.float32
    )


def random_weights(model: torch.nn.Module, seed: int) -> dict[str, np.ndarray]:
    """Seeded weights for every parameter: norms near 1, biases not zero, matrices near unit gain."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, parameter in model.named_parameters():
        noise = rng.standard_normal(tuple(parameter.shape))
        if name.endswith("norm.weight"):
            value = 1.0 + 0.2 * noise
        elif name == "model.embed_tokens.weight":
            value = 0.3 * noise
        else:
            value = 0.2 * noise
        weights[name] = (np.round(value * GRID) / GRID).astype(np.float32)
    return weights


def build(case: Case, seed: int, changes: dict[str, Any]) -> torch.nn.Module:
    """The transformers model of a case with its seeded weights; `changes` override config keys."""
    config_type, model_type = FAMILIES[case.family]
    keys = {"rope_parameters": case.rope, "max_position_embeddings": 256, **case.config, **changes}
    # transformers fills in the dictionaries it is given
    config = config_type(**json.loads(json.dumps(keys)), attn_implementation="eager", dtype="float32")
    model = model_type(config).eval()
    with torch.no_grad():
        parameters = dict(model.named_parameters())
        for name, value in random_weights(model, seed).items():
            parameters[name].copy_(torch.from_numpy(value))
    return model


def draw_tokens(case: Case, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (2, T) with repeats, and the next tokens as targets; a prompt and a few others do not count."""
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


def saved_folder(model: Any) -> tuple[dict[str, Any], set[str]]:
    """config.json as transformers writes it, and the names of the tensors beside it."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = json.loads((Path(folder) / "config.json").read_text())
        return config, set(load_file(Path(folder) / "model.safetensors"))


def as_version_4(config: dict[str, Any]) -> dict[str, Any]:
    """The same config in the keys of transformers 4, without those that equal its defaults."""
    old = {key: value for key, value in config.items() if key not in ("dtype", "rope_parameters")}
    rope = dict(config["rope_parameters"])
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    if theta != 10000.0:
        old["rope_theta"] = theta
    # Llama 3.1 brought the key rope_type; files older than it say type.
    kind_key = "rope_type" if kind == "llama3" else "type"
    old["rope_scaling"] = None if kind == "default" else {kind_key: kind, **rope}
    old["torch_dtype"] = "float32"
    old["transformers_version"] = "4.46.0"
    if old["head_dim"] * old["num_attention_heads"] == old["hidden_size"]:
        del old["head_dim"]
    if old["model_type"] == "llama" and old["num_key_value_heads"] == old["num_attention_heads"]:
        del old["num_key_value_heads"]
    if not old["tie_word_embeddings"]:
        del old["tie_word_embeddings"]
    return old


def check_version_4(
    case: Case, old: dict[str, Any], model: Any, tokens: np.ndarray, logits: np.ndarray
) -> None:
    """transformers itself must read both configs alike."""
    config_type, model_type = FAMILIES[case.family]
    config = config_type.from_dict(json.loads(json.dumps(old)), attn_implementation="eager")
    twin = model_type(config).eval()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert np.array_equal(forward(twin, tokens).numpy(), logits), "the two configs differ in meaning"


def check_contrasts(case: Case, seed: int, tokens: np.ndarray, logits: np.ndarray) -> None:
    """Every contrast must move the logits far beyond the tolerance of the tests."""
    for changes in case.contrasts:
        with torch.no_grad():
            other = forward(build(case, seed, changes), tokens).numpy()
        moved = float(np.abs(other - logits).max())
        assert moved > 1e-2, f"{changes} moves the logits by {moved:.1e} only"


def make_model(name: str) -> dict[str, np.ndarray]:
    """The arrays of one golden model file."""
    case, seed = CASES[name], zlib.crc32(name.encode())
    tokens, targets = draw_tokens(case, seed)
    model = build(case, seed, {})
    logits = forward(model, tokens)
    flat, counted = logits.reshape(-1, logits.shape[-1]), torch.from_numpy(targets).reshape(-1)
    loss = torch.nn.functional.cross_entropy(flat, counted, ignore_index=IGNORED, reduction="mean")
    loss.backward()
    weights = {key: value.detach().numpy() for key, value in model.named_parameters()}
    gradients = {key: value.grad.numpy() for key, value in model.named_parameters() if value.grad is not None}
    assert set(gradients) == set(weights), "a parameter has no gradient"
    config, names = saved_folder(model)
    assert names == set(weights), "names on disk differ from names in memory"
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
            # a model of its own: transformers keeps the frequencies of the longest sequence seen
            short = forward(build(case, seed, {}), tokens[:, : case.short_length])
        arrays["short_logits"] = short.numpy()
    return arrays
