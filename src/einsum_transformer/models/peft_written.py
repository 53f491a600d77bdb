"""adapter_config.json of a model, such that `peft` puts the same adapters on the same weights."""

import re
from collections.abc import Mapping
from typing import Any

from einsum_transformer.models.lora_config import LoRAConfig
from einsum_transformer.models.model import Model
from einsum_transformer.models.peft_names import adapter_module, stack_name
from einsum_transformer.notes import note


def config_dict(model: Model) -> dict[str, Any]:
    """adapter_config.json of a model: the targets are the names that the adapters really are on.

    In a model with stacked experts whatever is in a feed-forward is named as a parameter: PEFT takes
    `gate_proj` and the like in target_modules for those of the experts, also where they are a shared one's.
    """
    config = model.lora
    assert config is not None
    modules, parameters = _targets(model)
    named = {**modules, **parameters}
    ranks, alphas = _patterns(config, named)
    written = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.source,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "target_modules": _short(model, config, list(modules)) if modules else [],
        "rank_pattern": ranks | dict(config.rank_pattern),
        "alpha_pattern": alphas | dict(config.alpha_pattern),
        "bias": "none",
        "use_dora": False,
        "fan_in_fan_out": bool(model.family.transposed),
        "modules_to_save": None,
        "inference_mode": True,
    }
    if parameters:
        written["target_parameters"] = list(parameters)
        if config.lora_dropout:
            note("lora_dropout is written as 0 into the adapter's config: PEFT has none on parameters")
            written["lora_dropout"] = 0.0
    return written


def _targets(model: Model) -> tuple[dict[str, tuple[int, float]], dict[str, tuple[int, float]]]:
    """(module -> rank and scaling, parameter -> rank and scaling)."""
    leaves, family = model.adapters, model.family
    modules: dict[str, tuple[int, float]] = {}
    parameters: dict[str, tuple[int, float]] = {}
    for path, leaf in leaves.items():
        module, numbers = adapter_module(family, leaves, path), (leaf.rank, leaf.scaling)
        if leaf.stack:
            parameters[stack_name(family, leaf.stack)] = numbers
        elif family.stacked_experts and ".mlp." in path and module == family.module_name(path):
            parameters[f"{module}.weight"] = numbers
        else:
            modules[module] = numbers
    return modules, parameters


def _patterns(
    config: LoRAConfig, named: Mapping[str, tuple[int, float]]
) -> tuple[dict[str, int], dict[str, float]]:
    """The patterns without which the config would say another rank or scaling: for all names of one end
    together where they are alike."""
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, numbers in named.items():
        if config.rank_and_scaling(name) == numbers:
            continue
        end = name.removesuffix(".weight").rpartition(".")[2] + ".weight" * name.endswith(".weight")
        alike = {own for other, own in named.items() if other.endswith(f".{end}")}
        pattern = rf".*\.{re.escape(end)}" if len(alike) == 1 else re.escape(name)
        ranks[pattern], alphas[pattern] = numbers[0], _alpha(config, *numbers)
    return ranks, alphas


def _alpha(config: LoRAConfig, rank: int, scaling: float) -> float:
    """The alpha that gives this scaling, bit for bit where there is one."""
    alpha = scaling / config.scaling(rank, 1.0)
    near = (round(alpha, 6), alpha, scaling * (rank**0.5 if config.use_rslora else rank))
    return next((each for each in near if config.scaling(rank, each) == scaling), alpha)


def _short(model: Model, config: LoRAConfig, modules: list[str]) -> list[str]:
    """What says the same to PEFT: short names, or else the modules' whole ones.

    A regular expression and "all-linear" mean the same there, but depend on what else a model has; and an
    adapter that was read may be on fewer modules than its short names say (layers_to_transform).
    """
    family, leaves = model.family, model.adapters
    matrices = [
        adapter_module(family, leaves, path) for path, place in model.weights.items() if len(place.stored) > 1
    ]
    short = not isinstance(config.target_modules, str)
    if short and [module for module in matrices if config.targets(module)] == modules:
        return list(config.target_modules)
    return modules
