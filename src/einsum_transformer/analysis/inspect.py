"""The contents of a checkpoint, without loading it: its tensors, their weights in the model, and the keys of
its config that are used, absent or ignored."""

from __future__ import annotations

import json
import re
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from einsum_transformer.arguments import checked
from einsum_transformer.errors import InputError
from einsum_transformer.loading.configs import bounded
from einsum_transformer.loading.contents import Contents, look
from einsum_transformer.loading.places import Place
from einsum_transformer.loading.sources import Options, Source, name_of
from einsum_transformer.models.builder import weights_of
from einsum_transformer.models.config import ModelConfig
from einsum_transformer.models.ready import written_keys
from einsum_transformer.models.run_config import RunConfig
from einsum_transformer.tables import columns, quantity


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a file."""

    name: str
    file: str
    dtype: str
    """In the file."""
    shape: tuple[int, ...]
    nbytes: int
    weights: tuple[str, ...]
    """What it is in the model (several, where one tensor holds many); nothing where the model has no use."""


@checked
@dataclass(frozen=True, slots=True)
class Inspection:
    """The contents of a checkpoint or a config."""

    source: str
    model_type: str | None
    config: Mapping[str, Any] | None
    """The switches that were read, None where the config cannot be read."""
    used: Mapping[str, Any]
    """Keys of the config that were read, with their values; all keys if the config cannot be read."""
    defaulted: tuple[str, ...]
    """Keys that are absent or null, so that the family's default holds."""
    ignored: tuple[str, ...]
    """Keys that were not used."""
    tensors: tuple[Tensor, ...]
    missing: tuple[str, ...]
    """Tensors that the config requires and no file contains."""
    problems: tuple[str, ...]
    """The reasons for which `load` would reject it."""
    parameters: int | None
    """Parameters of the config's model; None if the config cannot be read or the file has other layers."""

    @property
    def bytes_by_dtype(self) -> dict[str, int]:
        """Type in the files -> bytes of its tensors, the largest first."""
        found = Counter[str]()
        for tensor in self.tensors:
            found[tensor.dtype] += tensor.nbytes
        return dict(found.most_common())

    def to_dict(self) -> dict[str, Any]:
        """The facts in JSON types."""
        return asdict(self) | {"bytes_by_dtype": self.bytes_by_dtype}

    def text(self, every: bool = False) -> str:
        """The facts as text; every: one line for each tensor instead of each kind of tensor."""
        return render(self, every)

    def __str__(self) -> str:
        return render(self)


def inspect(source: Source, options: Options) -> Inspection:
    """The contents of a source; everything that `load` would reject is among the problems.

    Raises InputError if the keys of the config cannot be read.
    """
    problems: list[str] = []
    found = look(source, options, problems)
    config, tensors, places = found.config, found.tensors, found.places or {}
    stated = written_keys(source) if isinstance(source, RunConfig) else found.keys
    keys = {name: stated[name] for name in sorted(stated) if not name.startswith("//")}
    ignored, defaulted = ((), ()) if config is None else (config.ignored, config.defaulted)
    roles, missing = _roles(places), ()
    if tensors is not None:
        held = tensors.names()
        missing = tuple(name for name in roles if name not in held)
        tensors.close()
    return Inspection(
        name_of(source),
        None if config is None else config.model_type,
        None if config is None else _settings(config),
        {name: value for name, value in keys.items() if name not in {*ignored, *defaulted}},
        tuple(sorted(set(defaulted))),
        ignored,
        tuple(
            Tensor(i.name, i.file.name, i.dtype, i.shape, i.nbytes, tuple(roles.get(i.name, ())))
            for i in found.infos.values()
        ),
        missing,
        tuple(problems),
        _parameters(found),
    )


def _parameters(found: Contents) -> int | None:
    """Parameters of the model; None for a config that the file contradicts (it may be very large)."""
    if found.config is None or (found.tensors is not None and found.places is None):
        return None
    with suppress(InputError):
        return sum(prod(weight.stored) for weight in weights_of(bounded(found.config, "")))
    return None


def _roles(places: Mapping[str, Place]) -> dict[str, list[str]]:
    """Tensor -> the weights that are read from it."""
    roles: dict[str, list[str]] = {}
    for path, place in places.items():
        for name in place.shapes:
            roles.setdefault(name, []).append(path)
    return roles


def _settings(config: ModelConfig) -> dict[str, Any]:
    omitted = ("defaulted", "ignored", "training", "attention_block")
    return {name: value for name, value in asdict(config).items() if name not in omitted}


def render(found: Inspection, every: bool = False) -> str:
    """The facts as text; every: a line for each tensor, not for each kind."""
    head = f"{found.source}: {found.model_type or 'a config that cannot be read'}"
    if found.parameters is not None:
        head += f", {found.parameters:,} parameters"
    lines = [head]
    if found.tensors:
        kinds = ", ".join(f"{quantity(n, 'B')} {dtype}" for dtype, n in found.bytes_by_dtype.items())
        files = len({tensor.file for tensor in found.tensors})
        lines.append(f"{len(found.tensors)} tensors in {files} file{'s'[: files > 1]}: {kinds}")
        lines += ["", *_table(found.tensors, every)]
    settings = [f"{name} = {_short(value)}" for name, value in found.used.items()]
    read = "keys that were read" if found.config is not None else "keys in the file"
    groups = [(read, settings), ("absent or null, so at their default", found.defaulted)]
    groups.append(("keys that nothing here reads", found.ignored))
    for title, names in groups:
        if names:
            text = textwrap.wrap(", ".join(names), 96, break_long_words=False, break_on_hyphens=False)
            lines += ["", f"{title}:", *(f"  {line}" for line in text)]
    if found.problems:
        lines += ["", *(f"problem: {problem}" for problem in found.problems)]
    return "\n".join(lines)


def _table(tensors: tuple[Tensor, ...], every: bool) -> Iterator[str]:
    rows = [("tensor", "", "type", "shape", "bytes", "in the model")]
    for (name, dtype, shape, role), alike in _grouped(tensors, every).items():
        size = quantity(sum(tensor.nbytes for tensor in alike), "B")
        count = f"x {len(alike)}" if len(alike) > 1 else ""
        rows.append((name, count, dtype, " x ".join(map(str, shape)), size, role))
    yield from columns(rows, right=(1, 4))


def _short(value: Any) -> str:
    """A value of a config on a fraction of a line."""
    if isinstance(value, dict) and value:
        return "{" + ", ".join(f"{key}: {_short(each)}" for key, each in list(value.items())[:8]) + "}"
    if isinstance(value, list) and len(value) > 4:
        return f"list of {len(value)}"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _grouped(tensors: tuple[Tensor, ...], every: bool) -> dict[tuple[Any, ...], list[Tensor]]:
    """Tensors that differ by the numbers in their names alone are one line, with `*` for the numbers."""
    found: dict[tuple[Any, ...], list[Tensor]] = {}
    for tensor in tensors:
        kinds = list(dict.fromkeys(_starred(weight) for weight in tensor.weights))
        role = kinds[0].removesuffix(".weight") if kinds else "-"
        role += f" and {len(kinds) - 1} more" if len(kinds) > 1 else ""
        name = tensor.name if every else _starred(tensor.name)
        found.setdefault((name, tensor.dtype, tensor.shape, role), []).append(tensor)
    return found


def _starred(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
