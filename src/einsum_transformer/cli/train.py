"""`train`: change a model's weights, and show how the loss and the time went."""

from __future__ import annotations

import json as jsonlib
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from einsum_transformer.cli import options
from einsum_transformer.cli.training_data import count_of
from einsum_transformer.errors import InputError
from einsum_transformer.notes import note

if TYPE_CHECKING:
    from einsum_transformer.models.model import Model
    from einsum_transformer.models.run_config import RunConfig
    from einsum_transformer.training.data import RandomTokens, TextBatches
    from einsum_transformer.training.optimizers import SGD, AdamW
    from einsum_transformer.training.schedule import Schedule

_BATCH, _LENGTH, _RATE = 4, 128, 1e-3


def train(
    model: options.Model = None,
    model_flag: options.ModelFlag = None,
    config: options.ConfigFlag = None,
    data: Annotated[
        str | None, typer.Option(metavar="FILE", help="Text, or JSON records of text, prompts or messages.")
    ] = None,
    valid: Annotated[str | None, typer.Option(metavar="FILE", help="Data to validate with.")] = None,
    valid_share: Annotated[
        float | None,
        typer.Option(metavar="X", help="Without --valid, the part of --data that is held out; default 0.05."),
    ] = None,
    mask_prompt: Annotated[bool, typer.Option("--mask-prompt", help="Learn the answers only.")] = False,
    pad: Annotated[bool, typer.Option("--pad", help="A row for each example, not packed ones.")] = False,
    long: Annotated[
        str, typer.Option(metavar="split|refuse", help="What becomes of examples longer than a row.")
    ] = "split",
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
    decay_matrices_only: Annotated[
        bool, typer.Option("--decay-matrices-only", help="No weight decay of norms and biases.")
    ] = False,
    beta1: Annotated[
        float | None, typer.Option("--beta1", "--adam-beta1", metavar="X", help="Of adamw; default 0.9.")
    ] = None,
    beta2: Annotated[
        float | None, typer.Option("--beta2", "--adam-beta2", metavar="X", help="Of adamw; default 0.999.")
    ] = None,
    eps: Annotated[
        float | None, typer.Option("--eps", "--adam-epsilon", metavar="X", help="Of adamw; default 1e-8.")
    ] = None,
    schedule: Annotated[
        str, typer.Option(metavar="constant|linear|cosine", help="How the learning rate goes to --min-lr.")
    ] = "constant",
    min_lr: Annotated[
        float | None,
        typer.Option(metavar="X", min=0, help="Where linear and cosine schedules end; default 0."),
    ] = None,
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
    lora: Annotated[
        bool, typer.Option("--lora", help="Train adapters; all weights stay as they are.")
    ] = False,
    lora_rank: Annotated[int | None, typer.Option(metavar="N", min=1, help="Default 8.")] = None,
    lora_alpha: Annotated[float | None, typer.Option(metavar="X", help="Default 16.")] = None,
    lora_dropout: Annotated[
        float | None, typer.Option(metavar="P", help="Of the adapters' inputs; default 0.")
    ] = None,
    lora_targets: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="q_proj,v_proj (default), all-linear, or a regular expression."),
    ] = None,
    rslora: Annotated[bool, typer.Option("--rslora", help="Scale by alpha / sqrt(rank).")] = False,
    merge: Annotated[
        bool,
        typer.Option("--merge", help="At the end also write --output/merged, the adapters in the weights."),
    ] = False,
    adapter_path: options.AdapterPath = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="FOLDER", help="Keep the result and checkpoints here."),
    ] = None,
    save_every: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="A checkpoint in --output every N steps.")
    ] = None,
    keep_last: Annotated[
        int, typer.Option(metavar="N", min=1, help="Checkpoints that stay; older ones are removed.")
    ] = 2,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in --output.")
    ] = False,
    eval_every: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Validate every N steps, not only at both ends.")
    ] = None,
    plot: Annotated[str | None, typer.Option(metavar="FILE.png", help="Draw the loss curve.")] = None,
    ray_workers: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Divide each batch over N Ray workers; threads are divided too."
        ),
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Of a Ray cluster; default: start one here.")
    ] = None,
    shard_optimizer: Annotated[
        bool, typer.Option("--shard-optimizer", help="Divide the optimizer's state over the workers too.")
    ] = False,
    worker_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="The longest that a worker's answer may take.")
    ] = 600.0,
    seed: options.Seed = None,
    blas: options.Blas = "auto",
    threads: options.Threads = None,
    max_layers: options.MaxLayers = None,
    dtype: options.Dtype = None,
    assignments: options.Assignments = None,
    revision: options.Revision = None,
    offline: options.Offline = False,
    allow_links: options.AllowLinks = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a model on text, or on random tokens, and show how the loss and the time went.

    Without --data all tokens are random; with --fix-batch all steps see one batch, whose loss a sound
    backward pass brings down. --lora, or a JSON config with use_lora, trains adapters and leaves the rest
    as it is. A JSON config has no tokenizer: --data then trains one of vocab_size tokens first.

    The log and metrics.jsonl are in --output, or in a new folder under runs/. With --output a checkpoint of
    the last step is kept: a model folder, or with adapters a PEFT folder, beside the optimizer's state.

    \b
    etx train --config configs/fast_lora.json --lr 0.05 --steps 10 --max-layers 4 --fix-batch --seed 42
    etx train --lora --data notes.txt --optimizer adamw --lr 2e-4 --steps 100 -o my-run --save-every 20
    etx train --lora --data chats.jsonl --mask-prompt --pad --steps 100 -o my-run --resume
    etx run --adapter-path my-run/step-00000100 -p "Once upon a time"
    """
    from einsum_transformer.analysis.training import check_plot
    from einsum_transformer.cli.training_data import Text, batches_of
    from einsum_transformer.cli.training_run import TrainingRun, show
    from einsum_transformer.generation.context import check_length
    from einsum_transformer.training.journal import Journal
    from einsum_transformer.training.loop import Settings, Trainer

    source = options.source_of(model, model_flag, config, assignments)
    keys = None if isinstance(source, str) else source
    rate = lr if lr is not None else keys.learning_rate if keys else _RATE
    settings = Settings(
        _schedule(rate, steps, schedule, warmup_steps, min_lr),
        _optimizer(
            optimizer,
            momentum,
            nesterov,
            weight_decay,
            decay_matrices_only,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
        ),
        clip_norm,
        seed or 0,
        grad_checkpoint,
    )
    if output is None and (resume or save_every):
        raise InputError("--resume and --save-every need --output, the folder that checkpoints are in")
    merge = merge or bool(keys and keys.use_lora and keys.lora_merge_after_training)
    if merge and output is None:
        raise InputError("merging after training needs --output, the folder that the model goes to")
    if long not in ("split", "refuse"):
        raise InputError(f"--long {long!r}: choose split or refuse")
    if plot is not None:
        check_plot(plot)
        if Path(plot).suffix.lower() != ".png":
            raise InputError(
                f"--plot {plot}: a PNG image is written, so a name that ends in .png is expected"
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
        allow_links=allow_links,
        adapter=adapter_path,
    )
    rows = batch_size or (keys.batch_size if keys else _BATCH)
    length = seq_len or (keys.seq_len if keys else _LENGTH)
    check_length(loaded.config, length, "--seq-len", strict=keys is not None)  # it says max_seq_len itself
    text = Text(data, valid, valid_share, mask_prompt, not pad, long == "split", output if resume else None)
    loaded, batches, validation = batches_of(
        loaded, text, rows, length, seed or 0, fix_batch, grad_accumulation_steps
    )
    if eval_every and validation is None:
        note("--eval-every: there is nothing to validate with")
    compute = _compute(ray_workers, ray_address, threads, worker_timeout, shard_optimizer, batches)
    adapters = _Adapters(lora, lora_rank, lora_alpha, lora_dropout, lora_targets, rslora)
    adapted = _with_adapters(loaded, keys, adapters, seed or 0)
    if merge and adapted.lora is None:
        raise InputError("--merge: there is no adapter to merge; train one with --lora or --adapter-path")
    folder = Path(output or _new_folder(loaded.source))
    with Journal(folder, resume) as journal, ExitStack() as stack:
        trainer = Trainer(adapted, batches, settings, compute)
        stack.callback(trainer.compute.close)
        run = TrainingRun(trainer, journal, steps, validation, rows, silent, stack)
        run.begin(resume)
        run.train(save_every if output else None, keep_last, eval_every)
        if output is not None:
            run.save(keep_last)
        if merge and output is not None:
            run.merge(folder / "merged")
        found = run.report(loaded, None if data or fix_batch else loaded.config.vocab_size)
        if plot is not None:
            run.plot(plot)
    if json:
        curves = {"losses": list(run.losses.values()), "validation": run.validated, "folder": str(folder)}
        options.write(jsonlib.dumps({"model": loaded.source} | found.to_dict() | curves) + "\n")
    elif not quiet:
        show(found, run, folder, output is not None)


@dataclass(frozen=True, slots=True)
class _Adapters:
    wanted: bool
    rank: int | None
    alpha: float | None
    dropout: float | None
    targets: str | None
    rslora: bool


def _new_folder(source: str) -> str:
    name = Path(source.split(" (")[0]).stem
    first = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder, number = first, 1
    while folder.exists():
        number += 1
        folder = first.with_name(f"{first.name}-{number}")
    return str(folder)


def _compute(
    workers: int | None,
    address: str | None,
    threads: int | None,
    timeout: float,
    shard: bool,
    batches: RandomTokens | TextBatches,
) -> Any:
    """Who computes: this process, or workers of a Ray cluster."""
    from einsum_transformer.training.loop import Local

    if workers is None:
        for flag, given in (("--ray-address", address), ("--shard-optimizer", shard)):
            if given:
                raise InputError(f"{flag} needs --ray-workers, their number")
        return Local
    from einsum_transformer.cluster.data_parallel import check_rows, data_parallel
    from einsum_transformer.training.data import TextBatches

    if isinstance(batches, TextBatches) and workers > len(batches.rows):
        raise InputError(
            f"{count_of(len(batches.rows), 'row')} cannot be divided over {workers} Ray workers, and "
            "the data gives no more: use fewer workers, more data, or shorter rows (--seq-len)"
        )
    # Before Ray starts, which takes its time.
    check_rows(batches.batch_size // batches.accumulation, workers)
    return data_parallel(workers, address, threads, timeout, shard)


def _schedule(lr: float, steps: int, shape: str, warmup_steps: int, min_lr: float | None) -> Schedule:
    from einsum_transformer.training.schedule import Schedule

    if min_lr is not None and shape == "constant":
        raise InputError("--min-lr is where a schedule ends: choose --schedule cosine or linear")
    if min_lr is not None and min_lr > lr:
        raise InputError(f"--min-lr {min_lr}: more than the learning rate, {lr}")
    return Schedule(lr, steps, shape, warmup_steps, min_lr or 0.0)


def _optimizer(
    name: str,
    momentum: float,
    nesterov: bool,
    weight_decay: float | None,
    matrices_only: bool,
    **of_adam: float | None,
) -> SGD | AdamW:
    from einsum_transformer.training.optimizers import OPTIMIZERS, SGD, AdamW

    if name not in OPTIMIZERS:
        raise InputError(f"--optimizer {name!r}: choose {' or '.join(OPTIMIZERS)}")
    given = {key: value for key, value in of_adam.items() if value is not None}
    if name == "sgd" and given:
        raise InputError(f"--{next(iter(given))} belongs to adamw; sgd has --momentum")
    if matrices_only and not (name == "adamw" if weight_decay is None else weight_decay):
        raise InputError("--decay-matrices-only says what --weight-decay holds for, but that is 0")
    if name == "sgd":
        return SGD(momentum, nesterov, weight_decay or 0.0, matrices_only)
    if momentum or nesterov:
        raise InputError("--momentum and --nesterov belong to sgd; adamw has moments of its own")
    if given.get("eps") == 0:
        note("--eps 0: a weight with gradients of 0 alone becomes nan; 1e-8 is usual")
    if weight_decay is not None:
        given["weight_decay"] = weight_decay
    return AdamW(decay_matrices_only=matrices_only, **given)


def _with_adapters(model: Model, keys: RunConfig | None, flags: _Adapters, seed: int) -> Model:
    """The model, with the adapters that flags or its JSON config ask for."""
    from einsum_transformer.models.adapters import with_lora
    from einsum_transformer.models.lora_config import ALL_LINEAR, LoRAConfig

    values = (flags.rank, flags.alpha, flags.targets, flags.dropout)
    given = flags.wanted or flags.rslora or any(value is not None for value in values)
    if model.lora is not None:
        if given:
            raise InputError("--adapter-path says what the adapter is; --lora and its flags begin a new one")
        return model
    if not given and not (keys and keys.use_lora):
        return model
    if not flags.wanted and not (keys and keys.use_lora):
        raise InputError("flags of LoRA were given without --lora")
    rank, alpha = (keys.lora_rank, keys.lora_alpha) if keys else (8, 16.0)
    targets: str | tuple[str, ...] = keys.lora_target_modules if keys else ("q_proj", "v_proj")
    if flags.targets is not None:
        plain = all(
            part.strip().replace("_", "").replace(".", "").isalnum() for part in flags.targets.split(",")
        )
        names = tuple(part.strip() for part in flags.targets.split(","))
        if not all(names):
            raise InputError(f"--lora-targets {flags.targets!r}: names with commas between them are expected")
        targets = names if plain and flags.targets != ALL_LINEAR else flags.targets
    rank = rank if flags.rank is None else flags.rank
    alpha = alpha if flags.alpha is None else flags.alpha
    config = LoRAConfig(rank, alpha, targets, flags.dropout or 0.0, flags.rslora)
    return with_lora(model, config, seed)
