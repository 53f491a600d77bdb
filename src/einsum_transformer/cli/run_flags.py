"""The flags of a run, for `run` and `profile`, and the call that both make."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

from einsum_transformer.cli import options, output
from einsum_transformer.cli.chat_flags import ChatFlags
from einsum_transformer.cli.flags import flag
from einsum_transformer.cli.prompts import given_prompt
from einsum_transformer.errors import InputError
from einsum_transformer.notes import note

if TYPE_CHECKING:
    from einsum_transformer.api.profile import Profile
    from einsum_transformer.models.model import Model
    from einsum_transformer.models.run_config import RunConfig

_IDS_SHOWN = 16


@dataclass(frozen=True, slots=True)
class RunFlags:
    """The prompt, and what is done with it."""

    prompt: str | None = flag("--prompt", "-p", metavar="TEXT", help="The prompt; `-` reads stdin.")
    prompt_file: str | None = flag(metavar="FILE", help="The prompt as a text file.")
    tokens: options.TokenFile = None
    chat: bool | None = flag("--chat/--raw", help="Apply the chat template to the prompt; default raw.")
    ignore_eos: bool = flag("--ignore-eos", default=False, help="Continue after end tokens.")
    prefill_only: bool = flag("--prefill-only", default=False, help="Stop before the first new token.")
    batch_size: options.Rows = None
    trace: options.Trace = None


def measured(
    source: str | RunConfig,
    flags: RunFlags,
    template: ChatFlags,
    sampled: options.Sampled,
    context: options.Context,
    drafting: options.Drafting,
    equations: bool,
    memory: bool,
    loading: options.Loading,
    hub: options.Hub,
    shown: options.Shown,
) -> None:
    """Call `et.profile` and write its result."""
    from einsum_transformer.api.profile import profile

    names = ("--chat-template", "--chat-template-kwargs", "--enable-thinking/--no-thinking", "--tools")
    for name, value in zip(("--system-prompt", *names), astuple(template)):
        if value is not None and not flags.chat:
            raise InputError(f"{name} needs --chat")
    if flags.tokens is not None and flags.chat:
        raise InputError("--chat needs a prompt of text, but --tokens gives token ids")
    given = given_prompt(flags.prompt, flags.prompt_file, flags.tokens)
    loaded, load_seconds = loading.open(source, hub, sampled.seed, shown.silent)
    settings = options.generation_options(sampled, context, drafting, loading, hub, shown.silent)
    settings["ignore_eos"] = flags.ignore_eos or None
    streamed = not shown.json and loaded.tokenizer is not None
    try:
        found = profile(
            loaded,
            _prompt(loaded, given, flags.chat, template),
            prefill_only=flags.prefill_only or None,
            batch_size=flags.batch_size,
            load_seconds=load_seconds,
            on_text=output.write if streamed else None,
            trace=flags.trace,
            equations=equations,
            memory=memory,
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
        if flags.trace is not None:
            terminal.print(f"wrote {flags.trace}")


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
