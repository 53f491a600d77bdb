"""Golden steps of torch.optim: SGD with all its options, and AdamW."""

import numpy as np
import torch

SETTINGS = {
    "sgd": (torch.optim.SGD, {}),
    "sgd_decay": (torch.optim.SGD, {"weight_decay": 0.1}),
    "sgd_momentum": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.01}),
    "sgd_nesterov": (torch.optim.SGD, {"momentum": 0.8, "nesterov": True}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.0}),
    "adamw_decay": (torch.optim.AdamW, {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}),
}
STEPS, SHAPE = 6, (5, 3)


def make_steps() -> dict[str, np.ndarray]:
    """Initial weights, gradients and learning rates; and the weights after each step of each optimizer."""
    rng = np.random.default_rng(0)
    arrays = {
        "start": rng.standard_normal(SHAPE),
        "gradients": rng.standard_normal((STEPS, *SHAPE)),
        "rates": 0.1 * np.cos(np.arange(STEPS) / STEPS),
    }
    for name, (kind, settings) in SETTINGS.items():
        w = torch.nn.Parameter(torch.tensor(arrays["start"]))
        optimizer = kind([w], lr=1.0, **settings)
        steps = []
        for gradient, rate in zip(arrays["gradients"], arrays["rates"]):
            optimizer.param_groups[0]["lr"] = rate
            w.grad = torch.tensor(gradient)
            optimizer.step()
            steps.append(w.detach().numpy().copy())
        arrays[name] = np.stack(steps)
    return arrays
