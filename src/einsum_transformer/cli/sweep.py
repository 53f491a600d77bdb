"""`sweep`: count and measure a model while keys of its config vary."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from einsum_transformer.cli import options, output
from einsum_transformer.cli.flags import flag
from einsum_transformer.errors import InputError


@dataclass(frozen=True, slots=True)
class Written:
    """Files that are written."""

    results: options.Results = None
    csv: str | None = flag(metavar="FILE.csv", help="Write one row per point to this file.")
    plot: str | None = flag(metavar="FILE.png", help="Plot seconds and memory to this file.")


def sweep(
    *,
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG", show_default=False, help="JSON run config or name of a packaged config (llama)."
        ),
    ],
    vary: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=V1,V2", help="Values of a key of the config, or threads; may be repeated."),
    ] = None,
    measure: Annotated[
        str, typer.Option(metavar="prefill|decode|training|none", help="What is timed; none: only counts.")
    ] = "prefill",
    repetitions: Annotated[int, typer.Option(metavar="N", min=1, help="Timed steps of each point.")] = 5,
    assignments: options.Assignments = None,
    written: Written,
    machine: options.Machine,
    seed: options.Seed = None,
    shown: options.Shown,
) -> None:
    """Count and measure a model for all combinations of values of some keys, and fit how its costs grow.

    Each point has the operations, bytes and memory of `etx plan`, the median seconds of a step, and its peak
    memory. For a key with three or more numbers, cost = c key^p is fitted: the exponent p, its 95 % interval
    and R^2. All points are planned first; a sweep that does not fit into memory is not started.
    In Python: et.sweep.

    \b
    etx sweep fast_lora --vary seq_len=64,128,256,512 --vary n_layers=2,4
    etx sweep fast_lora --vary batch_size=1,2,4,8 --measure decode --results decode.jsonl --plot decode.png
    etx sweep fast_lora --vary threads=1,2 --vary quantization=null,W8A16 --set n_layers=2
    etx sweep llama --vary seq_len=1024,4096,16384 --measure none
    """
    from einsum_transformer.api.sweep import sweep as call
    from einsum_transformer.loading import libraries

    libraries.use(machine.blas)
    more: dict[str, Any] = asdict(written) | {"measure": measure, "repetitions": repetitions}
    more |= {"threads": machine.threads} | ({} if seed is None else {"seed": seed})
    more["progress"] = output.progress("points", shown.silent)
    source, values = options.source_of(config, assignments), _values(vary or [])
    with output.announced("planning all points, then one after the other ...", shown.silent):
        found = call(source, values, **more)
    output.write_line(found.to_dict() if shown.json else str(found))


def _values(texts: list[str]) -> dict[str, list[Any]]:
    """The values of `--vary`: JSON values separated by commas; what is not valid JSON is a string."""
    found: dict[str, list[Any]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        if not (key and equals):
            raise InputError(f"--vary {text!r}: expected KEY=V1,V2")
        try:
            own: list[Any] = json.loads(f"[{values}]")
        except ValueError:
            own = [_value(each) for each in values.split(",")]
        found.setdefault(key, []).extend(own)
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
