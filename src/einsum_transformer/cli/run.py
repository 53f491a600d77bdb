"""`run`: continue a prompt, and show the time of each part."""

from __future__ import annotations

from einsum_transformer.cli import options, run_flags
from einsum_transformer.cli.chat_flags import ChatFlags


def run(
    *,
    named: options.NamedOrConfig,
    given: run_flags.RunFlags,
    template: ChatFlags,
    sampled: options.Sampled,
    context: options.Context,
    drafting: options.Drafting,
    equations: options.Equations = False,
    memory: options.Memory = False,
    loading: options.Loading,
    assignments: options.Assignments = None,
    hub: options.Hub,
    shown: options.Shown,
) -> None:
    """Continue a prompt, and show the time of each part.

    The text goes to stdout, the table to stderr. The default prompt is a short question; a JSON config
    without a tokenizer runs on --batch-size rows (default 1) of random tokens. Decoding is greedy unless a
    flag or a config sets sampling. In Python: et.profile, and et.generate or et.stream for the text alone.

    \b
    etx run -p "The capital of France is" -n 8 --temp 0
    etx run -m HuggingFaceTB/SmolLM2-360M-Instruct --chat -p "Why is the sky blue?" --top-p 0.9 --seed 1
    etx run model.gguf --prompt-file story.txt --prefill-only --json
    etx run --config configs/fast_lora.json --set n_layers=4 -n 16
    etx run --prompt-file notes.txt --prompt-lookup 3 --num-draft-tokens 8
    etx run -p "The sky is" -n 16 --equations --trace trace.json
    """
    source = named.source(assignments)
    run_flags.measured(
        source, given, template, sampled, context, drafting, equations, memory, loading, hub, shown
    )
