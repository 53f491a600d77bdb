"""Keys of a config.json that a family does not read: those that change nothing, are refused, or are noted.

A key in none of the tables is named in one note when the model is loaded. transformers ignores such keys too;
they are keys of other models, of other programs, or misspelt.
"""

from collections.abc import Mapping
from typing import Any

from einsum_transformer.errors import ConfigError
from einsum_transformer.models.config import Keys, ModelConfig, shown
from einsum_transformer.notes import note
from einsum_transformer.tables import some

NEUTRAL = frozenset(
    {
        # What the model is called and where it comes from.
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
        # How a framework stores, runs and returns things.
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
        # What only other heads or other inputs use.
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
        # How random weights are drawn; a checkpoint has its own.
        "initializer_range",
        "init_std",
        "initializer_factor",
        "emb_init_std",
        "embedding_fraction",
        # Sizes that follow from others.
        "qk_head_dim",
        "max_window_layers",
        "n_ctx",
        "seq_length",
        "_sliding_window_pattern",
    }
)
"""Keys that change no number of a forward pass."""

REFUSED: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
    "adapters": ({},),
    "is_causal": (True,),
}
"""Keys with another value than these make another model."""

SWITCHED_OFF: dict[str, tuple[Any, ...]] = {
    "rope_interleaved": (False,),
    "attn_logit_softcapping": (0,),
}
"""Keys with these values ask for nothing; with others they are named among the keys that are not used."""

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
"""Keys with another value than these change training alone, which does not apply them."""

LOSS_WEIGHTS: dict[str, tuple[Any, ...]] = {
    "router_aux_loss_coef": (0, 0.0),
    "seq_aux": (),
    "aux_loss_alpha": (0, 0.0),
}
"""Of losses that training alone adds: the first goes with `output_router_logits`, the last is on if not 0."""
_INNER = ("text_config.", "attn_config.")


def check_unread(keys: Keys) -> tuple[tuple[str, Any], ...]:
    """Refuse keys that make another model and note unknown ones.

    Returns the keys that concern training alone, with their values.
    """
    training, unknown = [], []
    for name in keys.left_over():
        value = _value(keys.raw, name)
        key = next((name.removeprefix(inner) for inner in _INNER if name.startswith(inner)), name)
        if value is None or key in NEUTRAL or value in SWITCHED_OFF.get(key, ()):
            continue
        if key in REFUSED:
            if value not in REFUSED[key]:
                raise ConfigError(f"{keys.source}: {name} = {shown(value)} is not supported")
        elif key in TRAINING or key in LOSS_WEIGHTS:
            training.append((name, value))
        else:
            unknown.append(name if len(name) <= 60 else f"{name[:57]}...")
    if unknown:
        note(f"{keys.source}: keys that are not used: {some(unknown, 8)}")
    return tuple(training)


def unapplied_settings(config: ModelConfig, losses_alone: bool = False) -> list[str]:
    """The settings that would change training, as `key = value`; losses_alone: those that add a loss."""
    held = dict(config.training)
    found = []
    for name, value in config.training:
        key = name.rpartition(".")[2]
        if key == "output_router_logits" and held.get("router_aux_loss_coef") in (0, 0.0):
            continue  # the loss that it adds has no weight
        switches = TRAINING if key in TRAINING else {"aux_loss_alpha": LOSS_WEIGHTS["aux_loss_alpha"]}
        adds_loss = key in ("output_router_logits", "aux_loss_alpha")
        if key in switches and value not in switches[key] and (adds_loss or not losses_alone):
            found.append(f"{name} = {shown(value)}")
    return found


def with_training_keys(written: dict[str, Any], training: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    """A config.json's keys, with those that concern training alone as they were read."""
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
    held = raw.get(outer)
    return _value(held, inner) if isinstance(held, Mapping) else name
