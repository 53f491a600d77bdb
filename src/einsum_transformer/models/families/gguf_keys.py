"""GGUF metadata that a family does not read: keys without effect, and rejected values.

The keys are those of the GGUF specification and of llama.cpp, without the prefix `{arch}.`. UNSUPPORTED lists
the values with which a key does not change the arithmetic; any other value is an error. One note names the
keys that are in no table.
"""

from collections.abc import Mapping
from typing import Any

from einsum_transformer.errors import ConfigError
from einsum_transformer.models.config import Keys, ModelConfig, shown
from einsum_transformer.notes import note
from einsum_transformer.tables import first_names

OFF: tuple[Any, ...] = (0, False, "")
ONE: tuple[Any, ...] = (0, 1)

DESCRIPTIVE = frozenset(
    {
        "tensor_data_layout",
        "rope.scaling.finetuned",
        "attention.layer_norm_epsilon",
        "attention.layer_norm_rms_epsilon",
        "attention.group_norm_epsilon",
        "attention.group_norm_groups",
        "rope.scaling.original_context_length",
        "expert_used_count",
    }
)
"""Keys that have no effect, whatever their value: descriptions, and settings of parts that a model does not
have (the epsilon of the other kind of norm, the length of RoPE scaling, the number of selected experts)."""

SIZES = frozenset(
    {
        "attention.q_lora_rank",
        "attention.kv_lora_rank",
        "attention.decay_lora_rank",
        "attention.iclr_lora_rank",
        "attention.value_residual_mix_lora_rank",
        "attention.gate_lora_rank",
        "attention.relative_buckets_count",
        "attention.key_length_mla",
        "attention.value_length_mla",
        "embedding_length_out",
        "features_length",
        "expert_feed_forward_length",
        "expert_shared_feed_forward_length",
        "expert_chunk_feed_forward_length",
        "moe_latent_size",
        "altup.num_inputs",
        "embedding_length_per_layer_input",
        "ssm.conv_kernel",
        "ssm.inner_size",
        "ssm.state_size",
        "ssm.time_step_rank",
        "ssm.group_count",
        "shortconv.l_cache",
        "wkv.head_size",
        "kda.head_dim",
        "convnext.embedding_length",
        "convnext.block_count",
        "posnet.embedding_length",
        "posnet.block_count",
        "expert_shared_count",
        "n_deepstack_layers",
        "attention.key_length",
        "attention.value_length",
        "attention.key_length_swa",
        "attention.value_length_swa",
    }
)
"""Sizes of tensors, whose shapes are checked: a part that a family does not have is an unexpected tensor."""

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        (
            "attention.max_alibi_bias",
            "attention.clamp_kqv",
            "attention.temperature_length",
            "attention.temperature_scale",
            "attention.shared_kv_layers",
            "attention.sliding_window_pattern",
            "attention.indexer.head_count",
            "attention.indexer.key_length",
            "attention.indexer.top_k",
            "attention.recurrent_layers",
            "rope.dimension_sections",
            "rope.scaling.yarn_log_multiplier",
            "leading_dense_block_count",
            "expert_count",
            "expert_group_scale",
            "experts_per_group",
            "nextn_predict_layers",
            "pooling_type",
            "decoder_start_token_id",
            "decoder_block_count",
            "attn_logit_softcapping",
            "router_logit_softcapping",
            "final_logit_softcapping",
            "swin_norm",
            "rescale_every_n_layers",
            "time_mix_extra_dim",
            "time_decay_extra_dim",
            "token_shift_count",
            "full_attention_interval",
            "activation_sparsity_scale",
            "altup.active_idx",
            "swiglu_clamp_exp",
            "swiglu_clamp_shexp",
            "ssm.dt_b_c_rms",
            "classifier.output_labels",
        ),
        OFF,
    ),
    **dict.fromkeys(
        (
            "attention.output_scale",
            "rope.scaling.alpha",
            "rope.scaling.attn_factor",
            "rope.scaling.factor",
            "rope.scale_linear",
            "logit_scale",
            "residual_scale",
            "embedding_scale",
            "expert_weights_scale",
            "expert_group_count",
            "expert_group_used_count",
            "moe_every_n_layers",
            "interleave_moe_layer_step",
        ),
        ONE,
    ),
    "attention.causal": (True,),
    "rope.scaling.type": ("none",),
    # -1 means "not set" in llama.cpp. transformers does not have an extrapolation factor.
    "rope.scaling.yarn_ext_factor": (-1.0, 1.0),
    "rope.scaling.yarn_attn_factor": (-1.0, 1.0),
    "rope.scaling.yarn_beta_fast": (-1.0, 32.0),
    "rope.scaling.yarn_beta_slow": (-1.0, 1.0),
    # 1: softmax
    "expert_gating_func": (0, 1),
}


PER_LAYER = (
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "expert_used_count",
    "expert_feed_forward_length",
)
"""Keys that may be a list with a value for each layer."""


def one_for_all_layers(own: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The metadata with each per-layer list of equal values replaced by the value. Errors: ConfigError if
    the values differ."""
    found = dict(own)
    for name in PER_LAYER:
        values = found.get(name)
        if isinstance(values, list):
            if not values or any(value != values[0] for value in values):
                raise ConfigError(f"{source}: {name} differs between layers, which is not supported")
            found[name] = values[0]
    return found


def check_unread(keys: Keys, architecture: str, config: ModelConfig) -> None:
    """Reject metadata that would change the arithmetic, and name keys that are in no table in one note."""
    own, unknown = _own_values(config), []
    for name in keys.left_over():
        if name in DESCRIPTIVE or name in SIZES or _is_without_effect(name, config):
            continue
        value = keys.raw.get(name)
        if name == "attention.sliding_window" and isinstance(value, int):
            value = 0 if value >= config.max_position_embeddings else value
        allowed = own.get(name, ()) + UNSUPPORTED.get(name, ())
        if not allowed:
            unknown.append(f"{architecture}.{name}")
        elif not all(_is(each, allowed) for each in (value if isinstance(value, list) else [value])):
            raise ConfigError(
                f"{keys.source}: {architecture}.{name} is {shown(value)}: it changes the arithmetic and is "
                f"not supported for {config.model_type}"
            )
    if unknown:
        note(f"{keys.source}: metadata that is not used: {first_names(unknown, 8)}")


def _is_without_effect(name: str, config: ModelConfig) -> bool:
    """Whether a key sets RoPE, or yarn, but the model does not use it."""
    if name.startswith("rope.scaling.yarn_"):
        return all(rope.rope_type != "yarn" for rope in config.ropes)
    return config.rope is None and name.startswith("rope.")


def _own_values(config: ModelConfig) -> dict[str, tuple[Any, ...]]:
    """Values that are equal to the settings of the model."""
    moe, rope = config.moe, config.rope
    rotated = () if rope is None else (int(config.head_dim * rope.partial_rotary_factor),)
    found: dict[str, tuple[Any, ...]] = {
        "attention.sliding_window": (0,),
        "attention.scale": (0.0, config.scale_of(0)),
        "embedding_scale": (config.embedding_scale,),
        "attn_logit_softcapping": (config.attn_logit_softcapping or 0.0,),
        "final_logit_softcapping": (config.final_logit_softcapping or 0.0,),
        "use_parallel_residual": (config.block.startswith("parallel"),),
        "expert_weights_norm": (False, True) if moe is None else (moe.norm_topk_prob,),
        "rope.dimension_count_swa": rotated,
        "rope.freq_base_swa": () if rope is None else (rope.rope_theta,),
    }
    if moe is not None:
        found["expert_weights_scale"] = (moe.routed_scaling_factor,)
    return found


def _is(value: Any, allowed: tuple[Any, ...]) -> bool:
    """Whether a value is one of these; floats are compared with float32 precision, as in files."""
    if isinstance(value, float):
        return any(
            isinstance(each, (int, float)) and abs(value - each) <= 1e-6 * max(1.0, abs(each))
            for each in allowed
        )
    return any(value == each for each in allowed)


_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
"""llama.cpp's name of a sampling setting, after `general.sampling.` -> its name in generation_config.json."""
_IGNORED_SAMPLING = {"xtc_probability": OFF, "xtc_threshold": (), "mirostat": OFF, "penalty_last_n": (-1,)}
_MIROSTAT_KEYS = ("mirostat_tau", "mirostat_eta")


def sampling_settings(metadata: Mapping[str, Any], source: str) -> dict[str, Any] | None:
    """The generation settings that a file recommends, under the names of generation_config.json.

    As in llama.cpp, a temperature above 0 enables sampling. A note names settings without such a name.
    """
    prefix = "general.sampling."
    given = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    if not given:
        return None
    found = {name: given.pop(key) for key, name in _SAMPLING.items() if key in given}
    if given.get("mirostat", 0) in OFF:
        given = {key: value for key, value in given.items() if key not in _MIROSTAT_KEYS}
    if given.get("xtc_probability", 0) in OFF:
        given.pop("xtc_threshold", None)
    unused = [f"{prefix}{key}" for key in given if not _is(given[key], _IGNORED_SAMPLING.get(key, ()))]
    if unused:
        note(f"{source}: sampling settings that are not used: {', '.join(unused)}")
    temperature = found.get("temperature")
    if isinstance(temperature, (int, float)) and temperature > 0:
        found["do_sample"] = True
    return found or None
