"""Training: data, optimizers, the loop, checkpoints, and LoRA's targets and files."""
