"""Analyses of a recorded run or a dry run: equations, costs, gradients, activations, training."""
