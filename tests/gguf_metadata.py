"""The metadata that llama.cpp's converter derives from a config.json, a function per architecture."""

import math
from collections.abc import Mapping
from typing import Any

from gguf.constants import ExpertGatingFuncType, Keys

Config = Mapping[str, Any]
Metadata = dict[str, Any]
"""Key, with {arch} for the architecture -> value; None: the converter does not write the key."""
LLM, ATTENTION, ROPE = Keys.LLM, Keys.Attention, Keys.Rope
ORIGINAL_LENGTH = "original_max_position_embeddings"


def first(config: Config, *keys: str) -> Any:
    """The value of the first of the keys that is present and not null."""
    return next((config[key] for key in keys if config.get(key) is not None), None)


def rope_of(config: Config) -> dict[str, Any]:
    """The RoPE parameters of the layers with full attention, with the keys of transformers 5."""
    rope = config.get("rope_parameters")
    if rope is None:
        scaling = config.get("rope_scaling") or {}
        rope = {"rope_theta": first(config, "rope_theta", "rotary_emb_base")}
        rope |= {"rope_type" if key == "type" else key: value for key, value in scaling.items()}
    return rope.get("full_attention", rope)


def head_size(config: Config) -> int:
    """The head dimension."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def original_length(config: Config) -> int:
    """The trained context length before RoPE scaling."""
    return first(rope_of(config), ORIGINAL_LENGTH) or first(
        config, ORIGINAL_LENGTH, "max_position_embeddings"
    )


def rotated_size(config: Config) -> int:
    """The number of rotated dimensions of a head, as the converter rounds it for the phi models."""
    share = first(rope_of(config), "partial_rotary_factor") or config.get("partial_rotary_factor", 1.0)
    return int(share * config["hidden_size"]) // config["num_attention_heads"]


def real(value: Any) -> float | None:
    """A number of the JSON file as a float, or None."""
    return None if value is None else float(value)


def _scaling(rope: Config) -> Metadata:
    kind, factor = rope.get("rope_type"), real(rope.get("factor"))
    if kind == "linear":
        return {ROPE.SCALING_TYPE: kind, ROPE.SCALING_FACTOR: factor}
    if kind in ("su", "longrope"):
        return {ROPE.SCALING_TYPE: "longrope"}
    if kind != "yarn":
        return {}
    return {
        ROPE.SCALING_TYPE: kind,
        ROPE.SCALING_FACTOR: factor,
        ROPE.SCALING_ORIG_CTX_LEN: rope[ORIGINAL_LENGTH],
        ROPE.SCALING_YARN_ATTN_FACTOR: real(first(rope, "attention_factor", "attn_factor")),
        ROPE.SCALING_YARN_BETA_FAST: real(rope.get("beta_fast")),
        ROPE.SCALING_YARN_BETA_SLOW: real(rope.get("beta_slow")),
    }


def _sizes(config: Config) -> Metadata:
    return {
        LLM.BLOCK_COUNT: config["num_hidden_layers"],
        LLM.CONTEXT_LENGTH: config["max_position_embeddings"],
        LLM.EMBEDDING_LENGTH: config["hidden_size"],
        LLM.FEED_FORWARD_LENGTH: config["intermediate_size"],
        ATTENTION.HEAD_COUNT: config["num_attention_heads"],
        ATTENTION.HEAD_COUNT_KV: first(config, "num_key_value_heads", "num_attention_heads"),
    }


def common(config: Config) -> Metadata:
    """The default metadata of the converter."""
    rope = rope_of(config)
    local = (config.get("rope_parameters") or {}).get("sliding_attention", {}).get("rope_theta")
    scoring = config.get("scoring_func")
    return _sizes(config) | {
        LLM.EXPERT_COUNT: first(config, "num_local_experts", "num_experts"),
        LLM.EXPERT_USED_COUNT: config.get("num_experts_per_tok"),
        LLM.EXPERT_GROUP_COUNT: config.get("n_group"),
        LLM.EXPERT_GROUP_USED_COUNT: config.get("topk_group"),
        LLM.EXPERT_GATING_FUNC: int(ExpertGatingFuncType[scoring.upper()]) if scoring else None,
        ATTENTION.KEY_LENGTH: config.get("head_dim"),
        ATTENTION.VALUE_LENGTH: config.get("head_dim"),
        ATTENTION.LAYERNORM_RMS_EPS: real(config.get("rms_norm_eps", 1e-6)),
        **_scaling(rope),
        ROPE.FREQ_BASE: real(rope.get("rope_theta")),
        ROPE.FREQ_BASE_SWA: real(local or config.get("rope_local_base_freq")),
    }


def llama(config: Config) -> Metadata:
    """llama, mistral, mixtral and smollm3."""
    own = {LLM.VOCAB_SIZE: config["vocab_size"], ROPE.DIMENSION_COUNT: head_size(config)}
    return common(config) | own


def granite(config: Config) -> Metadata:
    """granite: head_dim and factors that are 0 are not written."""
    factors = {
        LLM.EMBEDDING_SCALE: "embedding_multiplier",
        ATTENTION.SCALE: "attention_multiplier",
        LLM.RESIDUAL_SCALE: "residual_multiplier",
        LLM.LOGIT_SCALE: "logits_scaling",
    }
    own = {key: value for key, value in config.items() if key != "head_dim"}
    return llama(own) | {key: real(config.get(name)) or None for key, name in factors.items()}


def qwen_moe(config: Config) -> Metadata:
    """qwen2_moe and qwen3_moe: norm_topk_prob is not written."""
    return common(config) | {
        LLM.EXPERT_FEED_FORWARD_LENGTH: config.get("moe_intermediate_size"),
        LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH: config.get("shared_expert_intermediate_size"),
    }


def gemma(config: Config) -> Metadata:
    """gemma: the base of RoPE is not written."""
    return _sizes(config) | {
        ATTENTION.LAYERNORM_RMS_EPS: real(config["rms_norm_eps"]),
        ATTENTION.KEY_LENGTH: config["head_dim"],
        ATTENTION.VALUE_LENGTH: config["head_dim"],
    }


def gemma2(config: Config) -> Metadata:
    """gemma2: query_pre_attn_scalar and the layers with the sliding window are not written."""
    return gemma(config) | {
        LLM.ATTN_LOGIT_SOFTCAPPING: real(config["attn_logit_softcapping"]),
        LLM.FINAL_LOGIT_SOFTCAPPING: real(config["final_logit_softcapping"]),
        ATTENTION.SLIDING_WINDOW: config["sliding_window"],
    }


def gemma3(config: Config) -> Metadata:
    """gemma3_text: query_pre_attn_scalar and the layers with the sliding window are not written."""
    return common(config) | {
        ROPE.FREQ_BASE: real(rope_of(config).get("rope_theta")) or 1e6,
        LLM.FINAL_LOGIT_SOFTCAPPING: real(config.get("final_logit_softcapping")),
        ATTENTION.SLIDING_WINDOW: config["sliding_window"],
    }


def olmo3(config: Config) -> Metadata:
    """olmo3: written as olmo2, with the sliding window and its layers."""
    return common(config) | {
        ATTENTION.SLIDING_WINDOW: config["sliding_window"],
        ATTENTION.SLIDING_WINDOW_PATTERN: [kind == "sliding_attention" for kind in config["layer_types"]],
    }


def phi2(config: Config) -> Metadata:
    """phi: the base of RoPE is not written, and the width of the MLP is always 4 d."""
    heads = config["num_attention_heads"]
    return _sizes(config) | {
        LLM.FEED_FORWARD_LENGTH: 4 * config["hidden_size"],
        ATTENTION.HEAD_COUNT_KV: heads,
        ATTENTION.LAYERNORM_EPS: real(config["layer_norm_eps"]),
        ROPE.DIMENSION_COUNT: rotated_size(config),
        Keys.Tokenizer.ADD_BOS: False,
    }


def phi3(config: Config) -> Metadata:
    """phi3: a sliding window of 0 means none, and the type of RoPE scaling is not written."""
    rope, trained = rope_of(config), original_length(config)
    stretch = config["max_position_embeddings"] / trained
    longer = math.log(stretch) / math.log(trained) if stretch > 1 else 0.0
    return _sizes(config) | {
        ROPE.SCALING_ORIG_CTX_LEN: trained,
        ATTENTION.LAYERNORM_RMS_EPS: real(config["rms_norm_eps"]),
        ROPE.DIMENSION_COUNT: rotated_size(config),
        ROPE.FREQ_BASE: real(rope["rope_theta"]),
        ROPE.SCALING_ATTN_FACTOR: math.sqrt(1 + longer) if rope.get("long_factor") else None,
        ATTENTION.SLIDING_WINDOW: config.get("sliding_window") or 0,
    }


def gpt2(config: Config) -> Metadata:
    """gpt2: the width of the MLP is always 4 d."""
    return {
        LLM.BLOCK_COUNT: config["n_layer"],
        LLM.CONTEXT_LENGTH: first(config, "n_ctx", "n_positions"),
        LLM.EMBEDDING_LENGTH: config["n_embd"],
        LLM.FEED_FORWARD_LENGTH: 4 * config["n_embd"],
        ATTENTION.HEAD_COUNT: config["n_head"],
        ATTENTION.LAYERNORM_EPS: real(config["layer_norm_epsilon"]),
    }


def gptneox(config: Config) -> Metadata:
    """gpt_neox: the base of RoPE is not written."""
    share = first(rope_of(config), "partial_rotary_factor") or config["rotary_pct"]
    return _sizes(config) | {
        ATTENTION.HEAD_COUNT_KV: None,
        ROPE.DIMENSION_COUNT: int(share * (config["hidden_size"] // config["num_attention_heads"])),
        LLM.USE_PARALLEL_RESIDUAL: config.get("use_parallel_residual", True),
        ATTENTION.LAYERNORM_EPS: real(config["layer_norm_eps"]),
    }


def mpt(config: Config) -> Metadata:
    """mpt: a maximum bias of 0 means no ALiBi, and the width of the MLP is always 4 d."""
    attention = config["attn_config"]
    return {
        LLM.CONTEXT_LENGTH: config["max_seq_len"],
        LLM.EMBEDDING_LENGTH: config["d_model"],
        LLM.BLOCK_COUNT: config["n_layers"],
        LLM.FEED_FORWARD_LENGTH: 4 * config["d_model"],
        ATTENTION.HEAD_COUNT: config["n_heads"],
        ATTENTION.HEAD_COUNT_KV: attention.get("kv_n_heads"),
        ATTENTION.LAYERNORM_EPS: 1e-5,
        ATTENTION.CLAMP_KQV: real(attention.get("clip_qkv")),
        ATTENTION.MAX_ALIBI_BIAS: real(attention["alibi_bias_max"] if attention["alibi"] else 0),
    }


def _deepseek_experts(config: Config) -> Metadata:
    return {
        LLM.LEADING_DENSE_BLOCK_COUNT: config["first_k_dense_replace"],
        LLM.VOCAB_SIZE: config["vocab_size"],
        LLM.EXPERT_FEED_FORWARD_LENGTH: config["moe_intermediate_size"],
        LLM.EXPERT_COUNT: config["n_routed_experts"],
        LLM.EXPERT_SHARED_COUNT: config["n_shared_experts"],
    }


def deepseek(config: Config) -> Metadata:
    """deepseek: RoPE scaling is written as none, and weights of experts are neither scaled nor normalized."""
    rope = {ROPE.DIMENSION_COUNT: head_size(config), ROPE.SCALING_TYPE: "none"}
    return common(config) | rope | _deepseek_experts(config) | {LLM.EXPERT_WEIGHTS_SCALE: 1.0}


def deepseek2(config: Config) -> Metadata:
    """deepseek_v2 with compressed attention: one key/value head with the dimension of the rank."""
    rank, rotated = config["kv_lora_rank"], config["qk_rope_head_dim"]
    return _deepseek2(config) | {
        ATTENTION.HEAD_COUNT_KV: 1,
        ATTENTION.KEY_LENGTH: rank + rotated,
        ATTENTION.VALUE_LENGTH: rank,
        ATTENTION.KEY_LENGTH_MLA: config["qk_nope_head_dim"] + rotated,
        ATTENTION.VALUE_LENGTH_MLA: config["v_head_dim"],
    }


def deepseek2_expanded(config: Config) -> Metadata:
    """deepseek_v2 as converters wrote it before April 2025: with keys and values of every head."""
    return _deepseek2(config) | {
        ATTENTION.KEY_LENGTH: config["qk_nope_head_dim"] + config["qk_rope_head_dim"],
        ATTENTION.VALUE_LENGTH: config["v_head_dim"],
    }


def _deepseek2(config: Config) -> Metadata:
    mscale = rope_of(config).get("mscale_all_dim")
    return common(config) | {
        **_deepseek_experts(config),
        ATTENTION.KV_LORA_RANK: config["kv_lora_rank"],
        ATTENTION.Q_LORA_RANK: config.get("q_lora_rank"),
        LLM.EXPERT_WEIGHTS_SCALE: real(config.get("routed_scaling_factor")),
        LLM.EXPERT_WEIGHTS_NORM: True if config.get("norm_topk_prob") else None,
        ROPE.DIMENSION_COUNT: config["qk_rope_head_dim"],
        ROPE.SCALING_YARN_LOG_MUL: None if mscale is None else 0.1 * mscale,
    }
