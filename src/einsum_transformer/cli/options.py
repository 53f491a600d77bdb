"""The flags that several commands share, and the loading of a model with them."""

from __future__ import annotations

import re
import time
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from einsum_transformer.cli.flags import flag, moved
from einsum_transformer.cli.output import announced, silence
from einsum_transformer.errors import InputError

if TYPE_CHECKING:
    from einsum_transformer.generation.options import GenerationOptions
    from einsum_transformer.models.model import Model as LoadedModel
    from einsum_transformer.models.run_config import RunConfig

Source = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        show_default=False,
        help="Hugging Face folder or hub id, .gguf file, JSON config or name of a packaged config (llama).",
    ),
]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of a run config; may be repeated."),
]
Json = Annotated[bool, typer.Option("--json", help="Write only one JSON object to stdout.")]
Offline = Annotated[bool, typer.Option("--offline", help="Never use the network.")]
AllowLinks = Annotated[
    bool,
    typer.Option("--allow-links", help="Follow links to files outside of the model's folder."),
]
Revision = Annotated[
    str | None, typer.Option(metavar="NAME", help="Branch, tag or commit of a hub repository.")
]
Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="float32|float64|bfloat16",
        help="Type of weights and computation; default float32. bfloat16: of the matrices only.",
    ),
]
MaxLayers = Annotated[
    int | None,
    typer.Option("--max-layers", "--num-layers", metavar="N", min=1, help="Use only the first N layers."),
]
AdapterPath = Annotated[
    str | None,
    typer.Option("--adapter-path", metavar="FOLDER", help="LoRA adapter of PEFT, mlx-lm or `etx train`."),
]
Seed = Annotated[
    int | None,
    typer.Option(metavar="N", min=0, help="Seed of sampling, random weights and random tokens; default 0."),
]


def text_file(name: str) -> Path:
    """Return the path of a text. Raises InputError, before the model is loaded, if it is not a file."""
    path = Path(name)
    if not path.is_file():
        raise InputError(f"{path}: not a file")
    return path


def _writable(name: str) -> Any:
    """Return a callback that checks the file before the model is loaded; name: of the argument."""

    def checked(path: str | None) -> str | None:
        if path is not None:
            from einsum_transformer.formats.files import check_writable

            check_writable(Path(path), name)
        return path

    return checked


Trace = Annotated[
    str | None,
    typer.Option(
        metavar="FILE.json",
        callback=_writable("trace"),
        help="Write a trace of phases and einsum calls for https://ui.perfetto.dev.",
    ),
]
Equations = Annotated[
    bool, typer.Option("--equations", help="Also show the time of each equation, and the rest of each phase.")
]
Memory = Annotated[
    bool, typer.Option("--memory", help="Also show the memory of each owner over time; makes the run slower.")
]
TokenFile = Annotated[
    str | None,
    typer.Option("--tokens", metavar="FILE.npy", help="Token ids of shape (time) or (batch, time)."),
]
Rows = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        "-b",
        metavar="N",
        min=1,
        help="Rows of a batch; default 1 (gradcheck 2, train 4), or the config's.",
    ),
]
Length = Annotated[int, typer.Option("--seq-len", metavar="N", min=1, help="Tokens of each row.")]
Output = Annotated[
    str | None, typer.Option("--output", "-o", metavar="PATH", help="Folder to write the result to.")
]
Page = Annotated[
    str | None,
    typer.Option(
        "--output",
        "-o",
        metavar="PATH",
        callback=_writable("output"),
        help="HTML file to write the result to.",
    ),
]
Results = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="JSON lines, written after each measurement; a second run continues from them."
    ),
]
TextFile = Annotated[
    str, typer.Option("--file", "-f", metavar="FILE", show_default=False, help="A text in UTF-8.")
]
ChunkSize = Annotated[
    int | None,
    typer.Option(
        "--ctx-size", "-c", metavar="N", min=1, help="Tokens of the context: of a chunk (512; precision 128)."
    ),
]
Chunks = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Use only the first N chunks (default all; sensitivity 4)."),
]
Schemes = Annotated[
    list[str] | None,
    typer.Option("--scheme", metavar="SCHEME", help="A quantization to measure, W8A16; may be repeated."),
]
Every = Annotated[bool, typer.Option("--every", help="Show all rows of the table.")]
CacheTypeK = Annotated[
    str | None,
    typer.Option(
        "--cache-type-k", "-ctk", metavar="TYPE", help="Stored keys: float32, float16, int8 or int4."
    ),
]
CacheTypeV = Annotated[
    str | None,
    typer.Option(
        "--cache-type-v", "-ctv", metavar="TYPE", help="Stored values: float32, float16, int8 or int4."
    ),
]
GradCheckpoint = Annotated[
    bool,
    typer.Option("--grad-checkpoint", help="Recompute blocks in the backward pass: less memory, more time."),
]


@dataclass(frozen=True, slots=True)
class Named:
    """The model, as an argument or as `--model`."""

    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            show_default=False,
            help="Hugging Face folder or hub id, .gguf file, JSON config or name of a packaged config "
            "(random weights); default smollm2-135m.",
        ),
    ] = None
    model_flag: str | None = flag("--model", "-m", metavar="MODEL", help="The same as MODEL.")

    def source(self, assignments: list[str] | None = None) -> str | RunConfig:
        """Return the source that is named, as `source_of` returns it."""
        from einsum_transformer.loading.hub import DEFAULT_MODEL

        given = [name for name in astuple(self) if name is not None]
        if len(given) > 1:
            raise InputError(
                f"MODEL, --model and --config all name the model: give one of {', '.join(given)}"
            )
        return source_of(given[0] if given else DEFAULT_MODEL, assignments)


@dataclass(frozen=True, slots=True)
class NamedOrConfig(Named):
    """The model, as an argument, as `--model` or as `--config`."""

    config: str | None = flag("--config", metavar="FILE.json", help="The same as MODEL, for a run config.")


@dataclass(frozen=True, slots=True)
class Hub:
    """The search for the model's files."""

    revision: Revision = None
    offline: Offline = False
    allow_links: AllowLinks = False


@dataclass(frozen=True, slots=True)
class Machine:
    """The BLAS library and its threads."""

    blas: str = flag(default="auto", metavar="auto|numpy|mkl", help="BLAS library of the matrix products.")
    threads: int | None = flag(
        "--threads", "-t", "--num-threads", metavar="N", min=1, help="BLAS threads; default all cores."
    )


@dataclass(frozen=True, slots=True)
class Quantized(Machine):
    """The quantization of the weights, and the library of the products."""

    quantization: str | None = flag(
        metavar="SCHEME", help="Quantize the weights: W8A16, W4A16g64, ...; none: ignore that of a config."
    )
    quantization_mode: str = flag(
        default="real", metavar="real|simulated", help="Store integer codes, or rounded floats."
    )
    quantization_exclude: list[str] | None = flag(
        metavar="NAME", help="A module that is not quantized, by name or regular expression; may be repeated."
    )

    quantization_by_name: list[str] | None = flag(
        metavar="NAME=SCHEME", help="The scheme of a module, by name or regular expression; may be repeated."
    )

    def by_name(self) -> dict[str, str] | None:
        """The schemes by name."""
        pairs = [each.rpartition("=") for each in self.quantization_by_name or ()]
        for name, equals, scheme in pairs:
            if not (name and equals):
                raise InputError(f"--quantization-by-name {scheme!r}: expected NAME=SCHEME")
        return {name: scheme for name, _, scheme in pairs} or None

    def quantized(self) -> dict[str, Any]:
        """The arguments of `load`."""
        return {
            "quantization": self.quantization,
            "quantization_mode": self.quantization_mode,
            "quantization_exclude": self.quantization_exclude or (),
            "quantization_by_name": self.by_name(),
        }


@dataclass(frozen=True, slots=True)
class Stored(Quantized):
    """How the weights are stored in memory."""

    packed: bool | None = flag(
        "--packed/--no-packed",
        help="Keep matrices of a GGUF file in its encoding; default: if their floats are too large.",
    )

    def stored(self) -> dict[str, Any]:
        """The arguments of `load`."""
        return {**self.quantized(), "packed": self.packed}


@dataclass(frozen=True, slots=True)
class Loading(Stored):
    """The loading of a model for generation."""

    weight_budget: str | None = flag(
        metavar="SIZE", help="Maximum size of weights in memory (500M, 2G); others are read when needed."
    )
    adapter_path: AdapterPath = None
    max_layers: MaxLayers = None
    dtype: Dtype = None
    cache_type_k: CacheTypeK = None
    cache_type_v: CacheTypeV = None

    def open(
        self, source: str | RunConfig, hub: Hub, seed: int | None, quiet: bool
    ) -> tuple[LoadedModel, float]:
        """Return the model and the seconds of loading, see `open_model`."""
        from einsum_transformer.models.run_config import RunConfig

        more = {"max_layers": self.max_layers, "adapter": self.adapter_path, "seed": seed}
        caches = {"cache_type_k": self.cache_type_k, "cache_type_v": self.cache_type_v}
        dtype = self.dtype
        if dtype is None and self.weight_budget is None and isinstance(source, RunConfig):
            scheme = source.quantization if self.quantization is None else self.quantization
            plain = scheme in (None, "none")
            dtype = "bfloat16" if plain and source.weight_dtype == "bfloat16" else None
        return open_model(
            source, hub, self, dtype, quiet, self.weight_budget, **more, **caches, **self.stored()
        )


@dataclass(frozen=True, slots=True)
class Sampled:
    """Sampling and length; the fields are options of `generate`."""

    max_new_tokens: int | None = flag(
        "--max-tokens", "-n", "--max-new-tokens", metavar="N", min=0, help="Tokens to generate; default 128."
    )
    temperature: float | None = flag(
        "--temp", "--temperature", metavar="X", min=0, help="Sampling temperature; 0: greedy decoding."
    )
    top_k: int | None = flag(metavar="K", min=0, help="Sample from the K most probable tokens; 0: from all.")
    top_p: float | None = flag(
        metavar="P", min=0, max=1, help="Sample from the most probable tokens that sum to probability P."
    )
    min_p: float | None = flag(
        metavar="P", min=0, max=1, help="Remove tokens below P times the highest probability."
    )
    repetition_penalty: float | None = flag(
        metavar="X", help="Above 1: tokens of the text so far become less probable."
    )
    seed: Seed = None
    stop: list[str] | None = flag(metavar="TEXT", help="Stop before this text; may be repeated.")


@dataclass(frozen=True, slots=True)
class Context:
    """Context size and prefill; the fields are options of `generate`."""

    ctx_size: int | None = flag(
        "--ctx-size", "-c", metavar="N", min=1, help="Tokens of the context: of prompt and answer."
    )
    prefill_step_size: int | None = flag(
        metavar="N", min=1, help="Prompt tokens per forward pass; default 512."
    )


@dataclass(frozen=True, slots=True)
class Drafting:
    """Speculative decoding; the fields are options of `generate`."""

    draft_model: str | None = flag(
        metavar="MODEL", help="Speculative decoding: draft with a small model with the same vocabulary."
    )
    draft_layers: int | None = flag(
        metavar="N", min=1, help="Speculative decoding: draft with the first N layers of the model."
    )
    prompt_lookup: int | None = flag(
        "--prompt-lookup",
        metavar="N",
        min=1,
        help="Speculative decoding: draft the continuation of the last N tokens earlier in the text.",
    )
    num_draft_tokens: int | None = flag(
        "--num-draft-tokens", metavar="N", min=1, help="Tokens per draft; default 4."
    )


@dataclass(frozen=True, slots=True)
class Shown:
    """The output besides the result."""

    json: Json = False
    quiet: bool = flag(
        "--quiet", default=False, callback=silence, help="Write only the result: no notes, no tables."
    )

    @property
    def silent(self) -> bool:
        """Whether only errors are written to stderr."""
        return self.json or self.quiet


@dataclass(frozen=True, slots=True)
class MovedSizes:
    """Flags of `explain` and `diff` that were renamed."""

    moved_tokens: str | None = moved("--tokens", "--seq-len N")
    moved_batch: str | None = moved("--batch", "--batch-size N")


def generation_options(
    sampled: Sampled, context: Context, drafting: Drafting, loading: Loading, hub: Hub, quiet: bool
) -> GenerationOptions:
    """Return the options of `generate` from the flags; a draft model is loaded like the model."""
    found: dict[str, Any] = asdict(sampled) | asdict(context) | asdict(drafting)
    found["stop"] = tuple(sampled.stop or ()) or None
    if drafting.draft_model is not None:
        found["draft_model"], _ = open_model(
            drafting.draft_model, hub, loading, loading.dtype, quiet, loading.weight_budget
        )
    given: GenerationOptions = {**found}  # type: ignore[typeddict-item]
    return given


def source_of(source: str, assignments: list[str] | None = None) -> str | RunConfig:
    """Return a run config as a RunConfig with `--set` applied; any other source unchanged."""
    from einsum_transformer.formats.files import read_json
    from einsum_transformer.formats.sniff import is_json
    from einsum_transformer.models.ready import ready_config
    from einsum_transformer.models.run_config import override, parse_run_config

    if (ready := ready_config(source)) is not None:
        return override(ready, assignments or [])
    path = Path(source)
    absent = path.suffix == ".json" and not path.exists()  # reading it raises the error
    raw = read_json(path) if absent or is_json(path) else {}
    if raw and "model_type" not in raw:
        return override(parse_run_config(raw, source), assignments or [])
    if assignments:
        raise InputError(
            f"--set {assignments[0]}: {source} is not a run config; only the keys of a run config can be set"
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
    """Return the model and the seconds of loading; `settings` are arguments of `load`."""
    from einsum_transformer.engine import blas
    from einsum_transformer.loading import libraries
    from einsum_transformer.loading.load import load
    from einsum_transformer.models.run_config import RunConfig

    if machine.threads is not None:
        blas.set_threads(machine.threads)
    libraries.use(machine.blas)
    if isinstance(source, RunConfig):
        dtype = dtype or ("float64" if source.weight_dtype == "float64" else None)
    budget = None if weight_budget is None else parse_size(weight_budget, "--weight-budget")
    name = source.source if isinstance(source, RunConfig) else source
    start = time.perf_counter()
    with announced(f"loading {name} ...", quiet):
        model = load(source, dtype or "float32", weight_budget=budget, **asdict(hub), **settings)
    return model, time.perf_counter() - start


def parse_size(text: str, name: str) -> int:
    """Return the bytes of `500M`, `2G` or `1.5GiB`: K, M, G, T are powers of 1000, KiB etc. of 1024."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", text.strip().lower())
    if match is None or (match[3] and not match[2]):
        raise InputError(f"{name} is {text!r}: expected a size such as 500M, 2G or 1.5GiB")
    size = float(match[1]) * (1024 if match[3] else 1000) ** " kmgt".index(match[2] or " ")
    if not 1 <= size < 1 << 60:
        raise InputError(f"{name} is {text!r}: expected 1 byte to 1000000T")
    return int(size)
