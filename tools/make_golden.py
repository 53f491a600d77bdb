"""Write the reference files of tests/golden with torch and transformers (see --help)."""

import argparse
import os
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from golden_cases import CASES
from golden_curves import write_curves
from golden_lora import make_adapters, make_expert_adapters
from golden_models import make_model, make_reference
from golden_optimizers import make_steps
from golden_parts import make_parts, make_sinks
from golden_smollm2 import write_greedy
from transformers.utils.logging import disable_progress_bar

REFERENCES = ("gpt2_plain", "gemma2_caps", "qwen2_moe_dense_layer", "deepseek_v2_direct")
"""Models whose activations are written too, for `parity`."""
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2")
"""Families with adapters on stacked experts."""
OTHERS = {
    "parts": make_parts,
    "sinks": make_sinks,
    "optimizers": make_steps,
    "lora": make_adapters,
    "lora_heads": partial(make_expert_adapters, "heads"),
    **{f"lora_{name}": partial(make_expert_adapters, name) for name in MIXTURES},
    **{f"reference_{name}": partial(make_reference, name) for name in REFERENCES},
}
GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"


def main() -> None:
    """Write the files of the command line, by default all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"model names or {', '.join(OTHERS)}; default: all")
    parser.add_argument(
        "--smollm2",
        type=Path,
        help="folder of SmolLM2-135M-Instruct.Q4_1.gguf: write smollm2_greedy.json only",
    )
    parser.add_argument("--curves", type=Path, help="the same folder: write curves.json only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    if arguments.smollm2:
        write_greedy(arguments.smollm2, GOLDEN / "smollm2_greedy.json")
        return
    if arguments.curves:
        write_curves(arguments.curves, GOLDEN / "sonnets.txt", GOLDEN / "curves.json")
        return
    for name in arguments.names or [*CASES, *OTHERS]:
        arrays = OTHERS[name]() if name in OTHERS else make_model(name)
        path = GOLDEN / f"{name}.npz"
        np.savez_compressed(path, allow_pickle=False, **arrays)
        print(f"{path.name}: {path.stat().st_size} bytes, {len(arrays)} arrays")


if __name__ == "__main__":
    main()
