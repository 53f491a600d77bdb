"""The choice of BLAS libraries that `etx machine` measured, stored in the user's cache folder."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from einsum_transformer.engine import blas
from einsum_transformer.engine.libraries import numpy_library
from einsum_transformer.engine.mkl import installed_version, mkl_problem
from einsum_transformer.errors import InputError
from einsum_transformer.formats.files import read_json, write_json
from einsum_transformer.notes import note_once

_MOST = 1 << 20
KEYS = frozenset(f"{kind}{ending}" for kind in blas.KINDS for ending in ("", ", 1 thread"))


def use(name: str) -> None:
    """Set the library of matrix products to `auto`, `numpy` or `mkl` (see `engine.blas.use`).

    With `auto` and two installed libraries, each kind of product uses the library that `etx machine` measured
    to be faster on this machine; without a measurement, all use NumPy's.
    """
    several = name == "auto" and installed_version() is not None
    choice = stored_choice(blas.get_threads()) if several else None
    if several and choice is None:
        note_once("MKL is installed, but not measured on this machine: not used; `etx machine` measures it")
    blas.use(name, choice)
    if choice is not None and "mkl" in choice.values() and (problem := mkl_problem()):
        note_once(f"MKL is not used: {problem}")


def use_default() -> None:
    """Call `use("auto")` if nothing was chosen before."""
    if not blas.chosen():
        use("auto")


def processor() -> str:
    """Return the name of the processor, as far as it is known."""
    facts: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            facts.setdefault(name.strip(), value.strip())
    except (OSError, ValueError):
        pass
    if "model name" not in facts:
        return platform.processor() or platform.machine()
    # Virtual machines hide the product name; family and model identify the generation.
    family = f" (family {facts['cpu family']} model {facts['model']})" if "cpu family" in facts else ""
    return facts["model name"] + family


def table_path(threads: int) -> Path:
    """Return the file of the measurement for this processor, these library versions and thread count."""
    key = f"{processor()}|{numpy_library()}|mkl {installed_version()}|{threads}"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "einsum-transformer"
    return folder / f"machine-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"


def stored_choice(threads: int) -> dict[str, str] | None:
    """Return the stored choice, or None if there is none. A file that is not valid is noted and not used."""
    path = table_path(threads)
    if not path.exists():
        return None
    try:
        choice = read_json(path, "measurement", _MOST).get("choice")
        if not isinstance(choice, dict):
            raise InputError(f"{path}: measurement without `choice`")
        if unknown := [f"{key}: {value}" for key, value in choice.items() if not _valid(key, value)]:
            raise InputError(f"{path}: unknown choice {unknown[0]:.60}")
    except InputError as error:
        note_once(f"{error}; not used")
        return None
    return {str(key): str(value) for key, value in choice.items()}


def stored_rates(threads: int) -> Mapping[str, Any] | None:
    """Return the stored rates, which are not checked, or None if there are none."""
    path = table_path(threads)
    found = read_json(path, "measurement", _MOST).get("rates") if path.exists() else None
    return found if isinstance(found, dict) else None


def _valid(key: Any, value: Any) -> bool:
    return key in KEYS and value in ("numpy", "mkl")


def store(threads: int, measurement: Mapping[str, Any]) -> Path:
    """Store a measurement and return its path."""
    path = table_path(threads)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, measurement)
    return path
