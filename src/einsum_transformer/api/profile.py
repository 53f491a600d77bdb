"""`profile`: continue a prompt and measure the time of each part."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from einsum_transformer.analysis import dry_plan
from einsum_transformer.analysis.compare import cache_bytes
from einsum_transformer.analysis.memory_use import MemoryReader, MemoryUse
from einsum_transformer.analysis.profiler import EquationTime, Profiler, StageTime
from einsum_transformer.analysis.profiler import tables as profiler_tables
from einsum_transformer.analysis.quantization import lines_of_types, stored_types
from einsum_transformer.analysis.report import Report, Run, render, report, speculation_lines
from einsum_transformer.analysis.routing import LayerRouting, RoutingReader
from einsum_transformer.analysis.routing import render as render_routing
from einsum_transformer.analysis.trace import Trace
from einsum_transformer.api.sources import AnySource, model_of
from einsum_transformer.arguments import checked
from einsum_transformer.displays import as_html
from einsum_transformer.engine import Recorder, phase
from einsum_transformer.errors import InputError
from einsum_transformer.formats.files import check_writable
from einsum_transformer.generation.context import LengthNote, context_limit
from einsum_transformer.generation.decode import Request, prefill, request, stated_options
from einsum_transformer.generation.options import GenerationOptions
from einsum_transformer.generation.rows import Generation, Settings
from einsum_transformer.loading.hub import DEFAULT_MODEL
from einsum_transformer.loading.weights import memory
from einsum_transformer.models.model import Model
from einsum_transformer.notes import note
from einsum_transformer.tables import as_text

DEFAULT_PROMPT = "What is the capital of France?"
_RANDOM_TOKENS = 128


@checked
@dataclass(frozen=True, slots=True)
class Profile:
    """The result of a run and the time of each part. `str()` is the table."""

    model: str
    """The source of the model."""
    generations: tuple[Generation, ...]
    """One per prompt of the batch."""
    report: Report
    """Seconds of each part, tokens per second, bytes of the KV cache."""
    routing: tuple[LayerRouting, ...] = ()
    """The routing statistics of each layer; empty for a model without experts."""
    likeliest_next: tuple[int, ...] | None = None
    """With `prefill_only`: the most probable next token of each prompt."""
    quantization: str | None = None
    """The quantization of the weights and its mode, such as "W8A16,channel (real)"."""
    kv_cache: tuple[str, str] = ("unchanged", "unchanged")
    """The types of cached keys and values."""
    equations: tuple[EquationTime, ...] = ()
    """The time of each equation and of the rest of each phase, if `equations` is given."""
    stages: tuple[StageTime, ...] = ()
    """The time of each stage beside its prediction, if `equations` is given."""
    memory: MemoryUse | None = None
    """The memory over time by owner, if `memory` is given."""

    @property
    def text(self) -> str:
        """The text of the first prompt."""
        return self.generations[0].text

    def to_dict(self) -> dict[str, Any]:
        """Return texts, token ids and times in JSON types; for a batch, lists with one entry per prompt."""
        numbers = asdict(self.report)
        table = numbers.pop("rows")
        names = ("blas", "threads", "kv_cache_bytes", "peak_rss_bytes", "rope")
        facts = {name: numbers.pop(name) for name in names}
        fields = ("text", "tokens", "finish_reason", "prompt_tokens")
        found = {
            "model": self.model,
            "quantization": self.quantization,
            "kv_cache": list(self.kv_cache),
            **{name: _one_or_all([row.to_dict()[name] for row in self.generations]) for name in fields},
            "timings": numbers,
            "table": table,
            **facts,
        }
        if self.likeliest_next is not None:
            found["likeliest_next"] = _one_or_all(list(self.likeliest_next))
        if self.equations:
            found["stages"] = [stage.to_dict() for stage in self.stages]
            found["equations"] = list(map(asdict, self.equations))
        if self.memory is not None:
            found["memory"] = self.memory.to_dict()
        if self.routing:
            found["routing"] = [each.to_dict() for each in self.routing]
        if self.generations[0].speculation is not None:
            found["speculation"] = self.generations[0].speculation
        return found

    def tables(self) -> Iterator[Any]:
        """Yield the tables and lines as rich renderables."""
        yield render(self.report)
        yield from lines_of_types(self.quantization, self.kv_cache)
        yield from speculation_lines(self.generations[0].speculation)
        if self.equations:
            yield ""
            yield from profiler_tables(self.stages, self.equations)
        if self.memory is not None:
            yield ""
            yield from self.memory.tables()
        if self.routing:
            yield ""
            yield render_routing(list(self.routing))

    def __str__(self) -> str:
        return as_text(*self.tables())

    def _repr_html_(self) -> str:
        return as_html(*self.tables())


@checked
def profile(
    source: AnySource = DEFAULT_MODEL,
    prompt: Any = None,
    *,
    prefill_only: bool | None = None,
    batch_size: int | None = None,
    load_seconds: float | None = None,
    on_text: Callable[[str], Any] | None = None,
    trace: str | Path | None = None,
    equations: bool = False,
    memory: bool = False,
    **options: Unpack[GenerationOptions],
) -> Profile:
    """Continue a prompt and measure the time of each part.

    source: a model, or any source that `load` takes. prompt and options: as in `generate`. The default prompt
    is a short question, or `batch_size` rows of random tokens for a model without tokenizer. Defaults come
    from the run config of the model, if any.

    prefill_only: stop before the first new token; default: the value in the run config. load_seconds: seconds
    of loading the model, for the time to first token with loading; measured if this function loads `source`.
    on_text: called with each piece of text as it is generated, if there is one prompt. trace: write a trace
    of the run, its phases and its einsum calls, to this JSON file for https://ui.perfetto.dev; recording it
    makes the run slower. equations: also measure each einsum call, for `Profile.equations` and
    `Profile.stages` (see `Profiler`). memory: measure the memory of each owner over time, for
    `Profile.memory`; this makes the run slower. If `machine` has measured this machine, the times are
    compared with those that its rates predict.
    """
    if trace is not None:
        check_writable(Path(trace), "trace")
    started = time.perf_counter()
    model = model_of(source)
    if load_seconds is None:
        load_seconds = 0.0 if model is source else time.perf_counter() - started
    config = model.run_config
    if config is not None and config.use_lora and model.lora is None:
        note(f"{config.source}: use_lora applies to training only; this run does not use an adapter")
    if prefill_only is None:
        prefill_only = config is not None and config.prefill_only
    if prefill_only and any(options.get(name) for name in ("draft_model", "draft_layers", "prompt_lookup")):
        raise InputError("`prefill_only` excludes speculative decoding, because it does not generate tokens")
    if batch_size is not None and not (prompt is None and model.tokenizer is None):
        raise InputError("`batch_size` applies only to random tokens (no prompt and no tokenizer)")
    if prompt is None:
        prompt = default_prompt(model, batch_size, options.get("seed") or 0)
    job = request(model, prompt, options, stated_options(model))
    recorder, routers = Recorder(), RoutingReader()
    if model.config.moe is not None:
        recorder.on_value(routers, *RoutingReader.NAMES)
    tracing = None if trace is None else Trace(job.counters)
    if tracing is not None:
        tracing.record(recorder)
    profiler = Profiler(model) if equations else None
    if profiler is not None:
        profiler.record(recorder)
    reader = None
    if memory:
        reader = MemoryReader(model, lambda: job.counters().get("KV cache bytes", 0))
        reader.record(recorder)
    likeliest = None
    with recorder:
        started = time.perf_counter()
        if prefill_only:
            likeliest = _prefill(model, job)
        else:
            _generate(model, job, on_text if len(job.results) == 1 else None)
        seconds = time.perf_counter() - started
    prompt_lengths = tuple(len(result.prompt_tokens) for result in job.results)
    new_lengths = tuple(len(result.tokens) for result in job.results)
    kv_cache_bytes = max(result.kv_cache_bytes for result in job.results)
    run = Run(model.config, started, seconds, load_seconds, prompt_lengths, new_lengths, kv_cache_bytes)
    found = report(recorder.spans, run)
    routing = tuple(routers.layers())
    if trace is not None and tracing is not None:
        tracing.write(trace, model.source)
    measured: tuple[Any, Any] = (), ()
    predicted = None
    drafts = any(span.path == ("draft",) for span in recorder.spans)  # then steps have several tokens
    if (profiler is not None or memory) and not drafts:
        length, steps = max(prompt_lengths), sum(span.path == ("decode",) for span in recorder.spans)
        # All decode steps are compared with the one in the middle.
        phases = dry_plan.of_run(model, len(job.results), length, length + max(new_lengths) // 2)
        predicted = max(phase.peak_bytes for phase in phases)
        if profiler is not None:
            profiler.compare(phases[0])
            profiler.compare(phases[1], steps)
    if profiler is not None:
        measured = profiler.rows(), profiler.stages()
    use = None if reader is None else reader.stop(predicted)
    types = stored_types(model)
    return Profile(model.source, tuple(job.results), found, routing, likeliest, *types, *measured, use)


def _generate(model: Model, job: Request, on_text: Callable[[str], Any] | None) -> None:
    for _, text in job.run(model):
        if on_text is not None:
            with phase("text"):
                on_text(text)


def _prefill(model: Model, job: Request) -> tuple[int, ...]:
    """Run the prompts; returns the most probable next token of each."""
    prompts, settings = [result.prompt_tokens for result in job.results], job.settings
    if len(set(map(len, prompts))) > 1:
        raise InputError("`prefill_only`: expected prompts of one length")
    length = len(prompts[0])
    _check_length(model, settings, length)
    cache = model.cache(length, horizon=length)
    with phase("prefill"):
        logits = prefill(model, np.array(prompts), cache, settings.prefill_step_size)
    for result in job.results:
        result.finish_reason, result.kv_cache_bytes = "prefill", cache.nbytes
    return tuple(int(token) for token in np.argmax(logits, axis=-1))


def _check_length(model: Model, settings: Settings, length: int) -> None:
    limit = context_limit(model.config, settings.ctx_size)
    if length > limit:
        raise InputError(f"the prompt has {length} tokens, expected at most {limit} (the context)")
    LengthNote(model.config).grown(length)


def default_prompt(model: Model, rows: int | None, seed: int) -> Any:
    """Return a short question, or rows of random tokens for a model without tokenizer, and note it."""
    return _random_prompt(model, rows, seed) if model.tokenizer is None else _question(model)


def _question(model: Model) -> Any:
    """Return the default prompt, as a chat if the model has a chat template."""
    assert model.tokenizer is not None
    chat = model.tokenizer.chat_template is not None
    note(f"no prompt is given; the default{' as a chat' if chat else ''}: {DEFAULT_PROMPT}")
    return [{"role": "user", "content": DEFAULT_PROMPT}] if chat else DEFAULT_PROMPT


def _random_prompt(model: Model, batch_size: int | None, seed: int) -> list[list[int]]:
    config = model.run_config
    rows = batch_size or (config.batch_size if config else 1)
    length = config.seq_len if config else _RANDOM_TOKENS
    if (needed := cache_bytes(model.config, rows, length)) > (present := memory()):
        sizes = f"{needed / 2**30:,.1f} GiB of keys and values, but the machine has {present / 2**30:,.1f}"
        raise InputError(f"{rows} x {length} tokens need {sizes} GiB: lower `batch_size` or seq_len")
    note(f"no tokenizer: the prompt is {rows} x {length} random token ids of seed {seed}")
    rng = np.random.default_rng(seed)
    return rng.integers(0, model.config.vocab_size, (rows, length)).tolist()


def _one_or_all(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values
