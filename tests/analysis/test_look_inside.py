"""The lens ends in the logits, contributions sum to the logit, batches of replacements equal single ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import einsum_transformer as et
from einsum_transformer.analysis.lens import project
from einsum_transformer.tree import map_named
from golden_files import MODELS, Models, load_golden

Array = np.ndarray


def tokens_of(name: str, rows: int = 1) -> Array:
    return load_golden(name).tokens[:rows, :8]


def softmax(logits: Array) -> Array:
    p = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("name", MODELS)
def test_the_lens_of_the_last_layer_is_the_model(name: str, golden_model: Models) -> None:
    model, tokens = golden_model(name), tokens_of(name, 2)
    last = f"layers.{model.config.num_hidden_layers - 1}"
    stream = et.capture(model, tokens, last)[last]
    logits = model.logits(tokens)
    np.testing.assert_allclose(project(model, stream), logits, atol=1e-5)
    found = et.logit_lens(model, tokens, top=3)
    p = softmax(logits)
    order = np.argsort(-p, axis=-1, kind="stable")[..., :3]
    np.testing.assert_array_equal(found.top_tokens[-1], order)
    np.testing.assert_allclose(found.top_probabilities[-1], np.take_along_axis(p, order, -1), rtol=1e-4)
    np.testing.assert_allclose(found.entropy[-1], -(p * np.log(p)).sum(-1), rtol=1e-4)
    np.testing.assert_array_equal(found.target, order[..., 0])
    assert not found.target_ranks[-1].any()
    first = et.capture(model, tokens, "layers.0.resid_pre")["layers.0.resid_pre"]
    np.testing.assert_allclose(found.entropy[0], _entropy(project(model, first)), rtol=1e-4)


def _entropy(logits: Array) -> Array:
    p = softmax(logits)
    return -(p * np.log(p)).sum(-1)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("heads", [False, True])
def test_contributions_sum_to_the_logit(name: str, heads: bool, golden_model: Models) -> None:
    model, tokens = golden_model(name, "float64"), tokens_of(name, 2)
    logits = model.logits(tokens).astype(np.float64)
    cap = model.decoder.head.cap
    raw = logits if cap is None else cap * np.arctanh(logits / cap)
    for position, token in ((-1, 5), (3, (5, 9))):
        found = et.logit_attribution(model, tokens, token, position=position, heads=heads)
        ids = token if isinstance(token, tuple) else (token,)
        expected = raw[:, position, ids[0]] - (raw[:, position, ids[1]] if len(ids) > 1 else 0)
        np.testing.assert_allclose(found.contributions.sum(axis=0), expected, atol=1e-5)
        np.testing.assert_allclose(found.logit, expected, atol=1e-5)
    assert len(set(found.names)) == len(found.names) == len(found.contributions)
    layers = model.config.num_hidden_layers
    if heads and any(".head." in each for each in found.names):
        assert sum(".head." in each for each in found.names) == layers * model.config.num_attention_heads
    else:
        assert len(found.names) == 2 + 2 * layers


def test_the_component_that_is_removed_takes_its_contribution(golden_model: Models) -> None:
    """With a norm that divides by a constant, removing an output changes the logit by its contribution."""
    model, tokens = golden_model("llama_gqa", "float64"), tokens_of("llama_gqa")
    last = model.config.num_hidden_layers - 1
    found = et.logit_attribution(model, tokens, 5)
    part = found.contributions[found.names.index(f"layers.{last}.mlp"), 0]
    stream = et.capture(model, tokens, [f"layers.{last}", f"layers.{last}.mlp_out"])
    x, out = stream[f"layers.{last}"][:, -1], stream[f"layers.{last}.mlp_out"][:, -1]
    norm = model.decoder.norm
    rstd = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + norm.eps)
    row = np.asarray(model.decoder.head.weight)[5]
    assert part == pytest.approx(float((out * rstd * norm.weight @ row)[0]))


def test_heads_without_their_output(golden_model: Models) -> None:
    model, tokens = golden_model("llama_gqa"), tokens_of("llama_gqa")
    found = et.ablate_heads(model, tokens, 5, layers=[1, 0])
    plain = et.capture(model, tokens, ()).logits[0, 5]
    assert found.plain == pytest.approx(float(plain))
    assert found.effects.shape == (2, model.config.num_attention_heads)
    for i, layer in enumerate((1, 0)):
        for head in range(model.config.num_attention_heads):

            def zero(z: Array, head: int = head) -> Array:
                z[:, :, head] = 0
                return z

            changed = et.patch(model, tokens, {f"blocks.{layer}.attn.hook_z": zero}).logits[0, 5]
            assert found.effects[i, head] == pytest.approx(float(changed - plain), abs=1e-5)
    with pytest.raises(et.InputError, match="layers 0 to"):
        et.ablate_heads(model, tokens, 5, layers=[99])


@pytest.mark.parametrize("value", ["resid_pre", "attn_out", "mlp_out"])
def test_values_of_another_prompt(value: str, golden_model: Models) -> None:
    model, tokens = golden_model("gpt2_plain"), tokens_of("gpt2_plain", 2)
    prompt, other = tokens[:1], tokens[:1].copy()
    other[0, 3] = (other[0, 3] + 1) % model.config.vocab_size
    found = et.patch_positions(model, prompt, other, (5, 9), value=value)  # type: ignore[arg-type]
    plain = et.capture(model, prompt, ()).logits[0]
    target = et.capture(model, other, ()).logits[0]
    assert found.plain == pytest.approx(float(plain[5] - plain[9]), abs=1e-5)
    assert found.target == pytest.approx(float(target[5] - target[9]), abs=1e-5)
    # Tokens before the one that differs have the same values.
    assert np.abs(found.effects[:, :3]).max() < 1e-5
    for layer in range(model.config.num_hidden_layers):
        for position in (3, 7):
            source = et.capture(model, other, f"layers.{layer}.{value}")[f"layers.{layer}.{value}"]

            def patched(x: Array, source: Array = source, position: int = position) -> Array:
                x[:, position] = source[:, position]
                return x

            changed = et.patch(model, prompt, {f"layers.{layer}.{value}": patched}).logits[0]
            expected = float(changed[5] - changed[9]) - found.plain
            assert found.effects[layer, position] == pytest.approx(expected, abs=1e-5)
    shares = found.recovered
    assert shares is not None
    if value == "resid_pre":  # all of the difference is in the embedding of one token
        assert shares[0, 3] == pytest.approx(1, abs=1e-3)
    with pytest.raises(et.InputError, match="expected equal lengths"):
        et.patch_positions(model, prompt, other[:, :-1])


def test_attribution_patching_is_the_linear_part(golden_model: Models) -> None:
    """For prompts whose values are nearly equal, it equals activation patching."""
    model, tokens = golden_model("llama_gqa", "float64"), tokens_of("llama_gqa")
    model = replace(model, decoder=map_named(lambda _, weight: np.array(weight), model.decoder))
    weight = model.decoder.embed_tokens.weight
    weight[6] = weight[5] + 1e-6 * weight[7]
    prompt, other = tokens.copy(), tokens.copy()
    prompt[0, 2], other[0, 2] = 5, 6
    exact = et.patch_positions(model, prompt, other, 3)
    linear = et.attribute_positions(model, prompt, other, 3)
    np.testing.assert_allclose(linear.effects, exact.effects, atol=1e-4 * np.abs(exact.effects).max())
    assert (linear.plain, linear.target) == pytest.approx((exact.plain, exact.target))


def test_what_heads_attend_to(golden_model: Models) -> None:
    model, tokens = golden_model("llama_gqa"), tokens_of("llama_gqa", 2)
    found = et.head_summary(model, tokens)
    pattern = et.capture(model, tokens, "blocks.1.attn.hook_pattern")["blocks.1.attn.hook_pattern"]
    entropy = -(pattern * np.log(np.maximum(pattern, 1e-30))).sum(-1).mean(axis=(0, 2))
    np.testing.assert_allclose(found.entropy[1], entropy, rtol=1e-5)
    np.testing.assert_allclose(found.first[1], pattern[..., 0].mean(axis=(0, 2)), rtol=1e-5)
    own = np.einsum("bhtt->h", pattern) / (2 * tokens.shape[1])
    np.testing.assert_allclose(found.itself[1], own, rtol=1e-5)
    before = np.mean([pattern[:, :, i, i - 1] for i in range(1, tokens.shape[1])], axis=(0, 1))
    np.testing.assert_allclose(found.previous[1], before, rtol=1e-5)
    assert not et.head_summary(model, tokens[:, :1]).previous.any()


def test_next_tokens(golden_model: Models) -> None:
    model, tokens = golden_model("gpt2_plain"), tokens_of("gpt2_plain")
    found = et.next_tokens(model, tokens, 4)
    p = softmax(model.logits(tokens))
    np.testing.assert_allclose(found.top_probabilities, -np.sort(-p, axis=-1)[..., :4], rtol=1e-4)
    assert et.next_tokens(model, tokens, 10**6).top_tokens.shape[-1] == model.config.vocab_size


def test_results_are_json_and_tables(golden_model: Models) -> None:
    model, tokens = golden_model("llama_gqa"), tokens_of("llama_gqa")
    for found in (
        et.logit_lens(model, tokens),
        et.logit_attribution(model, tokens),
        et.head_summary(model, tokens),
        et.ablate_heads(model, tokens),
        et.patch_positions(model, tokens, tokens),
        et.next_tokens(model, tokens),
    ):
        json.dumps(found.to_dict())
        assert len(str(found).splitlines()) > 3
    with pytest.raises(et.InputError, match="expected one"):
        et.ablate_heads(model, tokens_of("llama_gqa", 2))
    with pytest.raises(et.InputError, match="has 8 tokens"):
        et.logit_attribution(model, tokens, position=8)


def test_plots(golden_model: Models, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model, tokens = golden_model("llama_gqa"), tokens_of("llama_gqa")
    for name, found in (
        ("lens", et.logit_lens(model, tokens)),
        ("heads", et.head_summary(model, tokens)),
        ("effects", et.ablate_heads(model, tokens)),
    ):
        found.plot(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        with pytest.raises(et.InputError, match="plot"):
            found.plot(tmp_path / "missing" / "plot.png")


def test_smollm2_moves_a_fact_to_the_last_position() -> None:
    model = et.load()
    found = et.patch_positions(
        model, "The capital of France is", "The capital of Italy is", (" Rome", " Paris"), layers=[5, 29]
    )
    assert found.columns == ("The", " capital", " of", " France", " is")
    shares = found.recovered
    assert shares is not None
    assert shares[0, 3] > 0.9
    assert shares[1, 4] > 0.9
    lens = et.logit_lens(model, "The capital of France is")
    assert lens.top_texts[-1][-1][0] == " Paris"
