"""Quantized weights in a safetensors folder: `X.codes`, `X.scales` and more in place of a tensor X.

config.json describes them under `quantization_config`, see `Model.save`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from einsum_transformer.errors import FormatError
from einsum_transformer.formats import Names, Packed, TensorInfo, TensorSource, as_rows
from einsum_transformer.formats.mapped import quoted

Array = np.ndarray

METHOD = "einsum_transformer"
"""The `quant_method` of config.json."""
DTYPE = "CODES"
"""The type of a quantized tensor (see `TensorInfo`)."""
BITS = (2, 3, 4, 8)
_PARTS = ("codes", "scales", "zeros", "divisor")


@dataclass(frozen=True, slots=True)
class _Form:
    """A quantized matrix (rows, columns), `transposed` if its tensor is (columns, rows)."""

    rows: int
    columns: int
    bits: int
    group: int
    transposed: bool

    def shapes(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        """Part -> the shapes that it can have."""
        groups = (self.rows, -(-self.columns // self.group)), (1, 1)
        codes = -(-self.columns // 2) if self.bits <= 4 else self.columns
        shapes = {"codes": ((self.rows, codes),), "scales": groups, "zeros": groups}
        return {**shapes, "divisor": ((self.columns,),)}

    def types(self) -> dict[str, tuple[str, ...]]:
        """Part -> the types that it can have."""
        codes = ("U8",) if self.bits <= 4 else ("I8",)
        return {"codes": codes, "scales": ("F32", "F16"), "zeros": ("I8",), "divisor": ("F32",)}


class CodesFolder:
    """The tensors of a folder with quantized weights, each of which is one tensor of type `DTYPE`.

    settings: `quantization_config` of config.json. Raises FormatError, before anything is read, for parts
    whose shapes or types contradict it.
    """

    def __init__(self, tensors: TensorSource, settings: Mapping[str, Any]) -> None:
        self.path: Path = tensors.path
        self._config = self.path / "config.json"
        self._tensors = tensors
        bits, weights = settings.get("activation_bits"), settings.get("weights")
        if bits not in (4, 8, 16) or not isinstance(weights, dict):
            raise FormatError(
                f"{self._config}: quantization_config: expected `activation_bits` 4, 8 or 16, and `weights`"
            )
        self._activation_bits = int(bits)
        self._forms = {name: self._form(name, given) for name, given in weights.items()}
        present = set(tensors.names())
        parts = {name: [part for part in _PARTS if f"{name}.{part}" in present] for name in self._forms}
        used = {f"{name}.{part}" for name, found in parts.items() for part in found}
        self._parts = {name: found for name, found in parts.items() if found}
        self._names = Names([*(name for name in tensors.names() if name not in used), *self._parts])

    def _form(self, name: str, given: Any) -> _Form:
        """The form of a weight, from [rows, columns, bits, group, transposed]."""
        if isinstance(given, list) and len(given) == 5 and all(isinstance(each, int) for each in given):
            rows, columns, bits, group, transposed = given
            if rows > 0 and columns > 0 and bits in BITS and group > 0 and transposed in (0, 1):
                return _Form(rows, columns, bits, group, bool(transposed))
        raise FormatError(
            f"{self._config}: quantization_config: {quoted(name)}: expected [rows, columns, bits, group, "
            "transposed]"
        )

    def names(self) -> list[str]:
        return self._names

    def info(self, name: str) -> TensorInfo:
        if name not in self._parts:
            return self._tensors.info(name)
        form, infos = (
            self._forms[name],
            {part: self._tensors.info(f"{name}.{part}") for part in self._parts[name]},
        )
        if missing := {"codes", "scales"} - infos.keys():
            raise FormatError(f"{self.path}: {quoted(f'{name}.{min(missing)}')} is missing")
        shapes, types = form.shapes(), form.types()
        for part, info in infos.items():
            expected = [list(shape) for shape in shapes[part]]
            if info.shape not in shapes[part] or info.dtype not in types[part]:
                raise FormatError(
                    f"{self.path}: {quoted(info.name)} is {info.dtype} {list(info.shape)}: config.json "
                    f"requires {' or '.join(types[part])} {' or '.join(map(str, expected))}"
                )
        if "zeros" in infos and infos["zeros"].shape != infos["scales"].shape:
            raise FormatError(f"{self.path}: the zeros and scales of {quoted(name)} have different shapes")
        shape = (form.columns, form.rows) if form.transposed else (form.rows, form.columns)
        first = infos["codes"]
        nbytes = sum(info.nbytes for info in infos.values())
        return TensorInfo(name, shape, DTYPE, nbytes, first.file, first.offset)

    def read(self, name: str) -> Array:
        packed = self.read_packed(name)
        if packed is None:
            return self._tensors.read(name)
        raise FormatError(f"{self.path}: {quoted(name)} is quantized: read its parts")

    def read_rows(self, name: str, start: int, stop: int) -> Array:
        if name not in self._parts:
            return self._tensors.read_rows(name, start, stop)
        return as_rows(self.read(name))[start:stop]

    def read_packed(self, name: str) -> Packed | None:
        if name not in self._parts:
            return self._tensors.read_packed(name)
        self.info(name)
        form = self._forms[name]
        parts = {part: self._tensors.read(f"{name}.{part}") for part in self._parts[name]}
        for part in ("scales", "divisor"):
            if part in parts and not (np.isfinite(parts[part]).all() and parts[part].all()):
                raise FormatError(f"{self.path}: {quoted(f'{name}.{part}')} contains 0, nan or inf")
        settings = {
            "bits": form.bits,
            "group": form.group,
            "activation_bits": self._activation_bits,
        }
        return Packed(DTYPE, (form.rows, form.columns), parts, settings)

    def release(self, name: str) -> None:
        if name not in self._parts:
            self._tensors.release(name)
            return
        for part in self._parts[name]:
            self._tensors.release(f"{name}.{part}")

    def close(self) -> None:
        self._tensors.close()
