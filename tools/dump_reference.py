"""Write the activations of a transformers model for `etx parity`: `tokens`, `logits` and an array per module.

    python tools/dump_reference.py FOLDER_OR_HUB_ID OUT.npz --prompt "The capital of France is"

Runs in the environment of tools/make_golden.py (torch, transformers). The arrays have the names of modules
("model.layers.0.self_attn.q_proj"); for a module that returns several values, the first is written.
"""

import argparse
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar


def activations(model: Any, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Module name -> its output (b, t, ...) for tokens (b, t), without routers, whose outputs differ between
    models."""
    found: dict[str, np.ndarray] = {"tokens": tokens.astype(np.int64)}

    def store(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            if not isinstance(value, torch.Tensor):
                return
            array = value.detach().float().numpy()
            if array.ndim == 2 and len(array) == tokens.size:  # modules of experts flatten (b, t)
                array = array.reshape(*tokens.shape, -1)
            if array.ndim >= 3 and array.shape[1] == tokens.shape[1]:
                # The position embedding has batch size 1.
                found[name] = np.broadcast_to(array, (len(tokens), *array.shape[1:])).copy()

        return hook

    handles = [
        module.register_forward_hook(store(name))
        for name, module in model.named_modules()
        if name and not _is_skipped(name, module)
    ]
    try:
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(tokens), use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    found["logits"] = logits.float().numpy()
    return found


def _is_skipped(name: str, module: Any) -> bool:
    """Whether it is the head (its logits are stored), the model without the head, or a module without a
    counterpart of this package (such as MPT's feed-forward, which adds the residual)."""
    kinds = ("Router", "Rotary", "Dropout", "Activation", "GELU", "SiLU", "Identity", "MptMLP")
    own = type(module).__name__
    return name in ("lm_head", "embed_out") or own.endswith("Model") or any(kind in own for kind in kinds)


def main() -> None:
    """Load the model, run it, and write the activations."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="Hugging Face folder or hub id")
    parser.add_argument("out", type=Path, help=".npz or .safetensors file to write")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", default="The capital of France is", help="a text for the tokenizer")
    source.add_argument("--tokens", type=Path, help=".npy of token ids, (time) or (batch, time)")
    parser.add_argument("--dtype", default="float32", help="dtype of transformers' computation")
    arguments = parser.parse_args()
    if arguments.out.suffix not in (".npz", ".safetensors"):
        parser.error(f"{arguments.out}: name a .npz or .safetensors file")
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=getattr(torch, arguments.dtype), attn_implementation="eager"
    ).eval()
    if arguments.tokens:
        tokens = np.atleast_2d(np.load(arguments.tokens, allow_pickle=False))
    else:
        tokens = np.array([AutoTokenizer.from_pretrained(arguments.model)(arguments.prompt)["input_ids"]])
    found = activations(model, tokens)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    if arguments.out.suffix == ".npz":
        np.savez_compressed(arguments.out, **found)
    else:
        save_file({name: np.ascontiguousarray(array) for name, array in found.items()}, arguments.out)
    print(f"{arguments.out}: {len(found)} arrays, {' x '.join(map(str, tokens.shape))} tokens")


if __name__ == "__main__":
    main()
