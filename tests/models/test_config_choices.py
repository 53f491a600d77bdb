"""A config that names what does not exist cannot be made."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest

import einsum_transformer as et
from einsum_transformer.components.rope import ROPE_TYPES, RopeConfig
from einsum_transformer.models.config import LAYER_TYPES, LatentConfig, ModelConfig, MoEConfig
from einsum_transformer.numerics.activations import ACTIVATIONS, HiddenAct
from tiny_models import config_of

MOE = MoEConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
LATENT = LatentConfig(kv_lora_rank=4, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=4)
CHOICES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "block": (config_of(), ("pre_norm", "sandwich_norm", "post_norm", "parallel", "parallel_two_norms")),
    "norm": (config_of(), ("rms", "layer")),
    "mlp": (config_of(), ("gated", "fused", "plain")),
    "hidden_act": (config_of(), tuple(ACTIVATIONS)),
    "fused_qkv": (config_of(), (None, "role", "head")),
    "qk_norm": (config_of(), (None, "head", "whole")),
    "layer_types": (
        config_of(num_hidden_layers=2),
        ((), ("full_attention", "full_attention")),
    ),
    "scoring": (MOE, ("softmax", "sigmoid")),
    "form": (LATENT, ("auto", "expanded", "absorbed")),
    "rope_type": (RopeConfig(), ("default", "linear", "dynamic", "llama3", "yarn")),
}
WRONG = ("pre_nrom", "", "PRE_NORM", 0, True, None, ("rms",), [], "x" * 1000)


@pytest.mark.parametrize("name", CHOICES)
def test_only_what_exists(name: str) -> None:
    config, choices = CHOICES[name]
    for choice in choices:
        assert getattr(replace(config, **{name: choice}), name) == choice
    for wrong in WRONG:
        if wrong in choices:
            continue
        value = (LAYER_TYPES[0], wrong) if name == "layer_types" else wrong
        with pytest.raises(et.ConfigError, match=rf"^{name} .* is not supported; supported: ") as caught:
            replace(config, **{name: value})
        message = str(caught.value)
        assert repr(wrong)[:60] in message
        assert all(str(choice) in message for choice in choices if choice and name != "layer_types")
        assert len(message) < 300


def test_text_is_no_list_of_layer_types() -> None:
    with pytest.raises(et.InputError, match="`layer_types` is 'full_attention'"):
        replace(config_of(), layer_types=LAYER_TYPES[0])


def test_every_activation_and_rotation_is_a_choice() -> None:
    """The lists of the types, and the tables that the arithmetic reads."""
    assert get_args(HiddenAct) == tuple(ACTIVATIONS)
    assert set(CHOICES["rope_type"][1]) == set(ROPE_TYPES) - {"longrope"}


@pytest.mark.parametrize("kind", [ModelConfig, MoEConfig, LatentConfig, RopeConfig])
def test_no_name_is_left_unchecked(kind: type) -> None:
    """A field of plain text is a name without a list: model_type, which the families check."""
    text = {name for name, declared in kind.__annotations__.items() if "str" in declared}
    assert text <= {"model_type", "defaulted", "ignored", "training"}
