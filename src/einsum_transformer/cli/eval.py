"""`eval`: the perplexity of a model, and its divergence from another one."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import typer

from einsum_transformer.cli import options, output
from einsum_transformer.errors import InputError

METRICS = ("ppl", "kld")


def eval(
    metric: Annotated[
        str, typer.Argument(metavar="ppl|kld", show_default=False, help="Perplexity, or KL divergence.")
    ],
    *,
    named: options.NamedOrConfig,
    file: Annotated[
        str, typer.Option("--file", "-f", metavar="FILE", show_default=False, help="A text in UTF-8.")
    ] = ...,  # type: ignore[assignment]
    reference_model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="kld: what to compare with; default the same without quantization."
        ),
    ] = None,
    ctx_size: options.ChunkSize = None,
    chunks: options.Chunks = None,
    convention: Annotated[
        str,
        typer.Option(
            metavar="llamacpp|llamacpp-stride|hf-stride|gptq|lm-eval", help="Which tokens are scored."
        ),
    ] = "llamacpp",
    stride: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Tokens between chunks, for conventions with a stride."),
    ] = None,
    results: options.Results = None,
    loading: options.Loading,
    seed: options.Seed = None,
    hub: options.Hub,
    shown: options.Shown,
) -> None:
    """Evaluate a model on a text: its perplexity, or the KL divergence from another model.

    Numbers of different conventions cannot be compared; the default is llama.cpp's, which scores the second
    half of each chunk of tokens. With kld and a quantization, the reference is the same model without it. In
    Python: et.perplexity, et.divergence.

    \b
    etx eval ppl -f notes.txt
    etx eval ppl -f notes.txt --convention hf-stride --ctx-size 1024 --stride 512
    etx eval kld -f notes.txt --quantization W4A16g64 --chunks 20
    etx eval ppl -f notes.txt --results notes.jsonl
    etx eval kld small.gguf --reference-model big.gguf -f notes.txt --json
    """
    from einsum_transformer.api.evaluate import divergence, perplexity
    from einsum_transformer.models.run_config import RunConfig

    if metric not in METRICS:
        raise InputError(f"metric {metric!r}: expected {' or '.join(METRICS)}")
    if metric == "ppl" and reference_model is not None:
        raise InputError("--reference-model is for kld")
    source = named.source()
    plain = replace(
        loading,
        quantization="none",
        quantization_mode="real",
        quantization_exclude=None,
        cache_type_k=None,
        cache_type_v=None,
        dtype=None if loading.dtype == "bfloat16" else loading.dtype,
        adapter_path=loading.adapter_path if reference_model is None else None,
    )
    changed = loading.quantization not in (None, "none") or loading.cache_type_k or loading.cache_type_v
    changed = changed or loading.dtype == "bfloat16"
    if isinstance(source, RunConfig) and loading.quantization is None:
        changed = changed or source.quantization not in (None, "none")
    if metric == "kld" and reference_model is None and not changed:
        raise InputError(
            "kld compares two models: give --reference-model MODEL, or a change such as --quantization SCHEME"
        )
    path = options.text_file(file)
    progress = output.progress("chunks", shown.silent)
    which: dict[str, Any] = {
        "ctx_size": ctx_size,
        "chunks": chunks,
        "convention": convention,
        "stride": stride,
        "results": results,
    }
    model, _ = loading.open(source, hub, seed, shown.silent)
    if metric == "ppl":
        found = perplexity(model, path, progress=progress, **which)
    else:
        other = reference_model if reference_model is not None else source
        compared, _ = plain.open(other, hub, seed, shown.silent)
        found = divergence(model, compared, path, progress=progress, **which)
    output.write_line(found.to_dict() if shown.json else str(found))
