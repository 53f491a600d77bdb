"""qwen2: Qwen 1.5, 2 and 2.5, QwQ and all others with model_type "qwen2": llama with biases of q, k and v,
and with sliding windows, if any, in the later layers only."""

from typing import Any

from einsum_transformer.models.config import FULL, SLIDING, Keys, ModelConfig
from einsum_transformer.models.families import gguf
from einsum_transformer.models.families.family import Family, read_layer_types
from einsum_transformer.models.families.llama import read_shared, write_shared


def read_windows(keys: Keys) -> dict[str, Any]:
    """sliding_window and layer_types: the window, if used, applies from layer max_window_layers on."""
    window = keys.get("sliding_window", int, 4096)
    first = keys.get("max_window_layers", int, 28)
    used = keys.get("use_sliding_window", bool, False)
    kinds = read_layer_types(
        keys, lambda layers: [SLIDING if used and i >= first else FULL for i in range(layers)]
    )
    if not used or set(kinds) == {FULL}:
        kinds, window = (), None
    elif set(kinds) == {SLIDING}:
        kinds = ()
    return {"sliding_window": window, "layer_types": kinds}


def write_windows(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_windows`."""
    windows = [FULL if window is None else SLIDING for window in config.windows]
    return {
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
        "max_window_layers": windows.index(SLIDING) if SLIDING in windows else len(windows),
        "layer_types": windows,
    }


FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    read_config=lambda keys: read_shared(keys, "qwen2", qkv_bias=True, **read_windows(keys)),
    write_config=lambda config: write_shared(config) | write_windows(config),
    read_gguf=lambda keys, metadata: gguf.read_shared(keys, metadata, "qwen2", qkv_bias=True),
    write_gguf=gguf.write_shared,
    gguf_names=gguf.NAMES,
)
