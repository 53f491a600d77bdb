"""Write tests/golden/generation.npz and generation_keys.json: outputs of transformers' logits processors and
`generate`, and the keys of its GenerationConfig."""

import ast
import inspect
import json
import os
import textwrap
import zlib
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers
from golden_cases import CASES
from golden_models import build
from transformers import GenerationConfig

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"
VOCAB, PROMPT, TEXT = 40, 6, 16
EOS = {"eos_token_id": [3, 17]}
MIXED = {
    "sequence_bias": [[[5], 1.5], [[2, 7], -2.0]],
    "encoder_repetition_penalty": 1.2,
    "repetition_penalty": 1.3,
    "no_repeat_ngram_size": 3,
    "encoder_no_repeat_ngram_size": 2,
    "bad_words_ids": [[8], [1, 9], [3]],
    "min_new_tokens": 4,
    "exponential_decay_length_penalty": [2, 1.1],
    "suppress_tokens": [11, 12],
    "begin_suppress_tokens": [13],
}
FILTERED = {"top_k": 25, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.9, "epsilon_cutoff": 0.005}
GREEDY: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5, "top_k": 3, "min_p": 0.5},
    *({name: value} for name, value in MIXED.items()),
    {"sequence_bias": [[[5], 1.5], [[5], 2.5], [[1, 2], 4.0], [[3, 1, 2], 1.0], [[0, 3, 1, 2], -9.0]]},
    {"bad_words_ids": [[2], [1, 2], [0, 1, 2], [17]]},
    {"repetition_penalty": 0.7},
    {"encoder_repetition_penalty": 0.6},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"encoder_no_repeat_ngram_size": 1},
    {"encoder_no_repeat_ngram_size": 3},
    {"min_length": 9},
    {"min_length": 9, "min_new_tokens": 1},
    {"min_length": 12, "min_new_tokens": 0},
    {"max_new_tokens": 5, "forced_eos_token_id": 17},
    {"max_length": 9, "forced_eos_token_id": [3, 17]},
    {"max_length": 30, "max_new_tokens": 4, "forced_eos_token_id": 5},
    {"forced_bos_token_id": 4},
    {"forced_bos_token_id": 4, "begin_suppress_tokens": [4, 5]},
    {"exponential_decay_length_penalty": [0, 1.5]},
    {"remove_invalid_values": True, "suppress_tokens": [1, 2]},
    {"renormalize_logits": True},
    MIXED,
]
SAMPLED: list[dict[str, Any]] = [
    {},
    {"top_k": 0},
    {"temperature": 0.6, "top_k": 0},
    {"top_k": 4},
    {"top_k": 0, "top_p": 0.6},
    {"top_k": 0, "min_p": 0.1},
    {"top_k": 0, "top_h": 0.4},
    {"top_k": 0, "top_h": 0.9, "temperature": 1.4},
    {"top_k": 0, "typical_p": 0.3},
    {"top_k": 0, "typical_p": 0.8},
    {"top_k": 0, "epsilon_cutoff": 0.03},
    {"top_k": 0, "eta_cutoff": 0.1},
    {"top_k": 0, "eta_cutoff": 0.9},
    {"top_k": 0, "renormalize_logits": True, "top_p": 0.8},
    FILTERED,
    {"temperature": 1.7, "eta_cutoff": 0.02, "top_h": 0.8, **FILTERED},
    {**MIXED, **FILTERED, "temperature": 0.8},
    {**MIXED, "top_k": 0, "remove_invalid_values": True, "eta_cutoff": 0.01},
]
GENERATED: list[tuple[str, dict[str, Any]]] = [
    ("llama_gqa", {"max_new_tokens": 12}),
    ("llama_gqa", {"max_new_tokens": 24, "no_repeat_ngram_size": 2, "repetition_penalty": 1.4}),
    ("llama_gqa", {"max_length": 14, "suppress_tokens": [3, 4, 5], "forced_eos_token_id": 9}),
    ("llama_gqa", {"max_new_tokens": 9, "min_new_tokens": 5, "bad_words_ids": [[80], [38, 12]]}),
    ("llama_gqa", {"max_new_tokens": 16, "encoder_no_repeat_ngram_size": 1, "begin_suppress_tokens": [38]}),
    ("llama_rope_dynamic", {"max_new_tokens": 48, "suppress_tokens": [2]}),
    ("llama_rope_linear", {"max_new_tokens": 40}),
    ("llama_rope_yarn", {"max_new_tokens": 40}),
]
"""Models and settings of greedy generation; the last three exceed `max_position_embeddings`."""
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
CHANGES: dict[str, dict[str, Any]] = {
    "llama_rope_linear": {"max_position_embeddings": 16},
    "llama_rope_yarn": {"max_position_embeddings": 16, "rope_parameters": YARN},
}


def processed(model: Any, settings: dict[str, Any], text: list[int], prompt: int, scores: np.ndarray) -> Any:
    """The logits after all processors that `generate` applies to them after this text."""
    config = GenerationConfig(**settings)
    no_length, no_least = config.max_length is None, config.min_length is None
    config, _ = model._prepare_generation_config(config)
    model._prepare_special_tokens(config, True, device="cpu", batch_size=1)
    ids = torch.tensor([text[:prompt]])
    config = model._prepare_generated_length(config, no_length, no_least, "input_ids", prompt, ids)
    apply = model._get_logits_processor(config, prompt, ids, device="cpu", model_kwargs={})
    return apply(torch.tensor([text]), torch.tensor(scores[None]))[0].numpy()


def make_processors() -> dict[str, Any]:
    """Logits before the processors, the texts, and the processed logits or probabilities."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model = transformers.LlamaForCausalLM(config)
    rng = np.random.default_rng(0)
    cases, given, texts, expected = [], [], [], []
    for sampled, settings in [*((False, each) for each in GREEDY), *((True, each) for each in SAMPLED)]:
        cases.append(EOS | {"do_sample": sampled, "max_new_tokens": 10} | settings)
        if "max_length" in settings:
            cases[-1].pop("max_new_tokens", None) if "max_new_tokens" not in settings else None
        for prompt, length in (
            (PROMPT, 6),
            (PROMPT, 7),
            (PROMPT, 8),
            (PROMPT, 10),
            (PROMPT, 15),
            (1, 1),
            (1, 2),
        ):
            # Few different tokens, so that n-grams repeat.
            text = rng.integers(0, 4, TEXT)
            text[:3] = text[3:6] = rng.integers(0, 3, 3)
            scores = (rng.standard_normal(VOCAB) * 2).astype(np.float32)
            found = processed(model, cases[-1], text[:length].tolist(), prompt, scores)
            if sampled:
                found = torch.softmax(torch.tensor(found), dim=-1).numpy()
            given.append(scores)
            texts.append([prompt, length, *text])
            expected.append(found)
    return {
        "cases": np.array(json.dumps(cases)),
        "scores": np.array(given),
        "texts": np.array(texts, np.int16),
        "expected": np.array(expected, np.float32),
    }


def make_generations() -> dict[str, Any]:
    """The tokens of greedy generation with golden models."""
    cases = []
    for name, settings in GENERATED:
        model = build(CASES[name], zlib.crc32(name.encode()), CHANGES.get(name, {}))
        prompt = [2, 7, 1, 8, 2, 8]
        with torch.no_grad():
            generated = model.generate(
                torch.tensor([prompt]),
                generation_config=GenerationConfig(**settings, pad_token_id=0),
            )
        cases.append({"model": name, "prompt": prompt, "settings": settings})
        cases[-1] |= {"changes": CHANGES.get(name, {}), "tokens": generated[0, 6:].tolist()}
    return {"generations": np.array(json.dumps(cases))}


def keys() -> dict[str, Any]:
    """All names that GenerationConfig stores or pops from its keywords, and the defaults of `generate`."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(GenerationConfig.__init__)))
    taken = {
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "pop"
        and isinstance(node.args[0], ast.Constant)
    }
    stored = {name for name in GenerationConfig().to_dict() if name != "_original_object_hash"}
    return {
        "transformers": transformers.__version__,
        "keys": sorted(taken | stored),
        "defaults": GenerationConfig._get_default_generation_params(),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    np.savez_compressed(GOLDEN / "generation.npz", **make_processors(), **make_generations())
    text = json.dumps(keys(), indent=1) + "\n"
    (GOLDEN / "generation_keys.json").write_text(text, encoding="utf-8")
