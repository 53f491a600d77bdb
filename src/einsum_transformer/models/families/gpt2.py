"""gpt2: learned positions, LayerNorm, biases everywhere, a fused matrix for q, k and v; matrices [in, out]
in checkpoints."""

from typing import Any

from einsum_transformer.models.config import Keys, ModelConfig
from einsum_transformer.models.families import gguf
from einsum_transformer.models.families.family import Family, check_allowed
from einsum_transformer.models.families.llama import read_shared, write_shared

_NAMES = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
    "n_inner": "intermediate_size",
    "activation_function": "hidden_act",
    "layer_norm_epsilon": "norm_eps",
}
_DEFAULTS = {
    "vocab_size": 50257,
    "hidden_size": 768,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "max_position_embeddings": 1024,
    "hidden_act": "gelu_new",
    "norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
}
_FIXED: dict[str, Any] = {
    "norm": "layer",
    "mlp": "plain",
    "fused_qkv": "role",
    "rope": None,
    "learned_positions": True,
    "attention_bias": True,
    "mlp_bias": True,
}


def _read(keys: Keys) -> ModelConfig:
    check_allowed(keys, "add_cross_attention", bool, False)
    keys.get("reorder_and_upcast_attn", bool, False)  # no difference in float32
    scaled = keys.get("scale_attn_weights", bool, True)
    own = keys.renamed(_NAMES)
    hidden = own.get("hidden_size", int, _DEFAULTS["hidden_size"])
    heads = own.get("num_attention_heads", int, _DEFAULTS["num_attention_heads"])
    return read_shared(
        own,
        "gpt2",
        _DEFAULTS | {"intermediate_size": 4 * hidden},
        eps="norm_eps",
        **_FIXED,
        num_key_value_heads=heads,
        head_dim=hidden // max(heads, 1),
        attention_scale=None if scaled else 1.0,
        scale_by_layer=keys.get("scale_attn_by_inverse_layer_idx", bool, False),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    own = {
        "scale_attn_weights": config.attention_scale is None,
        "scale_attn_by_inverse_layer_idx": config.scale_by_layer,
    }
    without = ("num_key_value_heads", "head_dim")
    return write_shared(config, eps="norm_eps", names=_NAMES, without=without) | own


FAMILY = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    read_config=_read,
    write_config=_write,
    read_gguf=lambda keys, metadata: gguf.read_shared(
        keys, metadata, "gpt2", hidden_act="gelu_new", **_FIXED
    ),
    write_gguf=gguf.write_shared,
    gguf_names=gguf.NAMES | gguf.FUSED | {"embed_positions": "position_embd"},
    prefix="transformer.",
    other_prefixes=("",),
    names={
        "embed_tokens": "wte",
        "embed_positions": "wpe",
        "layers": "h",
        "input_layernorm": "ln_1",
        "self_attn": "attn",
        "qkv_proj": "c_attn",
        "o_proj": "c_proj",
        "post_attention_layernorm": "ln_2",
        "up_proj": "c_fc",
        "down_proj": "c_proj",
        "norm": "ln_f",
    },
    transposed=frozenset({"qkv_proj", "o_proj", "up_proj", "down_proj"}),
    ignored_tensors=r".*\.attn\.(masked_)?bias",
)
