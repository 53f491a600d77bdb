"""Transformer language models in NumPy, where the einsum equation on the page is the code that runs."""

__version__ = "0.1.0"
