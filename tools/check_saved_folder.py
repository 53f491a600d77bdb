"""Check with transformers that folders written by `model.save` load and give the logits of a golden file."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

TOLERANCE = 1e-4


def problem(folder: Path, tokens: np.ndarray, reference: np.ndarray) -> str:
    """Return a message if the folder is wrong, else an empty string."""
    # Any: the type hints do not cover the pair that output_loading_info returns
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    model, report = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if report.get(kind):
            return f"{kind}: {report[kind]}"
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.from_numpy(tokens), use_cache=False).logits.numpy()
    if logits.shape != reference.shape:
        return f"logits have shape {logits.shape}, the golden file has {reference.shape}"
    difference = float(np.abs(logits - reference).max())
    print(f"{folder}: largest difference {difference:.1e}")
    # `<=` is false for NaN
    return "" if difference <= TOLERANCE else f"logits differ by more than {TOLERANCE}"


def main() -> None:
    """Exit with code 1 if a folder does not load cleanly or its logits differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reference", type=Path, help=".npz with the keys tokens (b, t) and logits (b, t, v)")
    parser.add_argument("folders", type=Path, nargs="+", help="Hugging Face folders of that model")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    with np.load(arguments.reference) as file:
        tokens, reference = file["tokens"], file["logits"]
    failed = False
    for folder in arguments.folders:
        if message := problem(folder, tokens, reference):
            print(f"{folder}: {message}", file=sys.stderr)
            failed = True
    sys.exit(failed)


if __name__ == "__main__":
    main()
