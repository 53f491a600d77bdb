"""`train`: change a model's weights, and show how the loss and the time went."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from einsum_transformer.cli import options
from einsum_transformer.cli.training_data import TextFlags, count_of
from einsum_transformer.errors import InputError
from einsum_transformer.notes import note

if TYPE_CHECKING:
    from einsum_transformer.models.model import Model
    from einsum_transformer.models.run_config import RunConfig
    from einsum_transformer.training.data import RandomTokens, TextBatches
    from einsum_transformer.training.optimizers import SGD, AdamW
    from einsum_transformer.training.schedule import Schedule

_BATCH, _LENGTH, _RATE = 4, 128, 1e-3


@dataclass(frozen=True, slots=True)
class OptimizerFlags:
    """How weights follow their gradients."""

    optimizer: str = options.flag(default="sgd", metavar="sgd|adamw", help="How weights change.")
    momentum: float = options.flag(default=0.0, metavar="X", help="Of sgd.")
    nesterov: bool = options.flag("--nesterov", default=False, help="With sgd and a momentum.")
    weight_decay: float | None = options.flag(metavar="X", help="Default 0 for sgd, 0.01 for adamw.")
    decay_matrices_only: bool = options.flag(
        "--decay-matrices-only", default=False, help="No weight decay of norms and biases."
    )
    beta1: float | None = options.flag("--beta1", "--adam-beta1", metavar="X", help="Of adamw; default 0.9.")
    beta2: float | None = options.flag(
        "--beta2", "--adam-beta2", metavar="X", help="Of adamw; default 0.999."
    )
    eps: float | None = options.flag("--eps", "--adam-epsilon", metavar="X", help="Of adamw; default 1e-8.")

    def made(self) -> SGD | AdamW:
        """The optimizer; raises InputError for flags that do not go together."""
        from einsum_transformer.training.optimizers import OPTIMIZERS, SGD, AdamW

        name, decay = self.optimizer, self.weight_decay
        if name not in OPTIMIZERS:
            raise InputError(f"--optimizer {name!r}: choose {' or '.join(OPTIMIZERS)}")
        of_adam = {"beta1": self.beta1, "beta2": self.beta2, "eps": self.eps}
        given = {key: value for key, value in of_adam.items() if value is not None}
        if name == "sgd" and given:
            raise InputError(f"--{next(iter(given))} belongs to adamw; sgd has --momentum")
        if self.decay_matrices_only and not (name == "adamw" if decay is None else decay):
            raise InputError("--decay-matrices-only says what --weight-decay holds for, but that is 0")
        if name == "sgd":
            return SGD(self.momentum, self.nesterov, decay or 0.0, self.decay_matrices_only)
        if self.momentum or self.nesterov:
            raise InputError("--momentum and --nesterov belong to sgd; adamw has moments of its own")
        if self.eps == 0:
            note("--eps 0: a weight with gradients of 0 alone becomes nan; 1e-8 is usual")
        if decay is not None:
            given["weight_decay"] = decay
        return AdamW(decay_matrices_only=self.decay_matrices_only, **given)


@dataclass(frozen=True, slots=True)
class ScheduleFlags:
    """How the learning rate changes."""

    schedule: str = options.flag(
        default="constant", metavar="constant|linear|cosine", help="How the learning rate goes to --min-lr."
    )
    min_lr: float | None = options.flag(
        metavar="X", min=0, help="Where linear and cosine schedules end; default 0."
    )
    warmup_steps: int = options.flag(default=0, metavar="N", min=0, help="Steps of rising learning rate.")

    def made(self, lr: float, steps: int) -> Schedule:
        """The schedule; raises InputError for flags that do not go together."""
        from einsum_transformer.training.schedule import Schedule

        if self.min_lr is not None and self.schedule == "constant":
            raise InputError("--min-lr is where a schedule ends: choose --schedule cosine or linear")
        if self.min_lr is not None and self.min_lr > lr:
            raise InputError(f"--min-lr {self.min_lr}: more than the learning rate, {lr}")
        return Schedule(lr, steps, self.schedule, self.warmup_steps, self.min_lr or 0.0)


@dataclass(frozen=True, slots=True)
class BatchFlags:
    """What a step sees, and in which parts."""

    batch_size: int | None = options.flag("--batch-size", "-b", metavar="N", min=1, help="Rows of a step.")
    seq_len: int | None = options.flag(metavar="N", min=1, help="Tokens of a row.")
    grad_accumulation_steps: int = options.flag(
        default=1, metavar="N", min=1, help="Parts a batch is computed in, one after the other."
    )
    grad_checkpoint: bool = options.flag(
        "--grad-checkpoint", default=False, help="Less memory: blocks run again for the backward pass."
    )
    fix_batch: bool = options.flag("--fix-batch", default=False, help="The same batch at every step.")


@dataclass(frozen=True, slots=True)
class KeepFlags:
    """Where checkpoints are, and which."""

    output: str | None = options.flag(
        "--output", "-o", metavar="FOLDER", help="Keep the result and checkpoints here."
    )
    save_every: int | None = options.flag(metavar="N", min=1, help="A checkpoint in --output every N steps.")
    keep_last: int = options.flag(
        default=2, metavar="N", min=1, help="Checkpoints that stay; older ones are removed."
    )
    resume: bool = options.flag(
        "--resume", default=False, help="Go on from the newest checkpoint in --output."
    )


@dataclass(frozen=True, slots=True)
class AdapterFlags:
    """Which adapters are trained."""

    lora: bool = options.flag("--lora", default=False, help="Train adapters; all weights stay as they are.")
    lora_rank: int | None = options.flag(metavar="N", min=1, help="Default 8.")
    lora_alpha: float | None = options.flag(metavar="X", help="Default 16.")
    lora_dropout: float | None = options.flag(metavar="P", help="Of the adapters' inputs; default 0.")
    lora_targets: str | None = options.flag(
        metavar="NAMES", help="q_proj,v_proj (default), all-linear, or a regular expression."
    )
    rslora: bool = options.flag("--rslora", default=False, help="Scale by alpha / sqrt(rank).")

    def put_on(self, model: Model, keys: RunConfig | None, seed: int) -> Model:
        """The model, with the adapters that flags or its JSON config ask for."""
        from einsum_transformer.models.adapters import with_lora
        from einsum_transformer.models.lora_config import ALL_LINEAR, LoRAConfig

        given = self != AdapterFlags()
        if model.lora is not None:
            if given:
                raise InputError(
                    "--adapter-path says what the adapter is; --lora and its flags begin a new one"
                )
            return model
        if not self.lora and not (keys and keys.use_lora):
            if given:
                raise InputError("flags of LoRA were given without --lora")
            return model
        rank, alpha = (keys.lora_rank, keys.lora_alpha) if keys else (8, 16.0)
        targets: str | tuple[str, ...] = keys.lora_target_modules if keys else ("q_proj", "v_proj")
        if self.lora_targets is not None:
            names = tuple(part.strip() for part in self.lora_targets.split(","))
            plain = all(name.replace("_", "").replace(".", "").isalnum() for name in names)
            if not all(names):
                raise InputError(
                    f"--lora-targets {self.lora_targets!r}: names with commas between them are expected"
                )
            targets = names if plain and self.lora_targets != ALL_LINEAR else self.lora_targets
        rank = rank if self.lora_rank is None else self.lora_rank
        alpha = alpha if self.lora_alpha is None else self.lora_alpha
        config = LoRAConfig(rank, alpha, targets, self.lora_dropout or 0.0, self.rslora)
        return with_lora(model, config, seed)


@dataclass(frozen=True, slots=True)
class ClusterFlags:
    """What else than this process computes."""

    ray_workers: int | None = options.flag(
        metavar="N", min=1, help="Divide each batch over N Ray workers; threads are divided too."
    )
    ray_address: str | None = options.flag(
        metavar="HOST:PORT", help="Of a Ray cluster; default: start one here."
    )
    shard_optimizer: bool = options.flag(
        "--shard-optimizer", default=False, help="Divide the optimizer's state over the workers too."
    )
    worker_timeout: float = options.flag(
        default=600.0, metavar="SECONDS", help="The longest that a worker's answer may take."
    )

    def compute(self, threads: int | None, batches: RandomTokens | TextBatches) -> Any:
        """Who computes: this process, or workers of a Ray cluster."""
        from einsum_transformer.training.loop import Local

        workers = self.ray_workers
        if workers is None:
            for flag, given in (
                ("--ray-address", self.ray_address),
                ("--shard-optimizer", self.shard_optimizer),
            ):
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
        return data_parallel(workers, self.ray_address, threads, self.worker_timeout, self.shard_optimizer)


def train(
    *,
    named: options.NamedOrConfig,
    text: TextFlags,
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
    optimizer: OptimizerFlags,
    schedule: ScheduleFlags,
    clip_norm: Annotated[
        float | None, typer.Option(metavar="X", help="Bound for the norm of all gradients together.")
    ] = None,
    batches: BatchFlags,
    adapters: AdapterFlags,
    merge: Annotated[
        bool,
        typer.Option("--merge", help="At the end also write --output/merged, the adapters in the weights."),
    ] = False,
    adapter_path: options.AdapterPath = None,
    keep: KeepFlags,
    eval_every: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Validate every N steps, not only at both ends.")
    ] = None,
    plot: Annotated[str | None, typer.Option(metavar="FILE.png", help="Draw the loss curve.")] = None,
    cluster: ClusterFlags,
    seed: options.Seed = None,
    machine: options.Machine,
    max_layers: options.MaxLayers = None,
    dtype: options.Dtype = None,
    assignments: options.Assignments = None,
    hub: options.Hub,
    shown: options.Shown,
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
    from einsum_transformer.cli.training_data import batches_of
    from einsum_transformer.cli.training_run import TrainingRun, show
    from einsum_transformer.generation.context import check_length
    from einsum_transformer.training.journal import Journal
    from einsum_transformer.training.loop import Settings, Trainer

    source = named.source(assignments)
    keys = None if isinstance(source, str) else source
    rate = lr if lr is not None else keys.learning_rate if keys else _RATE
    settings = Settings(
        schedule.made(rate, steps), optimizer.made(), clip_norm, seed or 0, batches.grad_checkpoint
    )
    output = keep.output
    if output is None and (keep.resume or keep.save_every):
        raise InputError("--resume and --save-every need --output, the folder that checkpoints are in")
    merge = merge or bool(keys and keys.use_lora and keys.lora_merge_after_training)
    if merge and output is None:
        raise InputError("merging after training needs --output, the folder that the model goes to")
    if text.long not in ("split", "refuse"):
        raise InputError(f"--long {text.long!r}: choose split or refuse")
    if plot is not None:
        check_plot(plot)
        if Path(plot).suffix.lower() != ".png":
            raise InputError(
                f"--plot {plot}: a PNG image is written, so a name that ends in .png is expected"
            )
    loaded, _ = options.open_model(
        source, hub, machine, dtype, quiet=True, max_layers=max_layers, seed=seed, adapter=adapter_path
    )
    rows = batches.batch_size or (keys.batch_size if keys else _BATCH)
    length = batches.seq_len or (keys.seq_len if keys else _LENGTH)
    check_length(loaded.config, length, "--seq-len", strict=keys is not None)  # it says max_seq_len itself
    resumed, parts, fixed = (
        output if keep.resume else None,
        batches.grad_accumulation_steps,
        batches.fix_batch,
    )
    loaded, data, validation = batches_of(loaded, text, resumed, rows, length, seed or 0, fixed, parts)
    if eval_every and validation is None:
        note("--eval-every: there is nothing to validate with")
    compute = cluster.compute(machine.threads, data)
    adapted = adapters.put_on(loaded, keys, seed or 0)
    if merge and adapted.lora is None:
        raise InputError("--merge: there is no adapter to merge; train one with --lora or --adapter-path")
    folder = Path(output or _new_folder(loaded.source))
    with Journal(folder, keep.resume) as journal, ExitStack() as stack:
        trainer = Trainer(adapted, data, settings, compute)
        stack.callback(trainer.compute.close)
        run = TrainingRun(trainer, journal, steps, validation, rows, shown.silent, stack)
        run.begin(keep.resume)
        run.train(keep.save_every if output else None, keep.keep_last, eval_every)
        if output is not None:
            run.save(keep.keep_last)
        if merge and output is not None:
            run.merge(folder / "merged")
        found = run.report(None if text.data or fixed else loaded.config.vocab_size)
        if plot is not None:
            run.plot(plot)
    if shown.json:
        curves = {"losses": list(run.losses.values()), "validation": run.validated, "folder": str(folder)}
        options.write_line({"model": loaded.source} | asdict(found) | curves)
    elif not shown.quiet:
        show(found, run, folder, output is not None)


def _new_folder(source: str) -> str:
    name = Path(source.split(" (")[0]).stem
    first = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder, number = first, 1
    while folder.exists():
        number += 1
        folder = first.with_name(f"{first.name}-{number}")
    return str(folder)
