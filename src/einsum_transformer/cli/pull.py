"""`pull`: fetch a model from the Hugging Face hub."""

from __future__ import annotations

from typing import Annotated

import typer

from einsum_transformer.cli import options


def pull(
    repo: Annotated[
        str,
        typer.Argument(metavar="REPO", help="A hub repository, owner/name[:FILE], or smollm2-135m."),
    ],
    revision: options.Revision = None,
    offline: options.Offline = False,
    json: options.Json = False,
) -> None:
    """Fetch a model from the hub, and print where it lies.

    What is in the cache already is not fetched again. Weights are fetched as safetensors; of a repository of
    GGUF files the one that FILE names, by its file name or its quantization.

    \b
    etx pull HuggingFaceTB/SmolLM2-135M-Instruct
    etx pull meta-llama/Llama-3.2-1B --revision main      (HF_TOKEN or `hf auth login` for gated models)
    etx pull bartowski/Llama-3.2-1B-Instruct-GGUF:Q4_K_M
    etx run $(etx pull HuggingFaceTB/SmolLM2-135M) -p "Once upon a time"
    """
    from einsum_transformer.loading import hub

    path = (
        hub.default_model(offline)
        if repo.lower() == hub.DEFAULT_MODEL
        else hub.download(repo, revision, offline)
    )
    options.write_line({"repo": repo, "path": str(path)} if json else str(path))
