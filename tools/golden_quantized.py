"""Quantized checkpoints of a small Llama as other programs write them, and the logits of their weights.

    python tools/golden_quantized.py

writes tests/golden/quantized_checkpoints.npz. It needs torch, transformers, compressed-tensors 0.20, loguru,
mlx and mlx-cpu. compressed-tensors and MLX write and dequantize their own formats. No tool that runs on a CPU
writes GPTQ, AWQ and FP8: random words are dequantized by the formulas of llama.cpp and of AutoAWQ.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

TARGET = Path(__file__).parents[1] / "tests" / "golden" / "quantized_checkpoints.npz"
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
SHAPES = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (96, 64),
    "mlp.up_proj": (96, 64),
    "mlp.down_proj": (64, 96),
}
Array = np.ndarray
Tensors = dict[str, Array]
"""Suffix -> tensor of one matrix; "value": its dequantized values, which are not stored."""


def fp8(rng: Any, weight: Array, block: tuple[int, int] | None) -> Tensors:
    """DeepSeek's blocks: the values of a block times its scale (llama.cpp, conversion of fp8)."""
    rows, columns = block or weight.shape
    codes = np.empty(weight.shape, ml_dtypes.float8_e4m3fn)
    value = np.empty(weight.shape, np.float32)
    scales = np.empty((-(-weight.shape[0] // rows), -(-weight.shape[1] // columns)), np.float32)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            own = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            scales[i, j] = np.abs(weight[own]).max() / 448
            codes[own] = (weight[own] / scales[i, j]).astype(codes.dtype)
            value[own] = codes[own].astype(np.float32) * scales[i, j]
    return {"weight": codes, "weight_scale_inv": scales if block else scales.reshape(()), "value": value}


def words(codes: Array, bits: int) -> Array:
    """Codes along the first axis in words of 32 bits, the lowest first."""
    count = 32 // bits
    found = np.zeros((len(codes) // count, codes.shape[1]), np.uint32)
    for i in range(count):
        found |= codes[i::count].astype(np.uint32) << np.uint32(i * bits)
    return found.view(np.int32)


def gptq(rng: Any, weight: Array, bits: int, size: int, version: str, ordered: bool = False) -> Tensors:
    """Random codes and zero points; w = scale * (code - zero point), of which v1 stores one less."""
    n, k = weight.shape
    groups = -(-k // size)
    codes = rng.integers(0, 1 << bits, (k, n))
    zeros = rng.integers(0, 1 << bits, (groups, n))
    scales = (rng.random((groups, n)) * 0.2 / (1 << bits)).astype(np.float16)
    columns = np.arange(k) // size
    columns = rng.permutation(columns) if ordered else columns
    offset = 1 if version == "gptq" else 0
    value = (codes - (zeros[columns] + offset)) * scales[columns].astype(np.float32)
    tensors = {"qweight": words(codes, bits), "qzeros": words(zeros.T, bits).T, "scales": scales}
    return {**tensors, "g_idx": columns.astype(np.int32), "value": value.T.astype(np.float32)}


def awq(rng: Any, weight: Array, size: int) -> Tensors:
    """Random codes; eight outputs in a word, in the order 0 2 4 6 1 3 5 7."""
    n, k = weight.shape
    order = np.array([0, 2, 4, 6, 1, 3, 5, 7])

    def packed(codes: Array) -> Array:
        return words(codes.reshape(len(codes), -1, 8)[:, :, order].reshape(len(codes), -1).T, 4).T

    codes, zeros = rng.integers(0, 16, (k, n)), rng.integers(0, 16, (k // size, n))
    scales = (rng.random((k // size, n)) * 0.0125).astype(np.float16)
    value = (codes - np.repeat(zeros, size, axis=0)) * np.repeat(scales.astype(np.float32), size, axis=0)
    return {
        "qweight": packed(codes),
        "qzeros": packed(zeros),
        "scales": scales,
        "value": value.T.astype(np.float32),
    }


def compressed(rng: Any, weight: Array, kind: str, **arguments: Any) -> Tensors:
    """Compressed and decompressed by compressed-tensors."""
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    given = QuantizationArgs(**arguments)
    w = torch.tensor(weight)
    state: dict[str, Any] = {"weight": w}
    size = arguments.get("group_size") or weight.shape[1]
    groups = w.reshape(len(w), -1, size)
    limit = groups.abs().amax(-1)
    if kind == "nvfp4-pack-quantized":
        state["weight_global_scale"] = 448 * 6 / w.abs().max().reshape(1)
        state["weight_scale"] = (limit / 6 * state["weight_global_scale"]).to(torch.float8_e4m3fn).float()
    elif kind == "mxfp4-pack-quantized":
        state["weight_scale"] = torch.exp2(torch.ceil(torch.log2(limit / 6)))
    elif arguments["type"] == "float":
        state["weight_scale"] = limit / 448
    elif arguments["symmetric"]:
        state["weight_scale"] = limit / (2 ** (given.num_bits - 1) - 0.5)
    else:
        low, high = groups.amin(-1), groups.amax(-1)
        state["weight_scale"] = (high - low) / (2**given.num_bits - 1)
        least = -(2 ** (given.num_bits - 1))
        zero = torch.clamp(torch.round(-low / state["weight_scale"]) + least, least, -least - 1)
        state["weight_zero_point"] = zero.to(torch.int8)
    scheme = QuantizationScheme(targets=["Linear"], weights=given, format=kind)
    compressor = BaseCompressor.get_value_from_registry(kind)
    stored = compressor.compress(state, scheme)
    value = compressor.decompress(dict(stored), scheme)["weight"].float().numpy()
    tensors = {name: numpy_of(each) for name, each in stored.items()}
    if kind == "nvfp4-pack-quantized":  # whose values are rounded to bfloat16
        exact = nvfp4_values(tensors)
        np.testing.assert_allclose(value, exact, rtol=2**-7)
        value = exact
    return {**tensors, "value": value}


def nvfp4_values(tensors: Tensors) -> Array:
    """The values of numbers of 4 bits times their scales, divided by the scale of the matrix."""
    numbers = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    packed = tensors["weight_packed"]
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
    signed = numbers[codes & 7] * np.where(codes > 7, -1, 1)
    scales = np.repeat(tensors["weight_scale"].astype(np.float32), 16, axis=1)
    return (signed * scales / tensors["weight_global_scale"]).astype(np.float32)


def numpy_of(tensor: Any) -> Array:
    """A torch tensor as an array, with float8 and bfloat16."""
    import torch

    types = {torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn, torch.bfloat16: ml_dtypes.bfloat16}
    if tensor.dtype in types:
        width = torch.uint8 if tensor.dtype.itemsize == 1 else torch.uint16
        return tensor.contiguous().view(width).numpy().view(types[tensor.dtype])
    return tensor.contiguous().numpy()


def mlx(rng: Any, weight: Array, **settings: Any) -> Tensors:
    """Quantized and dequantized by MLX."""
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    found = mx.quantize(mx.array(weight), **settings)
    value = mx.dequantize(*found, **settings, dtype=mx.float32)
    parts = dict(zip(("weight", "scales", "biases"), map(np.array, found)))
    return {**parts, "value": np.array(value).astype(np.float32)}


def ct_config(kind: str, **weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "format": kind}}
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": kind,
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": ["lm_head"],
        }
    }


def cases() -> dict[str, tuple[dict[str, Any], Any]]:
    """Name -> additional keys of config.json, and the function that quantizes a matrix."""
    found: dict[str, tuple[dict[str, Any], Any]] = {}
    for name, block in (("fp8, blocks", [48, 64]), ("fp8, one scale", None)):
        settings = {"quant_method": "fp8", "weight_block_size": block, "activation_scheme": "dynamic"}
        chosen = tuple(block) if block else None
        found[name] = {"quantization_config": settings}, lambda rng, w, b=chosen: fp8(rng, w, b)
    for name, bits, size, version, ordered in (
        ("gptq, 4 bits", 4, 32, "gptq", False),
        ("gptq, 4 bits, act-order", 4, 32, "gptq", True),
        ("gptq, 8 bits", 8, 64, "gptq", False),
        ("gptq, 2 bits, v2", 2, 32, "gptq_v2", False),
    ):
        settings = {"quant_method": "gptq", "bits": bits, "group_size": size, "checkpoint_format": version}
        own = bits, size, version, ordered
        found[name] = {"quantization_config": settings}, lambda rng, w, own=own: gptq(rng, w, *own)
    settings = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
    found["awq"] = {"quantization_config": settings}, lambda rng, w: awq(rng, w, 32)
    group = {"strategy": "group", "group_size": 32}
    for name, kind, arguments in (
        ("ct, 4 bits", "pack-quantized", {"num_bits": 4, "type": "int", "symmetric": True, **group}),
        ("ct, 4 bits, zeros", "pack-quantized", {"num_bits": 4, "type": "int", "symmetric": False, **group}),
        (
            "ct, 8 bits, rows",
            "pack-quantized",
            {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
        ),
        ("ct, 8 bits, zeros", "pack-quantized", {"num_bits": 8, "type": "int", "symmetric": False, **group}),
        (
            "ct, int8",
            "int-quantized",
            {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
        ),
        (
            "ct, float8",
            "float-quantized",
            {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"},
        ),
        (
            "ct, nvfp4",
            "nvfp4-pack-quantized",
            {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16},
        ),
        ("ct, mxfp4", "mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "symmetric": True, **group}),
    ):
        more = {"scale_dtype": "torch.uint8"} if kind.startswith("mxfp4") else {}

        def quantize(rng: Any, w: Array, kind: str = kind, own: Any = (arguments, more)) -> Tensors:
            import torch

            scale = {"scale_dtype": torch.uint8} if own[1] else {}
            return compressed(rng, w, kind, **own[0], **scale)

        found[name] = ct_config(kind, **arguments, **more), quantize
    for bits in (2, 3, 4, 5, 6, 8):
        settings = {"group_size": 32, "bits": bits}
        found[f"mlx, {bits} bits"] = {"quantization": settings}, lambda rng, w, s=settings: mlx(rng, w, **s)
    for mode, size, bits in (("mxfp4", 32, 4), ("nvfp4", 16, 4), ("mxfp8", 32, 8)):
        settings = {"group_size": size, "bits": bits, "mode": mode}
        found[f"mlx, {mode}"] = {"quantization": settings}, lambda rng, w, s=settings: mlx(rng, w, **s)
    return found


def logits(weights: Tensors, tokens: Array) -> Array:
    """The logits of transformers in float64."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**CONFIG, attn_implementation="eager")).double()
    model.load_state_dict({name: torch.tensor(each).double() for name, each in weights.items()}, strict=True)
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def main() -> None:
    rng = np.random.default_rng(0)
    d, v = CONFIG["hidden_size"], CONFIG["vocab_size"]
    plain = {
        "model.embed_tokens.weight": rng.standard_normal((v, d)).astype(np.float32),
        "lm_head.weight": rng.standard_normal((v, d)).astype(np.float32) * 0.2,
        "model.norm.weight": rng.random(d).astype(np.float32) + 0.5,
        "model.layers.0.input_layernorm.weight": rng.random(d).astype(np.float32) + 0.5,
        "model.layers.0.post_attention_layernorm.weight": rng.random(d).astype(np.float32) + 0.5,
    }
    tokens = rng.integers(0, v, (1, 12))
    held: Tensors = {f"plain/{name}": array for name, array in plain.items()} | {"tokens": tokens}
    descriptions: dict[str, Any] = {}
    for name, (keys, quantize) in cases().items():
        weights, described = dict(plain), {}
        for module, shape in SHAPES.items():
            weight = (rng.standard_normal(shape) * 0.1).astype(np.float32)
            tensors = quantize(rng, weight)
            weights[f"model.layers.0.{module}.weight"] = tensors.pop("value")
            for suffix, array in tensors.items():
                full = f"model.layers.0.{module}.{suffix}"
                described[full] = [str(array.dtype), list(array.shape)]
                held[f"{name}/{full}"] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        held[f"{name}/logits"] = logits(weights, tokens)
        descriptions[name] = {"config": CONFIG | keys, "tensors": described}
        print(f"{name}: logits up to {np.abs(held[f'{name}/logits']).max():.2f}")
    held["descriptions"] = np.array(json.dumps(descriptions))
    np.savez_compressed(TARGET, **held)
    print(f"{TARGET.name}: {TARGET.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
