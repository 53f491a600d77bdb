"""Train on two Ray workers that share each batch: the same losses as in one process.

pip install ".[ray]"; python examples/09_ray.py
"""

import numpy as np

import einsum_transformer as et


def train(workers: int | None) -> et.Training:
    # Loaded each time, because a model in memory is trained in place. float64: rounding does not hide errors.
    model = et.load("fast_lora", dtype="float64", max_layers=2, seed=0)
    return et.train(model, steps=3, lr=0.1, batch_size=4, seq_len=32, workers=workers)


alone, shared = train(None), train(2)  # et.RayWorkers(2, address="auto") joins a running cluster
for step, loss in shared.losses.items():
    print(f"step {step}  two workers {loss:.12f}  one process {alone.losses[step]:.12f}")
assert np.allclose(list(shared.losses.values()), list(alone.losses.values()), rtol=1e-12)

weights = alone.model.named_parameters()
for name, weight in shared.model.named_parameters().items():
    assert np.allclose(weight, weights[name], rtol=1e-9, atol=1e-12), name
print(f"{len(weights)} weights are equal")
