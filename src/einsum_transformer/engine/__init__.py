"""The einsum engine: equations, how they run, and how runs are recorded."""

from einsum_transformer.engine.contract import Gradients, Leaf, einsum, is_trained, weight_grad
from einsum_transformer.engine.equation import Equation, EquationError
from einsum_transformer.engine.recorder import Recorder, phase, requested, tap, tap_gradient
from einsum_transformer.engine.shapes import ShapeArray
from einsum_transformer.engine.side_by_side import einsums

__all__ = [
    "Equation",
    "EquationError",
    "Gradients",
    "Leaf",
    "Recorder",
    "ShapeArray",
    "einsum",
    "einsums",
    "is_trained",
    "phase",
    "requested",
    "tap",
    "tap_gradient",
    "weight_grad",
]
