"""Every family's model: gradients against differences in float64, and a cached run against a whole one."""

from typing import Any

import numpy as np
import pytest

import einsum_transformer as et
from einsum_transformer.analysis import gradcheck as checks
from einsum_transformer.generation.decode import Generation, Settings, decode_batch
from einsum_transformer.generation.sampling import Sampling
from einsum_transformer.models.families import FAMILIES
from golden_files import MODELS, Folders, Models, load_golden

Array = np.ndarray
KINKED = "mpt_clip"
"""Its clipped projections have kinks, which some step of the differences crosses."""


def test_every_family_has_goldens() -> None:
    """At least two; the multimodal config is that of the text model inside."""
    kinds = [load_golden(name).config["model_type"] for name in MODELS]
    assert all(kinds.count(kind) >= 2 for kind in FAMILIES if kind != "gemma3")


@pytest.mark.parametrize("name", [name for name in MODELS if name != KINKED])
def test_gradients_in_float64(
    name: str, golden_folder: Folders, golden_model: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All parameters along one direction, and each along one of its own."""
    golden = load_golden(name)
    monkeypatch.setattr(checks, "_directions", lambda g, rng: [("direction", rng.standard_normal(g.shape))])
    tokens, targets = golden.tokens[:, :9], golden.targets[:, :9]
    found = checks.gradcheck(et.load(golden_folder(name), dtype="float64"), tokens, targets)
    assert found.passed, [row for row in (found.whole, *found.rows) if row.error > found.tolerance]
    assert len(found.rows) == sum(1 for _ in golden_model(name).weights)


def in_chunks(model: et.Model, tokens: Array, lengths: list[int], cache: Any) -> Array:
    """Logits of the tokens, given in chunks of these lengths and then one by one."""
    starts = np.cumsum([0, *lengths]).tolist()
    pieces = [tokens[:, a : a + n] for a, n in zip(starts, lengths)]
    pieces += [tokens[:, i : i + 1] for i in range(starts[-1], tokens.shape[1])]
    return np.concatenate([model.decoder.forward(piece, cache)[0] for piece in pieces], axis=1)


@pytest.mark.parametrize("lengths", [[], [3, 1, 5], [12]], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_cached_is_whole(name: str, lengths: list[int], golden_model: Models) -> None:
    """Across the edges of windows, and beyond the length that longrope and dynamic RoPE change at."""
    golden, model = load_golden(name), golden_model(name)
    whole = model.logits(golden.tokens)
    cache = model.cache(horizon=golden.tokens.shape[1])
    got = in_chunks(model, golden.tokens, lengths, cache)
    np.testing.assert_allclose(got, whole, rtol=0, atol=2e-5 * max(1, np.abs(whole).max()))


@pytest.mark.parametrize("name", [name for name in MODELS if name != "llama_rope_dynamic"])
def test_padded_rows_are_rows(name: str, golden_model: Models) -> None:
    """A left-padded batch, in one pass and token by token."""
    golden, model = load_golden(name), golden_model(name)
    tokens = golden.tokens[:, :14].copy()
    pads = np.array([0, 5])
    alone = [model.logits(tokens[:1])[0], model.logits(tokens[1:, 5:])[0]]
    for lengths in ([14], []):
        got = in_chunks(model, tokens, lengths, model.cache(pads=pads))
        for row, expected in enumerate(alone):
            got_row = got[row, pads[row] :]
            np.testing.assert_allclose(got_row, expected, rtol=0, atol=2e-5 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("start", [9, 15, 16, 17, 24])
def test_generation_across_the_length_that_longrope_changes_at(start: int, golden_model: Models) -> None:
    """Greedy, from prompts on both sides of 16 tokens: what a whole run says token by token, also in a batch
    whose rows pass that length at different times, and where a cache is continued."""
    golden, model = load_golden("phi3_longrope"), golden_model("phi3_longrope")

    def greedy(prompt: list[int]) -> list[int]:
        text = list(prompt)
        for _ in range(10):
            text.append(int(model.logits(np.array([text]))[0, -1].argmax()))
        return text[len(prompt) :]

    prompts = [golden.tokens[0, :start].tolist(), golden.tokens[1, : start - 4].tolist()]
    expected = [greedy(prompt) for prompt in prompts]
    settings: dict[str, Any] = {"max_new_tokens": 10, "temperature": 0, "ignore_eos": True}
    assert et.generate(model, prompts[0], **settings).tokens == expected[0]
    assert et.generate(model, prompts[0], prefill_step_size=5, **settings).tokens == expected[0]
    assert [each.tokens for each in et.generate(model, prompts, **settings)] == expected


def test_a_continued_cache_passes_that_length(golden_model: Models) -> None:
    """The second of two turns on one cache goes beyond it."""
    golden, model = load_golden("phi3_longrope"), golden_model("phi3_longrope")
    text = golden.tokens[0, :20].tolist()
    cache, sampling = model.cache(), Sampling()
    for turn in (text[:11], text[11:]):
        results = [Generation(turn)]
        list(decode_batch(model, results, sampling, Settings(1, ignore_eos=True), cache))
        cache.truncate(cache.length)
    assert cache.length == 20
    expected = int(model.logits(np.array([text]))[0, -1].argmax())
    assert results[0].tokens == [expected]
