"""`merge`: merge a LoRA adapter into the weights, or subtract it again."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from einsum_transformer.api.sources import AnySource, model_of
from einsum_transformer.arguments import checked
from einsum_transformer.errors import InputError
from einsum_transformer.models.adapters import Merged, merged, read_merged, write_merged
from einsum_transformer.models.model import Model
from einsum_transformer.models.peft import adapter_digest, with_adapter
from einsum_transformer.models.run_config import RunConfig
from einsum_transformer.tables import as_text, terminal_table


@checked
@dataclass(frozen=True, slots=True)
class Merge:
    """A model with merged adapters, and the rounding error of each weight. `str()` is the table."""

    model: Model
    tensors: tuple[Merged, ...]
    dtype: str
    """The storage type, to which the weights are rounded."""
    adapters: tuple[str, ...]
    """The sha256 of every adapter folder that is merged into the weights."""
    folder: str | None = None
    """The folder that the model was saved in, or None."""

    @property
    def worst(self) -> Merged:
        """The weight whose rounding error is largest, relative to its change."""
        return max(self.tensors, key=lambda row: row.relative)

    def save(self, folder: str | Path) -> None:
        """Write a Hugging Face folder in the storage type, with merged_adapters.json."""
        self.model.save(folder, dtype=self.dtype)
        write_merged(Path(folder), list(self.adapters))

    def to_dict(self) -> dict[str, Any]:
        """Return source, folder and the change of each tensor in JSON types."""
        rows = [asdict(row) for row in self.tensors]
        return {"model": self.model.source, "folder": self.folder, "tensors": rows}

    def table(self) -> Any:
        """Return the weights as a rich table."""
        table = terminal_table(("weight", "rms change", "rms error", "error of change"))
        for row in self.tensors:
            table.add_row(row.name, f"{row.change:.3g}", f"{row.error:.3g}", f"{row.relative:.3%}")
        return table

    def __str__(self) -> str:
        return as_text(self.table())


@checked
def merge(
    source: AnySource,
    adapter: str | Path | None = None,
    output: str | Path | None = None,
    *,
    dtype: Literal["float32", "bfloat16", "float64"] = "float32",
    unmerge: bool = False,
    dequantize: bool = False,
    revision: str | None = None,
    offline: bool = False,
    allow_links: bool = False,
) -> Merge:
    """Merge an adapter into the weights, W + scaling * B A, and report the rounding error of each weight.

    source: a model with adapters, or a model (or any source that `load` takes) with `adapter`, the folder of
    an adapter. output: the folder to write the result to, with a record of the adapter, so that it is not
    merged twice. dtype: the storage type, to which the weights are rounded. unmerge: subtract an adapter that
    was merged; the base weights are restored up to the rounding of the storage type. dequantize: merge into
    the values of quantized weights, as floats; activations are then not rounded. revision, offline,
    allow_links: as in `load`.

    Returns a Merge: `.model` is the merged model, `.tensors` lists the weights that changed.
    """
    name = source.source if isinstance(source, (Model, RunConfig)) else str(source)
    folder = Path(name)
    if output is not None and Path(output).exists() and folder.exists() and Path(output).samefile(folder):
        raise InputError(f"`output` {output}: is the folder of the model; choose another folder")
    recorded = read_merged(folder)
    own = None if adapter is None else adapter_digest(adapter)
    if unmerge and adapter is None:
        raise InputError("`unmerge` needs `adapter`, the folder of the adapter")
    if unmerge and own not in recorded:
        raise InputError(f"{name}: {adapter} is not merged into it, so it cannot be subtracted")
    if not unmerge and own in recorded:
        raise InputError(f"{name}: {adapter} is already merged into it; `unmerge` subtracts it")
    where = {"revision": revision, "offline": offline, "allow_links": allow_links}
    model = source if isinstance(source, Model) else model_of(source, adapter=adapter, **where)
    if model is source and adapter is not None:
        model = with_adapter(model, adapter)
    whole, report = merged(model, dtype, -1 if unmerge else 1, dequantize)
    added = [own] if own is not None and not unmerge else []
    digests = [each for each in recorded if each != own] + added
    saved = None if output is None else str(output)
    found = Merge(whole, tuple(report), dtype, tuple(digests), saved)
    if output is not None:
        found.save(output)
    return found
