"""What the commands share: flags, the way from them to a model, and the notes on stderr."""

from __future__ import annotations

import logging
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from einsum_transformer.errors import InputError
from einsum_transformer.notes import LOGGER

if TYPE_CHECKING:
    from rich.console import Console

    from einsum_transformer.generation.decode import Settings
    from einsum_transformer.generation.sampling import Sampling
    from einsum_transformer.generation.speculative import Speculation
    from einsum_transformer.models.model import Model as LoadedModel
    from einsum_transformer.models.run_config import RunConfig

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        show_default=False,
        help="Hugging Face folder or hub id, .gguf file, JSON config (random weights); default smollm2-135m.",
    ),
]
ModelFlag = Annotated[str | None, typer.Option("--model", "-m", metavar="MODEL", help="The same as MODEL.")]
ConfigFlag = Annotated[
    str | None, typer.Option("--config", metavar="FILE.json", help="The same, for a JSON config.")
]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of a JSON config; may be repeated."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, and nothing else there.")]


def silence(quiet: bool) -> bool:
    """Drop the library's notes if `--quiet` is given."""
    LOGGER.setLevel(logging.ERROR if quiet else logging.WARNING)
    return quiet


Quiet = Annotated[bool, typer.Option("--quiet", callback=silence, help="Only the text: no notes, no table.")]
Revision = Annotated[
    str | None, typer.Option(metavar="NAME", help="Branch, tag or commit of a hub repository.")
]
Offline = Annotated[bool, typer.Option("--offline", help="Never use the network.")]
AllowLinks = Annotated[
    bool,
    typer.Option("--allow-links", help="Read weights through links that lead out of the model's folder."),
]
Blas = Annotated[str, typer.Option(metavar="auto|numpy|mkl", help="BLAS library of the matrix products.")]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", "-t", "--num-threads", metavar="N", min=1, help="BLAS threads; default all cores."
    ),
]
Dtype = Annotated[
    str | None, typer.Option(metavar="float32|float64", help="What is computed in; default float32.")
]
WeightBudget = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE", help="Weights held in memory (500M, 2G); the rest is read when it is needed."
    ),
]
MaxLayers = Annotated[
    int | None,
    typer.Option("--max-layers", "--num-layers", metavar="N", min=1, help="Keep only the first layers."),
]
AdapterPath = Annotated[
    str | None,
    typer.Option(
        "--adapter-path", metavar="FOLDER", help="A LoRA adapter, as PEFT, `etx train` or mlx-lm writes it."
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        "--max-tokens", "-n", "--max-new-tokens", metavar="N", min=0, help="Tokens to generate; default 128."
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option("--temp", "--temperature", metavar="X", min=0, help="0 takes the likeliest token."),
]
TopK = Annotated[
    int | None, typer.Option(metavar="K", min=0, help="Draw from the K likeliest tokens; 0 switches it off.")
]
TopP = Annotated[
    float | None,
    typer.Option(metavar="P", min=0, max=1, help="Draw from the tokens that make up this probability."),
]
MinP = Annotated[
    float | None,
    typer.Option(metavar="P", min=0, max=1, help="Leave out tokens below this share of the likeliest."),
]
RepetitionPenalty = Annotated[
    float | None, typer.Option(metavar="X", help="Above 1, tokens that occurred become less likely.")
]
Seed = Annotated[
    int | None, typer.Option(metavar="N", min=0, help="Of the sampling, random weights and random prompts.")
]
Stop = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End at this text; may be repeated.")]
CtxSize = Annotated[
    int | None,
    typer.Option("--ctx-size", "-c", metavar="N", min=1, help="Most tokens of prompt and answer together."),
]
PrefillStep = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Prompt tokens per forward pass; default 512.")
]
DraftModel = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="Speculative decoding: a small model of the same vocabulary drafts."),
]
DraftLayers = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Speculative decoding: the model's own first N layers draft."),
]
Lookup = Annotated[
    int | None,
    typer.Option(
        "--prompt-lookup",
        metavar="N",
        min=1,
        help="Speculative decoding: drafts are what followed the last N tokens earlier in the text.",
    ),
]
DraftTokens = Annotated[
    int | None, typer.Option("--num-draft-tokens", metavar="N", min=1, help="Tokens of a draft; default 4.")
]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Go on after end tokens.")]
SystemPrompt = Annotated[str | None, typer.Option(metavar="TEXT", help="The system message of a chat.")]

ChatTemplate = Annotated[
    str | None,
    typer.Option(
        "--chat-template",
        "--chat-template-file",
        metavar="FILE|TEXT|NAME",
        help="A jinja template, its file, or the name of one of the model's; default the model's own.",
    ),
]
ChatTemplateKwargs = Annotated[
    str | None,
    typer.Option(
        "--chat-template-kwargs",
        "--chat-template-config",
        metavar="JSON",
        help="Variables of the chat template, as a JSON object.",
    ),
]
EnableThinking = Annotated[
    bool | None,
    typer.Option("--enable-thinking/--no-thinking", help="The template's variable enable_thinking."),
]
Tools = Annotated[
    str | None,
    typer.Option("--tools", metavar="FILE.json", help="Tools for the chat template, a list of objects."),
]


def source_of(
    model: str | None, flag: str | None, config: str | None, assignments: list[str] | None
) -> str | RunConfig:
    """The one source that was named; a JSON config of the project as a RunConfig with `--set` applied."""
    from einsum_transformer.formats.files import read_json
    from einsum_transformer.formats.sniff import is_json
    from einsum_transformer.loading.hub import DEFAULT_MODEL
    from einsum_transformer.models.run_config import override, parse_run_config

    given = [name for name in (model, flag, config) if name is not None]
    if len(given) > 1:
        raise InputError(f"MODEL, --model and --config all name the model: give one of {', '.join(given)}")
    source = given[0] if given else DEFAULT_MODEL
    path = Path(source)
    absent = path.suffix == ".json" and not path.exists()  # reading it says so
    raw = read_json(path) if absent or is_json(path) else {}
    if raw and "model_type" not in raw:
        return override(parse_run_config(raw, source), assignments or [])
    if assignments:
        raise InputError(
            f"--set {assignments[0]}: only a JSON config of this project has keys to set, {source} is none"
        )
    return source


def open_model(
    source: str | RunConfig,
    *,
    blas: str,
    threads: int | None,
    dtype: str | None,
    weight_budget: str | None = None,
    quiet: bool = False,
    **settings: Any,
) -> tuple[LoadedModel, float]:
    """(the model, the seconds it took to load); `settings` as for `load`."""
    from einsum_transformer.engine import blas as libraries
    from einsum_transformer.loading.load import load
    from einsum_transformer.models.run_config import RunConfig

    libraries.use(blas)
    if threads is not None:
        libraries.set_threads(threads)
    if isinstance(source, RunConfig):
        _refuse(source, weight_budget)
        if source.use_lora and not quiet:
            note(f"{source.source}: use_lora concerns training; this run has no adapter")
        dtype = dtype or ("float64" if source.weight_dtype == "float64" else None)
    budget = None if weight_budget is None else parse_size(weight_budget, "--weight-budget")
    name = source.source if isinstance(source, RunConfig) else source
    start = time.perf_counter()
    with announced(f"loading {name} ...", quiet):
        model = load(source, dtype or "float32", weight_budget=budget, **settings)
    return model, time.perf_counter() - start


def _refuse(config: RunConfig, weight_budget: str | None) -> None:
    """What a config or its flags ask for and a run does not have."""
    if weight_budget is not None and config.weight_file is None and config.hf_repo_id is None:
        raise InputError(
            f"--weight-budget: {config.source} has random weights, which are in no file to be read again"
        )


def generation_settings(
    model: LoadedModel, config: RunConfig | None, max_tokens: int | None, **flags: Any
) -> tuple[Sampling, Settings]:
    """Flags first (None: not given), then the keys of a JSON config, then those of generation_config.json."""
    from einsum_transformer.generation.decode import options

    stated = dict(model.generation_config or {})
    if config is not None:
        stated |= {"do_sample": config.temperature > 0, "temperature": config.temperature}
        stated |= {"top_k": config.top_k_sample, "max_new_tokens": config.max_new_tokens}
    given = flags | {"max_new_tokens": max_tokens, "stop": flags.get("stop") or None}
    return options(model, given, stated)


def speculation_of(
    model: LoadedModel,
    config: RunConfig | None,
    draft_model: str | None,
    draft_layers: int | None,
    prompt_lookup: int | None,
    num_draft_tokens: int | None,
    **where: Any,
) -> Speculation | None:
    """What the flags ask for, or else the keys of a JSON config; `where`: how to load a draft model."""
    from einsum_transformer.generation.speculative import speculation

    if config is not None and config.speculative and draft_model is None and prompt_lookup is None:
        draft_layers = draft_layers or config.draft_layers
        if draft_layers is None:
            raise InputError(
                f"{config.source}: speculative needs draft_layers, the number of layers that draft"
            )
    drafting = None
    if draft_model is not None:
        drafting, _ = open_model(draft_model, blas="auto", threads=None, **where)
    return speculation(model, drafting, draft_layers, prompt_lookup or False, num_draft_tokens)


def parse_size(text: str, flag: str) -> int:
    """Bytes of `500M`, `2G`, `1.5GiB`: K, M, G and T are powers of 1000, KiB and so on of 1024."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", text.strip().lower())
    if match is None or (match[3] and not match[2]):
        raise InputError(f"{flag} {text!r}: write a size such as 500M, 2G or 1.5GiB")
    size = float(match[1]) * (1024 if match[3] else 1000) ** " kmgt".index(match[2] or " ")
    if not 1 <= size < 1 << 60:
        raise InputError(f"{flag} {text!r}: from 1 byte to 1000000T")
    return int(size)


def console() -> Console:
    """Where everything but results is written."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def note(text: str) -> None:
    """One line on stderr."""
    print(text, file=sys.stderr, flush=True)


def write(text: str) -> None:
    """A piece of the result, seen at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


@contextmanager
def announced(text: str, quiet: bool) -> Iterator[None]:
    """Says what is being waited for if it takes longer than two seconds."""
    if quiet:
        yield
        return
    timer = threading.Timer(2.0, note, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
