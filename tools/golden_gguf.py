"""GGUF metadata as llama.cpp reads it: its logits of golden models whose files have additional keys.

python tools/golden_gguf.py writes tests/golden/gguf_metadata.npz (needs llama-cpp-python 0.3.36).
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from check_gguf import llama_cpp_logits

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from gguf_files import write_model_gguf
from golden_files import FOLDER, load_golden

SCALING = "{arch}.rope.scaling."
YARN = {f"{SCALING}type": "yarn", f"{SCALING}factor": 4.0, f"{SCALING}original_context_length": 16}
# llama.cpp ignores these keys in files of this architecture.
OLMO3 = dict.fromkeys(f"{SCALING}yarn_{name}" for name in ("attn_factor", "beta_fast", "beta_slow"))
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama_gqa", {}),
    "the old key of the factor": ("llama_gqa", {"{arch}.rope.scale_linear": 4.0}),
    "a factor without a type": ("llama_gqa", {f"{SCALING}factor": 4.0}),
    "both keys of the factor": ("llama_gqa", {f"{SCALING}factor": 2.0, "{arch}.rope.scale_linear": 4.0}),
    "the old key, type linear": (
        "llama_gqa",
        {f"{SCALING}type": "linear", "{arch}.rope.scale_linear": 4.0},
    ),
    "a factor of type none": ("llama_gqa", {f"{SCALING}type": "none", f"{SCALING}factor": 4.0}),
    "an attention factor": ("llama_gqa", {f"{SCALING}attn_factor": 1.5}),
    "an attention factor, linear": (
        "llama_gqa",
        {f"{SCALING}type": "linear", f"{SCALING}factor": 4.0, f"{SCALING}attn_factor": 1.5},
    ),
    "yarn": ("llama_gqa", YARN),
    "yarn without a length": (
        "llama_gqa",
        {key: value for key, value in YARN.items() if "length" not in key},
    ),
    "an attention factor, yarn": ("llama_gqa", YARN | {f"{SCALING}attn_factor": 1.5}),
    "yarn of qwen3": ("qwen3_tied", YARN),
    "olmo3": ("olmo3_yarn", OLMO3),
    "olmo3, a pattern": ("olmo3_yarn", OLMO3 | {"{arch}.attention.sliding_window_pattern": 2}),
    "gemma2, a pattern": ("gemma2_caps", {"{arch}.attention.sliding_window_pattern": 3}),
    "gemma3, a pattern": ("gemma3_text", {"{arch}.attention.sliding_window_pattern": 2}),
    "gemma3, an attention factor": ("gemma3_text", {f"{SCALING}attn_factor": 1.5}),
    "gemma3 without windows": ("gemma3_text", {"{arch}.attention.sliding_window": 0}),
}
LENGTH = 15


def main() -> None:
    """Write the logits of every case."""
    found: dict[str, np.ndarray] = {"cases": np.array(json.dumps(CASES))}
    for name, (model, keys) in CASES.items():
        golden = load_golden(model)
        vocabulary = {"tokenizer.ggml.model": "none", "{arch}.vocab_size": golden.config["vocab_size"]}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            write_model_gguf(path, golden.config, golden.weights, **vocabulary, **keys)
            found[name] = llama_cpp_logits(path, 64, golden.tokens[0, :LENGTH].tolist())[-4:]
        print(f"{name}: {np.abs(found[name] - found['plain'][:, :1]).max():.2f}", flush=True)
    np.savez_compressed(FOLDER / "gguf_metadata.npz", allow_pickle=False, **found)


if __name__ == "__main__":
    main()
