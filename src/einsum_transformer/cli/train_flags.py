"""The flags of `train`, and their settings."""

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
    """The training data; the fields are arguments of `train`."""

    data: str | None = flag(metavar="FILE", help="Text, or JSON records of text, prompts or messages.")
    valid: str | None = flag(metavar="FILE", help="Validation data.")
    valid_share: float | None = flag(
        metavar="X", help="Without --valid: the share of --data to hold out; default 0.05."
    )
    mask_prompt: bool = flag("--mask-prompt", default=False, help="Train on the answers only.")
    pad: bool = flag("--pad", default=False, help="One row per example instead of packed rows.")
    long: str = flag(
        default="split", metavar="split|refuse", help="Split or reject examples that are longer than a row."
    )


@dataclass(frozen=True, slots=True)
class OptimizerFlags:
    """The optimizer and its settings."""

    optimizer: str = flag(default="sgd", metavar="sgd|adamw", help="The optimizer.")
    momentum: float = flag(default=0.0, metavar="X", help="Momentum; sgd only.")
    nesterov: bool = flag("--nesterov", default=False, help="Nesterov momentum; sgd only.")
    weight_decay: float | None = flag(metavar="X", help="Weight decay; default 0 for sgd, 0.01 for adamw.")
    decay_matrices_only: bool = flag(
        "--decay-matrices-only", default=False, help="No weight decay for norms and biases."
    )
    beta1: float | None = flag("--beta1", "--adam-beta1", metavar="X", help="adamw only; default 0.9.")
    beta2: float | None = flag("--beta2", "--adam-beta2", metavar="X", help="adamw only; default 0.999.")
    eps: float | None = flag("--eps", "--adam-epsilon", metavar="X", help="adamw only; default 1e-8.")

    def settings(self) -> SGD | AdamW:
        """Return the optimizer; InputError for contradictory flags."""
        from einsum_transformer.training.optimizers import OPTIMIZERS, SGD, AdamW

        name, decay = self.optimizer, self.weight_decay
        if name not in OPTIMIZERS:
            raise InputError(f"--optimizer is {name!r}: expected {' or '.join(OPTIMIZERS)}")
        of_adam = {"beta1": self.beta1, "beta2": self.beta2, "eps": self.eps}
        given = {key: value for key, value in of_adam.items() if value is not None}
        if name == "sgd" and given:
            raise InputError(f"--{next(iter(given))} is a setting of adamw; sgd has --momentum")
        if self.decay_matrices_only and not (name == "adamw" if decay is None else decay):
            raise InputError("--decay-matrices-only restricts --weight-decay, but that is 0")
        if name == "sgd":
            return SGD(self.momentum, self.nesterov, decay or 0.0, self.decay_matrices_only)
        if self.momentum or self.nesterov:
            raise InputError("--momentum and --nesterov are settings of sgd; adamw has --beta1 and --beta2")
        if self.eps == 0:
            note("--eps is 0: a weight whose gradients are all 0 becomes nan; the default is 1e-8")
        if decay is not None:
            given["weight_decay"] = decay
        return AdamW(decay_matrices_only=self.decay_matrices_only, **given)


@dataclass(frozen=True, slots=True)
class ScheduleFlags:
    """The learning rate schedule; the fields are arguments of `train`."""

    schedule: str = flag(
        default="constant", metavar="constant|linear|cosine", help="Schedule of the learning rate."
    )
    min_lr: float | None = flag(
        metavar="X", min=0, help="Final learning rate of linear and cosine schedules; default 0."
    )
    warmup_steps: int = flag(default=0, metavar="N", min=0, help="Steps of linear warm-up.")


@dataclass(frozen=True, slots=True)
class BatchFlags:
    """The batch of a step; the fields are arguments of `train`."""

    batch_size: int | None = flag(
        "--batch-size", "-b", metavar="N", min=1, help="Rows of a batch; default: the config's, or 4."
    )
    seq_len: int | None = flag(metavar="N", min=1, help="Tokens of each row; default 128.")
    grad_accumulation_steps: int = flag(
        default=1, metavar="N", min=1, help="Number of parts that a batch is computed in."
    )
    grad_checkpoint: options.GradCheckpoint = False
    fix_batch: bool = flag("--fix-batch", default=False, help="The same batch at every step.")


@dataclass(frozen=True, slots=True)
class KeepFlags:
    """The checkpoints; the fields are arguments of `train`."""

    output: options.Output = None
    save_every: int | None = flag(metavar="N", min=1, help="Write a checkpoint to --output every N steps.")
    keep_last: int = flag(
        default=2, metavar="N", min=1, help="Maximum number of checkpoints; older ones are removed."
    )
    resume: bool = flag("--resume", default=False, help="Continue from the newest checkpoint in --output.")


@dataclass(frozen=True, slots=True)
class AdapterFlags:
    """The adapters to train."""

    lora: bool = flag("--lora", default=False, help="Train LoRA adapters and freeze all other weights.")
    lora_rank: int | None = flag(metavar="N", min=1, help="Rank; default 8.")
    lora_alpha: float | None = flag(metavar="X", help="The scale is alpha / rank; default 16.")
    lora_dropout: float | None = flag(metavar="P", help="Dropout of the adapters' inputs; default 0.")
    lora_targets: str | None = flag(
        metavar="NAMES", help="q_proj,v_proj (default), all-linear, or a regular expression."
    )
    rslora: bool = flag("--rslora", default=False, help="Scale by alpha / sqrt(rank).")

    def settings(self, keys: RunConfig | None, has_adapters: bool) -> LoRAConfig | None:
        """Return the config of new adapters; None if no flag of LoRA is given."""
        from einsum_transformer.models.lora_config import LoRAConfig

        given = self != AdapterFlags()
        if given and has_adapters:
            raise InputError(
                "--adapter-path gives the adapter, so --lora and its flags cannot create a new one"
            )
        if not given:
            return None
        if not self.lora and not (keys and keys.use_lora):
            raise InputError("flags of LoRA are given without --lora")
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
        metavar="N", min=1, help="Divide each batch and the threads over N Ray workers."
    )
    ray_address: str | None = flag(
        metavar="HOST:PORT", help="Address of a Ray cluster; default: start a local one."
    )
    shard_optimizer: bool = flag(
        "--shard-optimizer", default=False, help="Divide the optimizer's state over the workers."
    )
    worker_timeout: float = flag(
        default=600.0, metavar="SECONDS", help="Maximum time to wait for a worker's result."
    )

    def settings(self, threads: int | None) -> RayWorkers | None:
        """Return the workers, or None to compute in this process."""
        if self.ray_workers is None:
            for name, given in (
                ("--ray-address", self.ray_address),
                ("--shard-optimizer", self.shard_optimizer),
            ):
                if given:
                    raise InputError(f"{name} needs --ray-workers")
            return None
        from einsum_transformer.cluster.data_parallel import RayWorkers

        return RayWorkers(
            self.ray_workers, self.ray_address, threads, self.worker_timeout, self.shard_optimizer
        )
