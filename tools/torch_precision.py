"""Print the error of torch's float32 against its float64 at the logits of a model.

    python tools/torch_precision.py FOLDER TOKENS.npy [--logits LOGITS.npy]

Runs in the environment of tools/make_golden.py (torch, transformers). FOLDER: written by `Model.save`.
TOKENS: (1, t) ids. LOGITS: float64 logits of this package for the same tokens, to compare with torch's.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM


def logits(folder: Path, tokens: np.ndarray, dtype: torch.dtype, attention: str) -> np.ndarray:
    """The logits (1, t, v) of the model in this type."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention).eval()
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(tokens), use_cache=False).logits.double().numpy()


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """||found - expected|| / ||expected||."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def main() -> None:
    """Load the model in each type, and print the errors."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="Hugging Face folder")
    parser.add_argument("tokens", type=Path, help=".npy of token ids (1, t)")
    parser.add_argument("--logits", type=Path, help=".npy of float64 logits of this package")
    arguments = parser.parse_args()
    tokens = np.atleast_2d(np.load(arguments.tokens, allow_pickle=False))
    ours = np.load(arguments.logits, allow_pickle=False) if arguments.logits else None
    expected = logits(arguments.folder, tokens, torch.float64, "eager")
    for attention in ("eager", "sdpa"):
        single = logits(arguments.folder, tokens, torch.float32, attention)
        print(f"torch float32, {attention}: {error(single, expected):.2e} against its float64")
        if ours is not None:
            print(f"  against the float64 of this package: {error(single, ours):.2e}")
    if ours is not None:
        # transformers computes norms, RoPE and softmax in float32, also in a float64 model.
        print(f"torch float64 against the float64 of this package: {error(expected, ours):.2e}")


if __name__ == "__main__":
    main()
