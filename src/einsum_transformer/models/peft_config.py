"""PEFT's adapter_config.json. Reading: every key is applied, known to have no effect, rejected, or noted.
Writing: a config with which PEFT adds the same adapters to the same weights."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from einsum_transformer.errors import ConfigError, InputError
from einsum_transformer.formats.files import read_json
from einsum_transformer.models.config import Keys, shown
from einsum_transformer.models.lora_config import LoRAConfig
from einsum_transformer.models.model import Model
from einsum_transformer.models.peft_names import adapter_module, stack_name
from einsum_transformer.notes import note

CONFIG = "adapter_config.json"

APPLIED = frozenset(
    {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "target_parameters"}
    | {"rank_pattern", "alpha_pattern"}
)
IGNORED = {
    "task_type": "the class of transformers that was adapted",
    "auto_mapping": "how to import that class",
    "base_model_name_or_path": "compared with the model (`note_base`)",
    "revision": "the revision of the base model",
    "inference_mode": "whether PEFT trains the adapter that it loads",
    "peft_version": "the version of PEFT that wrote the file",
    "fan_in_fan_out": "the layout of the base's matrices, which PEFT itself corrects by the base's class",
    "exclude_modules": "the tensors of the file determine which modules have an adapter",
    "layers_to_transform": "the tensors of the file determine which modules have an adapter",
    "layers_pattern": "the tensors of the file determine which modules have an adapter",
    "megatron_core": "the package that megatron_config is for",
    "loftq_config": "used by init_lora_weights = loftq, which is rejected",
    "eva_config": "used by the initialization of A only",
    "corda_config": "used by init_lora_weights = corda, which is rejected",
    "lora_ga_config": "used by init_lora_weights = lora_ga, which is rejected",
    "qalora_group_size": "used by use_qalora, which is rejected",
    "runtime_config": "the device that PEFT computes on",
}
"""Keys that do not change what an adapter computes, whatever their value, and why."""
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "use_dora": (),
    "lora_bias": (),
    "modules_to_save": (),
    "trainable_token_indices": (),
    "alora_invocation_tokens": (),
    "megatron_config": (),
    "use_qalora": (),
    "use_bdlora": (),
    "arrow_config": (),
    "layer_replication": (),
    "kasa_config": (),
    "monteclora_config": (),
    "ensure_weight_tying": (),
    # The other initializations (pissa, olora, corda, lora_ga, loftq) also change the base's weights.
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva", "mica"),
}
"""Keys that change what an adapter computes, unless they are null, false, empty or one of these values."""
NOTED = {"velora_config": "it compresses the activations that PEFT saves; gradients here are exact"}
"""Keys that change PEFT's training, but not what the adapter computes."""


def read_config(folder: Path) -> LoRAConfig:
    """The settings in adapter_config.json. Errors: ConfigError that names the file and the key."""
    path = folder / CONFIG
    raw = read_raw(path)
    if (kind := raw.get("peft_type")) != "LORA":
        raise ConfigError(f"{path}: peft_type is {shown(kind)}: only LORA adapters are supported")
    for key, value in raw.items():
        _check_key(path, key, value)
    targets, parameters = raw.get("target_modules"), _names(raw.get("target_parameters") or [])
    if targets is None and parameters:
        targets = []
    if not isinstance(targets, str) and (targets := _names(targets)) is None:
        found = shown(raw.get("target_modules"))
        raise ConfigError(f"{path}: target_modules is {found}: expected names or one regular expression")
    if parameters is None:
        raise ConfigError(f"{path}: target_parameters is {shown(raw['target_parameters'])}: expected names")
    keys = Keys(raw, str(path))
    try:
        return LoRAConfig(
            keys.get("r", int, 8),
            keys.get("lora_alpha", float, 8.0),
            targets,
            keys.get("lora_dropout", float, 0.0),
            keys.get("use_rslora", bool, False),
            _patterns(raw, "rank_pattern", path, int),
            _patterns(raw, "alpha_pattern", path, float),
            parameters,
        )
    except ConfigError:
        raise
    except InputError as error:
        raise ConfigError(f"{path}: {error}") from None


def read_raw(path: Path) -> dict[str, Any]:
    """The JSON object in an adapter's config."""
    return read_json(path, "the adapter's config")


def _check_key(path: Path, key: str, value: Any) -> None:
    if key in APPLIED or key in IGNORED or not value:
        return
    if key in UNSUPPORTED:
        if value not in UNSUPPORTED[key]:
            raise ConfigError(f"{path}: {key} = {shown(value)} is not supported")
    elif key in NOTED:
        note(f"{path}: {key} is ignored: {NOTED[key]}")
    elif value is True or isinstance(value, (dict, list)):
        # A key of a newer version of PEFT enables a variant of LoRA with one of these values.
        raise ConfigError(f"{path}: {key} = {shown(value)}: unknown key, which may change the adapter")
    else:
        note(f"{path}: {key} = {shown(value)}: unknown key, ignored")


def _names(value: Any) -> tuple[str, ...] | None:
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return tuple(value)
    return None


def _patterns(raw: dict[str, Any], name: str, path: Path, kind: type) -> dict[str, Any]:
    found = raw.get(name) or {}
    kinds = (int, float) if kind is float else (int,)
    if not isinstance(found, dict) or not all(type(value) in kinds for value in found.values()):
        raise ConfigError(f"{path}: {name} must map patterns to numbers")
    try:
        return {pattern: kind(value) for pattern, value in found.items()}
    except OverflowError:
        raise ConfigError(f"{path}: {name} contains a number that is too large") from None


def note_base(folder: Path, source: str) -> None:
    """Write a note if an adapter names another base model than `source`, by the last part of its name."""
    base = read_raw(folder / CONFIG).get("base_model_name_or_path")
    # The source of a model built from a config ends in "(random weights, seed 0)".
    plain = base.partition(" (random weights")[0] if isinstance(base, str) else ""
    name = plain.rstrip("/").rpartition("/")[2].lower()
    if name and name not in source.lower():
        note(f"{folder}: the adapter was trained on {shown(base)}, the model is {source}")


def config_dict(model: Model) -> dict[str, Any]:
    """The adapter_config.json of a model, whose targets are the modules that have adapters.

    In a model with stacked experts, matrices of a feed-forward are written as parameters: PEFT takes names
    such as `gate_proj` in target_modules for those of the experts, even if they belong to a shared expert.
    """
    config = model.lora
    assert config is not None
    modules, parameters = _targets(model)
    named = {**modules, **parameters}
    ranks, alphas = _patterns_written(config, named)
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
            note(
                "lora_dropout is written as 0 to the adapter's config: PEFT does not support it on parameters"
            )
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


def _patterns_written(
    config: LoRAConfig, named: Mapping[str, tuple[int, float]]
) -> tuple[dict[str, int], dict[str, float]]:
    """The patterns for adapters whose rank or scaling differs from the config's: one for all names with the
    same suffix if they have the same rank and scaling, else one per name."""
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
    """The alpha that gives this scaling, bit for bit if there is one."""
    alpha = scaling / config.scaling(rank, 1.0)
    near = (round(alpha, 6), alpha, scaling * (rank**0.5 if config.use_rslora else rank))
    return next((each for each in near if config.scaling(rank, each) == scaling), alpha)


def _short(model: Model, config: LoRAConfig, modules: list[str]) -> list[str]:
    """target_modules for PEFT: the config's short names if they match just these modules, else full names.

    Regular expressions and "all-linear" depend on the other modules of a model, and a loaded adapter may be
    on fewer modules than its short names match (layers_to_transform).
    """
    family, leaves = model.family, model.adapters
    matrices = [
        adapter_module(family, leaves, path) for path, spec in model.weights.items() if len(spec.stored) > 1
    ]
    short = not isinstance(config.target_modules, str)
    if short and [module for module in matrices if config.targets(module)] == modules:
        return list(config.target_modules)
    return modules
