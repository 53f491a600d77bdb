"""Loss curves of SmolLM2-135M-Instruct with an adapter, trained with torch and peft on sonnets."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from golden_smollm2 import FILE
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

STEPS, ROWS, LENGTH = 40, 2, 48
RANK, ALPHA, TARGETS = 8, 16, ["q_proj", "v_proj"]
OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.05}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.01}),
}


def initialize(model: Any) -> None:
    """Initialize adapters as the package does with seed 0: the name of a matrix seeds the stream of its A."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                path = name.removeprefix("base_model.model.model.").split(".lora_A.")[0]
                rng = np.random.default_rng([0, zlib.crc32(path.encode())])
                bound = parameter.shape[1] ** -0.5
                parameter.copy_(torch.from_numpy(rng.uniform(-bound, bound, tuple(parameter.shape))))
            elif ".lora_B." in name:
                assert not parameter.any(), "peft does not initialize B with zeros"


def batch(ids: list[int], step: int) -> torch.Tensor:
    """Consecutive rows of LENGTH + 1 tokens, which wrap around at the end of the text."""
    starts = [(step * ROWS + row) * LENGTH % (len(ids) - LENGTH) for row in range(ROWS)]
    return torch.tensor([ids[start : start + LENGTH + 1] for start in starts])


def train(folder: Path, ids: list[int], name: str) -> list[float]:
    """The loss of every step before its update."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=FILE, dtype=torch.float32, attn_implementation="eager"
    )
    settings = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules=TARGETS)
    adapted: Any = get_peft_model(model, settings)
    initialize(adapted)
    kind, options = OPTIMIZERS[name]
    optimizer = kind([parameter for parameter in adapted.parameters() if parameter.requires_grad], **options)
    losses = []
    for step in range(STEPS):
        rows = batch(ids, step)
        logits = adapted(input_ids=rows[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(round(loss.item(), 6))
    return losses


def write_curves(folder: Path, text: Path, target: Path) -> None:
    """Train with each optimizer from the same initial weights, and write the JSON file."""
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    curves = {
        name: {"options": options, "losses": train(folder, ids, name)}
        for name, (_, options) in OPTIMIZERS.items()
    }
    adapter = {"r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS}
    shape = {"steps": STEPS, "rows": ROWS, "length": LENGTH}
    contents = {"model": FILE, "text": text.name, **shape, "adapter": adapter, "ids": ids, "curves": curves}
    target.write_text(json.dumps(contents) + "\n")
    print(f"{target.name}: {target.stat().st_size} bytes")
