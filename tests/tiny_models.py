"""Tiny models with random weights, as folders, GGUF files and in memory; and a reference implementation with
loops."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import einsum_transformer as et
from einsum_transformer.components.rope import inverse_frequencies
from einsum_transformer.models.builder import WeightSpec, build
from einsum_transformer.models.config import Keys, ModelConfig
from einsum_transformer.models.families import family_of
from einsum_transformer.models.families.family import read_rope
from einsum_transformer.text.tokenizer import Tokenizer
from golden_files import write_folder

Array = np.ndarray

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 60,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def hf_config(**changes: Any) -> dict[str, Any]:
    """The config.json of a tiny llama with `changes`."""
    return CONFIG | changes


def random_weights(config: Mapping[str, Any], seed: int = 0) -> dict[str, Array]:
    """Checkpoint name -> random float32 weights of the config, including norms and biases."""
    rng = np.random.default_rng(seed)
    d, f, v, h = (config[key] for key in ("hidden_size", "intermediate_size", "vocab_size", "head_dim"))
    q, k = config["num_attention_heads"] * h, config["num_key_value_heads"] * h
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (v, d)
    for layer in range(config["num_hidden_layers"]):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        matrices = {
            f"{attention}.q_proj": (q, d),
            f"{attention}.k_proj": (k, d),
            f"{attention}.v_proj": (k, d),
        }
        matrices[f"{attention}.o_proj"] = (d, q)
        mlps = {f"{mlp}.gate_proj": (f, d), f"{mlp}.up_proj": (f, d), f"{mlp}.down_proj": (d, f)}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{norm}.weight"] = (d,)
        for name, shape in (matrices | mlps).items():
            shapes[f"{name}.weight"] = shape
            always = config["model_type"] == "qwen2" and name in list(matrices)[:3]
            if always or config.get("attention_bias" if name in matrices else "mlp_bias"):
                shapes[f"{name}.bias"] = shape[:1]
    return {name: _values(rng, name, shape) for name, shape in shapes.items()}


def _values(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> Array:
    spread = 0.2 if len(shape) == 1 else 1.0 if "embed" in name else shape[-1] ** -0.5
    return (rng.standard_normal(shape) * spread + ("norm" in name)).astype(np.float32)


def tiny_model(dtype: str = "float32", seed: int = 0, **changes: Any) -> et.Model:
    """A model of `random_weights` in memory, with new, writable arrays."""
    raw = hf_config(**changes)
    family = family_of(raw["model_type"], "tiny")
    config = family.read_config(Keys(raw, "tiny"))
    weights = random_weights(raw, seed)

    def leaf(weight: WeightSpec) -> Array:
        return weights[family.checkpoint_name(weight.path)].astype(dtype).reshape(weight.shape)

    return et.Model(config, build(config, leaf))


def successor_model(vocab: int, **changes: Any) -> et.Model:
    """A model that predicts (i + 1) % vocab after token i, independent of the earlier tokens."""
    settings = {"hidden_size": vocab, "vocab_size": vocab, "num_hidden_layers": 1, "eos_token_id": None}
    model = tiny_model(**(settings | changes))
    for name, weight in model.named_parameters().items():
        weight[...] = 1 if "norm" in name else 0
    parameters = model.named_parameters()
    parameters["model.embed_tokens.weight"][...] = np.eye(vocab)
    parameters["lm_head.weight"][...] = np.roll(np.eye(vocab), 1, axis=0)
    return model


def make_tokenizer(folder: Path, tokens: list[str]) -> Tokenizer:
    """A tokenizer with one token for each string, in this order; tokens in `<| |>` are special."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in tokens if "<|" in token])
    (folder / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
    return Tokenizer.from_folder(folder)


def write_tiny(folder: Path, seed: int = 0, **changes: Any) -> tuple[Path, dict[str, Array]]:
    """Write a Hugging Face folder of the tiny model; returns the folder and the weights."""
    config = hf_config(**changes)
    weights = random_weights(config, seed)
    return write_folder(folder, config, weights), weights


def write_config(path: Path, config: Any) -> Path:
    """Write `config` as a JSON file; a string is written unchanged."""
    path.write_text(config if isinstance(config, str) else json.dumps(config), encoding="utf-8")
    return path


def reference_logits(
    config: Mapping[str, Any], weights: Mapping[str, Array], tokens: list[int], interleaved: bool = False
) -> Array:
    """Logits (t, v) of one sequence in float64, with loops over positions and heads and without a cache."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim, window = config["head_dim"], config.get("sliding_window") or len(tokens)
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    x = w["model.embed_tokens.weight"][tokens]
    rotate = _rotation(config, len(tokens), interleaved)

    def linear(values: Array, name: str) -> Array:
        return values @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def norm(values: Array, name: str) -> Array:
        return (
            values
            / np.sqrt((values**2).mean(-1, keepdims=True) + config["rms_norm_eps"])
            * w[f"{name}.weight"]
        )

    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        normed = norm(x, f"{at}.input_layernorm")
        q = linear(normed, f"{at}.self_attn.q_proj").reshape(-1, heads, head_dim)
        k, v = (linear(normed, f"{at}.self_attn.{n}_proj").reshape(-1, kv_heads, head_dim) for n in "kv")
        mixed = np.zeros_like(q)
        for t in range(len(tokens)):
            seen = range(max(0, t - window + 1), t + 1)
            for head in range(heads):
                group = head // (heads // kv_heads)
                query = rotate(q[t, head], t)
                scores = np.array([query @ rotate(k[s, group], s) for s in seen]) / head_dim**0.5
                p = np.exp(scores - scores.max())
                mixed[t, head] = p / p.sum() @ v[list(seen), group]
        x = x + linear(mixed.reshape(len(tokens), -1), f"{at}.self_attn.o_proj")
        normed = norm(x, f"{at}.post_attention_layernorm")
        gate, up = linear(normed, f"{at}.mlp.gate_proj"), linear(normed, f"{at}.mlp.up_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * up, f"{at}.mlp.down_proj")
    head_name = "model.embed_tokens" if config.get("tie_word_embeddings") else "lm_head"
    return linear(norm(x, "model.norm"), head_name)


def _rotation(config: Mapping[str, Any], length: int, interleaved: bool) -> Any:
    """Return rotate(vector, position), which applies RoPE with complex numbers."""
    rope = read_rope(Keys(dict(config), "reference"), config["max_position_embeddings"])
    inv_freq, factor = inverse_frequencies(rope, config["head_dim"], length)
    half = len(inv_freq)

    def rotate(vector: Array, position: int) -> Array:
        even, odd = (
            (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
            if interleaved
            else (slice(half), slice(half, 2 * half))
        )
        rotated = (vector[even] + 1j * vector[odd]) * np.exp(1j * position * inv_freq) * factor
        out = vector.copy()
        out[even], out[odd] = rotated.real, rotated.imag
        return out

    return rotate


def write_gguf(path: Path, config: Mapping[str, Any], weights: Mapping[str, Array], **keys: Any) -> Path:
    """Write the checkpoint as llama.cpp's converter does: with GGUF names, and with rows of q and k permuted
    for architectures whose RoPE pairs neighbours. keys: additional metadata."""
    import gguf

    kind = {"mistral": "llama"}.get(config["model_type"], config["model_type"])
    writer = gguf.GGUFWriter(path, kind)
    numbers = {
        f"{kind}.block_count": config["num_hidden_layers"],
        f"{kind}.context_length": config["max_position_embeddings"],
        f"{kind}.embedding_length": config["hidden_size"],
        f"{kind}.feed_forward_length": config["intermediate_size"],
        f"{kind}.attention.head_count": config["num_attention_heads"],
        f"{kind}.attention.head_count_kv": config["num_key_value_heads"],
        f"{kind}.attention.key_length": config["head_dim"],
        f"{kind}.attention.value_length": config["head_dim"],
        f"{kind}.rope.dimension_count": config["head_dim"],
        f"{kind}.rope.freq_base": float(config["rope_theta"]),
        f"{kind}.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        f"{kind}.vocab_size": config["vocab_size"],
    }
    extra = {key: value for key, value in keys.items() if isinstance(value, Array)}
    for key, value in (numbers | {key: value for key, value in keys.items() if key not in extra}).items():
        if value is None:
            continue
        add = {
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
        }
        add[type(value)](key, value)
    for name, array in weights.items():
        writer.add_tensor(_gguf_name(name), permuted(name, array, config) if kind == "llama" else array)
    for name, array in extra.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


_GGUF = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _gguf_name(name: str) -> str:
    module, kind = name.rsplit(".", 1)
    if not module.startswith("model.layers."):
        return f"{_GGUF[module]}.{kind}"
    _, _, layer, module = module.split(".", 3)
    return f"blk.{layer}.{_GGUF[module]}.{kind}"


def permuted(name: str, array: Array, config: Mapping[str, Any]) -> Array:
    """Permute rows of q and k from pairs (i, i + h/2) to (2i, 2i + 1), by the number of heads of each."""
    counts = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    heads = counts.get(name.split(".")[-2])
    if heads is None:
        return array
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))


def config_of(**changes: Any) -> ModelConfig:
    """The ModelConfig of the tiny llama with `changes`."""
    raw = hf_config(**changes)
    return family_of(raw["model_type"], "tiny").read_config(Keys(raw, "tiny"))
