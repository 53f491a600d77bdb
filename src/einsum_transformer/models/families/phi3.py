"""phi3: Phi 3, 3.5 and 4: llama with fused q, k and v, fused gate and up, a sliding window and longrope."""

from collections.abc import Mapping
from typing import Any

from einsum_transformer.models.config import Keys, ModelConfig
from einsum_transformer.models.families import gguf
from einsum_transformer.models.families.family import Family, read_rope
from einsum_transformer.models.families.llama import read_shared, write_shared


def _read(keys: Keys) -> ModelConfig:
    positions = keys.get("max_position_embeddings", int, 4096)
    trained = keys.get("original_max_position_embeddings", int, 4096)
    if "original_max_position_embeddings" not in keys.raw:
        keys.raw = {**keys.raw, "original_max_position_embeddings": trained}
    return read_shared(
        keys,
        "phi3",
        {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
        # Early files have other names for longrope.
        rope=read_rope(keys, positions, aliases={"su": "longrope", "yarn": "longrope"}),
        fused_qkv="role",
        mlp="fused",
        sliding_window=keys.get("sliding_window", int, None),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    rope = config.rope
    assert rope is not None
    written = write_shared(config, "sliding_window")
    written["original_max_position_embeddings"] = rope.original_max_position_embeddings
    if rope.rope_type == "longrope":
        # transformers 4 accepts only these three keys.
        scaling = {
            "type": "longrope",
            "short_factor": [*rope.short_factor],
            "long_factor": [*rope.long_factor],
        }
        if rope.factor != config.max_position_embeddings / rope.original_max_position_embeddings:
            scaling["factor"] = rope.factor
        if rope.attention_factor is not None:
            scaling["attention_factor"] = rope.attention_factor
        written["rope_scaling"] = scaling
    return written


def _read_gguf(keys: Keys, metadata: Mapping[str, Any]) -> ModelConfig:
    # A window of 0 means no window.
    window = keys.get("attention.sliding_window", int, 0) or None
    fixed: dict[str, Any] = {"fused_qkv": "role", "mlp": "fused", "partial": True}
    return gguf.read_shared(keys, metadata, "phi3", sliding_window=window, **fixed)


FAMILY = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    read_config=_read,
    write_config=_write,
    read_gguf=_read_gguf,
    # Without the key, older versions of llama.cpp assume a window.
    write_gguf=lambda config: (
        {"attention.sliding_window": 0} | gguf.write_shared(config) | gguf.write_window(config)
    ),
    llama_cpp_windows=False,
    gguf_names=gguf.NAMES | gguf.FUSED | {"mlp.gate_up_proj": "ffn_up"},
)
