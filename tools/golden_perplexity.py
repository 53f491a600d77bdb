"""Perplexities of SmolLM2 as other programs compute them, for each convention.

    python tools/golden_perplexity.py --folder FOLDER --gguf FILE.gguf

writes tests/golden/perplexity.json. FOLDER: SmolLM2 as `Model.save` writes it. FILE: the same weights in F32,
because llama.cpp rounds activations to 8 bits where weights are quantized. It needs torch, transformers,
lm-eval and llama-cpp-python. The loops are those of the documentation of transformers (hf-stride) and of GPTQ
(gptq); lm-eval divides a document with its own functions; logits of llama.cpp are scored as by its program
llama-perplexity (llamacpp, llamacpp-stride).
"""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
TEXT = ROOT / "examples" / "shakespeare.txt"
CHARACTERS, SIZE, STRIDE = 1600, 128, 48


def hf_stride(model: Any, ids: Any) -> float:
    """The loop of the documentation of transformers."""
    import torch

    total, count, previous = 0.0, 0, 0
    for begin in range(0, ids.size(1), STRIDE):
        end = min(begin + SIZE, ids.size(1))
        new = end - previous
        own = ids[:, begin:end]
        targets = own.clone()
        targets[:, :-new] = -100
        with torch.no_grad():
            loss = model(own, labels=targets).loss
        valid = int((targets != -100).sum()) - targets.size(0)
        total += float(loss) * valid
        count += valid
        previous = end
        if end == ids.size(1):
            break
    return math.exp(total / count)


def gptq(model: Any, ids: Any) -> float:
    """Disjoint windows, each with the mean of its losses."""
    import torch

    losses = []
    for i in range(ids.numel() // SIZE):
        own = ids[:, i * SIZE : (i + 1) * SIZE]
        with torch.no_grad():
            logits = model(own).logits
        losses.append(float(torch.nn.functional.cross_entropy(logits[0, :-1].double(), own[0, 1:])) * SIZE)
    return math.exp(sum(losses) / (len(losses) * SIZE))


def rolling(model: Any, ids: Any, prefix: int, text: str) -> dict[str, float]:
    """loglikelihood_rolling of lm-eval, and the three numbers of its rolling tasks."""
    import torch
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    total, count = 0.0, 0
    for pair in get_rolling_token_windows(ids[0].tolist(), prefix, SIZE, 1):
        context, continuation = make_disjoint_window(pair)
        own = torch.tensor([context + continuation])
        with torch.no_grad():
            logits = model(own[:, :-1]).logits[0, -len(continuation) :].double()
        total -= float(
            torch.nn.functional.cross_entropy(logits, own[0, -len(continuation) :], reduction="sum")
        )
        count += len(continuation)
    words, nbytes = len(re.split(r"\s+", text)), len(text.encode())
    return {
        "perplexity": math.exp(-total / count),
        "word_perplexity": math.exp(-total / words),
        "bits_per_byte": -total / nbytes / math.log(2),
    }


def llama_cpp(gguf: str, text: str) -> dict[str, float]:
    """Both conventions of llama.cpp from its own logits of the same windows."""
    from llama_cpp import Llama

    found = {}
    for name, size in (("llamacpp", SIZE), ("llamacpp-stride", SIZE + STRIDE // 2)):
        model = Llama(gguf, n_ctx=size, n_batch=size, n_ubatch=size, logits_all=True, verbose=False)
        bos = model.token_bos() if model._model.add_bos_token() else None
        tokens = model.tokenize(text.encode(), add_bos=True, special=False)
        losses = []
        if name == "llamacpp":
            starts, scored = range(0, len(tokens) // size * size, size), size - 1 - size // 2
        else:
            starts, scored = range(0, len(tokens) - size, STRIDE), STRIDE
        for start in starts:
            own = list(tokens[start : start + size])
            if bos is not None:
                own[0] = bos
            model.reset()
            model.eval(own)
            logits = np.array(model.scores[: len(own)], np.float64)
            logits -= logits.max(axis=1, keepdims=True)
            log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            for j in range(size - 1 - scored, size - 1):
                losses.append(-log_p[j, own[j + 1]])
        found[name] = math.exp(float(np.mean(losses)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--gguf", required=True)
    options = parser.parse_args()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = TEXT.read_text(encoding="utf-8")[:CHARACTERS]
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32)
    ids = tokenizer(text, return_tensors="pt").input_ids
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    found = {
        "characters": CHARACTERS,
        "ctx_size": SIZE,
        "stride": STRIDE,
        "hf-stride": hf_stride(model, ids),
        "gptq": gptq(model, ids),
        "lm-eval": rolling(model, ids, prefix, text),
        **llama_cpp(options.gguf, text),
    }
    target = ROOT / "tests" / "golden" / "perplexity.json"
    target.write_text(json.dumps(found, indent=2) + "\n")
    print(target.read_text())


if __name__ == "__main__":
    main()
