"""adapter_config.json, as PEFT writes it: every key is obeyed, known to change nothing, refused, or noted."""

from pathlib import Path
from typing import Any

from einsum_transformer.errors import ConfigError, InputError
from einsum_transformer.formats.files import read_json
from einsum_transformer.models.config import Keys, shown
from einsum_transformer.models.lora_config import LoRAConfig
from einsum_transformer.notes import note

CONFIG = "adapter_config.json"

OBEYED = frozenset(
    {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "target_parameters"}
    | {"rank_pattern", "alpha_pattern"}
)
NEUTRAL = {
    "task_type": "says which class of transformers was adapted",
    "auto_mapping": "says how to find that class",
    "base_model_name_or_path": "is compared with the model (`note_base`)",
    "revision": "is the base's",
    "inference_mode": "says whether PEFT trains what it loads",
    "peft_version": "is the writer's",
    "fan_in_fan_out": "says how the base stores its matrices; PEFT itself corrects it by the base's class",
    "exclude_modules": "the tensors of the file say what has an adapter",
    "layers_to_transform": "the tensors of the file say what has an adapter",
    "layers_pattern": "the tensors of the file say what has an adapter",
    "megatron_core": "names the package that megatron_config is for",
    "loftq_config": "is for init_lora_weights = loftq, which is refused",
    "eva_config": "is for a start of A alone",
    "corda_config": "is for init_lora_weights = corda, which is refused",
    "lora_ga_config": "is for init_lora_weights = lora_ga, which is refused",
    "qalora_group_size": "is for use_qalora, which is refused",
    "runtime_config": "says where PEFT computes",
}
"""Keys that do not change what an adapter computes, whatever they hold, and why."""
REFUSED = {
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
    # The other ways to begin (pissa, olora, corda, lora_ga, loftq) change the base's weights as well.
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva", "mica"),
}
"""Keys that describe another function, unless they are null, false, empty or one of these values."""
NOTED = {"velora_config": "it compresses what PEFT keeps for the backward pass; gradients here are exact"}
"""Keys that change the training there and not what the adapter computes."""


def read_config(folder: Path) -> LoRAConfig:
    """The settings in adapter_config.json. Errors: ConfigError names the file and the key."""
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
        raise ConfigError(f"{path}: target_modules is {found}: names, or one regular expression, expected")
    if parameters is None:
        raise ConfigError(f"{path}: target_parameters is {shown(raw['target_parameters'])}: names expected")
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
    if key in OBEYED or key in NEUTRAL or not value:
        return
    if key in REFUSED:
        if value not in REFUSED[key]:
            raise ConfigError(f"{path}: {key} = {shown(value)} is not supported")
    elif key in NOTED:
        note(f"{path}: {key} is ignored: {NOTED[key]}")
    elif value is True or isinstance(value, (dict, list)):
        # What newer versions of PEFT add switches a variant on in one of these ways.
        raise ConfigError(f"{path}: {key} = {shown(value)} is not known here, and may change the adapter")
    else:
        note(f"{path}: {key} = {shown(value)} is not known here and ignored")


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
        raise ConfigError(f"{path}: {name} holds a number that is too large") from None


def note_base(folder: Path, source: str) -> None:
    """A note if an adapter names another base than the model at hand, by the last part of its name."""
    base = read_raw(folder / CONFIG).get("base_model_name_or_path")
    # A config's source ends in "(random weights, seed 0)".
    plain = base.partition(" (random weights")[0] if isinstance(base, str) else ""
    name = plain.rstrip("/").rpartition("/")[2].lower()
    if name and name not in source.lower():
        note(f"{folder}: the adapter was trained on {shown(base)}, the model is {source}")
