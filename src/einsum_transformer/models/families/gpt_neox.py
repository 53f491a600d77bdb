"""gpt_neox: Pythia and GPT-NeoX: attention and feed-forward in parallel with a LayerNorm each, partial RoPE,
a fused matrix for q, k and v in head order."""

from collections.abc import Mapping
from typing import Any

from einsum_transformer.models.config import Keys, ModelConfig
from einsum_transformer.models.families import gguf
from einsum_transformer.models.families.family import Family, read_rope
from einsum_transformer.models.families.llama import read_shared, write_shared

_NAMES = {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"}
_DEFAULTS = {"layer_norm_eps": 1e-5, "hidden_act": "gelu"}
_FIXED: dict[str, Any] = {"norm": "layer", "mlp": "plain", "fused_qkv": "head", "mlp_bias": True}


def _read(keys: Keys) -> ModelConfig:
    own = keys.renamed(_NAMES)
    parallel = keys.get("use_parallel_residual", bool, True)
    hidden, heads = keys.get("hidden_size", int), keys.get("num_attention_heads", int)
    positions = keys.get("max_position_embeddings", int, 2048)
    return read_shared(
        own,
        "gpt_neox",
        _DEFAULTS,
        eps="layer_norm_eps",
        block="parallel_two_norms" if parallel else "pre_norm",
        **_FIXED,
        head_dim=hidden // max(heads, 1),
        num_key_value_heads=heads,
        rope=read_rope(own, positions, default_partial=0.25),
        attention_bias=keys.get("attention_bias", bool, True),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    assert config.rope is not None
    own = {
        "rotary_pct": config.rope.partial_rotary_factor,
        "use_parallel_residual": config.block != "pre_norm",
    }
    without = ("num_key_value_heads", "head_dim")
    return write_shared(config, "attention_bias", eps="layer_norm_eps", names=_NAMES, without=without) | own


def _read_gguf(keys: Keys, metadata: Mapping[str, Any]) -> ModelConfig:
    parallel = keys.get("use_parallel_residual", bool, True)
    block = "parallel_two_norms" if parallel else "pre_norm"
    fixed: dict[str, Any] = _FIXED | {"attention_bias": True, "hidden_act": "gelu", "partial": True}
    return gguf.read_shared(keys, metadata, "gpt_neox", block=block, **fixed)


FAMILY = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    read_config=_read,
    write_config=_write,
    read_gguf=_read_gguf,
    write_gguf=lambda config: (
        gguf.write_shared(config) | {"use_parallel_residual": config.block != "pre_norm"}
    ),
    gguf_names=gguf.NAMES | gguf.FUSED,
    gguf_architecture="gptneox",
    prefix="gpt_neox.",
    names={
        "embed_tokens": "embed_in",
        "lm_head": "embed_out",
        "self_attn": "attention",
        "qkv_proj": "query_key_value",
        "o_proj": "dense",
        "up_proj": "dense_h_to_4h",
        "down_proj": "dense_4h_to_h",
        "norm": "final_layer_norm",
    },
    module_names={"embed_out": "lm_head"},
    ignored_tensors=r".*\.attention\.((masked_)?bias|rotary_emb\.inv_freq)",
)
