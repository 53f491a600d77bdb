"""`convert`: write a model as a GGUF file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from einsum_transformer.api.sources import AnySource
from einsum_transformer.arguments import checked
from einsum_transformer.errors import InputError
from einsum_transformer.loading.configs import folder_keys
from einsum_transformer.loading.gguf_save import save_gguf
from einsum_transformer.loading.load import load
from einsum_transformer.loading.sources import Folder, Options, TensorFile, find
from einsum_transformer.models.model import Model
from einsum_transformer.models.unsupported import is_own


@checked
def convert(
    source: AnySource,
    output: str | Path,
    outtype: str = "F16",
    *,
    progress: Callable[[int, int], object] = lambda done, total: None,
    revision: str | None = None,
    offline: bool = False,
    allow_links: bool = False,
) -> Path:
    """Write a model as a GGUF file, which llama.cpp and programs based on it load.

    source: a model without adapters, or any source that `load` takes; its weights are read and converted one
    at a time. output: the path of the file. outtype: the type of the matrices: "F32", "F16", "BF16", "Q8_0"
    (8 bits and one scale per 32 elements), "Q4_0" (4 bits) or "Q4_1" (4 bits, with minimums); norms, biases
    and routers are F32. With 4 bits, embedding and output head are Q8_0. progress: called with the number
    of written tensors and their total. revision, offline, allow_links: as in `load`.

    The tokenizer and its chat template are included; those of a GGUF file are copied. Quantized weights are
    dequantized first. Returns the path. Raises InputError, before anything is written, for a model or a
    tokenizer that GGUF files cannot describe.
    """
    path = Path(output)
    if not path.parent.is_dir():
        raise InputError(f"`output` {path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise InputError(f"`output` {path}: a folder; give the name of the file, such as model.gguf")
    if isinstance(source, Model):
        model = source
    else:
        where: dict[str, Any] = {"revision": revision, "offline": offline, "allow_links": allow_links}
        found = find(source, Options(**where))
        own = isinstance(found, Folder) and is_own(folder_keys(found.path).get("quantization_config"))
        in_files = isinstance(found, (Folder, TensorFile)) and not own
        model = load(source, weight_budget=0 if in_files else None, **where)
    if path.exists() and Path(model.source).is_file() and path.samefile(model.source):
        raise InputError(f"`output` {path}: is the file of the model; choose another name")
    save_gguf(model, path, outtype, progress)
    return path
