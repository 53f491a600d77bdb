"""Scores and answers of HFLM, the model class of lm-evaluation-harness for transformers.

It writes tests/golden/lm_eval.json, in an environment with torch, transformers and lm_eval 0.4.13, from the
root of the repository. The model is the default one in float32, as `Model.save` writes it:

    python -c "import einsum_transformer as et; et.load('smollm2-135m').save('FOLDER')"
    python tools/golden_lm_eval.py FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

TARGET = Path(__file__).parent.parent / "tests" / "golden" / "lm_eval.json"
TASKS = ("shakespeare_next_line", "shakespeare_scenes", "shakespeare_last_word")
MESSAGES = (
    {"role": "system", "content": "Answer with one word."},
    {"role": "user", "content": "What is the capital of France?"},
)
LONG = "The fairies dance in a ring around the old oak, and the moon looks down on them. " * 4
PAIRS = (
    ("", "Now, fair Hippolyta, our nuptial hour"),
    ("", "<|im_start|>user"),
    ("The capital of France is ", "Paris"),
    ("The capital of France is\n\n", "Paris"),
    ("<|im_start|>user\nHello<|im_end|>\n", "<|im_start|>assistant"),
    ("The capital of France is", " Paris"),
    ("The capital of France is", " London"),
    ("The capital of France is", " Paris, the city of"),
    (LONG, "Then Puck arrives."),
)
TEXTS = (LONG, "Hello", "<|im_start|>user\nHello<|im_end|>", "")
PROMPTS = (
    ("List three colors:\n1.", {"until": ["\n", "blue"], "max_gen_toks": 12}),
    ("List three colors:\n1.", {"until": "2.", "max_gen_toks": 12, "do_sample": False, "temperature": 0.7}),
    (LONG, {"until": ["."], "max_new_tokens": 8}),
    ("Hello", {"max_gen_toks": 5, "repetition_penalty": 1.3}),
)
SETTINGS = ({}, {"max_length": 32}, {"add_bos_token": True}, {"add_bos_token": False, "prefix_token_id": 0})


class Recorded:
    """In the place of the harness's cache: collects every answer."""

    def __init__(self) -> None:
        self.answers: list[Any] = []

    def add_partial(self, kind: str, args: Sequence[Any], answer: Any) -> None:
        self.answers.append({"kind": kind, "args": list(args), "answer": answer})


def requests(rows: Sequence[Any]) -> list[Any]:
    return [SimpleNamespace(args=row, task_name=None) for row in rows]


def answers(folder: str, settings: dict[str, Any]) -> list[Any]:
    """The answers to single requests, in the order of the constants."""
    lm = HFLM(pretrained=folder, dtype="float32", device="cpu", **settings)
    chat = lm.apply_chat_template(list(MESSAGES))
    prompts = [*PROMPTS, (chat, {"max_gen_toks": 8})]
    found = []
    for kind, rows in (
        ("loglikelihood", PAIRS),
        ("loglikelihood_rolling", [(text,) for text in TEXTS]),
        ("generate_until", prompts),
    ):
        # One by one: a batch of HFLM adds BOS to all texts or to none.
        results = [getattr(lm, kind)(requests([row]), disable_tqdm=True)[0] for row in rows]
        found += [{"kind": kind, "args": list(row), "answer": each} for row, each in zip(rows, results)]
    return found


def main() -> None:
    folder = sys.argv[1]
    lm = HFLM(pretrained=folder, dtype="float32", device="cpu", batch_size=1)
    lm.cache_hook = Recorded()
    manager = TaskManager(include_path="examples/tasks", include_defaults=False)
    results = lm_eval.simple_evaluate(model=lm, tasks=list(TASKS), task_manager=manager)["results"]
    scores = {
        task: {name: float(value) for name, value in results[task].items() if "," in name and value != "N/A"}
        for task in TASKS
    }
    chats = [
        {"add_generation_prompt": start, "text": lm.apply_chat_template(list(MESSAGES), start)}
        for start in (True, False)
    ]
    golden = {
        "versions": {"lm_eval": lm_eval.__version__},
        "scores": scores,
        "requests": lm.cache_hook.answers,
        "messages": MESSAGES,
        "chats": chats,
        "single": [{"settings": each, "requests": answers(folder, each)} for each in SETTINGS],
    }
    TARGET.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(scores, indent=1), f"{TARGET.name}: {TARGET.stat().st_size} bytes", sep="\n")


if __name__ == "__main__":
    main()
