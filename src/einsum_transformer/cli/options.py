"""What the commands share: flags, the way from them to a model, and the notes on stderr."""

from __future__ import annotations

import inspect
import json
import logging
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, field, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

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

Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of a JSON config; may be repeated."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, and nothing else there.")]
Offline = Annotated[bool, typer.Option("--offline", help="Never use the network.")]
AllowLinks = Annotated[
    bool,
    typer.Option("--allow-links", help="Read weights through links that lead out of the model's folder."),
]
Revision = Annotated[
    str | None, typer.Option(metavar="NAME", help="Branch, tag or commit of a hub repository.")
]
Dtype = Annotated[
    str | None, typer.Option(metavar="float32|float64", help="What is computed in; default float32.")
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
Seed = Annotated[
    int | None, typer.Option(metavar="N", min=0, help="Of the sampling, random weights and random prompts.")
]


_KEYWORD = inspect.Parameter.KEYWORD_ONLY


def flag(*names: str, default: Any = None, **options: Any) -> Any:
    """A field of a group of flags: its names, its default, and what else `typer.Option` takes."""
    return field(default=default, metadata={"option": typer.Option(*names, **options)})


def ungrouped(command: Callable[..., None]) -> Callable[..., None]:
    """The command with a parameter for each field of those of its parameters that are groups of flags.

    A group is a dataclass whose fields are flags, so that commands can have the same ones, and pass them on.
    """
    signature = inspect.signature(command, eval_str=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    for name, parameter in signature.parameters.items():
        if is_dataclass(parameter.annotation):
            groups[name] = parameter.annotation
            parameters += _flags(parameter.annotation)
        else:
            parameters.append(parameter)

    @wraps(command)
    def called(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{each.name: given.pop(each.name) for each in fields(group)})
        command(**given)

    called.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return called


def _flags(group: Any) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    for each in fields(group):
        kind = hints[each.name]
        kind = Annotated[kind, each.metadata["option"]] if each.metadata else kind
        yield inspect.Parameter(each.name, _KEYWORD, default=each.default, annotation=kind)


@dataclass(frozen=True, slots=True)
class Named:
    """The model, in one of two ways."""

    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            show_default=False,
            help="Hugging Face folder or hub id, .gguf file, JSON config (random weights); "
            "default smollm2-135m.",
        ),
    ] = None
    model_flag: str | None = flag("--model", "-m", metavar="MODEL", help="The same as MODEL.")

    def source(self, assignments: list[str] | None = None) -> str | RunConfig:
        """The one source that was named, as `source_of` has it."""
        from einsum_transformer.loading.hub import DEFAULT_MODEL

        given = [name for name in astuple(self) if name is not None]
        if len(given) > 1:
            raise InputError(
                f"MODEL, --model and --config all name the model: give one of {', '.join(given)}"
            )
        return source_of(given[0] if given else DEFAULT_MODEL, assignments)


@dataclass(frozen=True, slots=True)
class NamedOrConfig(Named):
    """The model, in one of three ways."""

    config: str | None = flag("--config", metavar="FILE.json", help="The same, for a JSON config.")


@dataclass(frozen=True, slots=True)
class Hub:
    """How files are found."""

    revision: Revision = None
    offline: Offline = False
    allow_links: AllowLinks = False


@dataclass(frozen=True, slots=True)
class Machine:
    """What computes."""

    blas: str = flag(default="auto", metavar="auto|numpy|mkl", help="BLAS library of the matrix products.")
    threads: int | None = flag(
        "--threads", "-t", "--num-threads", metavar="N", min=1, help="BLAS threads; default all cores."
    )


@dataclass(frozen=True, slots=True)
class Loading(Machine):
    """How a model is loaded to generate with it."""

    weight_budget: str | None = flag(
        metavar="SIZE", help="Weights held in memory (500M, 2G); the rest is read when it is needed."
    )
    adapter_path: AdapterPath = None
    max_layers: MaxLayers = None
    dtype: Dtype = None

    def open(
        self, source: str | RunConfig, hub: Hub, seed: int | None, quiet: bool
    ) -> tuple[LoadedModel, float]:
        """The model, as `open_model` has it."""
        more = {"max_layers": self.max_layers, "adapter": self.adapter_path, "seed": seed}
        return open_model(source, hub, self, self.dtype, quiet, self.weight_budget, **more)


@dataclass(frozen=True, slots=True)
class Sampled:
    """Which tokens are chosen, and how many; the names are those of `generate`."""

    max_new_tokens: int | None = flag(
        "--max-tokens", "-n", "--max-new-tokens", metavar="N", min=0, help="Tokens to generate; default 128."
    )
    temperature: float | None = flag(
        "--temp", "--temperature", metavar="X", min=0, help="0 takes the likeliest token."
    )
    top_k: int | None = flag(metavar="K", min=0, help="Draw from the K likeliest tokens; 0 switches it off.")
    top_p: float | None = flag(
        metavar="P", min=0, max=1, help="Draw from the tokens that make up this probability."
    )
    min_p: float | None = flag(
        metavar="P", min=0, max=1, help="Leave out tokens below this share of the likeliest."
    )
    repetition_penalty: float | None = flag(
        metavar="X", help="Above 1, tokens that occurred become less likely."
    )
    seed: Seed = None
    stop: list[str] | None = flag(metavar="TEXT", help="End at this text; may be repeated.")


@dataclass(frozen=True, slots=True)
class Context:
    """How prompt and answer are read; the names are those of `generate`."""

    ctx_size: int | None = flag(
        "--ctx-size", "-c", metavar="N", min=1, help="Most tokens of prompt and answer together."
    )
    prefill_step_size: int | None = flag(
        metavar="N", min=1, help="Prompt tokens per forward pass; default 512."
    )


@dataclass(frozen=True, slots=True)
class Drafting:
    """Speculative decoding; the names are those of `generate`."""

    draft_model: str | None = flag(
        metavar="MODEL", help="Speculative decoding: a small model of the same vocabulary drafts."
    )
    draft_layers: int | None = flag(
        metavar="N", min=1, help="Speculative decoding: the model's own first N layers draft."
    )
    prompt_lookup: int | None = flag(
        "--prompt-lookup",
        metavar="N",
        min=1,
        help="Speculative decoding: drafts are what followed the last N tokens earlier in the text.",
    )
    num_draft_tokens: int | None = flag(
        "--num-draft-tokens", metavar="N", min=1, help="Tokens of a draft; default 4."
    )


def silence(quiet: bool) -> bool:
    """Drop the library's notes if `--quiet` is given."""
    LOGGER.setLevel(logging.ERROR if quiet else logging.WARNING)
    return quiet


@dataclass(frozen=True, slots=True)
class Shown:
    """What is shown beside the result."""

    json: Json = False
    quiet: bool = flag("--quiet", default=False, callback=silence, help="Only the text: no notes, no table.")

    @property
    def silent(self) -> bool:
        """Whether stderr is only for mistakes."""
        return self.json or self.quiet


def source_of(source: str, assignments: list[str] | None = None) -> str | RunConfig:
    """A JSON config of the project, or a ready config by name, as a RunConfig with `--set` applied; any other
    source as it is."""
    from einsum_transformer.formats.files import read_json
    from einsum_transformer.formats.sniff import is_json
    from einsum_transformer.models.ready import ready_config
    from einsum_transformer.models.run_config import override, parse_run_config

    if (ready := ready_config(source)) is not None:
        return override(ready, assignments or [])
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
    hub: Hub,
    machine: Machine,
    dtype: str | None = None,
    quiet: bool = False,
    weight_budget: str | None = None,
    **settings: Any,
) -> tuple[LoadedModel, float]:
    """(the model, the seconds it took to load); `settings` as for `load`."""
    from einsum_transformer.engine import blas
    from einsum_transformer.loading.load import load
    from einsum_transformer.models.run_config import RunConfig

    blas.use(machine.blas)
    if machine.threads is not None:
        blas.set_threads(machine.threads)
    if isinstance(source, RunConfig):
        if weight_budget is not None and source.weight_file is None and source.hf_repo_id is None:
            raise InputError(
                f"--weight-budget: {source.source} has random weights, which are in no file to be read again"
            )
        if source.use_lora and not quiet:
            note(f"{source.source}: use_lora concerns training; this run has no adapter")
        dtype = dtype or ("float64" if source.weight_dtype == "float64" else None)
    budget = None if weight_budget is None else parse_size(weight_budget, "--weight-budget")
    name = source.source if isinstance(source, RunConfig) else source
    start = time.perf_counter()
    with announced(f"loading {name} ...", quiet):
        model = load(source, dtype or "float32", weight_budget=budget, **asdict(hub), **settings)
    return model, time.perf_counter() - start


def generation_settings(
    model: LoadedModel, config: RunConfig | None, sampled: Sampled, context: Context, **more: Any
) -> tuple[Sampling, Settings]:
    """Flags first (None: not given), then the keys of a JSON config, then those of generation_config.json."""
    from einsum_transformer.generation.decode import options

    stated = dict(model.generation_config or {})
    if config is not None:
        stated |= {"do_sample": config.temperature > 0, "temperature": config.temperature}
        stated |= {"top_k": config.top_k_sample, "max_new_tokens": config.max_new_tokens}
    stop = tuple(sampled.stop or ()) or None
    return options(model, asdict(sampled) | asdict(context) | more | {"stop": stop}, stated)


def speculation_of(
    model: LoadedModel, config: RunConfig | None, flags: Drafting, loading: Loading, hub: Hub, quiet: bool
) -> Speculation | None:
    """What the flags ask for, or else the keys of a JSON config; a draft model is loaded like the model."""
    from einsum_transformer.generation.speculative import speculation

    layers = flags.draft_layers
    if (
        config is not None
        and config.speculative
        and flags.draft_model is None
        and flags.prompt_lookup is None
    ):
        layers = layers or config.draft_layers
        if layers is None:
            raise InputError(
                f"{config.source}: speculative needs draft_layers, the number of layers that draft"
            )
    drafting = None
    if flags.draft_model is not None:
        drafting, _ = open_model(flags.draft_model, hub, loading, loading.dtype, quiet, loading.weight_budget)
    return speculation(model, drafting, layers, flags.prompt_lookup or False, flags.num_draft_tokens)


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


def write_line(result: str | Mapping[str, Any]) -> None:
    """The result, as text or as one JSON object, and the end of its line."""
    write((result if isinstance(result, str) else json.dumps(result)) + "\n")


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
