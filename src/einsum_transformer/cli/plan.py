"""`plan`: print the costs and the memory of a model before it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from einsum_transformer.cli import options, output
from einsum_transformer.cli.flags import flag


@dataclass(frozen=True, slots=True)
class Planned:
    """How weights and cache are stored, and how the model is trained."""

    dtype: options.Dtype = None
    quantization: str | None = flag(
        metavar="SCHEME", help="Quantize the weights: W8A16, W4A16g64, ...; none: ignore that of a config."
    )
    cache_type_k: options.CacheTypeK = None
    cache_type_v: options.CacheTypeV = None
    lora_rank: int | None = flag(metavar="N", min=1, help="Rank; default 8.")
    optimizer: str = flag(default="adamw", metavar="sgd|adamw", help="The optimizer.")
    grad_checkpoint: options.GradCheckpoint = False


def plan(
    *,
    named: options.NamedOrConfig,
    batch: options.Rows = None,
    tokens: Annotated[
        int | None,
        typer.Option("--seq-len", metavar="N", min=1, help="Tokens of each row; default 512."),
    ] = None,
    planned: Planned,
    assignments: options.Assignments = None,
    offline: options.Offline = False,
    allow_links: options.AllowLinks = False,
    json: options.Json = False,
) -> None:
    """Print the parameters, operations, bytes and memory of a model before it runs.

    The program runs on arrays that have only a shape, so no weights are needed and models of any size work:
    the prefill of the rows, the decode of one more token, and a training step. The memory of training is that
    of all weights, of adapters, and of adapters on quantized weights. --set changes a key of a run config and
    shows the totals before and after. In Python: et.plan.

    \b
    etx plan                                         the default model, 1 row of 512 tokens
    etx plan llama --seq-len 8192 --dtype bfloat16
    etx plan config.json --quantization W4A16g64 --cache-type-k int8 --cache-type-v int8
    etx plan llama --set n_layers=14                 the totals before and after
    """
    from einsum_transformer.analysis.plan import totals_table
    from einsum_transformer.api.plan import plan as call
    from einsum_transformer.models.lora_config import LoRAConfig
    from einsum_transformer.tables import as_text

    settings: dict[str, Any] = {"offline": offline, "allow_links": allow_links}
    settings["dtype"] = planned.dtype or "float32"
    names = ("quantization", "cache_type_k", "cache_type_v", "optimizer")
    settings |= {name: getattr(planned, name) for name in names} | {"recompute": planned.grad_checkpoint}
    if planned.lora_rank is not None:
        settings["lora"] = LoRAConfig(r=planned.lora_rank, target_modules="all-linear")
    with output.announced("counting the tiles of attention ...", json):
        found = call(named.source(assignments), batch, tokens, **settings)
        before = call(named.source(), batch, tokens, **settings) if assignments else None
    if json:
        compared = {} if before is None else {"before": before.to_dict()}
        output.write_line(found.to_dict() | compared)
        return
    output.write_line(str(found))
    if before is not None:
        output.write_line("")
        output.write_line(as_text(totals_table([("before", before), ("after", found)])))
