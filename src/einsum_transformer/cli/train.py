"""`train`: change a model's weights, and show how the loss and the time went."""

from __future__ import annotations

import json as jsonlib
from typing import TYPE_CHECKING, Annotated

import typer

from einsum_transformer.cli import options
from einsum_transformer.errors import InputError

if TYPE_CHECKING:
    from einsum_transformer.checkpoint import Model
    from einsum_transformer.models.run_config import RunConfig
    from einsum_transformer.training.optimizers import SGD, AdamW

_BATCH, _LENGTH, _RATE = 4, 128, 1e-3


def train(
    model: options.Model = None,
    model_flag: options.ModelFlag = None,
    config: options.ConfigFlag = None,
    steps: Annotated[
        int, typer.Option("--steps", "--iters", metavar="N", min=1, help="Steps of training.")
    ] = 10,
    lr: Annotated[
        float | None,
        typer.Option(
            "--lr",
            "--learning-rate",
            metavar="X",
            min=0,
            help="Default: learning_rate of the config, or 0.001.",
        ),
    ] = None,
    optimizer: Annotated[str, typer.Option(metavar="sgd|adamw", help="How weights change.")] = "sgd",
    momentum: Annotated[float, typer.Option(metavar="X", help="Of sgd.")] = 0.0,
    nesterov: Annotated[bool, typer.Option("--nesterov", help="With sgd and a momentum.")] = False,
    weight_decay: Annotated[
        float | None, typer.Option(metavar="X", help="Default 0 for sgd, 0.01 for adamw.")
    ] = None,
    schedule: Annotated[
        str, typer.Option(metavar="constant|linear|cosine", help="How the learning rate goes to 0.")
    ] = "constant",
    warmup_steps: Annotated[int, typer.Option(metavar="N", min=0, help="Steps of rising learning rate.")] = 0,
    clip_norm: Annotated[
        float | None, typer.Option(metavar="X", help="Bound for the norm of all gradients together.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "-b", metavar="N", min=1, help="Rows of a step.")
    ] = None,
    seq_len: Annotated[int | None, typer.Option(metavar="N", min=1, help="Tokens of a row.")] = None,
    grad_accumulation_steps: Annotated[
        int, typer.Option(metavar="N", min=1, help="Parts a batch is computed in, one after the other.")
    ] = 1,
    grad_checkpoint: Annotated[
        bool,
        typer.Option("--grad-checkpoint", help="Less memory: blocks run again for the backward pass."),
    ] = False,
    fix_batch: Annotated[bool, typer.Option("--fix-batch", help="The same batch at every step.")] = False,
    seed: options.Seed = None,
    blas: options.Blas = "auto",
    threads: options.Threads = None,
    max_layers: options.MaxLayers = None,
    dtype: options.Dtype = None,
    assignments: options.Assignments = None,
    revision: options.Revision = None,
    offline: options.Offline = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a model on random tokens, and show how the loss and the time went.

    With --fix-batch all steps see one batch, whose loss a sound backward pass brings down. A JSON config with
    use_lora trains adapters on its lora_target_modules and leaves the rest as it is. What each step did goes
    to stderr.

    \b
    etx train --config configs/fast_lora.json --lr 0.05 --steps 10 --max-layers 4 --fix-batch --seed 42
    etx train --config configs/fast_lora.json --set use_lora=false --optimizer adamw --lr 0.001 --fix-batch
    etx train --steps 3 --seq-len 64 -b 2 --json
    """
    from einsum_transformer.engine import Recorder
    from einsum_transformer.training.data import RandomTokens
    from einsum_transformer.training.loop import Settings, Trainer
    from einsum_transformer.training.schedule import Schedule

    source = options.source_of(model, model_flag, config, assignments)
    keys = None if isinstance(source, str) else source
    rate = lr if lr is not None else keys.learning_rate if keys else _RATE
    settings = Settings(
        Schedule(rate, steps, schedule, warmup_steps),
        _optimizer(optimizer, momentum, nesterov, weight_decay),
        clip_norm,
        seed or 0,
        grad_checkpoint,
    )
    silent = quiet or json
    loaded, _ = options.open_model(
        source,
        blas=blas,
        threads=threads,
        dtype=dtype,
        quiet=True,
        max_layers=max_layers,
        seed=seed,
        revision=revision,
        offline=offline,
    )
    rows = batch_size or (keys.batch_size if keys else _BATCH)
    length = seq_len or (keys.seq_len if keys else _LENGTH)
    if length > loaded.config.max_position_embeddings:
        raise InputError(f"--seq-len {length}: the context is {loaded.config.max_position_embeddings} tokens")
    batches = RandomTokens(
        loaded.config.vocab_size, rows, length, seed or 0, fix_batch, grad_accumulation_steps
    )
    trainer = Trainer(_with_adapters(loaded, keys, seed or 0), batches, settings)
    reports = []
    with Recorder() as recorder:
        for report in trainer.run(steps):
            reports.append(report)
            if not silent:
                fault = f"  left out: {report.fault}" if report.fault else ""
                options.note(
                    f"step {report.step + 1}/{steps}  loss {report.loss:.4f}  norm {report.norm:.3g}  "
                    f"lr {report.lr:.3g}  {report.seconds:.2f} s{fault}"
                )
    from einsum_transformer.analysis.training import render, training_report

    found = training_report(
        recorder.spans,
        [report.loss for report in reports],
        [report.seconds for report in reports],
        sum(report.targets for report in reports),
        trainer.bad_steps,
        sum(array.size for array in loaded.named_parameters().values()),
        list(trainer.weights.values()),
        sum(array.nbytes for moment in trainer.compute.moments().values() for array in moment.values()),
    )
    if json:
        losses = {"losses": [report.loss for report in reports]}
        options.write(jsonlib.dumps({"model": loaded.source} | found.to_dict() | losses) + "\n")
    elif not quiet:
        terminal = options.console()
        terminal.print()
        terminal.print(render(found))


def _optimizer(name: str, momentum: float, nesterov: bool, weight_decay: float | None) -> SGD | AdamW:
    from einsum_transformer.training.optimizers import OPTIMIZERS, SGD, AdamW

    if name not in OPTIMIZERS:
        raise InputError(f"--optimizer {name!r}: choose {' or '.join(OPTIMIZERS)}")
    if name == "sgd":
        return SGD(momentum, nesterov, weight_decay or 0.0)
    if momentum or nesterov:
        raise InputError("--momentum and --nesterov belong to sgd; adamw has moments of its own")
    return AdamW() if weight_decay is None else AdamW(weight_decay=weight_decay)


def _with_adapters(model: Model, keys: RunConfig | None, seed: int) -> Model:
    """The model, with the adapters that its JSON config asks for."""
    from einsum_transformer.models.adapters import with_lora
    from einsum_transformer.models.lora_config import LoRAConfig

    if keys is None or not keys.use_lora:
        return model
    return with_lora(model, LoRAConfig(keys.lora_rank, keys.lora_alpha, keys.lora_target_modules), seed)
