"""`explain`, `diff`, `inspect`, `parity` and `gradcheck`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from einsum_transformer.analysis import gradcheck as gradients
from einsum_transformer.analysis import inspect as inspection
from einsum_transformer.analysis import parity as activations
from einsum_transformer.analysis.compare import Comparison, compare
from einsum_transformer.analysis.explain import Program
from einsum_transformer.analysis.explain import explain as dry_run
from einsum_transformer.analysis.gradcheck import GradCheck
from einsum_transformer.analysis.inspect import Inspection
from einsum_transformer.analysis.parity import TOLERANCE, Parity, open_reference
from einsum_transformer.api.sources import AnySource, described, model_of
from einsum_transformer.arguments import checked
from einsum_transformer.errors import InputError
from einsum_transformer.loading.hub import DEFAULT_MODEL
from einsum_transformer.loading.sources import Options, find
from einsum_transformer.models.adapters import with_lora
from einsum_transformer.models.config import ModelConfig
from einsum_transformer.models.model import Model
from einsum_transformer.models.run_config import RunConfig
from einsum_transformer.notes import note


@checked
def explain(
    source: AnySource | ModelConfig = DEFAULT_MODEL,
    batch: int = 1,
    tokens: int = 128,
    backward: bool = False,
    *,
    adapter: str | Path | None = None,
    offline: bool = False,
    allow_links: bool = False,
) -> Program:
    """Return the program of a model for `batch` rows of `tokens` tokens: each equation and its cost.

    The model runs on arrays that have only a shape. Weights are not read, so models of any size work. source:
    a model, its config, or what `load` takes. backward: also the gradient equations. adapter: a folder of
    LoRA adapters to add to the model. Adapters count as in a real pass, also those that a run config trains
    (`use_lora`); frozen weights have no gradient. offline, allow_links: as in `load`.

    Returns a Program: `str()` is a table, `.steps` lists the equations, `.flops` is their sum.
    """
    found = described(source, adapter, offline, allow_links)
    if not isinstance(found, ModelConfig) and found.quantization not in (None, "none"):
        note(f"{found.source}: costs are those of the weights without quantization")
    return dry_run(found, batch, tokens, backward)


@checked
def diff(
    a: AnySource | ModelConfig,
    b: AnySource | ModelConfig,
    batch: int = 1,
    tokens: int = 128,
    *,
    offline: bool = False,
    allow_links: bool = False,
) -> Comparison:
    """Compare two models: settings, parameters, equations, FLOPs, bytes and KV cache.

    a, b: models, their configs, or what `load` takes. Only configs are read, so models of any size can be
    compared. batch, tokens: rows of a batch and tokens of a row. offline, allow_links: as in `load`. `str()`
    of the result is a set of tables.
    """
    configs = [described(source, None, offline, allow_links) for source in (a, b)]
    short = [Path(_name(source)).stem for source in (a, b)]
    names = (short[0], short[1]) if short[0] != short[1] and all(short) else ("A", "B")
    return compare(configs[0], configs[1], batch, tokens, names)


def _name(source: AnySource | ModelConfig) -> str:
    if isinstance(source, ModelConfig):
        return source.model_type
    return source.source if isinstance(source, (Model, RunConfig)) else str(source)


@checked
def inspect(
    source: str | Path | RunConfig = DEFAULT_MODEL,
    *,
    revision: str | None = None,
    offline: bool = False,
    allow_links: bool = False,
) -> Inspection:
    """List the contents of a checkpoint without loading it: tensors, types, sizes, weights of the model.

    `.used`, `.defaulted` and `.ignored` list the keys of its config. `.problems` lists every reason for which
    `load` rejects it; it is empty for a checkpoint that loads. `str()` is a set of tables. source, revision,
    offline, allow_links: as in `load`.
    """
    options = Options(revision=revision, offline=offline, allow_links=allow_links)
    return inspection.inspect(find(source, options), options)


@checked
def parity(
    source: AnySource,
    reference: str | Path,
    *,
    tokens: Any = None,
    tolerance: float = TOLERANCE,
) -> Parity:
    """Compare a model's activations with those of another program, and find the first that differs.

    source: a model, or what `load` takes. It runs on the reference's tokens; embedding, norms, the product of
    every matrix, attention, feed-forward, layers and logits are compared one by one. reference: a .npz or
    .safetensors file (or a folder with one) whose arrays are named as the checkpoint names its modules
    (`model.layers.0.self_attn.q_proj`), with `tokens` and `logits`; tools/dump_reference.py writes one from
    transformers. tokens: token ids (b, t) if the reference does not contain any. tolerance: maximum relative
    error of a step.

    `.passed` is True if no step differs; `.first_diverging` is the first step that does, or None.
    """
    dump = open_reference(Path(reference))
    return activations.parity(model_of(source), dump, tolerance, tokens)


@checked
def gradcheck(
    source: AnySource = DEFAULT_MODEL,
    tokens: Any = None,
    targets: Any = None,
    *,
    batch_size: int = 2,
    seq_len: int = 8,
    parameters: str = ".*",
    tolerance: float = 1e-6,
    grad_checkpoint: bool = False,
    seed: int = 0,
    max_layers: int | None = None,
    progress: Callable[[int, int], Any] | None = None,
) -> GradCheck:
    """Compare the gradient of every parameter with central differences of the loss, in float64.

    The directions are: all parameters at once, a random direction in each parameter, and single elements.

    source: a model loaded with dtype="float64", or any source that `load` takes; for a run config with
    `use_lora`, the adapters are checked. tokens, targets: (b, t) token ids, -100 for positions without a
    target; default: `batch_size` rows of `seq_len` random tokens. parameters: check only parameters whose
    name this regular expression is found in. tolerance: maximum relative error. grad_checkpoint: check the
    backward pass that recomputes blocks. seed: seed of random weights, tokens and directions. max_layers:
    load only the first layers. progress: called with the number of checked parameters and of all parameters.

    `.passed` is True if all agree; `.rows` lists the comparisons.
    """
    model = model_of(source, dtype="float64", max_layers=max_layers, seed=seed)
    if model.quantization is not None:
        raise InputError(
            f"{model.source}: rounded activations ({model.quantization}) have no derivative that differences "
            "could confirm: check the model without quantization"
        )
    config = model.run_config
    if config is not None and config.lora is not None and model.lora is None:
        model = with_lora(model, config.lora, seed)
    if (tokens is None) != (targets is None):
        raise InputError("`tokens` and `targets` must be given together")
    if tokens is None:
        tokens, targets = _random_rows(model.config.vocab_size, batch_size, seq_len, seed)
    tokens, targets = model.checked_pair(tokens, targets)
    return gradients.gradcheck(
        model, tokens, targets, tolerance, parameters, grad_checkpoint, seed, progress or _nothing
    )


def _random_rows(vocab_size: int, rows: int, length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return random tokens and their successors as targets; some have no target, and one row ends early."""
    if rows < 1 or length < 2:
        raise InputError(f"`batch_size` is {rows}, `seq_len` is {length}: expected at least 1 and 2")
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab_size, (rows, length + 1))
    targets = np.where(rng.random((rows, length)) < 0.2, -100, tokens[:, 1:])
    targets[-1, length // 2 :] = -100
    targets[0, 0] = tokens[0, 1]
    return tokens[:, :-1], targets


def _nothing(done: int, total: int) -> None:
    """Report no progress."""
