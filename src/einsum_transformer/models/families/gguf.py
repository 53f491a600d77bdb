"""Weight names and metadata keys that families share in GGUF files."""

import math
from collections.abc import Mapping
from typing import Any

from einsum_transformer.components.rope import RopeConfig, RopeType, inverse_frequencies
from einsum_transformer.errors import ConfigError
from einsum_transformer.models.config import FULL, SLIDING, Keys, ModelConfig, MoEConfig, shown
from einsum_transformer.models.families.family import token_ids

NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
FUSED = {"self_attn.qkv_proj": "attn_qkv"}
POST_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
EXPERTS = {
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}
FACTORS = r"rope_(freqs|factors_long|factors_short)\.weight"
"""Tensors of a file that are settings of RoPE, not weights."""
PERMUTED = frozenset({"self_attn.q_proj", "self_attn.k_proj", "self_attn.q_bias", "self_attn.k_bias"})


def read_shared(keys: Keys, metadata: Mapping[str, Any], model_type: str, **settings: Any) -> ModelConfig:
    """Read the metadata that most architectures share; `settings` are values that the family adds or fixes.

    partial: whether RoPE may rotate only a part of each head.
    """
    hidden = keys.get("embedding_length", int)
    heads = keys.get("attention.head_count", int)
    context = keys.get("context_length", int)
    vocabulary = metadata.get("tokenizer.ggml.tokens")
    every = Keys(metadata, keys.source)
    head_dim, partial = settings.pop("head_dim", None), settings.pop("partial", False)
    head_dim = head_dim or keys.get("attention.key_length", int, hidden // max(heads, 1))
    eps = "layer_norm_rms_epsilon" if settings.get("norm", "rms") == "rms" else "layer_norm_epsilon"
    fields: dict[str, Any] = {
        "model_type": model_type,
        "vocab_size": keys.get("vocab_size", int, len(vocabulary) if vocabulary is not None else ...),
        "hidden_size": hidden,
        "num_hidden_layers": keys.get("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.get("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "norm_eps": keys.get(f"attention.{eps}", float),
        "bos_token_id": every.get("tokenizer.ggml.bos_token_id", int, None),
        "eos_token_id": token_ids(every.get("tokenizer.ggml.eos_token_id", int, None)),
        "pad_token_id": every.get("tokenizer.ggml.padding_token_id", int, None),
    }
    others = {
        "intermediate_size": lambda: keys.get("feed_forward_length", int),
        "rope": lambda: read_rope(keys, head_dim, context),
    }
    fields |= {name: read() for name, read in others.items() if name not in settings}
    if fields.get("rope") is not None and not partial:
        check_rotated(keys, head_dim)
    return ModelConfig(**fields | settings)


def check_rotated(keys: Keys, head_dim: int) -> None:
    """Raise ConfigError unless RoPE rotates all dimensions of a head."""
    rotated = keys.get("rope.dimension_count", int, head_dim)
    if rotated != head_dim:
        raise ConfigError(f"{keys.source}: rope.dimension_count {rotated} is not the head size {head_dim}")


def read_rope(keys: Keys, head_dim: int, context: int) -> RopeConfig:
    """Read RoPE's base, scaling, and number of rotated dimensions per head.

    As in llama.cpp, a factor without a type is linear, the old key of the factor is `rope.scale_linear`, and
    `attn_factor` multiplies cosines and sines of every type. `yarn_attn_factor`, which llama.cpp's converter
    copies from transformers' configs, replaces yarn's own factor, as in transformers.
    """
    kind, factor = _scaling(keys)
    rotated = keys.get("rope.dimension_count", int, head_dim)
    attention = keys.get("rope.scaling.attn_factor", float, 1.0)
    settings: dict[str, Any] = {"attention_factor": None if attention == 1 else attention}
    if kind == "yarn":
        settings = _read_yarn(keys, factor, attention)
    return RopeConfig(
        rope_theta=keys.get("rope.freq_base", float, 10000.0),
        rope_type="default" if kind == "linear" and factor == 1 else kind,
        partial_rotary_factor=rotated / max(head_dim, 1),
        factor=factor,
        original_max_position_embeddings=keys.get("rope.scaling.original_context_length", int, 0) or context,
        **settings,
    )


def _scaling(keys: Keys) -> tuple[RopeType, float]:
    """(rope_type, factor)"""
    kind = keys.get("rope.scaling.type", str, None)
    if kind not in (None, "none", "linear", "yarn", "longrope"):
        raise ConfigError(f"{keys.source}: rope.scaling.type {shown(kind)} is not supported")
    old = keys.get("rope.scale_linear", float, 0.0)
    factor = keys.get("rope.scaling.factor", float, old) or 1.0
    return ("default", 1.0) if kind == "none" else (kind or "linear", factor)


def _read_yarn(keys: Keys, factor: float, more: float) -> dict[str, Any]:
    """The settings of yarn; -1 means that a value is not set. more: a further attention factor."""
    found: dict[str, Any] = {}
    for name, default in (("beta_fast", 32.0), ("beta_slow", 1.0)):
        stated = keys.get(f"rope.scaling.yarn_{name}", float, default)
        found[name] = default if stated == -1 else stated
    attention = keys.get("rope.scaling.yarn_attn_factor", float, -1.0)
    if attention == -1:
        if more == 1:
            return found
        attention = 0.1 * math.log(max(factor, 1.0)) + 1.0
    return found | {"attention_factor": attention * more}


def read_windows(keys: Keys, default_pattern: int) -> dict[str, Any]:
    """sliding_window and layer_types; a pattern n means full attention in every n-th layer."""
    window = keys.get("attention.sliding_window", int, 0)
    pattern = keys.get("attention.sliding_window_pattern", (int, list), default_pattern)
    layers = keys.get("block_count", int)
    if not window:
        return {}
    if isinstance(pattern, list):
        if len(pattern) != layers or not all(value in (0, 1) for value in pattern):
            raise ConfigError(
                f"{keys.source}: attention.sliding_window_pattern must be a bool for each of {layers} layers"
            )
        kinds = tuple(SLIDING if value else FULL for value in pattern)
    else:
        kinds = tuple(SLIDING if pattern == 0 or i % pattern < pattern - 1 else FULL for i in range(layers))
    return {"sliding_window": window, "layer_types": kinds} if SLIDING in kinds else {}


def read_experts(keys: Keys, size: int, **settings: Any) -> MoEConfig:
    """Read the numbers of experts and of experts per token; size: hidden size of each expert."""
    return MoEConfig(keys.get("expert_count", int), keys.get("expert_used_count", int), size, **settings)


def write_shared(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_shared`: metadata that all architectures share, without the prefix `{arch}.`."""
    eps = "layer_norm_rms_epsilon" if config.norm == "rms" else "layer_norm_epsilon"
    written: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        f"attention.{eps}": config.norm_eps,
    }
    return written | write_rope(config.rope, config.head_dim)


def write_rope(rope: RopeConfig | None, head_dim: int) -> dict[str, Any]:
    """The inverse of `read_rope`. The divisors of llama3 and longrope are tensors."""
    if rope is None:
        return {}
    written: dict[str, Any] = {
        "rope.dimension_count": int(head_dim * rope.partial_rotary_factor),
        "rope.freq_base": rope.rope_theta,
    }
    scaling: dict[str, Any] = {}
    if rope.rope_type in ("linear", "yarn"):
        scaling |= {"type": rope.rope_type, "factor": rope.factor}
    if rope.rope_type in ("longrope", "yarn"):
        scaling["original_context_length"] = rope.original_max_position_embeddings
    if rope.rope_type == "yarn":
        scaling |= {"yarn_beta_fast": rope.beta_fast, "yarn_beta_slow": rope.beta_slow}
        if rope.attention_factor is not None:
            scaling["yarn_attn_factor"] = rope.attention_factor
    elif (attention := inverse_frequencies(rope, head_dim)[1]) != 1:
        scaling["attn_factor"] = attention
    return written | {f"rope.scaling.{key}": value for key, value in scaling.items()}


def write_window(config: ModelConfig, default_pattern: int = 0) -> dict[str, Any]:
    """The inverse of `read_windows`. The layers are listed only if they differ from the default pattern, as
    llama.cpp's converter does; 0: all layers have the window."""
    if config.sliding_window is None:
        return {}
    windows = [window is not None for window in config.windows]
    usual = [not default_pattern or i % default_pattern < default_pattern - 1 for i in range(len(windows))]
    pattern = {} if windows == usual else {"attention.sliding_window_pattern": windows}
    return {"attention.sliding_window": config.sliding_window} | pattern


def write_experts(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_experts`."""
    assert config.moe is not None
    return {
        "expert_count": config.moe.num_experts,
        "expert_used_count": config.moe.num_experts_per_tok,
        "expert_feed_forward_length": config.moe.moe_intermediate_size,
    }
