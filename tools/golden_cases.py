"""The tiny models of the golden files: configs with uneven sizes, and the settings that they must cover."""

from dataclasses import dataclass, field
from typing import Any

DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


@dataclass(frozen=True, slots=True)
class Case:
    """A golden model: its config, and config changes (`contrasts`) that must change its logits."""

    family: str
    config: dict[str, Any]
    length: int = 19
    short_length: int = 0
    rope: dict[str, Any] | None = field(default_factory=DEFAULT_ROPE.copy)
    """`rope_parameters`, or None for models without RoPE or with other keys for it."""
    contrasts: tuple[dict[str, Any], ...] = ()


def sizes(hidden: int, heads: int, kv: int, inter: int, layers: int, vocab: int) -> dict[str, Any]:
    """The six sizes under their keys of config.json."""
    return {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": inter,
        "num_hidden_layers": layers,
        "vocab_size": vocab,
    }


def multi_head(hidden: int, heads: int, inter: int, layers: int, vocab: int) -> dict[str, Any]:
    """The sizes of a model without a num_key_value_heads key."""
    found = sizes(hidden, heads, heads, inter, layers, vocab)
    return {name: size for name, size in found.items() if name != "num_key_value_heads"}


PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 512}
YARN_KEYS = {"beta_fast": 16.0, "beta_slow": 2.0, "mscale": 1.0, "mscale_all_dim": 0.4}

LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0}
NO_TOKENS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
# No padding token: torch does not compute a gradient for its embedding row.
GEMMA = {"head_dim": 10, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
GEMMA2 = {
    "query_pre_attn_scalar": 17,
    "sliding_window": 6,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
}
GPT2 = {"vocab_size": 67, "n_embd": 24, "n_head": 6, "n_layer": 3, "n_positions": 40} | NO_TOKENS
MPT = {"vocab_size": 67, "d_model": 24, "n_layers": 3, "max_seq_len": 40} | NO_TOKENS
QWEN_MOE = {
    "num_experts": 7,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 14,
    "shared_expert_intermediate_size": 22,
}
DEEPSEEK = {
    "n_routed_experts": 7,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 14,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
}
DEEPSEEK_V2 = {
    "n_routed_experts": 7,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 14,
    "n_shared_experts": 2,
    "kv_lora_rank": 14,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 7,
}

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
    "qwen2_tied": Case(
        "qwen2",
        sizes(42, 7, 1, 58, 3, 73) | {"head_dim": 8, "tie_word_embeddings": True},
        rope={"rope_type": "default", "rope_theta": 1000000.0},
        contrasts=(PLAIN,),
    ),
    "qwen2_window": Case(
        "qwen2",
        sizes(40, 4, 4, 52, 3, 67)
        | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
        length=31,
        contrasts=({"use_sliding_window": False}, {"sliding_window": 7}, {"max_window_layers": 1}),
    ),
    "qwen3_tied": Case("qwen3", sizes(24, 6, 2, 30, 3, 67) | {"head_dim": 10, "tie_word_embeddings": True}),
    "qwen3_window": Case(
        "qwen3",
        sizes(20, 5, 1, 26, 3, 61)
        | {"head_dim": 8, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
        length=29,
        contrasts=({"use_sliding_window": False}, {"sliding_window": 7}, {"max_window_layers": 2}),
    ),
    "gemma_mqa": Case("gemma", sizes(20, 5, 1, 26, 3, 61) | GEMMA | {"hidden_act": "gelu_pytorch_tanh"}),
    "gemma_untied": Case(
        "gemma", sizes(32, 4, 4, 52, 2, 59) | GEMMA | {"tie_word_embeddings": False, "attention_bias": True}
    ),
    "gemma2_caps": Case(
        "gemma2",
        sizes(24, 6, 2, 30, 3, 67) | GEMMA | GEMMA2,
        length=23,
        contrasts=(
            {"attn_logit_softcapping": None},
            {"final_logit_softcapping": None},
            {"query_pre_attn_scalar": 10},
            {"sliding_window": 7},
            {"layer_types": ["full_attention"] * 3},
        ),
    ),
    "gemma2_mqa": Case(
        "gemma2",
        sizes(20, 5, 1, 26, 5, 61)
        | GEMMA
        | GEMMA2
        | {"attn_logit_softcapping": None, "query_pre_attn_scalar": 6, "tie_word_embeddings": False},
        length=17,
    ),
    "gemma3_text": Case(
        "gemma3_text",
        sizes(24, 6, 2, 26, 7, 67) | GEMMA | {"sliding_window": 6, "query_pre_attn_scalar": 17},
        length=23,
        rope={
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000000.0},
            "sliding_attention": DEFAULT_ROPE,
        },
        contrasts=(
            {"sliding_window": 7},
            {"query_pre_attn_scalar": 10},
            {"rope_parameters": {"full_attention": DEFAULT_ROPE, "sliding_attention": DEFAULT_ROPE}},
            {"layer_types": ["sliding_attention"] * 7},
        ),
    ),
    "gemma3_text_mqa": Case(
        "gemma3_text",
        sizes(20, 5, 1, 26, 3, 61)
        | GEMMA
        | {"sliding_window": 5, "sliding_window_pattern": 2, "final_logit_softcapping": 2.0},
        length=17,
        rope={
            "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        },
        contrasts=({"final_logit_softcapping": None}, {"sliding_window_pattern": 3}),
    ),
    "phi_half": Case(
        "phi",
        sizes(32, 4, 4, 34, 3, 71) | NO_TOKENS,
        rope=DEFAULT_ROPE | {"partial_rotary_factor": 0.5},
        contrasts=({"rope_parameters": DEFAULT_ROPE | {"partial_rotary_factor": 0.75}},),
    ),
    "phi_gqa": Case(
        "phi",
        sizes(40, 4, 2, 30, 3, 61) | NO_TOKENS | {"hidden_act": "gelu"},
        rope=DEFAULT_ROPE | {"partial_rotary_factor": 0.4},
        contrasts=({"hidden_act": "gelu_new", "layer_norm_eps": 0.1},),
    ),
    "phi3_window": Case(
        "phi3",
        sizes(40, 4, 2, 30, 3, 67) | NO_TOKENS | {"sliding_window": 7},
        length=23,
        contrasts=({"sliding_window": None}, {"sliding_window": 8}),
    ),
    "phi3_longrope": Case(
        "phi3",
        sizes(40, 4, 4, 26, 3, 59)
        | NO_TOKENS
        | {"max_position_embeddings": 64, "original_max_position_embeddings": 16},
        length=29,
        short_length=11,
        rope=LONGROPE | {"short_factor": [1.0, 1.1, 1.3, 1.6, 2.0], "long_factor": [1.0, 2.0, 4.0, 7.0, 9.0]},
        contrasts=(PLAIN, {"max_position_embeddings": 128}, {"original_max_position_embeddings": 32}),
    ),
    "phi3_partial": Case(
        "phi3",
        sizes(48, 4, 1, 30, 3, 59) | NO_TOKENS | {"original_max_position_embeddings": 32},
        rope=LONGROPE
        | {"partial_rotary_factor": 0.5, "short_factor": [1.0, 1.5, 2.5], "long_factor": [1.0, 4.0, 9.0]},
        contrasts=({"rope_parameters": DEFAULT_ROPE | {"partial_rotary_factor": 0.5}},),
    ),
    "gpt2_plain": Case("gpt2", GPT2 | {"n_inner": 34}, rope=None),
    "gpt2_scaled": Case(
        "gpt2",
        GPT2
        | {
            "n_embd": 20,
            "n_head": 5,
            "scale_attn_by_inverse_layer_idx": True,
            "activation_function": "gelu",
            "tie_word_embeddings": False,
        },
        rope=None,
        contrasts=({"scale_attn_by_inverse_layer_idx": False},),
    ),
    "gpt_neox_parallel": Case(
        "gpt_neox",
        multi_head(32, 4, 34, 3, 71) | NO_TOKENS,
        rope=DEFAULT_ROPE | {"partial_rotary_factor": 0.25},
        contrasts=(
            {"use_parallel_residual": False},
            {"rope_parameters": DEFAULT_ROPE | {"partial_rotary_factor": 0.5}},
        ),
    ),
    "gpt_neox_sequential": Case(
        "gpt_neox",
        multi_head(40, 4, 30, 3, 61)
        | NO_TOKENS
        | {"use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True},
        rope={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.4},
        contrasts=({"use_parallel_residual": True},),
    ),
    "mpt_alibi": Case("mpt", MPT | {"n_heads": 6}, rope=None),
    "mpt_clip": Case(
        "mpt",
        MPT | {"d_model": 16, "n_heads": 4, "attn_config": {"clip_qkv": 1.0, "softmax_scale": 0.3}},
        rope=None,
        contrasts=(
            {"attn_config": {"softmax_scale": 0.3}},
            {"attn_config": {"clip_qkv": 1.0}},
        ),
    ),
    "olmo2_gqa": Case("olmo2", sizes(24, 6, 2, 30, 3, 67) | NO_TOKENS),
    "olmo2_mqa": Case(
        "olmo2",
        sizes(20, 5, 1, 26, 3, 61)
        | NO_TOKENS
        | {"head_dim": 8, "attention_bias": True, "rms_norm_eps": 1e-2, "tie_word_embeddings": True},
        contrasts=({"rms_norm_eps": 1e-5},),
    ),
    "olmo3_yarn": Case(
        "olmo3",
        sizes(24, 6, 2, 30, 5, 67) | NO_TOKENS | {"sliding_window": 6},
        length=23,
        rope={
            "full_attention": {
                "rope_type": "yarn",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "original_max_position_embeddings": 32,
                "attention_factor": 1.2,
                "beta_fast": 16.0,
                "beta_slow": 1.0,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 500000.0},
        },
        contrasts=(
            {"sliding_window": 7},
            {"layer_types": ["sliding_attention"] * 5},
            {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), DEFAULT_ROPE)},
        ),
    ),
    "olmo3_two_ropes": Case(
        "olmo3",
        sizes(20, 5, 1, 26, 3, 61)
        | NO_TOKENS
        | {
            "head_dim": 8,
            "attention_bias": True,
            "rms_norm_eps": 1e-2,
            "tie_word_embeddings": True,
            "sliding_window": 5,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
        length=17,
        rope={
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        },
        contrasts=(
            {"rms_norm_eps": 1e-5},
            {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), DEFAULT_ROPE)},
        ),
    ),
    "smollm3_nope": Case(
        "smollm3",
        sizes(24, 6, 2, 30, 5, 67) | NO_TOKENS | {"tie_word_embeddings": True},
        rope={"rope_type": "default", "rope_theta": 2000000.0},
        contrasts=({"no_rope_layer_interval": 2}, {"no_rope_layers": [1] * 5}),
    ),
    "smollm3_window": Case(
        "smollm3",
        sizes(20, 5, 1, 26, 5, 61)
        | NO_TOKENS
        | {
            "head_dim": 8,
            "no_rope_layers": [1, 0, 1, 1, 0],
            "use_sliding_window": True,
            "sliding_window": 5,
            "tie_word_embeddings": False,
            "mlp_bias": True,
        },
        contrasts=({"use_sliding_window": False}, {"no_rope_layers": [0, 0, 1, 1, 0]}),
    ),
    "granite_gqa": Case(
        "granite",
        sizes(24, 6, 2, 30, 3, 67)
        | NO_TOKENS
        | {
            "embedding_multiplier": 3.5,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.45,
            "logits_scaling": 1.75,
        },
        contrasts=(
            {"embedding_multiplier": 1.0},
            {"attention_multiplier": 1.0},
            {"attention_multiplier": 0.5},  # 1 / sqrt(head_dim)
            {"residual_multiplier": 1.0},
            {"logits_scaling": 1.0},
        ),
    ),
    "granite_tied": Case(
        "granite",
        sizes(30, 5, 1, 26, 3, 61)
        | NO_TOKENS
        | {
            "embedding_multiplier": 0.8,
            "attention_multiplier": 0.7,
            "residual_multiplier": 1.3,
            "logits_scaling": 0.6,
            "attention_bias": True,
            "mlp_bias": True,
            "rms_norm_eps": 1e-2,
            "tie_word_embeddings": True,
        },
        rope={"rope_type": "default", "rope_theta": 500.0},
        contrasts=(
            {"embedding_multiplier": 1.0},
            {"attention_multiplier": 1.0},
            {"residual_multiplier": 1.0},
            {"logits_scaling": 1.0},
            {"rms_norm_eps": 1e-5},
            PLAIN,
        ),
    ),
    "mixtral_window": Case(
        "mixtral",
        sizes(24, 6, 2, 20, 3, 67)
        | {"head_dim": 10, "num_local_experts": 7, "num_experts_per_tok": 2, "sliding_window": 7},
        contrasts=({"num_experts_per_tok": 3}, {"sliding_window": None}),
    ),
    "mixtral_mqa": Case(
        "mixtral",
        sizes(20, 5, 1, 18, 3, 61)
        | {"num_local_experts": 5, "num_experts_per_tok": 4, "tie_word_embeddings": True},
    ),
    "qwen2_moe_dense_layer": Case(
        "qwen2_moe",
        sizes(24, 6, 2, 30, 3, 67) | QWEN_MOE | {"mlp_only_layers": [1]},
        contrasts=({"norm_topk_prob": True}, {"num_experts_per_tok": 2}),
    ),
    "qwen2_moe_window": Case(
        "qwen2_moe",
        sizes(20, 5, 1, 30, 5, 61)
        | QWEN_MOE
        | {
            "decoder_sparse_step": 2,
            "norm_topk_prob": True,
            "qkv_bias": False,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 4,
            "tie_word_embeddings": True,
        },
        contrasts=({"norm_topk_prob": False}, {"use_sliding_window": False}, {"max_window_layers": 5}),
    ),
    "qwen3_moe_normalized": Case(
        "qwen3_moe",
        sizes(24, 6, 2, 30, 3, 67) | QWEN_MOE | {"head_dim": 10, "norm_topk_prob": True},
        contrasts=({"norm_topk_prob": False},),
    ),
    "qwen3_moe_window": Case(
        "qwen3_moe",
        sizes(20, 5, 1, 30, 3, 61)
        | QWEN_MOE
        | {"head_dim": 8, "mlp_only_layers": [0], "use_sliding_window": True, "sliding_window": 5}
        | {"num_experts_per_tok": 1},
        contrasts=({"norm_topk_prob": True}, {"use_sliding_window": False}),
    ),
    "deepseek_plain": Case("deepseek", sizes(24, 6, 6, 30, 3, 67) | DEEPSEEK | {"norm_topk_prob": False}),
    "deepseek_normalized": Case(
        "deepseek",
        sizes(20, 5, 5, 30, 4, 61)
        | DEEPSEEK
        | {"norm_topk_prob": True, "moe_layer_freq": 2, "n_shared_experts": 1},
        contrasts=({"norm_topk_prob": False},),
    ),
    "deepseek_v2_direct": Case(
        "deepseek_v2",
        sizes(24, 6, 6, 30, 3, 67) | DEEPSEEK_V2 | {"q_lora_rank": None, "first_k_dense_replace": 1},
        rope={
            **YARN,
            "factor": 8.0,
            "mscale": 0.7,
            "mscale_all_dim": 0.7,
            "original_max_position_embeddings": 16,
        },
        contrasts=(PLAIN, {"num_experts_per_tok": 2}),
    ),
    "deepseek_v2_groups": Case(
        "deepseek_v2",
        sizes(20, 5, 5, 30, 3, 61)
        | DEEPSEEK_V2
        | {
            "q_lora_rank": 11,
            "topk_method": "group_limited_greedy",
            "n_routed_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
            "attention_bias": True,
        },
        rope={
            **YARN,
            "factor": 8.0,
            "mscale": 0.9,
            "mscale_all_dim": 0.6,
            "original_max_position_embeddings": 16,
        },
        contrasts=({"topk_method": "greedy"}, {"routed_scaling_factor": 1.0}, {"topk_group": 1}),
    ),
}
