"""What each parameter of a model changes: the sweeps of the page "What a parameter costs".

Each sweep varies one key of `fast_lora` (random weights) and fits the exponent p of cost = c key^p. Counts
are those of dry runs, seconds and memory are measured.

    python benchmarks/parameters.py --markdown
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from machine import Table, machine_line, progress, save_json, show

import einsum_transformer as et


class Question(NamedTuple):
    """A key and its values, what is measured, the quantities to show, and the changes to the config."""

    key: str
    values: tuple[Any, ...]
    measure: str
    quantities: tuple[str, ...]
    changes: dict[str, Any]


SMALL: dict[str, Any] = {"n_layers": 4, "batch_size": 1, "max_seq_len": 8192}
EXPERTS: dict[str, Any] = SMALL | {"arch": "mixtral", "use_moe": True, "num_experts": 4, "top_k": 2}
QUESTIONS = (
    Question(
        "seq_len",
        (256, 512, 1024, 2048, 4096),
        "prefill",
        ("kv_bytes", "prefill.projection_flops", "prefill.attention_flops", "prefill.seconds"),
        SMALL | {"n_layers": 2},
    ),
    Question("seq_len", (256, 512, 1024, 2048, 4096), "decode", ("decode.flops", "decode.seconds"), SMALL),
    Question(
        "seq_len",
        (128, 256, 512, 1024),
        "training",
        ("training.flops", "training.peak_bytes", "training.measured_bytes", "training.seconds"),
        SMALL,
    ),
    Question(
        "n_layers",
        (2, 4, 8, 16),
        "training",
        ("parameters", "kv_bytes", "training.flops", "training.measured_bytes", "training.seconds"),
        {"batch_size": 1},
    ),
    Question(
        "d_model",
        (256, 512, 1024),
        "prefill",
        ("parameters", "block_parameters", "prefill.projection_flops", "prefill.seconds"),
        {"n_layers": 4, "batch_size": 4},
    ),
    Question(
        "n_kv_heads",
        (1, 2, 4, 8),
        "decode",
        ("parameters", "kv_bytes", "decode.flops", "decode.seconds"),
        SMALL | {"seq_len": 2048},
    ),
    Question("batch_size", (1, 2, 4, 8), "prefill", ("prefill.flops", "prefill.seconds"), {"n_layers": 4}),
    Question(
        "batch_size",
        (1, 2, 4, 8, 16),
        "decode",
        ("decode.flops", "decode.weight_bytes", "kv_bytes", "decode.seconds"),
        {"n_layers": 4},
    ),
    Question(
        "batch_size",
        (1, 2, 4, 8),
        "training",
        ("training.flops", "training.measured_bytes", "training.seconds"),
        {"n_layers": 4},
    ),
    Question(
        "learning_rate",
        (0.0005, 0.005, 0.05, 0.5),
        "training",
        ("training.flops", "training.measured_bytes", "training.seconds"),
        {"n_layers": 4},
    ),
    Question(
        "lora_rank",
        (2, 8, 32, 128),
        "training",
        ("trained_parameters", "training.flops", "training.measured_bytes", "training.seconds"),
        {"n_layers": 4, "use_lora": True},
    ),
    Question(
        "num_experts",
        (2, 4, 8, 16),
        "prefill",
        ("parameters", "prefill.flops", "prefill.seconds"),
        EXPERTS | {"top_k": 2},
    ),
    Question("top_k", (1, 2, 4), "prefill", ("parameters", "prefill.flops", "prefill.seconds"), EXPERTS),
    Question(
        "rope_base",
        (10000.0, 100000.0, 1000000.0),
        "prefill",
        ("parameters", "prefill.flops", "prefill.seconds"),
        SMALL,
    ),
)


def main() -> None:
    """Measure, and print one table of all exponents, and one of the points of each sweep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a smoke test; its figures have no meaning")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE", dest="json_file", help="all points")
    given = parser.parse_args()
    laws, points, found = [], [], []
    questions = [each._replace(values=each.values[:3]) for each in QUESTIONS[6:7]]
    for each in questions if given.quick else QUESTIONS:
        progress(f"{each.key}, {each.measure}")
        config = replace(et.read_run_config("fast_lora"), **each.changes)
        sweep = et.sweep(config, {each.key: list(each.values)}, each.measure, repetitions=given.repetitions)  # type: ignore[arg-type]
        found.append(sweep.to_dict())
        for name in each.quantities:
            law = sweep.law(each.key, name)
            r_squared = "constant" if law.r_squared is None else f"{law.r_squared:.3f}"
            interval = "" if law.r_squared is None else f"{law.low:.2f} to {law.high:.2f}"
            laws.append([each.key, each.measure, name, f"{law.exponent:.2f}", interval, r_squared])
        for point in sweep.points:
            counts, times = point.phases[each.measure], point.measured
            assert times is not None
            loss = f"{times.losses[-1]:.3f}" if times.losses and times.losses[-1] is not None else ""
            values = (
                f"{counts.flops / 1e9:.3f}",
                f"{1e3 * times.seconds:.2f}",
                f"{times.peak_bytes / 1e6:.1f}",
            )
            points.append([each.measure, each.key, str(point.values[each.key]), *values, loss])
    tables = [
        Table("Exponents", ["key", "step", "quantity", "exponent", "95 % interval", "R^2"], laws),
        Table("Points", ["step", "key", "value", "GFLOP", "ms", "measured MB", "loss"], points),
    ]
    show([machine_line()], tables, given.markdown)
    save_json(given.json_file, found)


if __name__ == "__main__":
    main()
