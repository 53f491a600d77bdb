"""`report`: write a run of one or two models as one HTML page."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import typer

from einsum_transformer.cli import options, output
from einsum_transformer.cli.flags import flag
from einsum_transformer.cli.prompts import given_prompt
from einsum_transformer.errors import InputError

Other = Annotated[
    str | None, typer.Argument(metavar="OTHER", show_default=False, help="A second model to show beside it.")
]


@dataclass(frozen=True, slots=True)
class PageFlags:
    """The prompt, the page, and what it shows."""

    prompt: str | None = flag("--prompt", "-p", metavar="TEXT", help="The prompt; `-` reads stdin.")
    prompt_file: str | None = flag(metavar="FILE", help="The prompt as a text file.")
    tokens: options.TokenFile = None
    output: options.Page = None
    training: bool = flag("--training", default=False, help="Also train some steps on the text.")
    tokens_shown: int = flag(
        "--tokens-shown", default=64, metavar="N", help="Tokens whose attention and predictions are shown."
    )


def report(
    *,
    named: options.NamedOrConfig,
    other: Other = None,
    page: PageFlags,
    sampled: options.Sampled,
    context: options.Context,
    loading: options.Loading,
    assignments: options.Assignments = None,
    hub: options.Hub,
    shown: options.Shown,
) -> None:
    """Write a run of one or two models as one HTML page.

    The page shows the program as equations with their arrays, costs and times, the memory, the attention and
    the predictions of each layer. It needs no other file and no network. A second model continues the same
    prompt and is shown beside the first. With --quantization the first model is quantized, and the errors of
    its weights are shown. The default of -n is 8. --json writes the data of the page to stdout. In Python:
    et.report.

    \b
    etx report -p "The capital of France is" -o report.html
    etx report fast_lora --training -o report.html
    etx report --quantization W4A16g64 -p "The sky is" -o report.html
    etx report a.gguf b.gguf -p "The sky is" -n 16 -o report.html
    """
    from einsum_transformer.api.report import report as call

    if page.output is None and not shown.json:
        raise InputError("--output is required: the HTML file to write, or --json")
    given = given_prompt(page.prompt, page.prompt_file, page.tokens)
    source, plain = named.source(assignments), replace(loading, quantization="none", adapter_path=None)
    plain = replace(plain, quantization_by_name=None, quantization_exclude=None)
    model, _ = loading.open(source, hub, sampled.seed, shown.silent)
    models: dict[str, Any] = {"other": None, "reference": None}
    if other is not None:
        models["other"], _ = plain.open(options.source_of(other), hub, sampled.seed, shown.silent)
    if loading.quantization not in (None, "none"):
        models["reference"], _ = plain.open(source, hub, sampled.seed, shown.silent)
    settings: dict[str, Any] = asdict(sampled) | asdict(context) | {"stop": tuple(sampled.stop or ()) or None}
    prompt = given["text"]
    if given["tokens"] is not None:
        prompt = model.checked(given["tokens"], f"the ids of {given['source']}").tolist()
    with output.announced("measuring ...", shown.silent):
        found = call(
            model,
            prompt,
            page.output,
            training=page.training,
            tokens_shown=page.tokens_shown,
            **models,
            **settings,
        )
    if shown.json:
        output.write_line(found.to_dict())
    elif not shown.quiet:
        output.note(str(found))
        output.note(f"wrote {page.output}")
