"""llama: Llama 2 and 3, SmolLM2, TinyLlama, Yi, DeepSeek-LLM and all others with model_type "llama"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from einsum_transformer.components.rope import RopeConfig
from einsum_transformer.errors import ConfigError
from einsum_transformer.models.config import Keys, ModelConfig
from einsum_transformer.models.families.family import Family, read_rope, token_ids, write_rope

GGUF_NAMES = {
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
GGUF_PERMUTED = frozenset({"self_attn.q_proj", "self_attn.k_proj", "self_attn.q_bias", "self_attn.k_bias"})


def read_shared(keys: Keys, model_type: str, **settings: Any) -> ModelConfig:
    """The keys that llama and its relatives have in common; `settings` are what the family adds or fixes."""
    hidden = keys.get("hidden_size", int)
    heads = keys.get("num_attention_heads", int)
    positions = keys.get("max_position_embeddings", int, 2048)
    return ModelConfig(
        model_type=model_type,
        vocab_size=keys.get("vocab_size", int),
        hidden_size=hidden,
        intermediate_size=keys.get("intermediate_size", int),
        num_hidden_layers=keys.get("num_hidden_layers", int),
        num_attention_heads=heads,
        num_key_value_heads=keys.get("num_key_value_heads", int, heads),
        head_dim=keys.get("head_dim", int, hidden // max(heads, 1)),
        max_position_embeddings=positions,
        rms_norm_eps=keys.get("rms_norm_eps", float, 1e-6),
        hidden_act=keys.get("hidden_act", str, "silu"),
        rope=read_rope(keys, positions),
        tie_word_embeddings=keys.get("tie_word_embeddings", bool, False),
        initializer_range=keys.get("initializer_range", float, 0.02),
        bos_token_id=keys.get("bos_token_id", int, None),
        eos_token_id=token_ids(keys.get("eos_token_id", (int, list), None)),
        pad_token_id=keys.get("pad_token_id", int, None),
        **settings,
    )


def write_shared(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_shared`."""
    eos = list(config.eos_token_id)
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "hidden_act": config.hidden_act,
        **write_rope(config.rope),
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": config.pad_token_id,
    }


def _read(keys: Keys) -> ModelConfig:
    return read_shared(
        keys,
        "llama",
        attention_bias=keys.get("attention_bias", bool, False),
        mlp_bias=keys.get("mlp_bias", bool, False),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    return write_shared(config) | {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}


def read_gguf(keys: Keys, metadata: Mapping[str, Any]) -> ModelConfig:
    """GGUF metadata of architecture "llama" (llama and mistral alike)."""
    hidden = keys.get("embedding_length", int)
    heads = keys.get("attention.head_count", int)
    context = keys.get("context_length", int)
    vocabulary = metadata.get("tokenizer.ggml.tokens")
    every = Keys(metadata, keys.source)
    eos = every.get("tokenizer.ggml.eos_token_id", int, None)
    head_dim = keys.get("attention.key_length", int, hidden // max(heads, 1))
    scaling = keys.get("rope.scaling.type", str, "none")
    window = keys.get("attention.sliding_window", int, None)
    if (rotated := keys.get("rope.dimension_count", int, head_dim)) != head_dim:
        raise ConfigError(
            f"{keys.source}: llama.rope.dimension_count {rotated} is not the head's size {head_dim}"
        )
    return ModelConfig(
        # The format has one architecture for both; the window tells them apart.
        model_type="llama" if window is None else "mistral",
        vocab_size=keys.get("vocab_size", int, len(vocabulary) if vocabulary is not None else ...),
        hidden_size=hidden,
        intermediate_size=keys.get("feed_forward_length", int),
        num_hidden_layers=keys.get("block_count", int),
        num_attention_heads=heads,
        num_key_value_heads=keys.get("attention.head_count_kv", int, heads),
        head_dim=head_dim,
        max_position_embeddings=context,
        rms_norm_eps=keys.get("attention.layer_norm_rms_epsilon", float),
        rope=RopeConfig(
            rope_theta=keys.get("rope.freq_base", float, 10000.0),
            rope_type="default" if scaling == "none" else scaling,
            factor=keys.get("rope.scaling.factor", float, 1.0),
            original_max_position_embeddings=keys.get("rope.scaling.original_context_length", int, context),
            attention_factor=keys.get("rope.scaling.attn_factor", float, None),
        ),
        sliding_window=window,
        bos_token_id=every.get("tokenizer.ggml.bos_token_id", int, None),
        eos_token_id=token_ids(eos),
        pad_token_id=every.get("tokenizer.ggml.padding_token_id", int, None),
    )


FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    read_config=_read,
    write_config=_write,
    read_gguf=read_gguf,
    gguf_names=GGUF_NAMES,
    gguf_permuted=GGUF_PERMUTED,
)
