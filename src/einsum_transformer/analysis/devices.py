"""Machines from data sheets: peak rates, memory bandwidth and memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from einsum_transformer.formats.files import parse_json

_FOLDER = files("einsum_transformer") / "devices"


@dataclass(frozen=True, slots=True)
class Device:
    """A machine of a data sheet."""

    name: str
    memory: int
    """Bytes."""
    bandwidth: int
    """Bytes per second."""
    flops: Mapping[str, int]
    """Type -> operations per second: "float32", "bfloat16", "int8"."""
    source: str
    """Where the numbers are from."""

    def seconds(self, flops: int, nbytes: int, dtype: str) -> tuple[float, float]:
        """Return the least seconds for operations of a type, and for bytes."""
        rate = self.flops.get(dtype, self.flops["float32"])
        return flops / rate, nbytes / self.bandwidth


@cache
def devices() -> tuple[Device, ...]:
    """Return the machines of `devices/*.json`, by memory."""
    found = [
        Device(**parse_json(Path(each.name), "device", each.read_bytes()))
        for each in _FOLDER.iterdir()
        if each.name.endswith(".json")
    ]
    return tuple(sorted(found, key=lambda device: (device.memory, device.name)))
