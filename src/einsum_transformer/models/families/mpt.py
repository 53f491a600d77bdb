"""mpt: ALiBi instead of position embeddings, no biases (not even in LayerNorms), a fused matrix for q, k and
v."""

from collections.abc import Mapping
from typing import Any

from einsum_transformer.models.config import Keys, ModelConfig
from einsum_transformer.models.families import gguf
from einsum_transformer.models.families.family import Family, check_allowed
from einsum_transformer.models.families.llama import read_shared, write_shared

_NAMES = {
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_layers": "num_hidden_layers",
    "max_seq_len": "max_position_embeddings",
    "layer_norm_epsilon": "norm_eps",
}
_DEFAULTS = {
    "vocab_size": 50368,
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
_FIXED: dict[str, Any] = {
    "norm": "layer",
    "norm_bias": False,
    "mlp": "plain",
    "hidden_act": "gelu",
    "fused_qkv": "role",
    "rope": None,
}


def _read(keys: Keys) -> ModelConfig:
    check_allowed(keys, "no_bias", bool, True)
    check_allowed(keys, "logit_scale", (float, str))
    keys.get("learned_pos_emb", bool, True)  # without effect with ALiBi
    own = keys.renamed(_NAMES)
    hidden = own.get("hidden_size", int, _DEFAULTS["hidden_size"])
    heads = own.get("num_attention_heads", int, _DEFAULTS["num_attention_heads"])
    attention = Keys(keys.get("attn_config", dict, {}), f"{keys.source}: attn_config")
    # transformers ignores these keys; the variants they select in the model's own code are not supported.
    check_allowed(attention, "attn_type", str, "multihead_attention")
    check_allowed(attention, "alibi", bool, True)
    for name in ("qk_ln", "prefix_lm", "attn_uses_sequence_id"):
        check_allowed(attention, name, bool, False)
    config = read_shared(
        own,
        "mpt",
        _DEFAULTS,
        eps="norm_eps",
        **_FIXED,
        intermediate_size=keys.get("expansion_ratio", int, 4) * hidden,
        num_key_value_heads=heads,
        head_dim=hidden // max(heads, 1),
        alibi_bias_max=attention.get("alibi_bias_max", float, 8.0),
        clip_qkv=attention.get("clip_qkv", float, None) or None,
        attention_scale=attention.get("softmax_scale", float, None),
    )
    keys.unused += [f"attn_config.{name}" for name in attention.left_over()]
    return config


def _write(config: ModelConfig) -> dict[str, Any]:
    without = ("num_key_value_heads", "head_dim", "intermediate_size", "hidden_act")
    return write_shared(config, eps="norm_eps", names=_NAMES, without=without) | {
        "expansion_ratio": config.intermediate_size // config.hidden_size,
        "no_bias": True,
        "attn_config": {
            "alibi": True,
            "alibi_bias_max": int(config.alibi_bias_max or 8),
            "attn_type": "multihead_attention",
            "clip_qkv": config.clip_qkv,
            "softmax_scale": config.attention_scale,
        },
    }


def _read_gguf(keys: Keys, metadata: Mapping[str, Any]) -> ModelConfig:
    return gguf.read_shared(
        keys,
        metadata,
        "mpt",
        alibi_bias_max=keys.get("attention.max_alibi_bias", float, 8.0),
        clip_qkv=keys.get("attention.clamp_kqv", float, 0.0) or None,
        **_FIXED,
    )


def _write_gguf(config: ModelConfig) -> dict[str, Any]:
    clip = {} if config.clip_qkv is None else {"attention.clamp_kqv": config.clip_qkv}
    return gguf.write_shared(config) | {"attention.max_alibi_bias": config.alibi_bias_max or 0.0} | clip


FAMILY = Family(
    model_type="mpt",
    architecture="MptForCausalLM",
    read_config=_read,
    write_config=_write,
    read_gguf=_read_gguf,
    write_gguf=_write_gguf,
    gguf_names=gguf.NAMES | gguf.FUSED,
    prefix="transformer.",
    names={
        "embed_tokens": "wte",
        "layers": "blocks",
        "input_layernorm": "norm_1",
        "self_attn": "attn",
        "qkv_proj": "Wqkv",
        "o_proj": "out_proj",
        "post_attention_layernorm": "norm_2",
        "mlp": "ffn",
        "norm": "norm_f",
    },
)
