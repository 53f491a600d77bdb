"""The engine: equations and how they run."""

from einsum_transformer.engine.contract import Leaf, einsum, weight_grad
from einsum_transformer.engine.equation import Equation, EquationError
from einsum_transformer.engine.recorder import Recorder, count, counting, phase, tap
from einsum_transformer.engine.shapes import ShapeArray

__all__ = [
    "Equation",
    "EquationError",
    "Leaf",
    "Recorder",
    "ShapeArray",
    "count",
    "counting",
    "einsum",
    "phase",
    "tap",
    "weight_grad",
]
