"""Transformer language models in NumPy, where the einsum equation on the page is the code that runs."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from einsum_transformer.analysis.explain import explain
    from einsum_transformer.engine.contract import einsum
    from einsum_transformer.errors import ConfigError, FormatError, InputError
    from einsum_transformer.generation.decode import Generation, generate
    from einsum_transformer.loading.load import load
    from einsum_transformer.models.model import Model
    from einsum_transformer.models.ready import available_configs
    from einsum_transformer.models.switches import (
        enable_gqa,
        enable_moe,
        enable_mqa,
        enable_prefill_decode_split,
        enable_quantization,
        enable_speculative_decoding,
        read_run_config,
    )

__all__ = [
    "ConfigError",
    "FormatError",
    "Generation",
    "InputError",
    "Model",
    "available_configs",
    "einsum",
    "enable_gqa",
    "enable_moe",
    "enable_mqa",
    "enable_prefill_decode_split",
    "enable_quantization",
    "enable_speculative_decoding",
    "explain",
    "generate",
    "load",
    "read_run_config",
]

__version__ = "0.1.0"

# OpenBLAS's worker threads wait for their next product in a busy loop, by default for 2^26 clock ticks, and
# take the processor from the threads that work on attention tiles meanwhile. It reads the variable when NumPy
# is imported, which the names above do (docs/decisions.md).
os.environ["OPENBLAS_THREAD_TIMEOUT"] = os.environ.get("OPENBLAS_THREAD_TIMEOUT", "22")

# Each name's home, imported when it is first asked for: the command line's --help needs none of them.
_HOMES = {
    "ConfigError": "errors",
    "FormatError": "errors",
    "Generation": "generation.decode",
    "InputError": "errors",
    "Model": "models.model",
    "available_configs": "models.ready",
    "einsum": "engine.contract",
    "enable_gqa": "models.switches",
    "enable_moe": "models.switches",
    "enable_mqa": "models.switches",
    "enable_prefill_decode_split": "models.switches",
    "enable_quantization": "models.switches",
    "enable_speculative_decoding": "models.switches",
    "explain": "analysis.explain",
    "generate": "generation.decode",
    "load": "loading.load",
    "read_run_config": "models.switches",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
