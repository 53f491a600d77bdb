"""phi: Phi 1, 1.5 and 2: attention and feed-forward in parallel after one LayerNorm, biases everywhere,
partial RoPE."""

from typing import Any

from einsum_transformer.models.config import Keys, ModelConfig
from einsum_transformer.models.families import gguf
from einsum_transformer.models.families.family import Family, check_allowed
from einsum_transformer.models.families.llama import read_shared, write_shared

_DEFAULTS = {"layer_norm_eps": 1e-5, "hidden_act": "gelu_new", "partial_rotary_factor": 0.5}
_FIXED: dict[str, Any] = {
    "block": "parallel",
    "norm": "layer",
    "mlp": "plain",
    "attention_bias": True,
    "mlp_bias": True,
    "lm_head_bias": True,
}


def _read(keys: Keys) -> ModelConfig:
    check_allowed(keys, "qk_layernorm", bool, False)
    return read_shared(keys, "phi", _DEFAULTS, eps="layer_norm_eps", **_FIXED)


def _write(config: ModelConfig) -> dict[str, Any]:
    written = write_shared(config, eps="layer_norm_eps")
    assert config.rope is not None
    return written | {"partial_rotary_factor": config.rope.partial_rotary_factor}


FAMILY = Family(
    model_type="phi",
    architecture="PhiForCausalLM",
    read_config=_read,
    write_config=_write,
    read_gguf=lambda keys, metadata: gguf.read_shared(
        keys, metadata, "phi", partial=True, **_FIXED, hidden_act="gelu_new"
    ),
    write_gguf=gguf.write_shared,
    gguf_names=gguf.NAMES,
    gguf_architecture="phi2",
    names={"o_proj": "dense", "up_proj": "fc1", "down_proj": "fc2", "norm": "final_layernorm"},
)
