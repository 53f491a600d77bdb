"""deepseek_v2: latent attention, and experts with top-k or group-limited top-k routing."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from einsum_transformer.components.rope import RopeConfig
from einsum_transformer.models.config import Keys, LatentConfig, ModelConfig
from einsum_transformer.models.families import gguf
from einsum_transformer.models.families.deepseek import (
    read_experts,
    read_gguf_experts,
    write_experts,
    write_gguf_experts,
)
from einsum_transformer.models.families.family import Family, check_allowed, read_rope
from einsum_transformer.models.families.llama import read_shared, write_shared


def _read(keys: Keys) -> ModelConfig:
    # For normalized expert weights, the model's own code and transformers differ.
    check_allowed(keys, "norm_topk_prob", bool, False)
    check_allowed(keys, "mlp_bias", bool, False)
    check_allowed(keys, "moe_layer_freq", int, 1)
    check_allowed(keys, "topk_method", str, "greedy", "group_limited_greedy")
    latent = LatentConfig(
        keys.get("kv_lora_rank", int, 512),
        keys.get("qk_nope_head_dim", int, 128),
        keys.get("qk_rope_head_dim", int, 64),
        keys.get("v_head_dim", int, 128),
        keys.nullable("q_lora_rank", int, 1536),
    )
    groups, top_groups = keys.get("n_group", int, 1), keys.get("topk_group", int, 1)
    limited = keys.get("topk_method", str, "greedy") == "group_limited_greedy"
    moe = read_experts(
        keys,
        norm_topk_prob=False,
        routed_scaling_factor=keys.get("routed_scaling_factor", float, 1.0),
        n_group=groups if limited else 1,
        topk_group=top_groups if limited else 1,
    )
    positions = keys.get("max_position_embeddings", int, 2048)
    rope = replace(read_rope(keys, positions), interleaved=True)
    keys.get("head_dim", int, None)  # without effect: latent attention has its own sizes
    return read_shared(
        keys,
        "deepseek_v2",
        {"bos_token_id": 1, "eos_token_id": 2},
        head_dim=latent.qk_rope_head_dim,
        rope=rope,
        latent=latent,
        attention_scale=_scale(latent, rope),
        attention_bias=keys.get("attention_bias", bool, False),
        moe=moe,
    )


def _size(keys: Keys, what: str) -> int:
    """The head size; in files for the absorbed form, key_length and value_length are sizes of the latents."""
    return keys.get(f"attention.{what}_length_mla", int, None) or keys.get(f"attention.{what}_length", int)


def _scale(latent: LatentConfig, rope: RopeConfig) -> float:
    """1 / sqrt(query size), times the square of yarn's factor for mscale_all_dim."""
    scale = (latent.qk_nope_head_dim + latent.qk_rope_head_dim) ** -0.5
    if rope.rope_type == "default" or not rope.mscale_all_dim or rope.factor <= 1:
        return scale
    return scale * (0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1) ** 2


def _write(config: ModelConfig) -> dict[str, Any]:
    latent, moe = config.latent, config.moe
    assert latent is not None
    assert moe is not None
    limited = moe.n_group > 1
    return (
        write_shared(config, "attention_bias")
        | write_experts(config)
        | {
            "kv_lora_rank": latent.kv_lora_rank,
            "q_lora_rank": latent.q_lora_rank,
            "qk_nope_head_dim": latent.qk_nope_head_dim,
            "qk_rope_head_dim": latent.qk_rope_head_dim,
            "v_head_dim": latent.v_head_dim,
            "topk_method": "group_limited_greedy" if limited else "greedy",
            "n_group": moe.n_group if limited else None,
            "topk_group": moe.topk_group if limited else None,
            "routed_scaling_factor": moe.routed_scaling_factor,
        }
    )


def _read_gguf(keys: Keys, metadata: Mapping[str, Any]) -> ModelConfig:
    check_allowed(keys, "expert_weights_norm", bool, False)
    check_allowed(keys, "expert_gating_func", int, 0, 1)
    check_allowed(keys, "rope.scaling.attn_factor", float, 1.0)
    rotated = keys.get("rope.dimension_count", int)
    latent = LatentConfig(
        keys.get("attention.kv_lora_rank", int),
        _size(keys, "key") - rotated,
        rotated,
        _size(keys, "value"),
        keys.get("attention.q_lora_rank", int, None),
    )
    rope = gguf.read_rope(keys, rotated, keys.get("context_length", int))
    # yarn's factor of the scores; the one of cos and sin is a quotient, 1 in all published models.
    factor = keys.get("rope.scaling.yarn_log_multiplier", float, 0.0) * 10
    if rope.rope_type == "yarn" and factor:
        rope = replace(rope, mscale=factor, mscale_all_dim=factor)
    groups, top_groups = keys.get("expert_group_count", int, 1), keys.get("expert_group_used_count", int, 1)
    return gguf.read_shared(
        keys,
        metadata,
        "deepseek_v2",
        head_dim=rotated,
        rope=replace(rope, interleaved=True),
        latent=latent,
        attention_scale=_scale(latent, rope),
        moe=read_gguf_experts(keys, n_group=groups, topk_group=top_groups),
        # The file's head_count_kv is 1, the head of the latents.
        num_key_value_heads=keys.get("attention.head_count", int),
    )


def _write_gguf(config: ModelConfig) -> dict[str, Any]:
    """The metadata of the absorbed form: one head of keys and values, the latents."""
    latent, moe, rope = config.latent, config.moe, config.rope
    assert latent is not None
    assert moe is not None
    assert rope is not None
    rank, rotated = latent.kv_lora_rank, latent.qk_rope_head_dim
    written = {
        "attention.head_count_kv": 1,
        "attention.key_length": rank + rotated,
        "attention.value_length": rank,
        "attention.key_length_mla": latent.qk_nope_head_dim + rotated,
        "attention.value_length_mla": latent.v_head_dim,
        "attention.kv_lora_rank": rank,
        "rope.dimension_count": rotated,
    }
    if latent.q_lora_rank is not None:
        written["attention.q_lora_rank"] = latent.q_lora_rank
    if moe.n_group > 1:
        written |= {"expert_group_count": moe.n_group, "expert_group_used_count": moe.topk_group}
    more = {} if not rope.mscale_all_dim else {"rope.scaling.yarn_log_multiplier": 0.1 * rope.mscale_all_dim}
    return gguf.write_shared(config) | write_gguf_experts(config) | written | more


FAMILY = Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    read_config=_read,
    write_config=_write,
    read_gguf=_read_gguf,
    write_gguf=_write_gguf,
    stacked_experts=True,
    gguf_names=gguf.NAMES
    | gguf.EXPERTS
    | {
        "self_attn.query.q_proj": "attn_q",
        "self_attn.query.q_a_proj": "attn_q_a",
        "self_attn.query.q_a_layernorm": "attn_q_a_norm",
        "self_attn.query.q_b_proj": "attn_q_b",
        "self_attn.kv_a_proj": "attn_kv_a_mqa",
        "self_attn.kv_a_layernorm": "attn_kv_a_norm",
        "self_attn.kv_b_proj": "attn_kv_b",
        "self_attn.k_b_proj": "attn_k_b",
        "self_attn.v_b_proj": "attn_v_b",
    },
    gguf_architecture="deepseek2",
    names={"query": "", "kv_a_proj": "kv_a_proj_with_mqa", "shared_expert": "shared_experts"},
)
