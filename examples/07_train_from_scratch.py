"""A small Shakespeare from random weights: a few minutes on two cores, then a sample.

python examples/07_train_from_scratch.py
STEPS=50 python examples/07_train_from_scratch.py
"""

import math
import os
from pathlib import Path

import einsum_transformer as et

here = Path(__file__).parent
steps = int(os.environ.get("STEPS", "500"))


def show(report):
    if report.step % 10 == 0:
        print(f"step {report.step + 1:3}  loss {report.loss:.3f}", flush=True)


# The model has no tokenizer: one with 1,024 byte-level tokens is trained on the text first.
source, text = here / "shakespeare.json", here / "shakespeare.txt"
recipe = {"optimizer": "adamw", "schedule": "cosine", "warmup_steps": 10, "clip_norm": 1.0}
training = et.train(source, text, steps=steps, **recipe, eval_every=100, on_step=show)
print("validation loss:", {step: round(loss, 3) for step, loss in training.validation.items()})

# Random weights give all tokens about the same probability, so the loss begins at log(vocabulary).
assert abs(training.losses[1] - math.log(1024)) < 0.1
assert training.validation[steps] < training.validation[0]

print(et.generate(training.model, "ROMEO\n", max_new_tokens=120, temperature=0.8, top_k=40, seed=1))
training.model.save("runs/shakespeare")  # then: etx run runs/shakespeare -p "ROMEO"
# training.plot("loss.png") draws the losses (pip install ".[plot]")
