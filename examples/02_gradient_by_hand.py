"""The gradient of one weight, by the hand-derived backward pass and by a central difference.

python examples/02_gradient_by_hand.py
"""

import numpy as np

import einsum_transformer as et

model = et.load("configs/fast_lora.json", dtype="float64", max_layers=2, seed=0)
rng = np.random.default_rng(0)
tokens = rng.integers(0, model.config.vocab_size, (2, 16))
targets = np.roll(tokens, -1, axis=1)

loss, gradients = model.loss_and_gradients(tokens, targets)
weights = model.named_parameters()
print(f"loss {loss:.6f}, {len(gradients)} gradients")

name, place, step = "model.layers.1.self_attn.q_proj.weight", (7, 3), 1e-4
weight = weights[name]
weight[place] += step
up, _ = model.loss_and_gradients(tokens, targets)
weight[place] -= 2 * step
down, _ = model.loss_and_gradients(tokens, targets)
weight[place] += step
print(f"{name}[{place[0]}, {place[1]}]")
print(f"  backward pass      {gradients[name][place]: .12e}")
print(f"  central difference {(up - down) / (2 * step): .12e}")
