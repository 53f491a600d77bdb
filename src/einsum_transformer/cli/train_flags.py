"""The flags of `train`, and the settings that they give."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from einsum_transformer.cli import options
from einsum_transformer.cli.flags import flag
from einsum_transformer.errors import InputError
from einsum_transformer.notes import note

if TYPE_CHECKING:
    from einsum_transformer.cluster.data_parallel import RayWorkers
    from einsum_transformer.models.lora_config import LoRAConfig
    from einsum_transformer.models.run_config import RunConfig
    from einsum_transformer.training.optimizers import SGD, AdamW


@dataclass(frozen=True, slots=True)
class TextFlags:
    """What is learned; the fields are arguments of `train`."""

    data: str | None = flag(metavar="FILE", help="Text, or JSON records of text, prompts or messages.")
    valid: str | None = flag(metavar="FILE", help="Data to validate with.")
    valid_share: float | None = flag(
        metavar="X", help="Without --valid: the share of --data that is held out; default 0.05."
    )
    mask_prompt: bool = flag("--mask-prompt", default=False, help="Learn the answers only.")
    pad: bool = flag("--pad", default=False, help="One row for each example instead of packed rows.")
    long: str = flag(
        default="split", metavar="split|refuse", help="What to do with examples that are longer than a row."
    )


@dataclass(frozen=True, slots=True)
class OptimizerFlags:
    """How weights follow their gradients."""

    optimizer: str = flag(default="sgd", metavar="sgd|adamw", help="The optimizer.")
    momentum: float = flag(default=0.0, metavar="X", help="Momentum of SGD.")
    nesterov: bool = flag("--nesterov", default=False, help="Nesterov momentum of SGD.")
    weight_decay: float | None = flag(metavar="X", help="Default 0 for sgd, 0.01 for adamw.")
    decay_matrices_only: bool = flag(
        "--decay-matrices-only", default=False, help="No weight decay of norms and biases."
    )
    beta1: float | None = flag("--beta1", "--adam-beta1", metavar="X", help="adamw only; default 0.9.")
    beta2: float | None = flag("--beta2", "--adam-beta2", metavar="X", help="adamw only; default 0.999.")
    eps: float | None = flag("--eps", "--adam-epsilon", metavar="X", help="adamw only; default 1e-8.")

    def settings(self) -> SGD | AdamW:
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
            raise InputError("--decay-matrices-only restricts --weight-decay, but that is 0")
        if name == "sgd":
            return SGD(self.momentum, self.nesterov, decay or 0.0, self.decay_matrices_only)
        if self.momentum or self.nesterov:
            raise InputError("--momentum and --nesterov belong to sgd; adamw has --beta1 and --beta2")
        if self.eps == 0:
            note("--eps 0: a weight whose gradients are all 0 becomes nan; 1e-8 is usual")
        if decay is not None:
            given["weight_decay"] = decay
        return AdamW(decay_matrices_only=self.decay_matrices_only, **given)


@dataclass(frozen=True, slots=True)
class ScheduleFlags:
    """How the learning rate changes; the fields are arguments of `train`."""

    schedule: str = flag(
        default="constant", metavar="constant|linear|cosine", help="How the learning rate goes to --min-lr."
    )
    min_lr: float | None = flag(metavar="X", min=0, help="Where linear and cosine schedules end; default 0.")
    warmup_steps: int = flag(default=0, metavar="N", min=0, help="Steps of rising learning rate.")


@dataclass(frozen=True, slots=True)
class BatchFlags:
    """What a step sees, and in which parts; the fields are arguments of `train`."""

    batch_size: options.Rows = None
    seq_len: int | None = flag(metavar="N", min=1, help="Tokens of a row; default 128.")
    grad_accumulation_steps: int = flag(
        default=1, metavar="N", min=1, help="Parts in which a batch is computed, one after the other."
    )
    grad_checkpoint: options.GradCheckpoint = False
    fix_batch: bool = flag("--fix-batch", default=False, help="The same batch at every step.")


@dataclass(frozen=True, slots=True)
class KeepFlags:
    """Where checkpoints are, and which; the fields are arguments of `train`."""

    output: options.Output = None
    save_every: int | None = flag(metavar="N", min=1, help="Write a checkpoint to --output every N steps.")
    keep_last: int = flag(default=2, metavar="N", min=1, help="Checkpoints to keep; older ones are removed.")
    resume: bool = flag("--resume", default=False, help="Continue from the newest checkpoint in --output.")


@dataclass(frozen=True, slots=True)
class AdapterFlags:
    """Which adapters are trained."""

    lora: bool = flag("--lora", default=False, help="Train LoRA adapters and freeze all other weights.")
    lora_rank: int | None = flag(metavar="N", min=1, help="Rank; default 8.")
    lora_alpha: float | None = flag(metavar="X", help="The scale is alpha / rank; default 16.")
    lora_dropout: float | None = flag(metavar="P", help="Dropout of the adapters' inputs; default 0.")
    lora_targets: str | None = flag(
        metavar="NAMES", help="q_proj,v_proj (default), all-linear, or a regular expression."
    )
    rslora: bool = flag("--rslora", default=False, help="Scale by alpha / sqrt(rank).")

    def settings(self, keys: RunConfig | None, has_adapters: bool) -> LoRAConfig | None:
        """The adapters of the flags and the run config; None: those of the config, or none."""
        from einsum_transformer.models.lora_config import LoRAConfig

        given = self != AdapterFlags()
        if given and has_adapters:
            raise InputError("--adapter-path already gives the adapter; --lora and its flags begin a new one")
        if not given:
            return None
        if not self.lora and not (keys and keys.use_lora):
            raise InputError("flags of LoRA were given without --lora")
        base = LoRAConfig() if keys is None else replace(keys, use_lora=True).lora
        assert base is not None
        changes = {"r": self.lora_rank, "lora_alpha": self.lora_alpha, "lora_dropout": self.lora_dropout}
        changes["use_rslora"] = self.rslora or None
        if self.lora_targets is not None:
            changes["target_modules"] = LoRAConfig.parse_targets(self.lora_targets)  # type: ignore[assignment]
        return replace(base, **{name: value for name, value in changes.items() if value is not None})


@dataclass(frozen=True, slots=True)
class ClusterFlags:
    """Workers of a Ray cluster."""

    ray_workers: int | None = flag(
        metavar="N", min=1, help="Divide each batch over N Ray workers; threads are divided too."
    )
    ray_address: str | None = flag(
        metavar="HOST:PORT", help="Address of a Ray cluster; default: start one here."
    )
    shard_optimizer: bool = flag(
        "--shard-optimizer", default=False, help="Divide the optimizer's state over the workers too."
    )
    worker_timeout: float = flag(default=600.0, metavar="SECONDS", help="Maximum time of a worker's answer.")

    def settings(self, threads: int | None) -> RayWorkers | None:
        """The workers, or None for this process alone."""
        if self.ray_workers is None:
            for name, given in (
                ("--ray-address", self.ray_address),
                ("--shard-optimizer", self.shard_optimizer),
            ):
                if given:
                    raise InputError(f"{name} needs --ray-workers, their number")
            return None
        from einsum_transformer.cluster.data_parallel import RayWorkers

        return RayWorkers(
            self.ray_workers, self.ray_address, threads, self.worker_timeout, self.shard_optimizer
        )
