"""`train`: train a model, and show the loss and the time of each part."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from einsum_transformer.cli import options, output, train_flags


def train(
    *,
    named: options.NamedOrConfig,
    text: train_flags.TextFlags,
    steps: Annotated[
        int, typer.Option("--steps", "--iters", metavar="N", min=1, help="Total number of training steps.")
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
    optimizer: train_flags.OptimizerFlags,
    schedule: train_flags.ScheduleFlags,
    clip_norm: Annotated[
        float | None, typer.Option(metavar="X", help="Maximum norm of all gradients together.")
    ] = None,
    batches: train_flags.BatchFlags,
    adapters: train_flags.AdapterFlags,
    merge: Annotated[
        bool,
        typer.Option("--merge", help="At the end also write --output/merged, with merged adapters."),
    ] = False,
    adapter_path: options.AdapterPath = None,
    keep: train_flags.KeepFlags,
    eval_every: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Validate every N steps, not only at the start and the end."),
    ] = None,
    plot: Annotated[str | None, typer.Option(metavar="FILE.png", help="Plot the loss to this file.")] = None,
    trace: options.Trace = None,
    equations: options.Equations = False,
    memory: options.Memory = False,
    cluster: train_flags.ClusterFlags,
    seed: options.Seed = None,
    machine: options.Stored,
    max_layers: options.MaxLayers = None,
    dtype: options.Dtype = None,
    assignments: options.Assignments = None,
    hub: options.Hub,
    shown: options.Shown,
) -> None:
    """Train a model on text or on random tokens, and show the loss and the time of each part.

    Without --data all tokens are random; with --fix-batch all steps use one batch, whose loss a correct
    backward pass reduces. --lora, or a run config with use_lora, trains adapters and freezes all other
    weights, which --quantization can store as integers. A run config has no tokenizer: one with vocab_size
    tokens is trained on --data first.

    The log and metrics.jsonl are written to --output, or to a new folder under runs/. --output also receives
    a checkpoint of the last step: a model folder, or a PEFT folder of adapters, with the optimizer's state.
    In Python: et.train.

    \b
    etx train fast_lora --lr 0.05 --steps 10 --max-layers 4 --fix-batch --seed 42
    etx train --lora --data notes.txt --optimizer adamw --lr 2e-4 --steps 100 -o my-run --save-every 20
    etx train --lora --quantization W4A16 --data notes.txt --steps 100 -o my-run
    etx train --lora --data chats.jsonl --mask-prompt --pad --steps 100 -o my-run --resume
    etx run --adapter-path my-run/step-00000100 -p "Once upon a time"
    """
    from einsum_transformer.api.train import train as call
    from einsum_transformer.cli.train_progress import TrainingProgress
    from einsum_transformer.training.journal import new_run_folder

    source = named.source(assignments)
    keys = None if isinstance(source, str) else source
    settings = {"optimizer": optimizer.settings(), "workers": cluster.settings(machine.threads)}
    settings["lora"] = adapters.settings(keys, adapter_path is not None)
    more = {"max_layers": max_layers, "seed": seed, "adapter": adapter_path, **machine.stored()}
    loaded, _ = options.open_model(source, hub, machine, dtype, quiet=True, **more)
    log_folder = None if keep.output else new_run_folder(loaded.source)
    with TrainingProgress(shown.silent) as progress:
        found = call(
            loaded,
            **asdict(text),
            steps=steps,
            lr=lr,
            **asdict(schedule),
            clip_norm=clip_norm,
            **asdict(batches),
            merge=merge,
            **asdict(keep),
            log_folder=log_folder,
            eval_every=eval_every,
            plot=plot,
            trace=trace,
            equations=equations,
            memory=memory,
            seed=seed or 0,
            observer=progress,
            **settings,
        )
    if shown.json:
        output.write_line(found.to_dict())
    elif not shown.quiet:
        terminal = output.console()
        for part in ("", *found.tables()):
            terminal.print(part)
        saved = found.checkpoint or "none (no --output)"
        terminal.print(f"log and metrics: {found.folder}; checkpoint: {saved}")
