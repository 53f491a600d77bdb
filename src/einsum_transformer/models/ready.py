"""The packaged configs: JSON files that are part of the package, used by name."""

import os
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from einsum_transformer.arguments import checked
from einsum_transformer.formats.files import parse_json, read_json
from einsum_transformer.models.run_config import RunConfig, parse_run_config

_SUFFIX = ".json"
_FOLDER = files("einsum_transformer") / "configs"


@checked
def available_configs() -> tuple[str, ...]:
    """The names of the packaged configs, sorted."""
    names = (each.name for each in _FOLDER.iterdir())
    return tuple(sorted(name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX)))


def ready_config(source: str | Path) -> RunConfig | None:
    """The packaged config of this name; None if there is no such config, or a file or folder of that name in
    the working directory."""
    keys = _ready_keys(str(source))
    return None if keys is None else parse_run_config(keys, str(source))


def written_keys(config: RunConfig) -> dict[str, Any]:
    """The keys of a run config: those of its file, and those that differ from the default."""
    written = _ready_keys(config.source)
    if written is None:
        written = read_json(Path(config.source)) if Path(config.source).is_file() else {}
    values = {each.name: getattr(config, each.name) for each in fields(config) if each.name != "source"}
    unchanged = parse_run_config({"arch": config.arch} | written, config.source)
    keys = {"arch": config.arch} | {name: written[name] for name in values if name in written}
    return keys | {name: each for name, each in values.items() if each != getattr(unchanged, name)}


def _ready_keys(name: str) -> dict[str, Any] | None:
    """The JSON object of the packaged config called `name`, as `ready_config` selects it."""
    if name not in available_configs() or os.path.lexists(name):
        return None
    return parse_json(Path(name), "config", (_FOLDER / f"{name}{_SUFFIX}").read_bytes())
