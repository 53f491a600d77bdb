"""Folders of other programs with quantized weights, as tensors of the names and shapes that a model has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from einsum_transformer.errors import FormatError
from einsum_transformer.formats import Names, Packed, TensorInfo, TensorSource
from einsum_transformer.formats.mapped import quoted
from einsum_transformer.formats.quantized_methods import METHODS, Form, Method, Read, method_name
from einsum_transformer.notes import note_once

Array = np.ndarray


class QuantizedFolder:
    """The tensors of a folder with quantized weights, in which each quantized matrix is one tensor.

    Raises FormatError, before anything is read, for tensors whose shapes or types contradict the method.
    """

    def __init__(self, tensors: TensorSource, settings: Mapping[str, Any]) -> None:
        self.path: Path = tensors.path
        self._tensors = tensors
        self.method: Method = METHODS[method_name(settings)](settings, str(self.path / "config.json"))
        suffixes = self.method.suffixes
        present = set(tensors.names())
        used: set[str] = {name for name in present if name.rpartition(".")[2] in self.method.unused}
        self._forms: dict[str, Form] = {}
        self._infos: dict[str, dict[str, TensorInfo]] = {}
        required = [part for part in suffixes if part not in self.method.optional]
        first = suffixes["scales"]
        for name in tensors.names():
            module, _, last = name.rpartition(".")
            if last != first:
                continue
            names = {part: f"{module}.{suffix}" for part, suffix in suffixes.items()}
            infos = {part: tensors.info(each) for part, each in names.items() if each in present}
            if missing := [part for part in required if part not in infos]:
                raise self.method.error(f"{quoted(names[missing[0]])} is missing, which {quoted(name)} needs")
            if not self.method.is_quantized(infos):
                continue
            weight = f"{module}.weight"
            self._infos[weight] = infos
            self._forms[weight] = self.method.form(infos, self._reader(infos))
            used |= {info.name for info in infos.values()}
        if not self._forms:
            raise self.method.error(
                f"describes {self.method.label} weights, but no tensor is quantized: remove "
                "`quantization_config` if the weights were dequantized"
            )
        if self.method.activations:
            note_once(
                f"{self.path}: activations are not quantized: products are those of the dequantized weights"
            )
        self._names = Names([*(name for name in tensors.names() if name not in used), *self._forms])

    def names(self) -> list[str]:
        return self._names

    def info(self, name: str) -> TensorInfo:
        if name not in self._forms:
            return self._tensors.info(name)
        infos = self._infos[name]
        first = next(iter(infos.values()))
        nbytes = sum(info.nbytes for info in infos.values())
        return TensorInfo(name, self._forms[name].shape, self.method.label, nbytes, first.file, first.offset)

    def read(self, name: str) -> Array:
        if name not in self._forms:
            return self._tensors.read(name)
        return self.read_rows(name, 0, self._forms[name].shape[0])

    def read_rows(self, name: str, start: int, stop: int) -> Array:
        if name not in self._forms:
            return self._tensors.read_rows(name, start, stop)
        form = self._forms[name]
        values = np.empty((stop - start, form.shape[1]), np.float32)
        form.encoding.values(self._parts(name, slice(start, stop)), values)
        return values

    def read_packed(self, name: str) -> Packed | None:
        if name not in self._forms:
            return self._tensors.read_packed(name)
        form = self._forms[name]
        return Packed(
            self.method.label, form.shape, self._parts(name, slice(0, form.shape[0])), encoding=form.encoding
        )

    def release(self, name: str) -> None:
        for info in self._infos[name].values() if name in self._infos else (None,):
            self._tensors.release(name if info is None else info.name)

    def close(self) -> None:
        self._tensors.close()

    def _parts(self, name: str, rows: slice) -> dict[str, Array]:
        parts = self.method.parts(self._forms[name], self._reader(self._infos[name]), rows)
        for part in ("scales", "biases", "factor"):
            array = parts.get(part)
            if (
                array is not None
                and array.dtype != np.uint8
                and not np.isfinite(array.astype(np.float32)).all()
            ):
                raise FormatError(f"{self.path}: the {part} of {quoted(name)} contain nan or inf")
        return parts

    def _reader(self, infos: Mapping[str, TensorInfo]) -> Read:
        """Return the function that reads the tensor of a part, or some rows of it; empty if it is absent."""

        def read(part: str, rows: slice | None) -> Array:
            if part not in infos:
                return np.empty(0, np.int32)
            whole = self._tensors.read(infos[part].name)
            return whole if rows is None else whole[rows]

        return read
