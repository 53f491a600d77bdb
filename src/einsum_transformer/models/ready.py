"""The packaged configs: JSON files that are part of the package, used by name."""

import os
from importlib.resources import files
from pathlib import Path

from einsum_transformer.formats.files import parse_json
from einsum_transformer.models.run_config import RunConfig, parse_run_config

_SUFFIX = ".json"
_FOLDER = files("einsum_transformer") / "configs"


def available_configs() -> tuple[str, ...]:
    """The names of the packaged configs, sorted."""
    names = (each.name for each in _FOLDER.iterdir())
    return tuple(sorted(name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX)))


def ready_config(source: str | Path) -> RunConfig | None:
    """The packaged config of this name; None if there is no such config, or a file or folder of that name in
    the working directory."""
    name = str(source)
    if name not in available_configs() or os.path.lexists(name):
        return None
    return parse_run_config(
        parse_json(Path(name), "config", (_FOLDER / f"{name}{_SUFFIX}").read_bytes()), name
    )
