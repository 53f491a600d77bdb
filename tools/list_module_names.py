"""Write tests/golden/module_names.json: the modules of each golden model that a peft adapter can target.

The names are those of `named_modules` in transformers, which can differ from the names of saved tensors. The
stacked parameters of experts are listed too.
"""

import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from golden_cases import CASES
from golden_models import build
from transformers import Conv1D, __version__

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden" / "module_names.json"
MATRICES = (torch.nn.Linear, torch.nn.Embedding, Conv1D)


def names_of(model: torch.nn.Module) -> list[str]:
    """The modules with a matrix, including routers, and the stacked parameters of experts."""
    found = [name for name, module in model.named_modules() if isinstance(module, MATRICES)]
    for name, parameter in model.named_parameters():
        module = name.removesuffix(".weight")
        if parameter.ndim > 1 and module not in found:
            found.append(module)
    return sorted(found)


def main() -> None:
    """List one golden model of each family except "deepseek", which transformers does not have."""
    cases = {case.family: name for name, case in reversed(CASES.items()) if case.family != "deepseek"}
    models = {name: names_of(build(CASES[name], 0, {})) for name in sorted(cases.values())}
    text = json.dumps({"transformers": __version__, "models": models}, indent=1)
    GOLDEN.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
