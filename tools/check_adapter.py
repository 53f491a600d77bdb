"""Check with peft that an adapter folder written by `save_adapter` loads and gives reference logits."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

TOLERANCE = 1e-4


def problem(base: Path, adapter: Path, tokens: np.ndarray, reference: np.ndarray) -> str:
    """Return a message if the adapter is wrong, else an empty string."""
    plain: Any = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = torch.from_numpy(tokens)
    with torch.no_grad():
        without = plain(input_ids=ids, use_cache=False).logits.numpy()
        model = PeftModel.from_pretrained(plain, adapter).eval()
        logits = model(input_ids=ids, use_cache=False).logits.numpy()
    # peft only warns about unknown or missing names
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        unmatched = set(file.keys()) ^ {name for name in get_peft_model_state_dict(model) if ".lora_" in name}
    if unmatched:
        return f"names in only one of peft's model and the folder: {', '.join(sorted(unmatched))}"
    if logits.shape != reference.shape:
        return f"logits have shape {logits.shape}, the reference has {reference.shape}"
    difference, change = (float(np.abs(logits - other).max()) for other in (reference, without))
    print(f"{adapter}: largest difference {difference:.1e}; the adapter changes the logits by {change:.1e}")
    if not change > 10 * TOLERANCE:
        return "the adapter changes the logits too little for a meaningful comparison"
    # `<=` is false for NaN
    return "" if difference <= TOLERANCE else f"logits differ by more than {TOLERANCE}"


def main() -> None:
    """Exit with code 1 if the adapter does not load cleanly or its logits differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path, help="Hugging Face folder of the base model")
    parser.add_argument("adapter", type=Path, help="PEFT folder")
    parser.add_argument("reference", type=Path, help=".npz with the keys tokens (b, t) and logits (b, t, v)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    with np.load(arguments.reference) as file:
        tokens, reference = file["tokens"], file["logits"]
    if message := problem(arguments.base, arguments.adapter, tokens, reference):
        print(f"{arguments.adapter}: {message}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
