"""Train LoRA adapters on one batch, merge them into the weights, and save the result.

python examples/08_lora_and_merge.py
"""

import tempfile

import numpy as np

import einsum_transformer as et

model = et.load("fast_lora", max_layers=2, seed=0)
settings = et.LoRAConfig(r=4, lora_alpha=8, target_modules="all-linear")
before = {name: weight.copy() for name, weight in model.named_parameters().items()}

# fix_batch: every step sees the same batch, so the loss falls quickly.
options = {"batch_size": 2, "seq_len": 32, "fix_batch": True}
training = et.train(model, steps=10, lr=0.01, optimizer="adamw", lora=settings, **options)
print(f"loss {training.losses[1]:.3f} -> {training.losses[10]:.3f}")
assert training.losses[10] < training.losses[1]

# Only the adapters are trained; the weights that they are on are frozen.
tuned = training.model
trained = sum(array.size for array in tuned.adapter_parameters().values())
print(f"trained: {trained:,} of {sum(weight.size for weight in before.values()):,} parameters")
after = tuned.named_parameters()
assert all(np.array_equal(weight, after[name]) for name, weight in before.items())

# W + scaling * B A in one matrix: the same logits, without the cost of the adapters.
merged = et.merge(tuned)
tokens = np.arange(16)[None]
error = np.abs(merged.model.logits(tokens) - tuned.logits(tokens)).max()
print(f"merged: {len(merged.tensors)} matrices, logits differ by {error:.1e}")
assert error < 1e-4
print(f"in bfloat16, rounding is {et.merge(tuned, dtype='bfloat16').worst.relative:.1%} of the change")
with tempfile.TemporaryDirectory() as folder:
    merged.save(folder)
    assert np.array_equal(et.load(folder).logits(tokens), merged.model.logits(tokens))
