"""`train`: data, tokenizer, adapters, steps, validation, checkpoints and the report of a training."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from einsum_transformer.analysis import dry_plan
from einsum_transformer.analysis.memory_use import MemoryReader, MemoryUse
from einsum_transformer.analysis.plots import check_plot
from einsum_transformer.analysis.profiler import EquationTime, Profiler, StageTime
from einsum_transformer.analysis.profiler import tables as profiler_tables
from einsum_transformer.analysis.trace import Trace
from einsum_transformer.analysis.training import (
    StepTimes,
    TrainingReport,
    optimizer_bytes,
    plot_losses,
    render,
    step_line,
    training_report,
)
from einsum_transformer.api.sources import AnySource, model_of
from einsum_transformer.arguments import checked
from einsum_transformer.cluster.data_parallel import RayWorkers, check_rows
from einsum_transformer.components.cache_types import UNCHANGED
from einsum_transformer.displays import as_html, curve
from einsum_transformer.engine import Recorder
from einsum_transformer.errors import InputError
from einsum_transformer.formats.files import check_writable
from einsum_transformer.generation.context import check_length
from einsum_transformer.models.adapters import merged, with_lora
from einsum_transformer.models.lora_config import LoRAConfig
from einsum_transformer.models.model import Model
from einsum_transformer.notes import note
from einsum_transformer.tables import as_text
from einsum_transformer.training import state
from einsum_transformer.training.batches import Texts, TextSettings, batches_of, count_of
from einsum_transformer.training.data import Rows, TextBatches, mean_loss
from einsum_transformer.training.journal import Journal
from einsum_transformer.training.loop import Compute, Local, StepReport, Trainer, TrainingSettings
from einsum_transformer.training.optimizers import OPTIMIZERS, SGD, AdamW
from einsum_transformer.training.schedule import Schedule

_BATCH, _LENGTH, _RATE = 4, 128, 1e-3


class TrainingObserver:
    """Callbacks of `train`. Override the methods that you need."""

    def begin(self, trainer: Trainer, steps: int) -> None:
        """Called before the first step; `trainer.steps_done` is above 0 in a resumed training."""

    def step(self, report: StepReport, line: str) -> None:
        """Called after each step with its report and its line of the log."""

    def message(self, text: str) -> None:
        """Called with each other message: validation, checkpoints, resuming."""


@checked
@dataclass(frozen=True, slots=True)
class Training:
    """The result of a training. `str()` is the report."""

    model: Model
    """The trained model, with its adapters if any."""
    report: TrainingReport
    """Times, memory, losses and advice."""
    losses: dict[int, float]
    """Step (from 1) -> loss of its batch before the update; with `resume`, of the new steps only."""
    validation: dict[int, float]
    """Step -> loss on the validation data after the step."""
    folder: str | None = None
    """The folder of the log and the metrics, or None."""
    checkpoint: str | None = None
    """The folder of the last checkpoint, or None without `output`."""
    equations: tuple[EquationTime, ...] = ()
    """The time of each equation and of the rest of each phase, if `equations` is given."""
    stages: tuple[StageTime, ...] = ()
    """The time of each stage beside its prediction, if `equations` is given."""
    memory: MemoryUse | None = None
    """The memory over time by owner, if `memory` is given."""

    def to_dict(self) -> dict[str, Any]:
        """Return the report, the losses and the folder in JSON types."""
        curves = {"losses": list(self.losses.values()), "validation": self.validation, "folder": self.folder}
        found = {"model": self.model.source} | asdict(self.report) | curves
        if self.equations:
            found["stages_of_equations"] = [stage.to_dict() for stage in self.stages]
            found["equations"] = list(map(asdict, self.equations))
        if self.memory is not None:
            found["memory"] = self.memory.to_dict()
        return found

    def plot(self, path: str | Path) -> None:
        """Plot the losses to a PNG file (needs matplotlib)."""
        plot_losses(path, self.losses, self.validation, self.model.source)

    def tables(self) -> list[Any]:
        """Return the report as rich renderables."""
        found = [render(self.report)]
        if self.validation:
            curve = ", ".join(f"{loss:.4f} after step {step}" for step, loss in self.validation.items())
            found.append(f"validation loss {curve}")
        if self.equations:
            found += ["", *profiler_tables(self.stages, self.equations)]
        if self.memory is not None:
            found += ["", *self.memory.tables()]
        return found

    def __str__(self) -> str:
        return as_text(*self.tables())

    def _repr_html_(self) -> str:
        curves = {"loss": self.losses, "validation loss": self.validation}
        return as_html(*(curve(each, name) for name, each in curves.items()), *self.tables())


@checked
def train(
    source: AnySource,
    data: Texts | None = None,
    *,
    steps: int = 10,
    lr: float | None = None,
    optimizer: Literal["sgd", "adamw"] | SGD | AdamW = "sgd",
    schedule: Literal["constant", "linear", "cosine"] = "constant",
    min_lr: float | None = None,
    warmup_steps: int = 0,
    clip_norm: float | None = None,
    batch_size: int | None = None,
    seq_len: int | None = None,
    grad_accumulation_steps: int = 1,
    grad_checkpoint: bool = False,
    fix_batch: bool = False,
    valid: Texts | None = None,
    valid_share: float | None = None,
    mask_prompt: bool = False,
    pad: bool = False,
    long: Literal["split", "refuse"] = "split",
    lora: LoRAConfig | bool | None = None,
    merge: bool = False,
    output: str | Path | None = None,
    log_folder: str | Path | None = None,
    save_every: int | None = None,
    keep_last: int = 2,
    resume: bool = False,
    eval_every: int | None = None,
    plot: str | Path | None = None,
    trace: str | Path | None = None,
    equations: bool = False,
    memory: bool = False,
    workers: int | RayWorkers | None = None,
    seed: int = 0,
    on_step: Callable[[StepReport], Any] | None = None,
    observer: TrainingObserver | None = None,
) -> Training:
    """Train a model on text, on conversations, or on random tokens.

    source: a model, or any source that `load` takes. The weights of a model may change in place; those of a
    read-only file are copied first. Defaults come from the run config of the model, if any.

    data: a text file, a file of JSON records (`{"text"}`, `{"prompt", "completion"}` or `{"messages"}`, as
    JSONL or an array), or a list of texts and such records; None: random tokens. valid: data to validate
    with. valid_share: without `valid`, the share of `data` that is held out (default 0.05). mask_prompt:
    train on completions and assistant messages only. pad: one row per example instead of packed rows.
    long: "split" examples that are longer than a row, or "refuse" them with an error. For a model without
    tokenizer, one with `vocab_size` tokens is trained on the data.

    steps: total number of optimizer steps. lr: learning rate (default 0.001). optimizer: "sgd", "adamw", or
    an SGD or AdamW with its settings. schedule: how the learning rate decreases to `min_lr` (default 0),
    after `warmup_steps` of linear warm-up. clip_norm: maximum norm of all gradients together. batch_size,
    seq_len: rows of a step (4) and tokens of a row (128). grad_accumulation_steps: number of parts that a
    batch is computed in. grad_checkpoint: recompute blocks in the backward pass, which saves memory.
    fix_batch: use the same batch in every step.

    lora: train adapters and freeze all other weights; True for LoRAConfig(). merge: at the end also write
    `output`/merged, with the adapters merged into the weights.

    output: the folder of checkpoints (a Hugging Face folder, or a PEFT folder of adapters, with the
    optimizer's state), log and metrics; None: no file is written. log_folder: the folder of the log without
    `output`. save_every: steps between checkpoints; keep_last: maximum number of checkpoints; older ones are
    removed. resume: continue from the newest checkpoint in `output`, bit for bit. eval_every: steps between
    validations, in addition to those at the start and the end. plot: plot the losses to this PNG file. trace:
    write a trace of the steps, their phases and einsum calls, to this JSON file for https://ui.perfetto.dev;
    recording it makes the steps slower. equations, memory: measure each einsum call, and the memory of each
    owner over time, as in `profile`; not with `workers`.

    workers: number of Ray workers that share each batch, or a RayWorkers. seed: of batches, dropout and new
    adapters. on_step: called with the StepReport of every step. observer: see TrainingObserver.

    Returns a Training: `.model`, `.losses`, `.validation`, `.report`. Raises InputError for contradictory
    settings, and TrainingFailed (an InputError) if several successive steps are not finite.
    """
    if output is None and (resume or save_every):
        raise InputError("`resume` and `save_every` need `output`, the folder of the checkpoints")
    if workers is not None and (equations or memory):
        raise InputError("`equations` and `memory` measure this process: use them without `workers`")
    if plot is not None:
        check_plot(plot)
    if trace is not None:
        check_writable(Path(trace), "trace")
    text = TextSettings(data, valid, valid_share, mask_prompt, pad, long)
    loaded = model_of(source, seed=seed)
    keys = loaded.run_config
    if any(each is not UNCHANGED for each in loaded.cache_types):
        note(f"{loaded.source}: training uses no KV cache: its types have no effect")
    merge = merge or bool(keys and keys.use_lora and keys.lora_merge_after_training)
    if merge and output is None:
        raise InputError("`merge` (lora_merge_after_training) needs `output`, the folder of the merged model")
    rate = lr if lr is not None else keys.learning_rate if keys else _RATE
    settings = TrainingSettings(
        _schedule(rate, steps, schedule, warmup_steps, min_lr),
        OPTIMIZERS[optimizer]() if isinstance(optimizer, str) else optimizer,
        clip_norm,
        seed,
        grad_checkpoint,
    )
    rows = batch_size or (keys.batch_size if keys else _BATCH)
    length = seq_len or (keys.seq_len if keys else _LENGTH)
    # A run config sets max_seq_len itself.
    check_length(loaded.config, length, "`seq_len`", strict=keys is not None)
    resumed = str(output) if resume else None
    loaded, batches, validation = batches_of(
        loaded, text, resumed, rows, length, seed, fix_batch, grad_accumulation_steps
    )
    if eval_every and validation is None:
        note("`eval_every` has no effect: there is no validation data")
    compute = _compute(workers, batches)
    adapted = _with_adapters(loaded, lora, seed)
    if merge and adapted.lora is None:
        raise InputError("`merge`: the model has no adapter; train one with `lora`, or give `adapter`")
    with Journal(output or log_folder, resume) as journal, ExitStack() as stack:
        trainer = Trainer(adapted, batches, settings, compute)
        stack.callback(trainer.compute.close)
        run = _Run(trainer, journal, steps, validation, rows, observer or TrainingObserver(), on_step)
        run.begin(resume)
        tracing = None if trace is None else Trace()
        profiler = Profiler(adapted) if equations else None
        reader = None if not memory else MemoryReader(adapted, optimizer=lambda: optimizer_bytes(trainer))
        done = trainer.steps_done
        run.train(save_every, keep_last, eval_every, [each for each in (tracing, profiler, reader) if each])
        if output is not None:
            run.save(keep_last)
            if merge:
                run.merge(Path(output) / "merged")
        random_tokens = data is None and not fix_batch
        found = run.result(loaded.config.vocab_size if random_tokens else None, output)
        if plot is not None:
            found.plot(plot)
            run.message(f"wrote {plot}")
        if trace is not None and tracing is not None:
            tracing.write(trace, loaded.source)
            run.message(f"wrote {trace}")
    if profiler is None and reader is None:
        return found
    # A step computes its batch in parts.
    planned = dry_plan.of_training(adapted, rows // grad_accumulation_steps, length, grad_checkpoint)
    if profiler is not None:
        profiler.compare(planned, (steps - done) * grad_accumulation_steps)
        found = replace(found, equations=profiler.rows(), stages=profiler.stages())
    return found if reader is None else replace(found, memory=reader.stop(planned.peak_bytes))


def _schedule(lr: float, steps: int, shape: str, warmup_steps: int, min_lr: float | None) -> Schedule:
    if min_lr is not None and shape == "constant":
        raise InputError(
            "`min_lr` is the end of a linear or cosine `schedule`; a constant one does not use it"
        )
    if min_lr is not None and min_lr > lr:
        raise InputError(f"`min_lr` is {min_lr}: expected at most the learning rate, {lr}")
    return Schedule(lr, steps, shape, warmup_steps, min_lr or 0.0)


def _compute(workers: int | RayWorkers | None, batches: Any) -> Callable[..., Compute]:
    """Return the class that computes: in this process, or with the workers of a Ray cluster."""
    if workers is None:
        return Local
    cluster = RayWorkers(workers) if isinstance(workers, int) else workers
    if isinstance(batches, TextBatches) and cluster.workers > len(batches.rows):
        raise InputError(
            f"the data yields {count_of(len(batches.rows), 'row')}, too few for {cluster.workers} Ray "
            "workers: use fewer `workers`, more data, or shorter rows (`seq_len`)"
        )
    # Checked before Ray starts, because that is slow.
    check_rows(batches.batch_size // batches.accumulation, cluster.workers)
    return cluster.compute()


def _with_adapters(model: Model, lora: LoRAConfig | bool | None, seed: int) -> Model:
    """Return the model with the adapters to train: its own, those of `lora`, or those of its run config."""
    if lora is True and model.run_config is not None and model.run_config.lora is not None:
        lora = model.run_config.lora
    if model.lora is not None:
        if lora:
            raise InputError(f"{model.source}: already has adapters; `lora` would create new ones")
        return model
    if lora is None and model.run_config is not None:
        lora = model.run_config.lora
    if not lora:
        return model
    return with_lora(model, LoRAConfig() if lora is True else lora, seed)


@dataclass(slots=True)
class _Run:
    """A running training: steps, log, metrics, validation and checkpoints."""

    trainer: Trainer
    journal: Journal
    steps: int
    validation: Rows | None
    batch_size: int
    observer: TrainingObserver
    on_step: Callable[[StepReport], Any] | None
    losses: dict[int, float] = field(default_factory=dict[int, float])
    validated: dict[int, float] = field(default_factory=dict[int, float])
    reports: list[StepReport] = field(default_factory=list[StepReport])
    times: StepTimes = field(default_factory=StepTimes)

    def begin(self, resume: bool) -> None:
        """Restore the newest checkpoint, or write run.json and validate once."""
        trainer, journal = self.trainer, self.journal
        found = state.checkpoints(journal.folder) if resume and journal.folder else []
        if found:
            for difference in state.restore(trainer, found[-1]):
                self.message(f"note: {difference}; results may differ in the last bits")
            journal.forget_after(trainer.steps_done)
            self.message(f"resumed after step {trainer.steps_done} from {found[-1]}")
        else:
            if resume:
                self.message(f"{journal.folder} does not contain a checkpoint: starting at step 1")
            journal.forget_after(-1)
            about = {"source": trainer.model.source, "begun": time.strftime("%Y-%m-%d %H:%M:%S")}
            journal.about(about | {"steps": self.steps} | state.description(trainer))
        self.observer.begin(trainer, self.steps)
        if self.validation is not None and not found:
            self.validate()

    def train(
        self,
        save_every: int | None,
        keep_last: int,
        eval_every: int | None,
        readers: Sequence[Trace | Profiler | MemoryReader],
    ) -> None:
        """Run the remaining steps."""
        recorder = Recorder()
        for each in readers:
            each.record(recorder)
        with recorder:
            for report in self.trainer.run(self.steps):
                done = report.step + 1
                stages = self.times.add(recorder.spans)
                self.reports.append(report)
                self.losses[done] = report.loss
                self._report(report, stages)
                if save_every and done % save_every == 0:
                    self.save(keep_last)
                if eval_every and self.validation is not None and done % eval_every == 0:
                    self.validate()
                recorder.spans.clear()
        if self.validation is not None and self.steps not in self.validated:
            self.validate()

    def validate(self) -> None:
        """Compute and log the loss on the validation data."""
        assert self.validation is not None
        step = self.trainer.steps_done
        loss = self.validated[step] = mean_loss(self.trainer.model, self.validation, self.batch_size)
        self.journal.metrics({"step": step, "validation_loss": loss})
        self.message(f"step {step}/{self.steps}  validation loss {loss:.4f}")

    def save(self, keep_last: int) -> None:
        """Write a checkpoint to the journal's folder."""
        assert self.journal.folder is not None
        checkpoint = state.save(self.trainer, self.journal.folder, keep_last)
        self.journal.note(f"checkpoint {checkpoint.name}")
        self.journal.commit()

    def merge(self, folder: Path) -> None:
        """Write the model with merged adapters to another folder."""
        whole, report = merged(self.trainer.model)
        whole.save(folder)
        self.message(f"merged {len(report)} adapters into the weights: {folder}")

    def message(self, text: str) -> None:
        """Write a message to the log and pass it to the observer."""
        self.journal.note(text)
        self.observer.message(text)

    def result(self, random_vocabulary: int | None, output: str | Path | None) -> Training:
        """Return the training, and write its report to the log."""
        if not self.reports:
            raise InputError(
                f"{self.journal.folder}: all {self.steps} steps are done; increase `steps` to continue"
            )
        report = training_report(self.times, self.reports, self.trainer, random_vocabulary)
        self.journal.note(json.dumps(asdict(report)))
        folder = self.journal.folder
        checkpoint = None if output is None else f"{folder}/step-{self.trainer.steps_done:08d}"
        return Training(
            self.trainer.model,
            report,
            self.losses,
            self.validated,
            None if folder is None else str(folder),
            checkpoint,
        )

    def _report(self, report: StepReport, stages: dict[str, float]) -> None:
        numbers = {"step": report.step + 1, "loss": report.loss, "norm": report.norm, "lr": report.lr}
        more = {"targets": report.targets, "seconds": report.seconds, "fault": report.fault}
        self.journal.metrics(numbers | more | {"stages": stages})
        line = step_line(report, self.steps, self.reports)
        self.journal.note(line)
        self.observer.step(report, line)
        if self.on_step is not None:
            self.on_step(report)
