"""`run`: continue a prompt, and show the time of each part."""

from __future__ import annotations

from dataclasses import astuple
from typing import TYPE_CHECKING, Annotated, Any

import typer

from einsum_transformer.cli import options, output
from einsum_transformer.cli.chat_flags import ChatFlags
from einsum_transformer.cli.prompts import given_prompt
from einsum_transformer.errors import InputError
from einsum_transformer.notes import note

if TYPE_CHECKING:
    from einsum_transformer.api.profile import Profile
    from einsum_transformer.models.model import Model

_IDS_SHOWN = 16


def run(
    *,
    named: options.NamedOrConfig,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="The prompt; `-` reads stdin.")
    ] = None,
    prompt_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="The prompt as a text file.")
    ] = None,
    tokens: options.TokenFile = None,
    chat: Annotated[
        bool | None, typer.Option("--chat/--raw", help="Apply the chat template to the prompt; default raw.")
    ] = None,
    template: ChatFlags,
    sampled: options.Sampled,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Continue after end tokens.")] = False,
    context: options.Context,
    drafting: options.Drafting,
    prefill_only: Annotated[
        bool, typer.Option("--prefill-only", help="Stop before the first new token.")
    ] = False,
    batch_size: options.Rows = None,
    trace: options.Trace = None,
    equations: Annotated[
        bool, typer.Option("--equations", help="Also show the time of each equation; makes the run slower.")
    ] = False,
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
    from einsum_transformer.api.profile import profile

    source = named.source(assignments)
    names = ("--chat-template", "--chat-template-kwargs", "--enable-thinking/--no-thinking", "--tools")
    for name, value in zip(("--system-prompt", *names), astuple(template)):
        if value is not None and not chat:
            raise InputError(f"{name} needs --chat")
    if tokens is not None and chat:
        raise InputError("--chat needs a prompt of text, but --tokens gives token ids")
    given = given_prompt(prompt, prompt_file, tokens)
    loaded, load_seconds = loading.open(source, hub, sampled.seed, shown.silent)
    settings = options.generation_options(sampled, context, drafting, loading, hub, shown.silent)
    settings["ignore_eos"] = ignore_eos or None
    streamed = not shown.json and loaded.tokenizer is not None
    try:
        found = profile(
            loaded,
            _prompt(loaded, given, chat, template),
            prefill_only=prefill_only or None,
            batch_size=batch_size,
            load_seconds=load_seconds,
            on_text=output.write if streamed else None,
            trace=trace,
            equations=equations,
            **settings,
        )
    except KeyboardInterrupt:
        output.write("\n" if streamed else "")
        raise
    if shown.json:
        output.write_line(found.to_dict())
        return
    _write_text(loaded, found, shown.quiet)
    if not shown.quiet:
        terminal = output.console()
        for part in ("", *found.tables()):
            terminal.print(part)
        if trace is not None:
            terminal.print(f"wrote {trace}")


def _prompt(model: Model, given: dict[str, Any], chat: bool | None, template: ChatFlags) -> Any:
    """Return the prompt for `profile`: token ids, a text, or None."""
    from einsum_transformer.api.profile import DEFAULT_PROMPT

    if given["tokens"] is not None:
        return model.checked(given["tokens"], f"the ids of {given['source']}").tolist()
    text: str | None = given["text"]
    tokenizer = model.tokenizer
    if text is None and chat is not None:
        text = DEFAULT_PROMPT
        note(f"no prompt is given; the default: {text}")
    if text == "" and not chat and (tokenizer is None or not tokenizer.encode_once(text)):
        raise InputError(f"{given['source']}: the prompt is empty: give at least one character")
    if not chat or text is None:
        return text
    if tokenizer is None:
        raise InputError(f"--chat: {model.source} has no tokenizer")
    return template.encoded(tokenizer, text)


def _write_text(model: Model, found: Profile, quiet: bool) -> None:
    """Write the result that was not streamed: the line end, the rows of a batch, or token ids."""
    rows = found.generations
    for row, result in enumerate(rows):
        name = f"row {row}: " if len(rows) > 1 else ""
        if found.likeliest_next is not None:
            token = found.likeliest_next[row]
            text = "" if model.tokenizer is None else f" {model.tokenizer.decode([token], False)!r}"
            output.write_line(f"{name}most probable next token: {token}{text}")
        elif model.tokenizer is not None:
            output.write_line(f"{name}{result.text}" if len(rows) > 1 else "")
        else:
            ids = result.tokens if quiet else result.tokens[:_IDS_SHOWN]
            more = f" ... ({len(result.tokens)} tokens)" if len(ids) < len(result.tokens) else ""
            output.write_line(f"{name}{' '.join(map(str, ids))}{more}")
