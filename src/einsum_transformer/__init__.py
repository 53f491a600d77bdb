"""Transformer language models in NumPy, where the einsum equation on the page is the code that runs."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from einsum_transformer.analysis.capture import Capture
    from einsum_transformer.analysis.compare import Comparison
    from einsum_transformer.analysis.evaluate import Divergence, Perplexity
    from einsum_transformer.analysis.explain import Program
    from einsum_transformer.analysis.gradcheck import GradCheck
    from einsum_transformer.analysis.inspect import Inspection
    from einsum_transformer.analysis.interventions import Effects
    from einsum_transformer.analysis.lens import Attribution, HeadSummary, LogitLens, NextTokens
    from einsum_transformer.analysis.machine import Machine
    from einsum_transformer.analysis.parity import Parity
    from einsum_transformer.analysis.plan import Plan
    from einsum_transformer.analysis.precision import Precision
    from einsum_transformer.analysis.profiler import Profiler
    from einsum_transformer.analysis.quantization import QuantizationReport
    from einsum_transformer.analysis.sensitivity import Sensitivity
    from einsum_transformer.analysis.sweep import Sweep
    from einsum_transformer.analysis.tasks import Evaluation
    from einsum_transformer.api.capture import capture, patch
    from einsum_transformer.api.compare import diff, explain, gradcheck, inspect, parity
    from einsum_transformer.api.convert import convert
    from einsum_transformer.api.evaluate import divergence, evaluate, perplexity
    from einsum_transformer.api.look_inside import (
        ablate_heads,
        attribute_positions,
        head_summary,
        logit_attribution,
        logit_lens,
        next_tokens,
        patch_positions,
    )
    from einsum_transformer.api.machine import machine
    from einsum_transformer.api.merge import Merge, merge
    from einsum_transformer.api.plan import plan
    from einsum_transformer.api.precision import precision
    from einsum_transformer.api.profile import Profile, profile
    from einsum_transformer.api.quantize import quantization_report, quantize
    from einsum_transformer.api.report import report
    from einsum_transformer.api.sensitivity import sensitivity
    from einsum_transformer.api.sweep import sweep
    from einsum_transformer.api.train import Training, TrainingObserver, train
    from einsum_transformer.cluster.data_parallel import RayWorkers
    from einsum_transformer.engine.contract import einsum
    from einsum_transformer.engine.recorder import Recorder
    from einsum_transformer.errors import ConfigError, FormatError, InputError
    from einsum_transformer.generation.chat import Chat, Turn
    from einsum_transformer.generation.decode import generate, stream
    from einsum_transformer.generation.options import GenerationOptions
    from einsum_transformer.generation.rows import Generation
    from einsum_transformer.loading.hub import pull
    from einsum_transformer.loading.load import load
    from einsum_transformer.models.adapters import with_lora
    from einsum_transformer.models.config import ModelConfig
    from einsum_transformer.models.lora_config import LoRAConfig
    from einsum_transformer.models.model import Model
    from einsum_transformer.models.peft import save_adapter
    from einsum_transformer.models.ready import available_configs
    from einsum_transformer.models.run_config import RunConfig
    from einsum_transformer.models.switches import (
        enable_gqa,
        enable_moe,
        enable_mqa,
        enable_prefill_decode_split,
        enable_quantization,
        enable_speculative_decoding,
        read_run_config,
    )
    from einsum_transformer.reports.data import Report
    from einsum_transformer.text.tokenizer import Tokenizer
    from einsum_transformer.training.data import RandomTokens, TextBatches
    from einsum_transformer.training.loop import StepReport, Trainer, TrainingSettings
    from einsum_transformer.training.optimizers import SGD, AdamW
    from einsum_transformer.training.schedule import Schedule

__all__ = [
    "SGD",
    "AdamW",
    "Attribution",
    "Capture",
    "Chat",
    "Comparison",
    "ConfigError",
    "Divergence",
    "Effects",
    "Evaluation",
    "FormatError",
    "Generation",
    "GenerationOptions",
    "GradCheck",
    "HeadSummary",
    "InputError",
    "Inspection",
    "LoRAConfig",
    "LogitLens",
    "Machine",
    "Merge",
    "Model",
    "ModelConfig",
    "NextTokens",
    "Parity",
    "Perplexity",
    "Plan",
    "Precision",
    "Profile",
    "Profiler",
    "Program",
    "QuantizationReport",
    "RandomTokens",
    "RayWorkers",
    "Recorder",
    "Report",
    "RunConfig",
    "Schedule",
    "Sensitivity",
    "StepReport",
    "Sweep",
    "TextBatches",
    "Tokenizer",
    "Trainer",
    "Training",
    "TrainingObserver",
    "TrainingSettings",
    "Turn",
    "ablate_heads",
    "attribute_positions",
    "available_configs",
    "capture",
    "convert",
    "diff",
    "divergence",
    "einsum",
    "enable_gqa",
    "enable_moe",
    "enable_mqa",
    "enable_prefill_decode_split",
    "enable_quantization",
    "enable_speculative_decoding",
    "evaluate",
    "explain",
    "generate",
    "gradcheck",
    "head_summary",
    "inspect",
    "load",
    "logit_attribution",
    "logit_lens",
    "machine",
    "merge",
    "next_tokens",
    "parity",
    "patch",
    "patch_positions",
    "perplexity",
    "plan",
    "precision",
    "profile",
    "pull",
    "quantization_report",
    "quantize",
    "read_run_config",
    "report",
    "save_adapter",
    "sensitivity",
    "stream",
    "sweep",
    "train",
    "with_lora",
]

__version__ = "0.1.0"

# OpenBLAS's worker threads wait for their next product in a busy loop, by default for 2^26 clock ticks, and
# take the processor from the threads that compute attention tiles. It reads the variable when NumPy is
# imported, which the names above do (docs/decisions.md).
os.environ["OPENBLAS_THREAD_TIMEOUT"] = os.environ.get("OPENBLAS_THREAD_TIMEOUT", "22")

# The module of each name, imported when it is first used: the command line's --help needs none of them.
_HOMES = {
    "AdamW": "training.optimizers",
    "Capture": "analysis.capture",
    "Chat": "generation.chat",
    "Comparison": "analysis.compare",
    "ConfigError": "errors",
    "Divergence": "analysis.evaluate",
    "Evaluation": "analysis.tasks",
    "FormatError": "errors",
    "Generation": "generation.rows",
    "GenerationOptions": "generation.options",
    "GradCheck": "analysis.gradcheck",
    "InputError": "errors",
    "Inspection": "analysis.inspect",
    "LoRAConfig": "models.lora_config",
    "Machine": "analysis.machine",
    "Merge": "api.merge",
    "Model": "models.model",
    "ModelConfig": "models.config",
    "Parity": "analysis.parity",
    "Perplexity": "analysis.evaluate",
    "Plan": "analysis.plan",
    "Precision": "analysis.precision",
    "Profile": "api.profile",
    "Profiler": "analysis.profiler",
    "QuantizationReport": "analysis.quantization",
    "Program": "analysis.explain",
    "RandomTokens": "training.data",
    "RayWorkers": "cluster.data_parallel",
    "Recorder": "engine.recorder",
    "Report": "reports.data",
    "RunConfig": "models.run_config",
    "SGD": "training.optimizers",
    "Schedule": "training.schedule",
    "Sensitivity": "analysis.sensitivity",
    "StepReport": "training.loop",
    "Sweep": "analysis.sweep",
    "TextBatches": "training.data",
    "Tokenizer": "text.tokenizer",
    "Trainer": "training.loop",
    "Training": "api.train",
    "TrainingObserver": "api.train",
    "TrainingSettings": "training.loop",
    "Turn": "generation.chat",
    "capture": "api.capture",
    "convert": "api.convert",
    "diff": "api.compare",
    "divergence": "api.evaluate",
    "available_configs": "models.ready",
    "einsum": "engine.contract",
    "enable_gqa": "models.switches",
    "enable_moe": "models.switches",
    "enable_mqa": "models.switches",
    "enable_prefill_decode_split": "models.switches",
    "enable_quantization": "models.switches",
    "enable_speculative_decoding": "models.switches",
    "evaluate": "api.evaluate",
    "explain": "api.compare",
    "generate": "generation.decode",
    "gradcheck": "api.compare",
    "inspect": "api.compare",
    "load": "loading.load",
    "machine": "api.machine",
    "merge": "api.merge",
    "parity": "api.compare",
    "patch": "api.capture",
    "perplexity": "api.evaluate",
    "plan": "api.plan",
    "precision": "api.precision",
    "profile": "api.profile",
    "pull": "loading.hub",
    "quantization_report": "api.quantize",
    "quantize": "api.quantize",
    "read_run_config": "models.switches",
    "report": "api.report",
    "save_adapter": "models.peft",
    "sensitivity": "api.sensitivity",
    "stream": "generation.decode",
    "sweep": "api.sweep",
    "train": "api.train",
    "with_lora": "models.adapters",
    "Attribution": "analysis.lens",
    "HeadSummary": "analysis.lens",
    "LogitLens": "analysis.lens",
    "NextTokens": "analysis.lens",
    "Effects": "analysis.interventions",
    "ablate_heads": "api.look_inside",
    "attribute_positions": "api.look_inside",
    "head_summary": "api.look_inside",
    "logit_attribution": "api.look_inside",
    "logit_lens": "api.look_inside",
    "next_tokens": "api.look_inside",
    "patch_positions": "api.look_inside",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
