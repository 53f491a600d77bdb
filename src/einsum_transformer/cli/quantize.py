"""`quantize`: write a model with weights of a few bits, with the bytes and errors of the result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from einsum_transformer.cli import options, output
from einsum_transformer.cli.flags import flag
from einsum_transformer.errors import InputError


@dataclass(frozen=True, slots=True)
class Method:
    """How the weights are rounded, and where they are written."""

    method: str = flag(
        default="rtn", metavar="rtn|gptq|awq", help="Round to nearest, or use a calibration text."
    )
    calibration: str | None = flag(metavar="FILE", help="The text of gptq and awq, in UTF-8.")
    calibration_chunks: int | None = flag(
        metavar="N", min=1, help="Chunks of 512 tokens of the text to use (default 32)."
    )
    output: options.Output = None
    save_format: str | None = flag(
        metavar="einsum_transformer|compressed-tensors",
        help="The format of --output; vLLM and transformers load compressed-tensors.",
    )


def check_other_folder(target: Path, source: Path) -> None:
    """Raise InputError if the result would replace the model."""
    if target.samefile(source):
        raise InputError("--output is the folder of the model: choose another folder")


def quantize(
    *,
    named: options.NamedOrConfig,
    quantized: options.Quantized,
    chosen: Method,
    assignments: options.Assignments = None,
    max_layers: options.MaxLayers = None,
    seed: options.Seed = None,
    hub: options.Hub,
    shown: options.Shown,
) -> None:
    """Quantize a model: show the bytes of each operation and the weights that change most; write a folder.

    Every command loads the folder and keeps its codes and scales in memory. Without --output, only the table
    is shown. In Python: et.quantize, et.quantization_report.

    \b
    etx quantize --quantization W8A8
    etx quantize --quantization W4A16g64 -o my-small-model
    etx quantize --quantization W4A16g64 --method awq --calibration notes.txt -o my-small-model
    etx quantize --quantization W4A16g64 -o for-vllm --save-format compressed-tensors
    """
    from einsum_transformer.api.quantize import quantization_report
    from einsum_transformer.api.quantize import quantize as call

    scheme = quantized.quantization
    if scheme is None:
        raise InputError("--quantization is required: a scheme such as W4A16g64")
    text = None if chosen.calibration is None else options.text_file(chosen.calibration)
    if chosen.calibration_chunks is not None and text is None:
        raise InputError("--calibration-chunks is used with --calibration only")
    settings: dict[str, Any] = {"mode": quantized.quantization_mode, "method": chosen.method}
    settings |= {"exclude": quantized.quantization_exclude or (), "by_name": quantized.by_name()}
    settings["calibration"] = text
    more = {"max_layers": max_layers, "seed": seed, "quantization": "none"}
    plain, _ = options.open_model(named.source(assignments), hub, quantized, quiet=shown.silent, **more)
    progress = output.progress("layers", shown.silent)
    if chosen.calibration_chunks is not None:
        settings["calibration_chunks"] = chosen.calibration_chunks
    if chosen.save_format is not None and chosen.output is None:
        raise InputError("--save-format is used with --output only")
    target = None if chosen.output is None else Path(chosen.output)
    if target is not None and target.is_dir() and Path(plain.source).is_dir():
        check_other_folder(target, Path(plain.source))
    model = call(plain, scheme, progress=progress, **settings)
    found = quantization_report(model, plain)
    if chosen.output is not None:
        form: dict[str, Any] = {"save_format": chosen.save_format} if chosen.save_format else {}
        model.save(chosen.output, **form)
        output.note(f"the quantized model is in {chosen.output}")
    output.write_line(found.to_dict() if shown.json else str(found))
