"""Recognize files and folders in unsupported formats, and explain how to convert them."""

import re
from collections.abc import Mapping
from pathlib import Path

from einsum_transformer.errors import FormatError
from einsum_transformer.formats.links import BROKEN_LINK, is_broken_link
from einsum_transformer.formats.sniff import kind_of, kind_of_bytes
from einsum_transformer.tables import first_names

PICKLES = frozenset({".pt", ".pth", ".ckpt", ".pkl"})
_HEAD = 4096
_MAX_LISTED = 8
_MAX_POINTER = 1024  # bytes; the Git LFS specification
_PICKLE = (
    "pickle checkpoints are not supported, because unpickling runs code from the file; convert it to "
    "safetensors first (transformers: save_pretrained(..., safe_serialization=True))"
)
_UNPACK = "a file compressed with {0}: unpack it first"
_KINDS = {
    "empty": "the file is empty: download it again",
    "Git LFS pointer": "a Git LFS pointer, not the file itself: run `git lfs pull` in its folder",
    "GGML": "a GGML file (older than GGUF): convert it with llama.cpp's convert_llama_ggml_to_gguf.py",
    "pickle": _PICKLE,
    "HDF5": "an HDF5 file of TensorFlow or Keras: convert it with transformers (from_tf=True) to safetensors",
    "npy": "a NumPy array, not a model",
    "HTML": "a web page, not the file itself: the download needs a login, or the URL points to a web page",
    "GGUF": "a GGUF file: pass it as the model",
    "safetensors": "a safetensors file",
    "JSON": "a JSON file, not weights",
    "text": "a text file",
    **{kind: _UNPACK.format(kind) for kind in ("gzip", "bzip2", "xz", "zstd", "7-Zip", "zip")},
    **{kind: f"a {kind} file, not a model" for kind in ("Parquet", "Arrow", "SQLite", "PDF", "PNG", "ELF")},
}


def named(kind: str, head: bytes = b"") -> str:
    """Describe a kind of `sniff` and what to do about it; "" for "binary", which may be anything."""
    if kind == "text" and re.match(rb"\s*<(!doctype|html|\?xml)", head, re.IGNORECASE):
        kind = "HTML"
    if kind == "zip" and b"data.pkl" in head:
        kind = "pickle"  # what torch.save writes
    if kind == "zip" and b".npy" in head:
        return "an archive of NumPy arrays: convert it to safetensors first"
    return _KINDS.get(kind, "")


def not_text(data: bytes) -> str:
    """Describe bytes that were given as text but are not text, and what to do; "" if they may be text.

    A Git LFS pointer is itself text; any other kind must contain bytes that are invalid in text, so that text
    may begin with the magic letters of a format.
    """
    kind, head = kind_of_bytes(data[:_HEAD], len(data)), data[:_HEAD]
    if kind == "Git LFS pointer":
        return named(kind) if len(data) < _MAX_POINTER else ""
    if kind in ("text", "JSON", "empty") or not (b"\x00" in data or _undecodable(data)):
        return ""
    return named(kind, head).replace(", not a model", ", not text")


def _undecodable(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return True
    return False


def instead(data: bytes, size: int, expected: str) -> str:
    """Return `it is ...` for the first bytes of a file that is not of the `expected` kind, "" if unknown."""
    kind = kind_of_bytes(data[:_HEAD], size)
    words = "" if kind == expected else named(kind, data[:_HEAD])
    return f"it is {words}" if words and kind != "empty" else words


def check_kind(path: Path, *expected: str) -> None:
    """Raise FormatError that describes a file if it is recognized as a kind other than `expected`."""
    kind = kind_of(path)
    if kind not in expected and (words := named(kind)):
        raise FormatError(f"{path}: {words}")


def is_pickle(path: Path) -> bool:
    """Return whether a file is a pickle according to its name, without opening it."""
    return path.suffix.lower() in PICKLES or path.name.lower().startswith("pytorch_model")


def pickle_refused(path: Path) -> FormatError:
    return FormatError(f"{path}: {_PICKLE}")


def is_piece(path: Path) -> bool:
    """Return whether a name denotes a piece of a GGUF file that was split by bytes, not by tensors."""
    return re.search(r"\.gguf([.-]split-[a-z]+|\.part\d+of\d+)$", path.name) is not None


def file_refused(path: Path) -> FormatError:
    """Return the error for a file that is neither safetensors nor GGUF."""
    if is_piece(path):
        return FormatError(f"{path}: a piece of a GGUF file: join all pieces into one file with `cat`")
    with path.open("rb") as file:
        words = named(kind_of(path), file.read(_HEAD))
    expected = "not a .safetensors file, a .gguf file or a checkpoint folder"
    return FormatError(f"{path}: {expected}{words and f': {words}'}")


def folder_refused(folder: Path, missing: str) -> FormatError:
    """Return the error for a folder without weights or without a config; it describes the folder's contents.

    missing: the description of the missing files, used if the folder's kind is unknown.
    """
    words = kind_of_folder(folder)
    if not any(folder.iterdir()):
        missing += " (the folder is empty)"
    return FormatError(f"{folder}: {words}" if words else f"{folder}: {missing}")


def kind_of_folder(folder: Path) -> str:
    """Describe a folder by the names of its files, and what to do; "" if its kind is unknown."""
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if not names:
        return ""
    if links := [name for name in names if re.fullmatch(_WANTED, name) and is_broken_link(folder / name)]:
        return f"{links[0]}: {BROKEN_LINK}"
    if pickles := [name for name in names if re.fullmatch(r"pytorch_model[.-].*", name)]:
        return f"{pickles[0]}: {_PICKLE}"  # first, since repositories contain several formats
    for is_it, words in _FOLDERS.items():
        if any(re.fullmatch(is_it, name) for name in names):
            return words
    pickles = [name for name in names if is_pickle(folder / name) or name.endswith(".bin")]
    if pickles:
        return f"{pickles[0]}: {_PICKLE}"
    if packed := [name for name in names if re.fullmatch(rf"({_WANTED})\.(gz|bz2|xz|zst|zip|7z)", name)]:
        return f"{packed[0]}: {_UNPACK.format(packed[0].rpartition('.')[2])}"
    for look in (_stray_weights, _models_inside):
        if words := look(folder, names):
            return words
    return ""


_WANTED = r".*\.safetensors(\.index\.json)?|.*\.gguf|config\.json"
_MISTRAL = "Mistral's own format (consolidated weights, params.json)"
_FOLDERS: Mapping[str, str] = {
    r"model_index\.json": "a diffusers pipeline, not a language model",
    r"consolidated.*\.safetensors": f"{_MISTRAL}: use the same model's Hugging Face format",
    r"consolidated.*\.pth": "Meta's original format (consolidated.*.pth, params.json): use the same model's "
    "Hugging Face repository, or transformers' convert_llama_weights_to_hf.py",
    r"weights(\.\d+)?\.npz": "an old MLX model (weights.npz): use the original model, or convert it again",
    r"tf_model.*\.h5|saved_model\.pb|.*\.ckpt\.(index|meta|data-.*)": "a TensorFlow model: convert it with "
    "transformers (from_tf=True) to safetensors",
    r"flax_model.*\.msgpack(\.index\.json)?": "a Flax model: convert it with transformers (from_flax=True) "
    "to safetensors",
    r".*\.distcp|pytorch_model_fsdp(_\d+)?": "a sharded PyTorch (FSDP) checkpoint: merge it with `accelerate "
    "merge-weights`",
    r"zero_to_fp32\.py|global_step\d+|mp_rank_\d+_model_states\.pt": "a DeepSpeed checkpoint: convert it "
    "with `python zero_to_fp32.py . OUT --safe_serialization`",
    r"latest_checkpointed_iteration\.txt|iter_\d+|mp_rank_\d+(_\d+)?": "a Megatron-LM checkpoint: convert it "
    "to the Hugging Face format first",
    r"model_weights\.ckpt|.*\.nemo|model_config\.yaml": "a NeMo model: convert it to the Hugging Face format "
    "first",
    r".*\.engine|.*\.plan|rank\d+\.safetensors": "a TensorRT-LLM model: use the original model",
    r"openvino_.*\.(xml|bin)": "an OpenVINO model: use the original model",
    r".*\.onnx(\.data|_data)?": "an ONNX model: use the original model",
    r".*\.(mlmodelc|mlpackage)": "a Core ML model: use the original model",
    r"(source_|shared_)?vocabulary\.(json|txt)": "a CTranslate2 model: use the original model",
    r"adapter_model\.(safetensors|bin)|adapters\.safetensors": "an adapter, not a model: pass the base model "
    "and give the adapter as `adapter`",
    r"modules\.json|config_sentence_transformers\.json": "a sentence-transformers model, which computes "
    "embeddings, not text",
}
"""Pattern of a file name -> description of a folder that contains such a file."""


def _stray_weights(folder: Path, names: list[str]) -> str:
    """Describe weight files whose names are neither standard nor listed in an index."""
    stray = [name for name in names if name.endswith(".safetensors")]
    if any(re.search(r"-\d+-of-\d+\.safetensors$", name) for name in stray):
        return (
            f"contains shards such as {stray[0]}, but no model.safetensors.index.json to list their tensors"
        )
    if len(stray) == 1 and "model.safetensors" not in stray:
        return f"contains {stray[0]}, not model.safetensors: rename it if these are the model's weights"
    return ""


def _models_inside(folder: Path, names: list[str]) -> str:
    """Describe subfolders that contain models: checkpoints of a training run, a collection, a hub cache."""
    paths = [*(folder / name for name in names)]
    if (snapshots := folder / "snapshots").is_dir():
        paths = sorted(snapshots.iterdir())
    found = [str(path.relative_to(folder)) for path in paths if path.is_dir() and _contains_model(path)]
    if not found:
        return ""
    return f"contains no model, but its subfolders do: choose one of {first_names(found, _MAX_LISTED)}"


def _contains_model(folder: Path) -> bool:
    return (folder / "config.json").exists() or any(folder.glob("*.gguf"))
