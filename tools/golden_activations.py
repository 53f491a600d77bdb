"""Write tests/golden/activations/NAME.npz: hidden states and attention patterns of the golden models.

    python tools/golden_activations.py [NAME ...]

Runs in the environment of tools/make_golden.py, after it. The tokens are those of tests/golden/NAME.npz. The
arrays are float32, rounded to 17 significant bits:

- `hidden_states` (layers + 1, b, t, d): transformers' output of that name. Index 0 is the input of the first
  layer, index i the output of layer i - 1, except that the last index is the output of the final norm.
- `last_layer` (b, t, d): the output of the last layer, before the final norm.
- `attentions` (layers, b, heads, t, t): the softmax of eager attention, [query, key], exactly 0 where masked.
"""

import argparse
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from golden_cases import CASES
from golden_models import build_golden, fewer_bits
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"
TOLERANCE = 1e-4
"""Maximum difference from the logits of the golden file, as in its tests."""


def last_layer(model: Any) -> torch.nn.Module:
    """The last decoder layer."""
    (layers,) = (part for part in model.base_model.children() if isinstance(part, torch.nn.ModuleList))
    return layers[-1]


def check_is_golden(name: str, tokens: np.ndarray, logits: np.ndarray) -> None:
    """Check that the golden file contains the same tokens and logits."""
    with np.load(GOLDEN / f"{name}.npz") as golden:
        assert np.array_equal(golden["tokens"], tokens), f"{name}: the golden file has other tokens"
        difference = float(np.abs(golden["logits"] - logits).max())
    assert difference <= TOLERANCE, f"{name}: the logits differ from the golden file by {difference:.1e}"


def make_activations(name: str) -> dict[str, np.ndarray]:
    """The arrays of one file."""
    model, _, tokens, _ = build_golden(name)
    outputs: list[torch.Tensor] = []

    def store(module: Any, inputs: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handle = last_layer(model).register_forward_hook(store)
    with torch.no_grad():
        found = model(
            input_ids=torch.from_numpy(tokens),
            use_cache=False,
            output_hidden_states=True,
            output_attentions=True,
        )
    handle.remove()
    check_is_golden(name, tokens, found.logits.numpy())
    (last,) = outputs
    arrays = {
        "hidden_states": torch.stack(found.hidden_states),
        "last_layer": last,
        "attentions": torch.stack(found.attentions),
    }
    return {key: fewer_bits(array.numpy()) for key, array in arrays.items()}


def main() -> None:
    """Write the files of the command line, by default all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="model names; default: all")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    set_verbosity_error()
    folder = GOLDEN / "activations"
    folder.mkdir(exist_ok=True)
    for name in arguments.names or CASES:
        path = folder / f"{name}.npz"
        np.savez_compressed(path, allow_pickle=False, **make_activations(name))
        print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
