"""`sensitivity`: the divergence of each part of a model that is quantized alone, and a mixed scheme."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from einsum_transformer.cli import options, output
from einsum_transformer.cli.flags import flag


@dataclass(frozen=True, slots=True)
class Measured:
    """What is quantized, and where the results are written."""

    by: str = flag(default="kind", metavar="tensor|layer|kind", help="What is quantized alone.")
    budget: str | None = flag(
        metavar="SIZE", help="Propose a mixed scheme with at most this size of weights (90M), and measure it."
    )
    results: options.Results = None
    plot: str | None = flag(metavar="FILE.png", help="Plot bytes and divergence to this file.")


def sensitivity(
    *,
    named: options.NamedOrConfig,
    file: options.TextFile = ...,  # type: ignore[assignment]
    schemes: options.Schemes = None,
    measured: Measured,
    ctx_size: options.ChunkSize = None,
    chunks: options.Chunks = None,
    every: options.Every = False,
    machine: options.Machine,
    max_layers: options.MaxLayers = None,
    seed: options.Seed = None,
    hub: options.Hub,
    shown: options.Shown,
) -> None:
    """Quantize each tensor, layer or kind of matrix alone, and show how much the predictions change.

    The measure is the KL divergence of `etx eval kld`. With --budget, the parts that suffer least get the
    fewest bytes; the resulting mixed scheme is measured and compared with the whole model in one scheme.
    In Python: et.sensitivity.

    \b
    etx sensitivity -f notes.txt
    etx sensitivity -f notes.txt --by layer --budget 90M --plot pareto.png
    etx sensitivity -f notes.txt --by tensor --scheme W8A16 --scheme W4A16g64 --results tensors.jsonl
    """
    from einsum_transformer.analysis.plots import check_plot
    from einsum_transformer.api.sensitivity import sensitivity as call

    path = options.text_file(file)
    if measured.plot is not None:
        check_plot(measured.plot)
    given: dict[str, Any] = {"ctx_size": ctx_size, "chunks": chunks, "results": measured.results}
    given["schemes"] = schemes or None
    more = {name: value for name, value in given.items() if value is not None}
    if measured.budget is not None:
        more["budget"] = options.parse_size(measured.budget, "--budget")
    settings = {"max_layers": max_layers, "seed": seed, "quantization": "none"}
    model, _ = options.open_model(named.source(), hub, machine, quiet=shown.silent, **settings)
    found = call(model, path, by=measured.by, progress=output.progress("measurements", shown.silent), **more)
    if measured.plot is not None:
        found.plot(measured.plot)
    output.write_line(found.to_dict() if shown.json else found.text(every))
