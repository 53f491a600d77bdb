"""Write tests/golden/transformer_lens_names.json: the names and shapes of the activations in TransformerLens.

    python tools/list_hook_names.py

Runs in an environment of its own with `transformer-lens==3.9.0`, `torch==2.13.0` and `transformers==5.24.0`.
transformer-lens 4.0 removed HookedTransformer. The two models are tiny and random, one like GPT-2, one like
Llama. Batch, positions, heads, key/value heads and all widths have different sizes, so that a shape shows the
axes of an array.
"""

import json
import os
import re
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden" / "transformer_lens_names.json"
BATCH, POSITIONS = 2, 5
SIZES = {"n_layers": 2, "n_heads": 6, "d_head": 4, "d_model": 24, "d_vocab": 67, "n_ctx": 40}
MODELS = {
    "gpt2": SIZES
    | {
        "d_mlp": 34,
        "act_fn": "gelu_new",
        "normalization_type": "LN",
        "positional_embedding_type": "standard",
        "attn_only": False,
    },
    "llama": SIZES
    | {
        "n_key_value_heads": 3,
        "d_mlp": 34,
        "act_fn": "silu",
        "gated_mlp": True,
        "normalization_type": "RMS",
        "final_rms": True,
        "positional_embedding_type": "rotary",
        "rotary_dim": 4,
        "rotary_adjacent_pairs": False,
        "attn_only": False,
    },
}
"""Keys of HookedTransformerConfig. Every HookedTransformer has biases; Llama's are zero."""


@dataclass(frozen=True, slots=True)
class Run:
    """Options of HookedTransformerConfig that add hooks or change shapes, and the models to run."""

    options: dict[str, bool]
    models: tuple[str, ...] = tuple(MODELS)


RUNS = {
    "default": Run({}),
    "split": Run({"use_attn_result": True, "use_split_qkv_input": True, "use_hook_mlp_in": True}),
    "ungrouped": Run(
        {"use_attn_result": True, "use_split_qkv_input": True, "ungroup_grouped_query_attention": True},
        ("llama",),
    ),
    # Grouped keys and values raise an error with this option.
    "attn_in": Run({"use_attn_in": True}, ("gpt2",)),
}


def shapes(config: dict[str, Any]) -> dict[str, list[int]]:
    """Hook name -> shape of the array, in the order of the forward pass."""
    model = HookedTransformer(HookedTransformerConfig(**config, seed=0, device="cpu"))
    tokens = torch.randint(config["d_vocab"], (BATCH, POSITIONS))
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    return {name: list(array.shape) for name, array in cache.items()}


def on_one_line(text: str) -> str:
    """JSON text with every list of numbers on one line."""
    return re.sub(r"\[\s+([\d,\s]+?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)


def main() -> None:
    """Run every model with every set of options."""
    warnings.filterwarnings("ignore", "HookedTransformer is deprecated", DeprecationWarning)
    models: dict[str, Any] = {}
    for name, config in MODELS.items():
        runs = {
            kind: {"options": run.options, "shapes": shapes(config | run.options)}
            for kind, run in RUNS.items()
            if name in run.models
        }
        models[name] = {"config": config, "runs": runs}
    found = {
        "transformer_lens": version("transformer-lens"),
        "batch": BATCH,
        "positions": POSITIONS,
        "models": models,
    }
    GOLDEN.write_text(on_one_line(json.dumps(found, indent=1)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
