"""Keys of a config.json that a family does not read: without effect, rejected, or training-only.

Keys in none of the tables are named in one note when the model is loaded. transformers ignores such keys too;
they belong to other models or programs, or are misspelt.
"""

from collections.abc import Mapping
from typing import Any

from einsum_transformer.errors import ConfigError
from einsum_transformer.models.config import Keys, ModelConfig, shown
from einsum_transformer.notes import note
from einsum_transformer.tables import first_names

IGNORED = frozenset(
    {
        # Read with the tensors (formats/codes.py).
        "quantization_config",
        # Name and origin of the model.
        "_name_or_path",
        "architectures",
        "auto_map",
        "model_type",
        "transformers_version",
        "_commit_hash",
        "unsloth_version",
        "unsloth_fixed",
        "is_llama_config",
        "finetuning_task",
        "license",
        # Storage, execution and return types of a framework.
        "dtype",
        "torch_dtype",
        "torchscript",
        "use_bfloat16",
        "tf_legacy_loss",
        "use_cache",
        "cache_implementation",
        "attn_impl",
        "attn_uses_sequence_id",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "chunk_size_feed_forward",
        "gradient_checkpointing",
        "pretraining_tp",
        "ep_size",
        "init_device",
        "reorder_and_upcast_attn",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_experts_implementation",
        "_flash_attn_2_enabled",
        "use_flash_attn",
        "use_flash_attention",
        "use_flash_attention_2",
        "flash_attn",
        "fused_dense",
        "flash_rotary",
        "fused_bias_fc",
        "norm_type",
        # Used only by other heads or other inputs.
        "classifier_dropout",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
        "problem_type",
        "id2label",
        "label2id",
        "num_labels",
        "boi_token_index",
        "eoi_token_index",
        "image_token_index",
        "image_token_id",
        "mm_tokens_per_image",
        "vision_config",
        "tokenizer_class",
        "sep_token_id",
        "cls_token_id",
        "mask_token_id",
        "unk_token_id",
        "decoder_start_token_id",
        "prefix",
        "task_specific_params",
        "is_decoder",
        "tie_encoder_decoder",
        "cross_attention_hidden_size",
        # Initialization of random weights.
        "initializer_range",
        "init_std",
        "initializer_factor",
        "emb_init_std",
        "embedding_fraction",
        # Sizes that are derived from others.
        "qk_head_dim",
        "max_window_layers",
        "n_ctx",
        "seq_length",
        "_sliding_window_pattern",
    }
)
"""Keys that do not affect the forward pass."""

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
    "adapters": ({},),
    "is_causal": (True,),
}
"""Keys and their supported values; any other value describes another model."""

SWITCHED_OFF: dict[str, tuple[Any, ...]] = {
    "rope_interleaved": (False,),
    "attn_logit_softcapping": (0,),
}
"""Keys and the values with which they have no effect; with others a note names them as not used."""

TRAINING: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        (
            "attention_dropout",
            "attn_pdrop",
            "emb_pdrop",
            "embd_pdrop",
            "embed_dropout",
            "resid_pdrop",
            "hidden_dropout",
            "hidden_dropout_prob",
            "attention_probs_dropout_prob",
            "dropout",
            "router_jitter_noise",
        ),
        (0, 0.0),
    ),
    "output_router_logits": (False,),
}
"""Keys that affect only training, and the values without effect; any other value is not applied."""

LOSS_WEIGHTS: dict[str, tuple[Any, ...]] = {
    "router_aux_loss_coef": (0, 0.0),
    "seq_aux": (),
    "aux_loss_alpha": (0, 0.0),
}
"""Weights of auxiliary losses: the first is used with `output_router_logits`, the last if it is not 0."""
_INNER = ("text_config.", "attn_config.")


def check_unread(keys: Keys) -> tuple[tuple[str, Any], ...]:
    """Reject keys that describe another model, note unknown ones, and return the training-only keys with
    their values."""
    training, unknown = [], []
    for name in keys.left_over():
        value = _value(keys.raw, name)
        key = next((name.removeprefix(inner) for inner in _INNER if name.startswith(inner)), name)
        if value is None or key in IGNORED or value in SWITCHED_OFF.get(key, ()):
            continue
        if key in UNSUPPORTED:
            if value not in UNSUPPORTED[key]:
                raise ConfigError(f"{keys.source}: {name} = {shown(value)} is not supported")
        elif key in TRAINING or key in LOSS_WEIGHTS:
            training.append((name, value))
        else:
            unknown.append(name if len(name) <= 60 else f"{name[:57]}...")
    if unknown:
        note(f"{keys.source}: keys that are not used: {first_names(unknown, 8)}")
    return tuple(training)


def unapplied_settings(config: ModelConfig, losses_only: bool = False) -> list[str]:
    """Training settings that are not applied, as `key = value`; losses_only: only those that add a loss."""
    training = dict(config.training)
    found = []
    for name, value in config.training:
        key = name.rpartition(".")[2]
        if key == "output_router_logits" and training.get("router_aux_loss_coef") in (0, 0.0):
            continue  # the weight of its loss is 0
        switches = TRAINING if key in TRAINING else {"aux_loss_alpha": LOSS_WEIGHTS["aux_loss_alpha"]}
        adds_loss = key in ("output_router_logits", "aux_loss_alpha")
        if key in switches and value not in switches[key] and (adds_loss or not losses_only):
            found.append(f"{name} = {shown(value)}")
    return found


def with_training_keys(written: dict[str, Any], training: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    """The keys of a config.json, with the training-only keys as they were read."""
    for name, value in training:
        outer, dot, key = name.rpartition(".")
        if not dot or outer == "text_config":
            written = {**written, key: value}
        elif isinstance(written.get(outer), dict):
            written = {**written, outer: {**written[outer], key: value}}
    return written


def _value(raw: Mapping[str, Any], name: str) -> Any:
    """The value of `key` or `object.key`."""
    outer, dot, inner = name.partition(".")
    if name in raw or not dot:
        return raw.get(name)
    nested = raw.get(outer)
    return _value(nested, inner) if isinstance(nested, Mapping) else name
