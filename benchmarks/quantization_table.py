"""The price of quantization on SmolLM2: perplexity, KL divergence, bytes, speed of prefill and decode.

Each scheme runs in a process of its own. The text is the beginning of examples/shakespeare.txt; GPTQ and AWQ
are calibrated on a later part of it. Accuracy and speed can be measured apart, because the accuracy does not
depend on what else the machine does.

    python benchmarks/quantization_table.py --json table.json
    python benchmarks/quantization_table.py --measure accuracy --json table.json
    python benchmarks/quantization_table.py --measure speed --json table.json --markdown
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from machine import Table, machine_line, median, progress, save_json, show, touch_memory
from processes import ROOT

TEXT = ROOT / "examples" / "shakespeare.txt"
SCORED = 60_000
"""Bytes of the text that are scored."""
CALIBRATION = slice(200_000, 500_000)
ROWS: dict[str, dict[str, Any]] = {
    "none": {},
    "bfloat16": {"dtype": "bfloat16"},
    "W8A16": {"scheme": "W8A16"},
    "W8A8": {"scheme": "W8A8"},
    "W8A8KV8": {"scheme": "W8A8KV8"},
    "W8A8KV4": {"scheme": "W8A8KV4"},
    "W4A16g64": {"scheme": "W4A16g64"},
    "W4A16g64 GPTQ": {"scheme": "W4A16g64", "method": "gptq"},
    "W4A16g64 AWQ": {"scheme": "W4A16g64", "method": "awq"},
    "W4A8g64": {"scheme": "W4A8g64"},
    "W4A4g64": {"scheme": "W4A4g64"},
}
STEPS = 128


def quantized(row: dict[str, Any], mode: str = "real", dtype: str = "float32") -> Any:
    """The model of a row; dtype: of the computation, for a scheme."""
    import einsum_transformer as et

    if "scheme" not in row:
        return et.load(dtype=row.get("dtype", dtype))
    calibrated = {} if "method" not in row else {"method": row["method"], "calibration": calibration()}
    return et.quantize(et.load(dtype=dtype), row["scheme"], mode=mode, **calibrated)


def calibration() -> str:
    return TEXT.read_bytes()[CALIBRATION].decode("utf-8", "ignore")


def text() -> str:
    """The scored text."""
    return TEXT.read_bytes()[:SCORED].decode("utf-8", "ignore")


def accuracy(row: dict[str, Any]) -> dict[str, Any]:
    """Perplexity of a row, and its divergence from the model without quantization."""
    import einsum_transformer as et

    model = quantized(row)
    if not row:
        found: Any = et.perplexity(model, text())
        names = "perplexity", "standard_error", "tokens"
    else:
        found = et.divergence(model, et.load(), text())
        names = "perplexity", "kl_mean", "kl_standard_error", "kl_p99", "same_top", "tokens"
    return {name: getattr(found, name) for name in names}


def agreement(row: dict[str, Any]) -> dict[str, Any]:
    """The divergence between the real and the simulated mode, in float64: rounded activations amplify the
    last bits of float32."""
    import einsum_transformer as et

    if "scheme" not in row or "method" in row:
        return {}
    models = [quantized(row, mode, "float64") for mode in ("real", "simulated")]
    return {"real_and_simulated": et.divergence(*models, text(), chunks=1).kl_mean}


def speed(row: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of a prefill of 512 tokens and of a decode step, bytes of the weights and peak memory."""
    touch_memory()
    import numpy as np

    from einsum_transformer.tree import named_leaves

    # The methods change the codes, not the speed.
    row = {key: value for key, value in row.items() if key != "method"}
    model = quantized(row)
    held = sum(weight.nbytes for _, weight in named_leaves(model.decoder))
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, 512 + STEPS))
    prefills, steps = [], []
    for _ in range(4):
        cache = model.cache(512)
        start = time.perf_counter()
        model.decoder.forward(tokens[:, :512], cache, "last")
        prefills.append((time.perf_counter() - start) * 1e3)
        cache = model.cache(128 + STEPS)
        model.decoder.forward(tokens[:, :128], cache, "last")
        start = time.perf_counter()
        for i in range(128, 128 + STEPS):
            model.decoder.forward(tokens[:, i : i + 1], cache, "last")
        steps.append((time.perf_counter() - start) * 1e3 / STEPS)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "bytes": held,
        "prefill_ms": median(prefills[1:]),
        "decode_ms": median(steps[1:]),
        "cache_bytes": cache.nbytes,
        "peak_rss_bytes": peak,
    }


def table(found: dict[str, dict[str, Any]]) -> Table:
    header = (
        *("scheme", "perplexity", "KL mean", "KL 99 %", "same top", "real/simulated"),
        *("weights MB", "prefill ms", "decode ms"),
    )
    rows = []
    for name in ROWS:
        row = found.get(name, {})

        def cell(key: str, form: str, factor: float = 1, row: dict[str, Any] = row) -> str:
            return format(row[key] * factor, form) if key in row else ""

        rows.append(
            (
                name,
                cell("perplexity", ".2f"),
                cell("kl_mean", ".4f"),
                cell("kl_p99", ".3f"),
                cell("same_top", ".1%"),
                cell("real_and_simulated", ".0e"),
                cell("bytes", ".0f", 1e-6),
                cell("prefill_ms", ".0f"),
                cell("decode_ms", ".1f"),
            )
        )
    return Table("Quantization of SmolLM2-135M-Instruct", header, rows)


MEASURES = {"accuracy": accuracy, "agreement": agreement, "speed": speed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", nargs="+", choices=list(MEASURES), default=list(MEASURES))
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--json", type=Path, help="results; those of an earlier run are kept")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--one", choices=list(MEASURES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(MEASURES[options.one](ROWS[options.rows[0]])))
        return
    found: dict[str, dict[str, Any]] = {}
    if options.json is not None and options.json.exists():
        found = json.loads(options.json.read_text(encoding="utf-8"))["rows"]
    for measure in options.measure:
        for name in options.rows:
            start = time.perf_counter()
            command = [sys.executable, __file__, "--one", measure, "--rows", name]
            ran = subprocess.run(command, capture_output=True, text=True, check=False)
            if ran.returncode:
                raise SystemExit(f"{name}: {ran.stderr[-2000:]}")
            found[name] = found.get(name, {}) | json.loads(ran.stdout)
            progress(f"{measure} of {name}: {time.perf_counter() - start:.0f} s")
            save_json(options.json, {"machine": machine_line(), "rows": found})
    show([machine_line()], [table(found)], options.markdown)


if __name__ == "__main__":
    main()
