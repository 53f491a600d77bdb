"""Training: data, optimizers, learning rate schedules, the training loop, and checkpoints."""
