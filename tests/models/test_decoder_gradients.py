"""The whole decoder's backward pass against differences of its forward pass, for each weight by itself, in
float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from components.gradient import assert_gradient, assert_weight_gradients, replaced
from einsum_transformer.models.blocks import Block
from einsum_transformer.numerics.softmax import IGNORE_INDEX
from einsum_transformer.tree import named_leaves
from tiny_models import LLAMA3, tiny_model

Array = np.ndarray
SMALL = {
    "vocab_size": 13,
    "hidden_size": 12,
    "intermediate_size": 10,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
}
MODELS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "window": {"model_type": "mistral", "sliding_window": 3},
    "multi-query": {"num_key_value_heads": 1},
    "three layers": {"num_hidden_layers": 3},
    "llama3": {"rope_scaling": LLAMA3},
    "yarn": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4}},
}
TOKENS = np.random.default_rng(0).integers(0, 13, (2, 9))


def small(**changes: Any) -> Any:
    return tiny_model("float64", **SMALL | changes)


@pytest.mark.parametrize("name", MODELS)
def test_every_weight(name: str) -> None:
    decoder = small(**MODELS[name]).decoder
    logits, saved = decoder.forward(TOKENS, keep=True)
    dlogits = np.random.default_rng(1).standard_normal(logits.shape)
    gradient = decoder.backward(dlogits, saved)
    assert_weight_gradients(lambda weights: weights.forward(TOKENS)[0], decoder, gradient, dlogits)


def test_the_embedding_of_a_tied_model_has_both_gradients() -> None:
    """The sum of what an untied model with the same numbers has for embedding and head."""
    tied = small(tie_word_embeddings=True)
    decoder = tied.decoder
    untied = replace(decoder, lm_head=decoder.head)
    logits, saved = decoder.forward(TOKENS, keep=True)
    apart = untied.backward(logits, untied.forward(TOKENS, keep=True)[1])
    together = decoder.backward(logits, saved)
    assert together.lm_head is None
    np.testing.assert_allclose(together.embed_tokens.weight, apart.embed_tokens.weight + apart.lm_head.weight)
    assert apart.lm_head.weight.any()


@pytest.mark.parametrize("name", ["untied", "tied", "biased", "window"])
def test_loss_gradients_by_checkpoint_name(name: str) -> None:
    """Names, shapes and values of loss_and_gradients, with targets that are ignored."""
    model = small(**MODELS[name])
    targets = np.roll(TOKENS, -1, axis=1)
    targets[:, -1] = targets[0, 2] = IGNORE_INDEX
    _, gradients = model.loss_and_gradients(TOKENS, targets)
    parameters = model.named_parameters()
    assert gradients.keys() == parameters.keys()
    for key, parameter in parameters.items():
        original = parameter.copy()

        def loss(p: Array, parameter: Array = parameter, original: Array = original) -> Array:
            parameter[...] = p
            value = model.loss_and_gradients(TOKENS, targets)[0]
            parameter[...] = original
            return np.array(value)

        assert_gradient(key, loss, original, gradients[key], np.ones(()))


def test_padding_of_a_batch_has_no_influence_on_gradients() -> None:
    """Rows end in ignored targets: the gradient is that of the shorter rows, weighted by their targets."""
    model = small()
    targets = np.roll(TOKENS, -1, axis=1)
    targets[0, 5:] = IGNORE_INDEX
    targets[1] = IGNORE_INDEX
    _, both = model.loss_and_gradients(TOKENS, targets)
    _, alone = model.loss_and_gradients(TOKENS[:1, :5], targets[:1, :5])
    for key, gradient in both.items():
        np.testing.assert_allclose(gradient, alone[key], atol=1e-13, err_msg=key)


def test_nothing_to_learn() -> None:
    """Every target ignored: loss 0, gradients 0, no NaN."""
    loss, gradients = small().loss_and_gradients(TOKENS, np.full_like(TOKENS, IGNORE_INDEX))
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients.values())


def broken_block_backward(
    block: Block, dy: Array, saved: tuple[Any, ...], context: Any
) -> tuple[Array, Block]:
    """The known bug: the residual's gradient goes through the norm too."""
    saved_norm, saved_attention, saved_post, saved_mlp, *_ = saved
    dnormed, dmlp = block.mlp.backward(dy, saved_mlp)
    dx, dpost = block.post_attention_layernorm.backward(dnormed + dy, saved_post)
    dnormed, dattention = block.self_attn.backward(dx, saved_attention, context)
    dinput, dnorm = block.input_layernorm.backward(dnormed + dx, saved_norm)
    return dinput, Block(dnorm, dattention, dpost, dmlp)


def test_a_residual_through_the_norm_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check fails at weights below the broken place, and names them."""
    decoder = small().decoder
    logits, saved = decoder.forward(TOKENS, keep=True)
    monkeypatch.setattr(Block, "backward", broken_block_backward)
    gradient = decoder.backward(logits, saved)
    found = []
    for path, array in named_leaves(decoder):
        wrong = dict(named_leaves(gradient))[path]
        try:
            assert_gradient(
                path, lambda p, path=path: replaced(decoder, path, p).forward(TOKENS)[0], array, wrong, logits
            )
        except AssertionError:
            found.append(path)
    assert "layers.0.self_attn.q_proj" in found
    assert "embed_tokens.weight" in found
    assert "lm_head.weight" not in found
    assert "layers.1.mlp.down_proj" not in found
