"""The gradient of one weight, by the hand-derived backward pass and by a central difference.

python examples/06_gradient_by_hand.py
"""

import numpy as np

import einsum_transformer as et

model = et.load("fast_lora", dtype="float64", max_layers=2, seed=0)
rng = np.random.default_rng(0)
tokens = rng.integers(0, model.config.vocab_size, (2, 16))
targets = np.roll(tokens, -1, axis=1)

loss, gradients = model.loss_and_gradients(tokens, targets)
weights = model.named_parameters()
print(f"loss {loss:.6f}, {len(gradients)} gradients")

name, index, step = "model.layers.1.self_attn.q_proj.weight", (7, 3), 1e-4
weight = weights[name]
weight[index] += step
up, _ = model.loss_and_gradients(tokens, targets)
weight[index] -= 2 * step
down, _ = model.loss_and_gradients(tokens, targets)
weight[index] += step
difference = (up - down) / (2 * step)
print(f"{name}[{index[0]}, {index[1]}]")
print(f"  backward pass      {gradients[name][index]: .12e}")
print(f"  central difference {difference: .12e}")
assert np.isclose(gradients[name][index], difference, rtol=1e-5)

# The same check for whole parameters, here the norms of a layer; without `parameters`, for all of them.
checked = et.gradcheck(model, tokens, targets, parameters="layers.1.*norm")
print(
    f"gradcheck: {len(checked.rows)} comparisons, largest error {max(row.error for row in checked.rows):.1e}"
)
assert checked.passed
