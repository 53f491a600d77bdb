"""`plan`: the costs and the memory of a model before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from einsum_transformer.analysis import dry_plan, rates
from einsum_transformer.analysis.plan import Plan
from einsum_transformer.api.sources import AnySource, described
from einsum_transformer.arguments import checked
from einsum_transformer.errors import InputError
from einsum_transformer.loading import libraries
from einsum_transformer.loading.hub import DEFAULT_MODEL
from einsum_transformer.models.config import ModelConfig
from einsum_transformer.models.lora_config import LoRAConfig
from einsum_transformer.models.model import Model
from einsum_transformer.models.run_config import RunConfig
from einsum_transformer.models.scheme import Quantization, cache_types
from einsum_transformer.notes import note

_MOST = 1 << 18
_MOMENTS = {"adamw": 2, "sgd": 0}


@checked
def plan(
    source: AnySource | ModelConfig = DEFAULT_MODEL,
    batch: int | None = None,
    tokens: int | None = None,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    quantization: str | None = None,
    cache_type_k: str | None = None,
    cache_type_v: str | None = None,
    lora: LoRAConfig | None = None,
    optimizer: Literal["adamw", "sgd"] = "adamw",
    recompute: bool = False,
    offline: bool = False,
    allow_links: bool = False,
) -> Plan:
    """Return the parameters, operations, bytes and memory of a model before it runs; no weights are read.

    Everything is counted in dry runs of the program on arrays that have only shapes: the prefill of `batch`
    rows of `tokens` tokens, the decode of one more token per row, and a training step on these rows.
    source: a model or config, or any source that `load` takes. batch, tokens: default those of a run config,
    else 1 and 512. dtype: of the matrices. quantization, cache_type_k, cache_type_v: as in `load`; the
    default quantization is that of a run config, which `dtype` bfloat16 and "none" ignore. lora: the adapters
    in the table of training memory; default those of a run config, else rank 8 on all matrices of the blocks.
    optimizer: "adamw" has two arrays of state per trained array, "sgd" none. recompute: recompute the
    activations of blocks in the backward pass instead of saving them.

    offline, allow_links: as in `load`.

    If `machine` has measured this machine, the seconds of each step are predicted from its rates. The times
    of other machines are lower bounds, by their data sheets. Raises InputError for sizes that are not
    possible.
    """
    found = described(source, None, offline, allow_links)
    config = found if isinstance(found, ModelConfig) else None
    run = found if isinstance(found, RunConfig) else None
    if isinstance(found, Model):
        config = found.config
    elif run is not None:
        config = run.model_config()
    assert config is not None
    rows = batch if batch is not None else run.batch_size if run is not None else 1
    length = tokens if tokens is not None else run.seq_len if run is not None else 512
    for name, value in (("batch", rows), ("tokens", length)):
        if not 1 <= value <= _MOST:
            raise InputError(f"`{name}` is {value}: expected 1 to {_MOST:,}")
    if config.learned_positions and length >= config.max_position_embeddings:
        most = config.max_position_embeddings - 1
        raise InputError(
            f"`tokens` is {length}: expected at most {most}, one less than the learned positions"
        )
    scheme = quantization if quantization is not None or run is None else run.quantization
    if run is not None and quantization is None and dtype == "bfloat16" and Quantization.of(scheme):
        note(f"{run.source}: the quantization {scheme} is not used with `dtype` bfloat16")
        scheme = None
    chosen = Quantization.of(scheme)
    if chosen is not None and dtype == "bfloat16":
        raise InputError("`dtype` bfloat16 excludes `quantization`, which stores the matrices as integers")
    adapters = lora or (run.lora if run is not None else None) or LoRAConfig(target_modules="all-linear")
    plan = dry_plan.plan(
        config,
        _name(source, config),
        rows,
        length,
        chosen,
        cache_types(cache_type_k, cache_type_v, chosen),
        dtype == "bfloat16",
        adapters,
        _MOMENTS[optimizer],
        recompute,
    )
    known = rates.stored_rates()
    return plan if known is None else rates.timed(plan, known, libraries.processor())


def _name(source: AnySource | ModelConfig, config: ModelConfig) -> str:
    if isinstance(source, (Model, RunConfig)):
        return source.source
    return str(source) if isinstance(source, (str, Path)) else config.model_type
