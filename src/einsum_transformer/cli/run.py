"""`run`: continue a prompt, and show where the time went."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, astuple, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from einsum_transformer.cli import options
from einsum_transformer.cli.chat_flags import ChatFlags
from einsum_transformer.cli.prompts import given_prompt
from einsum_transformer.errors import InputError

if TYPE_CHECKING:
    from einsum_transformer.analysis.report import Report
    from einsum_transformer.analysis.routing import RoutingReader
    from einsum_transformer.engine import Recorder
    from einsum_transformer.generation.decode import Generation, Settings
    from einsum_transformer.generation.sampling import Sampling
    from einsum_transformer.generation.speculative import Speculation
    from einsum_transformer.models.model import Model
    from einsum_transformer.models.run_config import RunConfig

DEFAULT_PROMPT = "What is the capital of France?"
_RANDOM_TOKENS = 128
_IDS_SHOWN = 16


def run(
    *,
    named: options.NamedOrConfig,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="`-` reads stdin.")
    ] = None,
    prompt_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="The prompt as a text file.")
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(metavar="FILE.npy", help="The prompt as token ids, (time) or (batch, time).")
    ] = None,
    chat: Annotated[
        bool | None, typer.Option("--chat/--raw", help="Put the prompt into the chat template; default raw.")
    ] = None,
    template: ChatFlags,
    sampled: options.Sampled,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after end tokens.")] = False,
    context: options.Context,
    drafting: options.Drafting,
    prefill_only: Annotated[
        bool, typer.Option("--prefill-only", help="Stop before the first new token.")
    ] = False,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            "-b",
            metavar="N",
            min=1,
            help="Rows of random tokens, where there is no tokenizer.",
        ),
    ] = None,
    loading: options.Loading,
    assignments: options.Assignments = None,
    hub: options.Hub,
    shown: options.Shown,
) -> None:
    """Continue a prompt, and show where the time went.

    The text goes to stdout, the table to stderr. A JSON config without a tokenizer runs on random tokens;
    without a prompt a model is asked a short question. Unless a flag or a config says otherwise, decoding is
    greedy.

    \b
    etx run -p "The capital of France is" -n 8 --temp 0
    etx run -m HuggingFaceTB/SmolLM2-360M-Instruct --chat -p "Why is the sky blue?" --top-p 0.9 --seed 1
    etx run model.gguf --prompt-file story.txt --prefill-only --json
    etx run --config configs/fast_lora.json --set n_layers=4 -n 16
    etx run --prompt-file notes.txt --prompt-lookup 3 --num-draft-tokens 8
    """
    source = named.source(assignments)
    keys = None if isinstance(source, str) else source
    drafts = (drafting.draft_model, drafting.draft_layers, drafting.prompt_lookup)
    if prefill_only and drafts != (None, None, None):
        raise InputError(
            "--prefill-only makes no token, so there is nothing to draft: leave out one of the flags"
        )
    names = ("--chat-template", "--chat-template-kwargs", "--enable-thinking/--no-thinking", "--tools")
    for flag, value in zip(("--system-prompt", *names), astuple(template)):
        if value is not None and not chat:
            raise InputError(f"{flag} needs --chat")
    if tokens is not None and chat:
        raise InputError("--chat needs a prompt of text, --tokens has ids")
    given = given_prompt(prompt, prompt_file, tokens)
    asked = _Prompt(**given, chat=chat, template=template, batch_size=batch_size, silent=shown.silent)
    loaded, load_seconds = loading.open(source, hub, sampled.seed, shown.silent)
    sampling, settings = options.generation_settings(loaded, keys, sampled, context, ignore_eos=ignore_eos)
    speculation = options.speculation_of(loaded, keys, drafting, loading, hub, shown.silent)
    rows = asked.rows(loaded, keys, sampled.seed or 0)
    job = _Job(loaded, load_seconds, rows, sampling, settings, speculation, shown)
    job.prefill() if prefill_only or (keys is not None and keys.prefill_only) else job.generate()


@dataclass(frozen=True, slots=True)
class _Prompt:
    """What the model is given: text, token ids, or neither."""

    text: str | None
    tokens: Any
    source: str | None
    """Where they come from: a flag, or the file of the ids."""
    chat: bool | None
    template: ChatFlags
    batch_size: int | None
    silent: bool

    def rows(self, model: Model, config: RunConfig | None, seed: int) -> list[list[int]]:
        """Token ids, all rows of one length."""
        if model.tokenizer is None and self.text is None and self.tokens is None:
            return self._random(model, config, seed)
        if self.batch_size is not None:
            raise InputError("--batch-size: only for a run on random tokens (no prompt and no tokenizer)")
        if self.tokens is not None:
            return model.checked(self.tokens, f"the ids of {self.source}").tolist()
        return [self._encoded(model)]

    def _encoded(self, model: Model) -> list[int]:
        from einsum_transformer.generation.decode import encode

        text, chat, tokenizer = self.text, self.chat, model.tokenizer
        if chat is None:
            # Nobody asked for raw text where nobody gave any, and a chat model answers a question better.
            chat = text is None and tokenizer is not None and tokenizer.chat_template is not None
        if text is None:
            text = DEFAULT_PROMPT
            if not self.silent:
                options.note(f"no prompt given, so this one{' as a chat' if chat else ''}: {text}")
        if chat and tokenizer is None:
            raise InputError(f"--chat: {model.source} has no tokenizer")
        if not chat or tokenizer is None:
            if text == "" and (tokenizer is None or not tokenizer.encode_once(text)):
                raise InputError(f"{self.source}: the prompt is empty: give at least one character")
            return encode(model, text)
        asked, about = self.template.options(tokenizer.chat_templates), self.template.system_prompt
        system = [] if about is None else [{"role": "system", "content": about}]
        return tokenizer.encode_chat([*system, {"role": "user", "content": text}], **asked)

    def _random(self, model: Model, config: RunConfig | None, seed: int) -> list[list[int]]:
        import numpy as np

        from einsum_transformer.analysis.compare import cache_bytes
        from einsum_transformer.loading.weights import memory

        rows = self.batch_size or (config.batch_size if config else 1)
        length = config.seq_len if config else _RANDOM_TOKENS
        if (needed := cache_bytes(model.config, rows, length)) > (present := memory()):
            sizes = f"{needed / 2**30:,.1f} GiB of keys and values, the machine has {present / 2**30:,.1f}"
            raise InputError(f"{rows} x {length} tokens need {sizes}: lower --batch-size or seq_len")
        if not self.silent:
            options.note(f"no tokenizer: {rows} x {length} random token ids of seed {seed}")
        rng = np.random.default_rng(seed)
        return rng.integers(0, model.config.vocab_size, (rows, length)).tolist()


@dataclass(frozen=True, slots=True)
class _Job:
    """One run: generate or prefill, then the results on stdout and the table on stderr."""

    model: Model
    load_seconds: float
    rows: list[list[int]]
    sampling: Sampling
    settings: Settings
    speculation: Speculation | None
    shown: options.Shown

    def generate(self) -> None:
        from einsum_transformer.engine import Recorder
        from einsum_transformer.generation.decode import Generation

        results = [Generation(row) for row in self.rows]
        live = len(results) == 1 and self.model.tokenizer is not None and not self.shown.json
        recorder = None if self.shown.quiet and not self.shown.json else Recorder()
        routers = _read_routers(recorder, self.model)
        with recorder or nullcontext():
            started = time.perf_counter()
            try:
                for text in self._pieces(results):
                    if live:
                        options.write(text)
            finally:
                if live:
                    options.write("\n")
            seconds = time.perf_counter() - started
        if not live and not self.shown.json:
            self._write_rows(results)
        self._finish(results, recorder, routers, started, seconds)

    def _pieces(self, results: list[Generation]) -> Iterator[str]:
        from einsum_transformer.engine import phase
        from einsum_transformer.generation.decode import stream

        made = stream(self.model, results, self.sampling, self.settings, speculation=self.speculation)
        for _, text in made:
            with phase("text"):
                yield text

    def prefill(self) -> None:
        import numpy as np

        from einsum_transformer.engine import Recorder, phase
        from einsum_transformer.generation.context import LengthNote, context_limit
        from einsum_transformer.generation.decode import Generation, prefill

        limit = context_limit(self.model.config, self.settings.ctx_size)
        if len(self.rows[0]) > limit:
            raise InputError(f"the prompt has {len(self.rows[0])} tokens, the context is {limit}: shorten it")
        LengthNote(self.model.config).grown(len(self.rows[0]))
        cache = self.model.cache(len(self.rows[0]), horizon=len(self.rows[0]))
        recorder = Recorder()
        routers = _read_routers(recorder, self.model)
        with recorder:
            started = time.perf_counter()
            with phase("prefill"):
                logits = prefill(self.model, np.array(self.rows), cache, self.settings.prefill_step_size)
            seconds = time.perf_counter() - started
        results = [Generation(row, finish_reason="prefill", kv_cache_bytes=cache.nbytes) for row in self.rows]
        likeliest = [int(token) for token in np.argmax(logits, axis=-1)]
        if not self.shown.json:
            self._write_likeliest(likeliest)
        self._finish(results, recorder, routers, started, seconds, likeliest_next=_one_or_all(likeliest))

    def _write_likeliest(self, tokens: list[int]) -> None:
        for row, token in enumerate(tokens):
            text = "" if self.model.tokenizer is None else f" {self.model.tokenizer.decode([token], False)!r}"
            name = f"row {row}: " if len(tokens) > 1 else ""
            options.write(f"{name}likeliest next token: {token}{text}\n")

    def _write_rows(self, results: list[Generation]) -> None:
        for row, result in enumerate(results):
            name = f"row {row}: " if len(results) > 1 else ""
            if self.model.tokenizer is not None:
                options.write(f"{name}{result.text}\n")
                continue
            shown = result.tokens if self.shown.quiet else result.tokens[:_IDS_SHOWN]
            more = f" ... ({len(result.tokens)} tokens)" if len(shown) < len(result.tokens) else ""
            options.write(f"{name}{' '.join(map(str, shown))}{more}\n")

    def _finish(
        self,
        results: list[Generation],
        recorder: Recorder | None,
        routers: RoutingReader,
        started: float,
        seconds: float,
        **more: Any,
    ) -> None:
        """The table, or the JSON object."""
        if recorder is None:
            return
        from einsum_transformer.analysis import routing
        from einsum_transformer.analysis.report import Run, render, report, speculation_lines

        found = report(
            recorder.spans,
            Run(
                self.model.config,
                started,
                seconds,
                self.load_seconds,
                tuple(len(result.prompt_tokens) for result in results),
                tuple(len(result.tokens) for result in results),
                max(result.kv_cache_bytes for result in results),
            ),
        )
        layers = routers.layers()
        if self.shown.json:
            more |= {"routing": [each.to_dict() for each in layers]} if layers else {}
            more |= {"speculation": results[0].speculation} if self.speculation else {}
            options.write_line(_json(self.model.source, results, found) | more)
        elif not self.shown.quiet:
            terminal = options.console()
            terminal.print()
            terminal.print(render(found))
            for line in speculation_lines(results[0].speculation):
                terminal.print(line)
            if layers:
                terminal.print()
                terminal.print(routing.render(layers))


def _json(source: str, results: list[Generation], found: Report) -> dict[str, Any]:
    """One object for a row; for a batch its first entries are lists."""
    numbers = asdict(found)
    table = numbers.pop("rows")
    facts = {
        name: numbers.pop(name) for name in ("blas", "threads", "kv_cache_bytes", "peak_rss_bytes", "rope")
    }
    return {
        "model": source,
        "text": _one_or_all([result.text for result in results]),
        "tokens": _one_or_all([result.tokens for result in results]),
        "finish_reason": _one_or_all([result.finish_reason for result in results]),
        "prompt_tokens": _one_or_all([result.prompt_tokens for result in results]),
        "timings": numbers,
        "table": table,
        **facts,
    }


def _one_or_all(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values


def _read_routers(recorder: Recorder | None, model: Model) -> RoutingReader:
    """What reads the choices of the model's routers, if it has some and somebody records."""
    from einsum_transformer.analysis.routing import RoutingReader

    reader = RoutingReader()
    if recorder is not None and model.config.moe is not None:
        recorder.on_value(reader, *RoutingReader.NAMES)
    return reader
