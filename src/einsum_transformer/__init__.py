"""Transformer language models in NumPy, where the einsum equation on the page is the code that runs."""

from einsum_transformer.analysis.explain import explain
from einsum_transformer.checkpoint import load
from einsum_transformer.engine import einsum
from einsum_transformer.errors import ConfigError, FormatError, InputError
from einsum_transformer.generation.decode import Generation, generate
from einsum_transformer.models.model import Model

__all__ = [
    "ConfigError",
    "FormatError",
    "Generation",
    "InputError",
    "Model",
    "einsum",
    "explain",
    "generate",
    "load",
]

__version__ = "0.1.0"
