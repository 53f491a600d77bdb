"""`profile`: measure a run by equation and by phase."""

from __future__ import annotations

from einsum_transformer.cli import options, run_flags
from einsum_transformer.cli.chat_flags import ChatFlags


def profile(
    *,
    named: options.NamedOrConfig,
    given: run_flags.RunFlags,
    template: ChatFlags,
    sampled: options.Sampled,
    context: options.Context,
    drafting: options.Drafting,
    memory: options.Memory = False,
    loading: options.Loading,
    assignments: options.Assignments = None,
    hub: options.Hub,
    shown: options.Shown,
) -> None:
    """Measure a run by equation and by phase, and compare it with its prediction.

    The same as `etx run --equations`: calls, quantiles, rates and the share of the roofline of each equation,
    and the elementwise operations between them. After `etx machine`, also what bounds each of them, and the
    seconds that the rates of this machine predict. `etx train --equations` and `etx chat --equations` do the
    same for a training and for a conversation. In Python: et.profile(..., equations=True), and et.Profiler
    for any other code.

    \b
    etx profile -p "The capital of France is" -n 32
    etx profile fast_lora --batch-size 4 -n 8 --memory
    etx profile --quantization W8A8 --prompt-file story.txt --prefill-only --json
    """
    source = named.source(assignments)
    run_flags.measured(source, given, template, sampled, context, drafting, True, memory, loading, hub, shown)
