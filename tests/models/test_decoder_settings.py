"""Settings of a config that no family reads by default: they reach the components, forward and backward."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import einsum_transformer as et
from einsum_transformer.components.latent_attention import LatentAttention, LatentQuery
from einsum_transformer.models.config import LatentConfig, ModelConfig
from einsum_transformer.models.decoder import Decoder, Weight, build
from tiny_models import config_of

Array = np.ndarray
LATENT = LatentConfig(
    kv_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=5, q_lora_rank=7, norm_eps=1e-3
)


def random_decoder(config: ModelConfig) -> Decoder:
    """A decoder of this config with seeded float64 weights."""
    rng = np.random.default_rng(0)

    def leaf(weight: Weight) -> Array:
        return rng.standard_normal(weight.shape) * 0.3 + ("norm" in weight.path)

    return build(config, leaf)


def test_epsilon_of_latent_norms() -> None:
    """It is a setting of its own beside the other norms' norm_eps."""
    config = replace(config_of(), num_key_value_heads=8, head_dim=2, latent=LATENT, norm_eps=1e-5)
    decoder = random_decoder(config)
    attention = decoder.layers[0].self_attn
    assert isinstance(attention, LatentAttention)
    assert isinstance(attention.query, LatentQuery)
    assert (attention.kv_a_layernorm.eps, attention.query.q_a_layernorm.eps) == (1e-3, 1e-3)
    assert decoder.norm.eps == 1e-5


@pytest.mark.parametrize("eps", [-1e-6, 2.0, float("nan")])
def test_epsilon_out_of_range(eps: float) -> None:
    with pytest.raises(et.ConfigError, match=r"norm_eps.*must lie from 0 to 1"):
        replace(LATENT, norm_eps=eps)
