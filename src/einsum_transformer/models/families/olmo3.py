"""olmo3: olmo2 with a sliding window and unscaled RoPE in three of four layers."""

from typing import Any

from einsum_transformer.models.config import FULL, SLIDING, Keys, ModelConfig
from einsum_transformer.models.families import gguf
from einsum_transformer.models.families.family import Family, read_layered_ropes, write_layered_ropes
from einsum_transformer.models.families.gemma2 import read_windows
from einsum_transformer.models.families.llama import write_shared
from einsum_transformer.models.families.olmo2 import read_common

_THETA = 500_000.0


def _read(keys: Keys) -> ModelConfig:
    windows = read_windows(keys, lambda n: [SLIDING if (i + 1) % 4 else FULL for i in range(n)])
    # Files of transformers 4 have one rope_theta for both kinds of layers.
    theta = keys.get("rope_theta", float, _THETA)
    rope, local = read_layered_ropes(keys, keys.get("max_position_embeddings", int, 2048), theta, theta)
    return read_common(keys, "olmo3", rope=rope, local_rope=local, **windows)


def _write(config: ModelConfig) -> dict[str, Any]:
    return write_shared(config, "attention_bias", without=("rope_scaling",)) | {
        "rope_parameters": write_layered_ropes(config),
        "sliding_window": config.sliding_window or 4096,
        "layer_types": [FULL if window is None else SLIDING for window in config.windows],
    }


def _write_gguf(config: ModelConfig) -> dict[str, Any]:
    local = {} if config.local_rope is None else {"rope.freq_base_swa": config.local_rope.rope_theta}
    return gguf.write_shared(config) | gguf.write_window(config, 4) | local


FAMILY = Family(
    model_type="olmo3",
    architecture="Olmo3ForCausalLM",
    read_config=_read,
    write_config=_write,
    # In GGUF files it is olmo2 too, whose reader distinguishes them.
    gguf_architecture="olmo2",
    write_gguf=_write_gguf,
    gguf_names=gguf.NAMES | gguf.POST_NORMS | gguf.QK_NORMS,
)
