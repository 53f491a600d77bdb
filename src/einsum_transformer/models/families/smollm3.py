"""smollm3: llama with NoPE (no position encoding) in every fourth layer."""

from collections.abc import Mapping
from typing import Any

from einsum_transformer.errors import ConfigError
from einsum_transformer.models.config import FULL, SLIDING, Keys, ModelConfig
from einsum_transformer.models.families import gguf
from einsum_transformer.models.families.family import Family, read_layer_types
from einsum_transformer.models.families.llama import read_shared, write_shared

_DEFAULTS = {
    "rope_theta": 2e6,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "pad_token_id": 128004,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}


def _read(keys: Keys) -> ModelConfig:
    layers = keys.get("num_hidden_layers", int)
    interval = keys.get("no_rope_layer_interval", int, 4)
    if interval < 1:
        raise ConfigError(f"{keys.source}: no_rope_layer_interval is {interval}, expected 1 or more")
    # Despite the key's name, 1 means that a layer uses RoPE.
    rotated = keys.get("no_rope_layers", list, None)
    rotated = [int((i + 1) % interval != 0) for i in range(layers)] if rotated is None else rotated
    if not all(value in (0, 1) for value in rotated) or len(rotated) < layers:
        raise ConfigError(f"{keys.source}: no_rope_layers must contain 0 or 1 for each of {layers} layers")
    window = keys.get("sliding_window", int, None)
    if not keys.get("use_sliding_window", bool, False):
        window = None
    kinds = read_layer_types(
        keys, lambda n: [SLIDING if window is not None and not rotated[i] else FULL for i in range(n)]
    )
    return read_shared(
        keys,
        "smollm3",
        _DEFAULTS,
        rope_layers=tuple(map(bool, rotated[:layers])),
        sliding_window=window if SLIDING in kinds else None,
        layer_types=kinds if SLIDING in kinds and window is not None else (),
        attention_bias=keys.get("attention_bias", bool, False),
        mlp_bias=keys.get("mlp_bias", bool, False),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    layers = range(config.num_hidden_layers)
    return write_shared(config, "attention_bias", "mlp_bias", "sliding_window") | {
        "no_rope_layers": [int(config.rope_of(i) is not None) for i in layers],
        "use_sliding_window": config.sliding_window is not None,
        "layer_types": [FULL if window is None else SLIDING for window in config.windows],
    }


def _read_gguf(keys: Keys, metadata: Mapping[str, Any]) -> ModelConfig:
    rotated = tuple((i + 1) % 4 != 0 for i in range(keys.get("block_count", int)))
    return gguf.read_shared(keys, metadata, "smollm3", rope_layers=rotated)


FAMILY = Family(
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    read_config=_read,
    write_config=_write,
    read_gguf=_read_gguf,
    write_gguf=gguf.write_shared,
    gguf_names=gguf.NAMES,
    gguf_permuted=gguf.PERMUTED,
)
