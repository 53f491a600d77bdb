"""llama: Llama 2 and 3, SmolLM2, TinyLlama, Yi, DeepSeek-LLM and all others with model_type "llama"."""

from collections.abc import Mapping
from typing import Any

from einsum_transformer.models.config import Keys, ModelConfig
from einsum_transformer.models.families import gguf
from einsum_transformer.models.families.family import Family, read_rope, token_ids, write_rope

DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
}
"""The defaults of absent keys in transformers."""


def read_shared(
    keys: Keys,
    model_type: str,
    defaults: Mapping[str, Any] | None = None,
    eps: str = "rms_norm_eps",
    act: str = "hidden_act",
    **settings: Any,
) -> ModelConfig:
    """Read the keys that most families share; `settings` are values that the family adds or fixes.

    defaults: defaults that differ from llama's. eps, act: the family's names of these keys.
    """
    known = DEFAULTS | {eps: DEFAULTS["rms_norm_eps"], act: DEFAULTS["hidden_act"]} | dict(defaults or {})

    def get(name: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
        return keys.get(name, kind, known.get(name, default))

    hidden = get("hidden_size", int)
    heads = get("num_attention_heads", int)
    positions = get("max_position_embeddings", int)
    if "rope" not in settings:
        settings["rope"] = read_rope(keys, positions, known["rope_theta"], known["partial_rotary_factor"])
    fields: dict[str, Any] = {
        "model_type": model_type,
        "vocab_size": get("vocab_size", int),
        "hidden_size": hidden,
        "num_hidden_layers": get("num_hidden_layers", int),
        "num_attention_heads": heads,
        "max_position_embeddings": positions,
        "norm_eps": get(eps, float),
        "tie_word_embeddings": get("tie_word_embeddings", bool),
        "initializer_range": get("initializer_range", float),
        "bos_token_id": keys.nullable("bos_token_id", int, known.get("bos_token_id")),
        "eos_token_id": token_ids(keys.nullable("eos_token_id", (int, list), known.get("eos_token_id"))),
        "pad_token_id": keys.nullable("pad_token_id", int, known.get("pad_token_id")),
    }
    # Values that the family sets are not read from the file.
    others = {
        "intermediate_size": lambda: get("intermediate_size", int),
        "num_key_value_heads": lambda: get("num_key_value_heads", int, heads),
        "head_dim": lambda: get("head_dim", int, hidden // max(heads, 1)),
        "hidden_act": lambda: get(act, str),
    }
    fields |= {name: read() for name, read in others.items() if name not in settings}
    return ModelConfig(**fields | settings)


def write_shared(
    config: ModelConfig,
    *fields: str,
    eps: str = "rms_norm_eps",
    act: str = "hidden_act",
    names: Mapping[str, str] | None = None,
    without: tuple[str, ...] = (),
) -> dict[str, Any]:
    """The inverse of `read_shared`, plus `fields`, whose keys have the same names.

    names: key of the file -> key here, as in `Keys.renamed`. without: keys that the file does not have.
    """
    eos = list(config.eos_token_id)
    written = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        eps: config.norm_eps,
        act: config.hidden_act,
        **write_rope(config.rope),
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": config.pad_token_id,
        **{field: getattr(config, field) for field in fields},
    }
    file_names = {new: old for old, new in (names or {}).items()}
    return {file_names.get(key, key): value for key, value in written.items() if key not in without}


def _read(keys: Keys) -> ModelConfig:
    return read_shared(
        keys,
        "llama",
        attention_bias=keys.get("attention_bias", bool, False),
        mlp_bias=keys.get("mlp_bias", bool, False),
    )


def _read_gguf(keys: Keys, metadata: Mapping[str, Any]) -> ModelConfig:
    """llama, mistral and mixtral are one GGUF architecture; a window and experts distinguish them."""
    window = keys.get("attention.sliding_window", int, 0) or None
    if keys.get("expert_count", int, 0):
        size = keys.get("feed_forward_length", int)
        moe = gguf.read_experts(keys, size)
        return gguf.read_shared(keys, metadata, "mixtral", moe=moe, sliding_window=window)
    kind = "llama" if window is None else "mistral"
    return gguf.read_shared(keys, metadata, kind, sliding_window=window)


FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    read_config=_read,
    write_config=lambda config: write_shared(config, "attention_bias", "mlp_bias"),
    read_gguf=_read_gguf,
    write_gguf=gguf.write_shared,
    gguf_names=gguf.NAMES,
    gguf_permuted=gguf.PERMUTED,
)
