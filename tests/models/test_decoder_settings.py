"""Settings of a config that no family reads by default: they reach the components, forward and backward."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import einsum_transformer as et
from components.gradient import assert_weight_gradients
from einsum_transformer.analysis.gradcheck import gradcheck
from einsum_transformer.components.latent_attention import LatentAttention, LatentQuery
from einsum_transformer.errors import ConfigError
from einsum_transformer.models.adapters import with_lora
from einsum_transformer.models.builder import WeightSpec, build, weights_of
from einsum_transformer.models.config import LatentConfig, ModelConfig
from einsum_transformer.models.decoder import Decoder
from einsum_transformer.models.lora_config import LoRAConfig
from einsum_transformer.tree import map_named, named_leaves
from tiny_models import config_of, tiny_model

Array = np.ndarray
LATENT = LatentConfig(
    kv_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=5, q_lora_rank=7, norm_eps=1e-3
)

SMALL = config_of(
    vocab_size=13,
    hidden_size=12,
    intermediate_size=10,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
)
SCALED = "(o_proj|down_proj)"
MULTIPLIED: dict[str, tuple[dict[str, Any], str]] = {
    "pre_norm": ({"block": "pre_norm"}, SCALED),
    "sandwich_norm": ({"block": "sandwich_norm"}, "post_(attention|feedforward)_layernorm.weight"),
    "post_norm": ({"block": "post_norm"}, "post_(attention|feedforward)_layernorm.weight"),
    "parallel": ({"block": "parallel"}, SCALED),
    "parallel_two_norms": ({"block": "parallel_two_norms"}, SCALED),
    "tied": ({"tie_word_embeddings": True}, SCALED),
    "capped": ({"final_logit_softcapping": 2.0}, SCALED),
    "tied and capped": ({"tie_word_embeddings": True, "final_logit_softcapping": 2.0}, SCALED),
}
"""Changes of a config, and the weights that a residual_multiplier could have been multiplied into."""
TOKENS = np.random.default_rng(1).integers(0, 13, (2, 7))


def random_decoder(config: ModelConfig) -> Decoder:
    """A decoder of this config with seeded float64 weights."""
    rng = np.random.default_rng(0)

    def leaf(weight: WeightSpec) -> Array:
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
    with pytest.raises(et.ConfigError, match=r"norm_eps.*expected a number from 0 to 1"):
        replace(LATENT, norm_eps=eps)


@pytest.mark.parametrize("name", MULTIPLIED)
def test_gradients_with_multipliers(name: str) -> None:
    config = replace(SMALL, residual_multiplier=0.3, logit_scale=2.5, **MULTIPLIED[name][0])
    decoder = random_decoder(config)
    logits, saved = decoder.forward(TOKENS, keep=True)
    dlogits = np.random.default_rng(2).standard_normal(logits.shape)
    gradient = decoder.backward(dlogits, saved)
    assert_weight_gradients(lambda weights: weights.forward(TOKENS)[0], decoder, gradient, dlogits)


@pytest.mark.parametrize("name", MULTIPLIED)
def test_a_residual_multiplier_is_a_factor_of_the_last_weights(name: str) -> None:
    changes, last = MULTIPLIED[name]
    multiplied = random_decoder(replace(SMALL, residual_multiplier=0.3, **changes))
    plain = map_named(
        lambda path, array: array * 0.3 if re.fullmatch(rf"layers\..*{last}", path) else array,
        random_decoder(replace(SMALL, **changes)),
    )
    logits, expected = multiplied.forward(TOKENS)[0], plain.forward(TOKENS)[0]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-12)
    assert np.abs(logits - random_decoder(replace(SMALL, **changes)).forward(TOKENS)[0]).max() > 1e-3


@pytest.mark.parametrize("tied", [False, True])
def test_a_logit_scale_comes_before_the_cap(tied: bool) -> None:
    plain = replace(SMALL, tie_word_embeddings=tied)
    logits = random_decoder(plain).forward(TOKENS)[0]
    scaled = random_decoder(replace(plain, logit_scale=2.5)).forward(TOKENS)[0]
    capped = random_decoder(replace(plain, logit_scale=2.5, final_logit_softcapping=2.0)).forward(TOKENS)[0]
    np.testing.assert_allclose(scaled, 2.5 * logits, rtol=0, atol=1e-12)
    np.testing.assert_allclose(capped, 2 * np.tanh(2.5 * logits / 2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("value", [0.0, -1.0, 1e10, float("nan")])
@pytest.mark.parametrize("name", ["residual_multiplier", "logit_scale"])
def test_multiplier_out_of_range(name: str, value: float) -> None:
    with pytest.raises(et.ConfigError, match=rf"{name}.*expected a number from 1e-9 to 1e9"):
        replace(SMALL, **{name: value})


@pytest.mark.parametrize("name", ["residual_multiplier", "logit_scale"])
def test_a_config_json_that_cannot_say_it_is_not_saved(name: str, tmp_path: Path) -> None:
    model = tiny_model()
    with pytest.raises(et.InputError, match=f"cannot represent {name} = 0.5"):
        replace(model, config=replace(model.config, **{name: 0.5})).save(tmp_path)


@pytest.mark.parametrize("lora", [False, True])
def test_a_model_with_sinks(lora: bool) -> None:
    """Gradients, a cached run, the names of tensors, and what cannot have sinks."""
    config = replace(SMALL, sinks=True)
    model = et.Model(config, random_decoder(config))
    assert model.named_parameters()["model.layers.0.self_attn.sinks"].shape == (4,)
    if lora:
        model = with_lora(model, LoRAConfig(2))
    found = gradcheck(model, TOKENS, TOKENS)
    assert found.passed, [row for row in found.rows if row.error > found.tolerance]
    assert any("sinks" in row.name for row in found.rows) is not lora
    cache = model.cache()
    pieces = [model.decoder.forward(TOKENS[:, i : i + 1], cache)[0] for i in range(TOKENS.shape[1])]
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), model.logits(TOKENS), atol=1e-10)
    with pytest.raises(ConfigError, match="sinks"):
        replace(config, fused_qkv="role")


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_listed_in_the_order_of_the_program(tied: bool) -> None:
    config = replace(SMALL, tie_word_embeddings=tied)
    listed = [spec.path for spec in weights_of(config)]
    assert listed[0] == "embed_tokens.weight"
    assert (listed[-1] == "lm_head.weight") is not tied
    assert sorted(listed) == sorted(path for path, _ in named_leaves(random_decoder(config)))
