"""Reference values of components: RoPE frequencies and rotation, RMSNorm, sampling distributions, and
attention with sinks."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from transformers import GptOssConfig, LlamaConfig
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 4096}

# (rope_parameters, head_dim, max_position_embeddings, sequence length)
ROPES: dict[str, tuple[dict[str, Any], int, int, int]] = {
    "default": ({"rope_type": "default", "rope_theta": 10000.0}, 64, 4096, 100),
    "default_small": ({"rope_type": "default", "rope_theta": 100.0}, 10, 32, 100),
    "default_1e6": ({"rope_type": "default", "rope_theta": 1000000.0}, 128, 32768, 5),
    "linear": ({"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}, 80, 8192, 100),
    "linear_fraction": ({"rope_type": "linear", "rope_theta": 50000.0, "factor": 1.75}, 18, 64, 100),
    "dynamic_short": ({"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}, 64, 2048, 2047),
    "dynamic_limit": ({"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}, 64, 2048, 2048),
    "dynamic_above": ({"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}, 64, 2048, 2049),
    "dynamic_long": ({"rope_type": "dynamic", "rope_theta": 5000.0, "factor": 3.5}, 22, 100, 777),
    "llama3_8b": ({**LLAMA3, "factor": 8.0, "original_max_position_embeddings": 8192}, 128, 131072, 10),
    "llama3_1b": ({**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192}, 64, 131072, 10),
    "llama3_small": ({**LLAMA3, "factor": 4.0, "original_max_position_embeddings": 50}, 26, 400, 10),
    "yarn": (YARN, 128, 16384, 10),
    "yarn_small_context": ({**YARN, "original_max_position_embeddings": 64}, 24, 256, 10),
    "yarn_attention_factor": ({**YARN, "attention_factor": 1.25}, 64, 16384, 10),
    "yarn_betas": ({**YARN, "beta_fast": 16.0, "beta_slow": 2.0}, 96, 16384, 10),
    "yarn_mscale": ({**YARN, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7}, 64, 163840, 10),
    "yarn_mscale_alone": ({**YARN, "mscale": 0.7}, 64, 16384, 10),
    "yarn_not_truncated": ({**YARN, "truncate": False}, 64, 16384, 10),
}
SINKS: dict[str, Any] = {
    "hidden_size": 20,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "attention_bias": True,
    "sliding_window": 4,
    "max_position_embeddings": 64,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 8.0,
        "beta_slow": 1.0,
        "truncate": False,
    },
}
"""An attention layer of GPT-OSS; only one of the two cases uses the window."""
ROTATED = ("default", "default_small", "llama3_1b", "yarn")

# keys as in generation_config.json; a missing key disables its step
SAMPLERS: tuple[dict[str, float], ...] = (
    {},
    {"temperature": 0.7},
    {"temperature": 1.9},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 1000},
    {"top_p": 0.0},
    {"top_p": 0.3},
    {"top_p": 0.9},
    {"top_p": 0.99},
    {"min_p": 0.05},
    {"min_p": 0.4},
    {"min_p": 1.0},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.8},
    {"temperature": 1.5, "top_p": 0.9, "min_p": 0.1},
    {"temperature": 2.5, "top_k": 12, "min_p": 0.3},
    {"repetition_penalty": 1.5, "temperature": 0.8, "top_k": 15, "top_p": 0.85, "min_p": 0.06},
)


@contextmanager
def double_precision() -> Iterator[None]:
    """Replace float32 with float64, because transformers' formulas cast to float32."""
    with patch.object(torch, "float", torch.float64), patch.object(torch, "float32", torch.float64):
        yield


def rope_config(name: str) -> LlamaConfig:
    """A Llama config with the RoPE parameters of the case."""
    parameters, head_dim, maximum, _ = ROPES[name]
    return LlamaConfig(
        head_dim=head_dim, max_position_embeddings=maximum, rope_parameters=json.loads(json.dumps(parameters))
    )


def frequencies(name: str) -> tuple[torch.Tensor, float]:
    """transformers' inverse frequencies (head_dim / 2,) and factor of cos and sin."""
    config, kind, length = rope_config(name), ROPES[name][0]["rope_type"], ROPES[name][3]
    if kind == "default":
        return LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    return ROPE_INIT_FUNCTIONS[kind](config, seq_len=length)


def rope_arrays() -> dict[str, np.ndarray]:
    """transformers' frequencies in float32, and the same formulas in float64."""
    arrays = {}
    for name, (parameters, head_dim, maximum, length) in ROPES.items():
        case = {
            "rope_parameters": parameters,
            "head_dim": head_dim,
            "max_position_embeddings": maximum,
            "length": length,
        }
        single, scaling = frequencies(name)
        with double_precision():
            double, _ = frequencies(name)
        assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
        arrays[f"rope/{name}/case"] = np.array(json.dumps(case))
        arrays[f"rope/{name}/inv_freq_float32"] = single.numpy()
        arrays[f"rope/{name}/inv_freq"] = double.numpy()
        arrays[f"rope/{name}/scaling"] = np.array(float(scaling))
    return arrays


def rotation_arrays(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Rotated heads (b, t, heads, head_dim): near positions in float32, far ones with float64 angles."""
    arrays = {}
    for name in ROTATED:
        head_dim = ROPES[name][1]
        near = np.array([0, 1, 2, 3, 7, 20, 31])
        far = np.array([0, 5, 1023, 4096, 65535, 131070, 131071])
        q = rng.standard_normal((2, near.size, 3, head_dim)).astype(np.float32)
        tensor = torch.from_numpy(q)
        rotary = LlamaRotaryEmbedding(rope_config(name))
        cos, sin = rotary(tensor, torch.from_numpy(near)[None])
        arrays[f"rotation/{name}/q"] = q
        arrays[f"rotation/{name}/near"] = near
        arrays[f"rotation/{name}/near_rotated"] = apply_rotary_pos_emb(tensor, tensor, cos, sin, 2)[0].numpy()
        with double_precision():
            inverse, scaling = frequencies(name)
        angle = torch.from_numpy(far)[None, :, None].double() * torch.cat((inverse, inverse))
        cos, sin = angle.cos() * scaling, angle.sin() * scaling
        arrays[f"rotation/{name}/far"] = far
        arrays[f"rotation/{name}/far_rotated"] = apply_rotary_pos_emb(tensor, tensor, cos, sin, 2)[0].numpy()
    return arrays


def norm_arrays(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """RMSNorm and its gradients in float64, for ordinary rows, rows with outliers, tiny and zero rows."""
    x = rng.standard_normal((2, 4, 37)).astype(np.float32)
    x[0, 1, 5] = 1e4
    x[0, 2] *= 1e4
    x[1, 0] *= 1e-3
    x[1, 1] = 0.0
    x[1, 2, 3], x[1, 2, 30] = -1e4, 3e4
    weight = (1.0 + 0.3 * rng.standard_normal(37)).astype(np.float32)
    dy = rng.standard_normal(x.shape).astype(np.float32)
    arrays = {"norm/x": x, "norm/weight": weight, "norm/dy": dy, "norm/eps": np.array([1e-5, 1e-6, 1e-2])}
    for index, eps in enumerate(arrays["norm/eps"]):
        norm = LlamaRMSNorm(37, eps=float(eps)).double()
        norm.weight.data = torch.from_numpy(weight).double()
        inputs = torch.from_numpy(x).double().requires_grad_()
        with double_precision():
            y = norm(inputs)
        assert y.dtype == torch.float64
        dx, dweight = torch.autograd.grad(y, (inputs, norm.weight), torch.from_numpy(dy).double())
        arrays[f"norm/y{index}"] = y.detach().numpy()
        arrays[f"norm/dx{index}"] = dx.numpy()
        arrays[f"norm/dweight{index}"] = dweight.numpy()
    return arrays


def processors(parameters: dict[str, float]) -> LogitsProcessorList:
    """The logits processors in the order of `generate`."""
    steps = LogitsProcessorList()
    if "repetition_penalty" in parameters:
        steps.append(RepetitionPenaltyLogitsProcessor(parameters["repetition_penalty"]))
    if "temperature" in parameters:
        steps.append(TemperatureLogitsWarper(parameters["temperature"]))
    if "top_k" in parameters:
        steps.append(TopKLogitsWarper(int(parameters["top_k"])))
    if "top_p" in parameters:
        steps.append(TopPLogitsWarper(parameters["top_p"]))
    if "min_p" in parameters:
        steps.append(MinPLogitsWarper(parameters["min_p"]))
    return steps


def probabilities(logits: np.ndarray, history: np.ndarray, parameters: dict[str, float]) -> np.ndarray:
    """Next-token probabilities (v,) after the tokens of `history`."""
    ids: Any = torch.from_numpy(history)[None]
    scores: Any = processors(parameters)(ids, torch.from_numpy(logits)[None].double())
    return scores.softmax(-1)[0].numpy()


def clear_cut(logits: np.ndarray, history: np.ndarray, parameters: dict[str, float]) -> bool:
    """Whether small changes of the thresholds keep the same tokens, so that rounding has no effect."""
    kept = probabilities(logits, history, parameters) > 0
    for key in {"top_p", "min_p"} & set(parameters):
        for step in (-3e-5, 3e-5):
            moved = {**parameters, key: min(max(parameters[key] + step, 0.0), 1.0)}
            if not np.array_equal(kept, probabilities(logits, history, moved) > 0):
                return False
    return True


def sampling_arrays(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Distributions (row, parameters, v) for flat, peaked, wide and partly masked logits."""
    scales = np.array([[0.5], [3.0], [8.0], [2.0]])
    logits = (rng.standard_normal((4, 53)) * scales).astype(np.float32)
    logits[3, 40:] = -np.inf
    histories = rng.integers(0, 53, size=(4, 9))
    histories[:, 4] = histories[:, 2]
    histories[:, 5] = logits.argmax(-1)
    table = np.empty((4, len(SAMPLERS), 53))
    for row in range(4):
        for column, parameters in enumerate(SAMPLERS):
            table[row, column] = probabilities(logits[row], histories[row], parameters)
            assert clear_cut(logits[row], histories[row], parameters), (row, parameters)
    return {
        "sampling/logits": logits,
        "sampling/histories": histories,
        "sampling/parameters": np.array(json.dumps(SAMPLERS)),
        "sampling/probabilities": table,
    }


def make_parts() -> dict[str, np.ndarray]:
    """The arrays of parts.npz."""
    rng = np.random.default_rng(20)
    return {**rope_arrays(), **rotation_arrays(rng), **norm_arrays(rng), **sampling_arrays(rng)}


def attention_with_sinks(layer: int) -> tuple[GptOssConfig, GptOssAttention]:
    """The config of SINKS and a layer of it in float64, with the same seeded weights for each layer."""
    keys = json.loads(json.dumps(SINKS))
    kinds = ["full_attention", "sliding_attention"]
    config = GptOssConfig(**keys, num_hidden_layers=2, layer_types=kinds, attn_implementation="eager")
    attention = GptOssAttention(config, layer).double().eval()
    rng = np.random.default_rng(21)
    with torch.no_grad():
        for name, parameter in attention.named_parameters():
            # Large enough for a sink to be the maximum of some rows, and a score that of others.
            scale = 2.0 if name == "sinks" else 0.3
            parameter.copy_(torch.from_numpy(scale * rng.standard_normal(tuple(parameter.shape))))
    return config, attention


def run_with_sinks(layer: int, x: np.ndarray, dy: np.ndarray) -> dict[str, np.ndarray]:
    """x (b, t, d) -> y and the gradients of sum(dy * y), and the cosines and sines (t, h / 2)."""
    config, attention = attention_with_sinks(layer)
    inputs = torch.from_numpy(x).requires_grad_()
    positions = torch.arange(x.shape[1])[None]
    make_mask = create_sliding_window_causal_mask if attention.sliding_window else create_causal_mask
    mask = make_mask(config, inputs, attention_mask=None, cache=None, position_ids=positions)
    with double_precision():
        cos, sin = GptOssRotaryEmbedding(config)(inputs, positions)
    y = attention(inputs, (cos, sin), mask)[0]
    weights = dict(attention.named_parameters())
    dx, *gradients = torch.autograd.grad(y, (inputs, *weights.values()), torch.from_numpy(dy))
    found = {"y": y, "dx": dx, "cos": cos[0], "sin": sin[0]}
    found |= {f"grad/{name}": gradient for name, gradient in zip(weights, gradients, strict=True)}
    assert all(each.dtype == torch.float64 for each in found.values())
    return {name: each.detach().numpy() for name, each in found.items()}


def make_sinks() -> dict[str, np.ndarray]:
    """The arrays of sinks.npz: attention with a sink for each head, without and with a window."""
    rng = np.random.default_rng(22)
    x, dy = rng.standard_normal((2, 2, 11, SINKS["hidden_size"]))
    cases = {"full": run_with_sinks(0, x, dy), "window": run_with_sinks(1, x, dy)}
    assert np.abs(cases["full"]["y"] - cases["window"]["y"]).max() > 1e-2
    assert all(np.abs(case["grad/sinks"]).min() > 1e-3 for case in cases.values())
    shared = {name: cases["full"][name] for name in ("cos", "sin")}
    weights = {name: each.detach().numpy() for name, each in attention_with_sinks(0)[1].named_parameters()}
    return {
        "config": np.array(json.dumps(SINKS)),
        "x": x,
        "dy": dy,
        **shared,
        **weights,
        **{
            f"{case}/{name}": array
            for case, arrays in cases.items()
            for name, array in arrays.items()
            if name not in shared
        },
    }
