"""Greedy continuations of SmolLM2-135M-Instruct by transformers, in float32 on the dequantized GGUF."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n    ",
    "A heat pump moves heat from a cold place to a warm one. It does so with a fluid that evaporates at a "
    "low temperature, a compressor that raises the pressure of the vapour, a second coil in which the vapour "
    "condenses and gives its heat away, and a valve through which the fluid expands again. For every "
    "kilowatt hour of electricity, three or four kilowatt hours of heat reach the house, because most "
    "of them were in the air or in the ground already. The reason that it cannot be any number we like is",
    'She looked at him and said, "',
    "List three primary colors:\n1.",
    "In 1969, the first humans",
    "Le chat noir dort sur",
    "E = mc² means that",
    "Hello",
)
CHAT = (
    {"role": "system", "content": "You are a helpful assistant. Answer briefly."},
    {"role": "user", "content": "What is the largest planet?"},
    {"role": "assistant", "content": "Jupiter."},
    {"role": "user", "content": "And the smallest one?"},
)


def greedy(model: Any, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    """`count` greedy tokens, ignoring EOS, and the difference of each logit to the second largest one."""
    tokens, margins, cache = [], [], None
    step = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(count):
            output = model(input_ids=step, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            best = output.logits[0, -1].topk(2)
            tokens.append(int(best.indices[0]))
            margins.append(round(float(best.values[0] - best.values[1]), 5))
            step = best.indices[:1].reshape(1, 1)
    return tokens, margins


def entry(model: Any, tokenizer: Any, ids: list[int], count: int) -> dict[str, Any]:
    """The entry of one continuation in the file."""
    tokens, margins = greedy(model, ids, count)
    text = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
    return {"ids": ids, "tokens": tokens, "margins": margins, "text": text}


def write_greedy(folder: Path, target: Path) -> None:
    """Continue every prompt by 64 tokens and the conversation by 32, and write the JSON file."""
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=FILE, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    prompts = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == prompt, "decoding differs"
        prompts.append({"prompt": prompt, **entry(model, tokenizer, ids, 64)})
    rendered = tokenizer.apply_chat_template(list(CHAT), tokenize=False, add_generation_prompt=True)
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    chat = {"messages": CHAT, "rendered": rendered, **entry(model, tokenizer, ids, 32)}
    target.write_text(json.dumps({"model": FILE, "prompts": prompts, "chat": chat}, indent=1) + "\n")
    print(f"{target.name}: {target.stat().st_size} bytes")
