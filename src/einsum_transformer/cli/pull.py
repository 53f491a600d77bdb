"""`pull`: fetch a model from the Hugging Face hub."""

from __future__ import annotations

from typing import Annotated

import typer

from einsum_transformer.cli import options, output


def pull(
    repo: Annotated[
        str,
        typer.Argument(metavar="REPO", help="A hub repository, owner/name[:FILE], or smollm2-135m."),
    ],
    revision: options.Revision = None,
    offline: options.Offline = False,
    json: options.Json = False,
) -> None:
    """Fetch a model from the hub, and print the path of its folder or file.

    Files that are in the cache are not fetched again. Weights are fetched as safetensors. From a repository
    of GGUF files, FILE selects one by its file name or its quantization. In Python: et.pull.

    \b
    etx pull HuggingFaceTB/SmolLM2-135M-Instruct
    etx pull meta-llama/Llama-3.2-1B --revision main      (HF_TOKEN or `hf auth login` for gated models)
    etx pull bartowski/Llama-3.2-1B-Instruct-GGUF:Q4_K_M
    etx run $(etx pull HuggingFaceTB/SmolLM2-135M) -p "Once upon a time"
    """
    from einsum_transformer.loading.hub import pull as call

    path = str(call(repo, revision, offline))
    output.write_line({"repo": repo, "path": path} if json else path)
