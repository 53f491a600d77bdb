"""Sweeps: exponents of known laws and of counts, measured points, results from which a run continues."""

from __future__ import annotations

import csv
import gc
import itertools
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import einsum_transformer as et
from command_line import etx
from einsum_transformer.analysis import step_times
from einsum_transformer.analysis.growth import fit, quantile
from einsum_transformer.analysis.step_times import StepTimes
from einsum_transformer.analysis.sweep import numeric
from einsum_transformer.api import sweep as api
from einsum_transformer.engine import blas, replay
from einsum_transformer.models.decoder import Decoder

TINY = et.RunConfig(
    "llama", d_model=64, n_layers=2, n_heads=4, d_ff=128, vocab_size=256, batch_size=2, seq_len=48
)


def noisy(exponent: float, noise: float, rng: np.random.Generator, curves: int = 2) -> list[Any]:
    """Curves c x^p with another c each, and normal noise in logarithms."""
    xs = [16, 32, 64, 128, 256]
    return [
        [(x, (i + 1) * 3.0 * x**exponent * math.exp(noise * rng.standard_normal())) for x in xs]
        for i in range(curves)
    ]


@pytest.mark.parametrize("exponent", [-1.0, 0.5, 1.0, 2.0])
def test_exact_laws(exponent: float) -> None:
    """Also with another factor for each curve, and with curves of different lengths."""
    curves = noisy(exponent, 0.0, np.random.default_rng(0), curves=3)
    law = fit([curves[0], curves[1][:2], curves[2][:1]])
    assert law.exponent == pytest.approx(exponent, abs=1e-12)
    assert law.standard_error == pytest.approx(0, abs=1e-12)
    assert law.r_squared == pytest.approx(1)
    assert (law.points, law.combinations) == (8, 3)


def test_the_interval_contains_the_exponent_as_often_as_it_should() -> None:
    """In 95 % of 2,000 noisy sets; the standard deviation of this share is 0.5 %."""
    rng = np.random.default_rng(1)
    found = [fit(noisy(1.5, 0.1, rng)) for _ in range(2000)]
    inside = np.mean([law.low <= 1.5 <= law.high for law in found])
    assert 0.935 < inside < 0.965
    exponents = [law.exponent for law in found]
    assert np.mean(exponents) == pytest.approx(1.5, abs=0.005)
    assert np.std(exponents) == pytest.approx(np.mean([law.standard_error for law in found]), rel=0.1)
    assert all(0.95 < law.r_squared < 1 for law in found if law.r_squared)


def test_the_fit_is_that_of_numpy() -> None:
    (curve,) = noisy(0.7, 0.3, np.random.default_rng(2), curves=1)
    law = fit([curve])
    x, y = np.log(np.array(curve)).T
    (slope, _), covariance = np.polyfit(x, y, 1, cov=True)
    assert law.exponent == pytest.approx(slope)
    assert law.standard_error == pytest.approx(math.sqrt(covariance[0, 0]))
    assert law.r_squared == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2)
    assert law.high - law.exponent == pytest.approx(3.1824 * law.standard_error, rel=1e-4)


def test_a_constant_has_exponent_0_and_no_r_squared() -> None:
    law = fit([[(1, 7.3), (2, 7.3), (3, 7.3)]])
    assert (law.exponent, law.standard_error, law.r_squared) == (0, 0, None)


@pytest.mark.parametrize(
    ("freedom", "expected"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (7, 2.3646), (30, 2.0423), (1000, 1.9623)],
)
def test_quantiles_of_students_distribution(freedom: int, expected: float) -> None:
    """Against the usual table."""
    assert quantile(freedom) == pytest.approx(expected, abs=1e-4)


def test_exponents_of_the_length() -> None:
    found = et.sweep(TINY, {"seq_len": [64, 128, 256, 512], "d_model": [32, 64]}, "none")
    assert [each.values for each in found.points[:3]] == [
        {"seq_len": 64, "d_model": 32},
        {"seq_len": 64, "d_model": 64},
        {"seq_len": 128, "d_model": 32},
    ]
    assert all(each.measured is None for each in found.points)
    for name, exponent in {
        "kv_bytes": 1,
        "prefill.projection_flops": 1,
        "prefill.attention_flops": 2,
        "training.projection_flops": 1,
        "training.attention_flops": 2,
        "training.head_flops": 1,
        "decode.projection_flops": 0,
        "decode.attention_flops": 1,
        "parameters": 0,
    }.items():
        law = found.law("seq_len", name)
        assert law.exponent == pytest.approx(exponent, abs=0.1), name
        assert (law.points, law.combinations) == (8, 2)
        assert law.low <= law.exponent <= law.high
    assert {law.key for law in found.laws} == {"seq_len"}  # d_model has two values


def test_exponents_of_the_layers_and_of_the_batch() -> None:
    found = et.sweep(TINY, {"n_layers": [1, 2, 4], "batch_size": [1, 2, 4]}, "none")
    for key, name, exponent in (
        ("n_layers", "block_parameters", 1),
        ("n_layers", "kv_bytes", 1),
        ("n_layers", "prefill.attention_flops", 1),
        ("n_layers", "prefill.head_flops", 0),
        ("batch_size", "block_parameters", 0),
        ("batch_size", "kv_bytes", 1),
        ("batch_size", "training.projection_flops", 1),
        ("batch_size", "decode.weight_bytes", 0),
    ):
        assert found.law(key, name).exponent == pytest.approx(exponent, abs=1e-6), (key, name)
    assert 0.5 < found.law("n_layers", "parameters").exponent < 1


def test_counts_are_those_of_the_plan() -> None:
    found = et.sweep(TINY, {"seq_len": [96]}, "none")
    (point,) = found.points
    planned = et.plan(replace(TINY, seq_len=96), optimizer="sgd")
    assert (point.parameters, point.weight_bytes) == (planned.parameters, planned.weight_bytes)
    assert point.kv_bytes == planned.kv_bytes
    matrices = 4 * 64 * 64 + 3 * 64 * 128
    assert point.block_parameters == 2 * (matrices + 2 * 64)
    assert point.phases["prefill"].projection_flops == 2 * 2 * 96 * 2 * matrices
    assert point.phases["training"].projection_flops == 3 * 2 * 2 * 96 * 2 * matrices
    assert point.phases["prefill"].head_flops == 2 * 2 * 64 * 256
    assert point.phases["training"].memory_bytes == planned.training[0].peak
    for each in planned.phases:
        own = point.phases[each.name]
        for name in ("flops", "flops_causal", "weight_bytes", "kv_bytes", "activation_bytes"):
            assert getattr(own, name) == each.total(name)
        assert own.peak_bytes == each.peak_bytes
        parts = own.projection_flops + own.attention_flops + own.head_flops
        assert 0.97 * own.flops_causal < parts < own.flops_causal  # the rest are norms
    assert found.laws == ()


def test_training_of_adapters_counts_only_their_gradients() -> None:
    config = replace(TINY, use_lora=True, lora_target_modules=("q_proj", "v_proj"))
    found = et.sweep(config, {"lora_rank": [2, 4, 8]}, "none")
    whole = et.sweep(TINY, {"seq_len": [48]}, "none").points[0]
    for point, rank in zip(found.points, (2, 4, 8), strict=True):
        # Two matrices of 64 x 64 in each of two layers.
        assert point.trained_parameters == 2 * 2 * rank * 128
        assert point.phases["training"].flops < whole.phases["training"].flops
    assert found.law("lora_rank", "trained_parameters").exponent == pytest.approx(1)


@pytest.mark.parametrize("measure", ["prefill", "decode", "training"])
def test_measured_points(measure: Any, tmp_path: Path) -> None:
    config = replace(TINY, d_model=128, d_ff=256, vocab_size=512)
    before = blas.get_threads()
    seen: list[tuple[int, int]] = []
    files = {name: tmp_path / f"sweep.{end}" for name, end in (("csv", "csv"), ("plot", "png"))}
    found = et.sweep(
        config,
        {"seq_len": [64, 128, 192], "threads": [1, 2]},
        measure,
        repetitions=3,
        progress=lambda *counts: seen.append(counts),
        **files,
    )
    assert seen == [(i, 6) for i in range(1, 7)]
    assert blas.get_threads() == before
    for point in found.points:
        assert point.measured is not None
        assert point.measured.seconds > 0
        assert point.measured.seconds == sorted(point.measured.seconds_of_each)[1]
        planned = point.phases[measure].peak_bytes
        # A decode step allocates less than 40 kB, to which Python's objects add.
        tolerance = {"training": 0.15, "prefill": 0.25}.get(measure)
        if tolerance is not None:
            assert point.measured.peak_bytes == pytest.approx(planned, rel=tolerance)
        assert point.measured.peak_bytes > 0.8 * planned
        losses = point.measured.losses
        assert len(losses) == (3 if measure == "training" else 0)
        assert all(loss == pytest.approx(math.log(512), abs=0.2) for loss in losses)
        assert list(losses) == sorted(losses, reverse=True)  # SGD on one batch
    assert [each.values["threads"] for each in found.points] == [1, 2] * 3
    for name in ("seconds", "measured_bytes"):
        assert found.law("seq_len", f"{measure}.{name}").combinations == 2
    rows = list(csv.DictReader(files["csv"].read_text().splitlines()))
    assert [int(row["seq_len"]) for row in rows] == [64, 64, 128, 128, 192, 192]
    assert float(rows[0]["seconds"]) == found.points[0].measured.seconds  # type: ignore[union-attr]
    assert int(rows[5][f"{measure}_flops"]) == found.points[5].phases[measure].flops
    assert files["plot"].read_bytes()[:4] == b"\x89PNG"
    text = str(found)
    assert f"{measure}.seconds" in text
    assert "seq_len does not change parameters" in text
    json.loads(json.dumps(found.to_dict(), allow_nan=False))


def test_a_learning_rate_that_diverges_is_a_point() -> None:
    found = et.sweep(TINY, {"learning_rate": [0.0, 1e-2, 1e15]}, "training", repetitions=3)
    still, falls, diverges = (each.measured.losses for each in found.points if each.measured)
    assert len(set(still)) == 1
    assert falls[2] < falls[0]  # type: ignore[operator]
    assert diverges[-1] is None
    assert "not finite" in str(found)


@pytest.mark.parametrize("measure", ["prefill", "decode", "training"])
def test_the_model_of_a_point_is_freed_before_the_next(measure: Any) -> None:
    gc.collect()
    before = sum(isinstance(each, Decoder) for each in gc.get_objects())

    def check(done: int, total: int) -> None:
        assert sum(isinstance(each, Decoder) for each in gc.get_objects()) == before

    et.sweep(TINY, {"n_layers": [1, 2]}, measure, repetitions=1, progress=check)


class Fake:
    """Replaces the measurement, and records the calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []
        self.threads: list[int] = []

    def __call__(self, config: et.RunConfig, kind: str, repetitions: int, seed: int) -> StepTimes:
        self.calls.append((config.seq_len, config.n_layers))
        self.threads.append(blas.get_threads())
        seconds = 1e-3 * config.seq_len * config.n_layers
        return StepTimes(seconds, (seconds,) * repetitions, 1000 * config.seq_len)


def interrupt(done: int, total: int) -> None:
    if done == 2:
        raise KeyboardInterrupt


def test_an_interrupted_sweep_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake, path = Fake(), tmp_path / "results.jsonl"
    monkeypatch.setattr(api, "step_times", fake)
    vary = {"seq_len": [16, 32, 64], "n_layers": [1, 2]}
    whole = et.sweep(TINY, vary)
    fake.calls.clear()
    with pytest.raises(KeyboardInterrupt):
        et.sweep(TINY, vary, results=path, progress=interrupt)
    assert fake.calls == [(16, 1), (16, 2)]
    # The line that was being written is removed.
    path.write_bytes(path.read_bytes() + b'{"point": {')
    fake.calls.clear()
    seen: list[int] = []
    again = et.sweep(TINY, vary, results=path, progress=lambda done, total: seen.append(done))
    assert fake.calls == [(32, 1), (32, 2), (64, 1), (64, 2)]
    assert seen == [1, 2, 3, 4, 5, 6]
    assert again == whole
    assert again.law("seq_len", "prefill.seconds").exponent == pytest.approx(1)
    fake.calls.clear()
    # More keys and values: only the new points run. TINY has two layers.
    more = et.sweep(TINY, {"seq_len": [16, 128]}, results=path)
    assert fake.calls == [(128, 2)]
    assert more.points[0].measured == whole.points[1].measured
    header, *records = map(json.loads, path.read_text().splitlines())
    assert (header["measure"], header["config"]["d_model"], len(records)) == ("prefill", 64, 7)
    assert {"package", "processor", "blas", "seed", "repetitions"} <= set(header)


def test_each_point_has_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the number before is restored."""
    fake = Fake()
    monkeypatch.setattr(api, "step_times", fake)
    before = blas.get_threads()
    try:
        for present in (1, 2):
            blas.set_threads(present)
            fake.threads.clear()
            et.sweep(TINY, {"threads": [2, 1]})
            assert fake.threads == [2, 1]
            assert et.sweep(TINY, {"seq_len": [8]}, threads=2).threads == 2
            assert et.sweep(TINY, {"seq_len": [8]}).threads == present
            assert fake.threads == [2, 1, 2, present]
            assert blas.get_threads() == present
    finally:
        blas.set_threads(before)


@pytest.mark.parametrize(
    ("most", "expected"),
    [(None, "pr rrrr r"), (1, "pr prprprpr pr"), (3, "pr prrrpr pr")],
)
def test_repetitions_begin_with_what_they_need(most: int | None, expected: str) -> None:
    """p: prepare, r: run, of four repetitions after the first, which is not timed, and before the traced."""
    calls: list[str] = []
    states = itertools.count()

    def prepare() -> int:
        calls.append("p")
        return next(states)

    def run(state: int) -> None:
        assert state == calls.count("p") - 1
        calls.append("r")

    found = step_times._measured(step_times._Step(prepare, run, most), 4)
    assert "".join(calls) == expected.replace(" ", "")
    assert len(found.seconds_of_each) == 4


def test_decode_steps_are_not_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    traces: list[int] = []
    original = replay.Trace

    class Counted(original):  # type: ignore[misc, valid-type]
        def __init__(self, *given: Any, **more: Any) -> None:
            traces.append(1)
            super().__init__(*given, **more)

    monkeypatch.setattr(replay, "Trace", Counted)
    et.sweep(TINY, {"seq_len": [100]}, "decode", repetitions=40)
    assert not traces
    et.generate(et.load(TINY, seed=0), [[1, 2, 3]], max_new_tokens=100)
    assert traces  # a long generation is replayed


@pytest.mark.parametrize(
    ("measure", "keys", "expected"),
    [
        ("prefill", {"weight_dtype": "bfloat16"}, "bfloat16"),
        ("prefill", {"weight_dtype": "float16"}, "float32"),
        ("decode", {"weight_dtype": "bfloat16", "quantization": "W8A16"}, "float32"),
        ("training", {"weight_dtype": "bfloat16"}, "float32"),
    ],
)
def test_types_of_the_weights(
    monkeypatch: pytest.MonkeyPatch, measure: Any, keys: dict[str, Any], expected: str
) -> None:
    """Training is in float32, as in `etx train`."""
    types: list[str] = []

    def load(config: et.RunConfig, dtype: str, seed: int) -> et.Model:
        types.append(dtype)
        return et.load(config, dtype, seed=seed)

    monkeypatch.setattr(step_times, "load", load)
    et.sweep(replace(TINY, **keys), {"seq_len": [8]}, measure, repetitions=1)
    assert types == [expected]


def test_stored_weights_are_measured() -> None:
    """Of 16 and 8 bits; training adapters on 8 bits."""
    varied = {"weight_dtype": ["float32", "bfloat16"], "quantization": [None, "W8A16"]}
    found = et.sweep(TINY, varied, "decode", repetitions=1)
    plain, quantized, half, both = (each.weight_bytes for each in found.points)
    assert quantized == both < half < plain
    config = replace(TINY, use_lora=True, quantization="W8A16")
    (point,) = et.sweep(config, {"lora_rank": [4]}, "training", repetitions=2).points
    assert point.weight_bytes == quantized
    assert point.measured is not None
    assert all(loss == pytest.approx(math.log(256), abs=0.1) for loss in point.measured.losses)
    weights = point.phases["training"].memory_bytes - point.phases["training"].peak_bytes
    assert quantized < weights < plain


def test_a_real_measurement_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.jsonl"
    arguments: dict[str, Any] = {"repetitions": 2, "results": path, "measure": "training"}
    first = et.sweep(TINY, {"threads": [1, 2]}, **arguments)
    monkeypatch.setattr(api, "step_times", None)
    assert et.sweep(TINY, {"threads": [1, 2]}, **arguments) == first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"measure": "decode"}, "contains results with other measure: give another file"),
        ({"seed": 1}, "contains results with other seed"),
        ({"repetitions": 2}, "contains results with other repetitions"),
        ({"source": replace(TINY, d_ff=96)}, "contains results with other config"),
    ],
)
def test_results_of_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(api, "step_times", Fake())
    given: dict[str, Any] = {"source": TINY, "vary": {"seq_len": [8]}, "results": tmp_path / "results.jsonl"}
    et.sweep(**given)
    with pytest.raises(et.InputError, match=message):
        et.sweep(**given | changes)


@pytest.mark.parametrize(
    "line",
    [
        {"point": {}},
        {"point": 3, "measured": {}},
        {"point": {}, "measured": {"seconds": 0, "seconds_of_each": [], "peak_bytes": 1, "losses": []}},
        {"point": {}, "measured": {"seconds": "a", "seconds_of_each": [], "peak_bytes": 1, "losses": []}},
    ],
)
def test_lines_that_are_not_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: dict[str, Any]
) -> None:
    monkeypatch.setattr(api, "step_times", Fake())
    path = tmp_path / "results.jsonl"
    et.sweep(TINY, {"seq_len": [8]}, results=path)
    path.write_text(path.read_text() + json.dumps(line) + "\n")
    with pytest.raises(et.FormatError, match=r"results\.jsonl: line 3 is not a point of a sweep"):
        et.sweep(TINY, {"seq_len": [8]}, results=path)


@pytest.mark.parametrize(
    ("vary", "changes", "message"),
    [
        ({}, {}, "`vary` is empty"),
        ({"seq_len": []}, {}, "`vary` seq_len has no values: expected one or more"),
        ({"seq_lne": [1]}, {}, "`vary` has the unknown key 'seq_lne'; did you mean 'seq_len'?"),
        ({"thread": [1]}, {}, "unknown key 'thread'; did you mean 'threads'?"),
        ({"source": ["a"]}, {}, "unknown key 'source'"),
        ({"seq_len": [8, 16, 8]}, {}, "`vary` seq_len has the value 8 twice"),
        ({"seq_len": [object()]}, {}, "which is not a JSON value"),
        ({"seq_len": [8, "many"]}, {}, "seq_len=many: config: key 'seq_len' is 'many', expected an integer"),
        ({"seq_len": [1.5]}, {}, "key 'seq_len' is 1.5, expected an integer"),
        ({"seq_len": [8, 0]}, {}, "seq_len=0: config: seq_len is 0, expected 1 or more"),
        ({"n_heads": [3], "seq_len": [8]}, {}, "n_heads=3, seq_len=8: config: "),
        ({"quantization": ["W5A8"]}, {}, "quantization=W5A8: quantization 'W5A8'"),
        ({"weight_dtype": ["float64"]}, {}, "weight_dtype float64 cannot be planned"),
        ({"quantization": ["W8A16"]}, {"measure": "training"}, "quantized weights cannot be trained"),
        ({"arch": ["gpt2"], "max_seq_len": [48]}, {"measure": "decode"}, "exceed the 48 learned positions"),
        ({"threads": [0]}, {}, "`threads` is 0: expected an integer, 1 or more"),
        ({"threads": [1, True]}, {}, "`threads` is true: expected an integer"),
        ({"threads": [1 << 20]}, {}, "`threads` is 1048576: this BLAS uses at most"),
        ({"seq_len": [8]}, {"threads": 0}, "`threads` is 0: expected an integer"),
        ({"seq_len": [8]}, {"repetitions": 0}, "`repetitions` is 0: expected 1 to 1000"),
        ({"seq_len": [8]}, {"seed": -1}, "`seed` is -1: expected 0 or more"),
        ({"seq_len": list(range(1, 201)), "d_ff": list(range(1, 101))}, {}, "`vary` has 20,000 combinations"),
        ({"seq_len": [8]}, {"plot": "curve.pdf"}, "expected a file name that ends in .png"),
        ({"seq_len": [8]}, {"source": "fast_lorra"}, "no such file; packaged configs: "),
    ],
)
def test_what_is_rejected(
    monkeypatch: pytest.MonkeyPatch, vary: Any, changes: dict[str, Any], message: str
) -> None:
    """In one line, and before anything runs."""
    fake = Fake()
    monkeypatch.setattr(api, "step_times", fake)
    with pytest.raises(et.InputError) as caught:
        et.sweep(**{"source": TINY, "vary": vary} | changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert fake.calls == []


@pytest.mark.parametrize("measure", ["prefill", "decode", "training"])
def test_a_point_that_is_too_large(monkeypatch: pytest.MonkeyPatch, measure: Any) -> None:
    """The point, its estimate and the memory are named; "none" counts it."""
    fake = Fake()
    monkeypatch.setattr(api, "step_times", fake)
    point = et.sweep(TINY, {"seq_len": [512]}, "none").points[0]
    needed = point.phases[measure].memory_bytes
    monkeypatch.setattr(api, "memory", lambda: needed - 1)
    with pytest.raises(et.InputError) as caught:
        et.sweep(TINY, {"n_layers": [1, 2], "seq_len": [8, 512]}, measure)
    size = api.quantity(needed, "B")
    expected = f"n_layers=2, seq_len=512: {measure} needs {size} by its plan, and the machine has {size}"
    assert str(caught.value).startswith(expected)
    assert fake.calls == []
    et.sweep(TINY, {"seq_len": [512]}, "none")
    monkeypatch.setattr(api, "memory", lambda: needed)
    et.sweep(TINY, {"seq_len": [512]}, measure)
    assert fake.calls == [(512, 2)]


@pytest.mark.parametrize("name", ["results", "csv", "plot"])
def test_files_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    fake = Fake()
    monkeypatch.setattr(api, "step_times", fake)
    for path in (tmp_path / "none" / "a.png", tmp_path):
        with pytest.raises(et.InputError, match=f"`{name}` .*(No such file|is a folder)"):
            et.sweep(TINY, {"seq_len": [8]}, **{name: path})
    assert fake.calls == []


def test_values_of_numpy_and_lists() -> None:
    found = et.sweep(TINY, {"seq_len": list(np.array([8, 16])), "lora_target_modules": [("q_proj",)]}, "none")
    assert found.varied == {"seq_len": (8, 16), "lora_target_modules": (["q_proj"],)}
    json.dumps(found.to_dict())


def test_notes_of_keys_without_an_effect(caplog: pytest.LogCaptureFixture) -> None:
    et.sweep(TINY, {"temperature": [0.0, 1.0], "lora_rank": [2, 4], "learning_rate": [0.1]}, "none")
    noted = [record.getMessage() for record in caplog.records]
    names = ("temperature", "lora_rank", "learning_rate")
    assert noted == [f"`vary` {name}: has no effect on these points" for name in names]
    caplog.clear()
    et.sweep(TINY, {"use_lora": [True], "lora_rank": [2, 4], "seq_len": [8]}, "none")
    assert not caplog.records


def test_numeric_keys() -> None:
    varied = {"a": (1, 2, 3), "b": (1, 2), "c": (0, 1, 2), "d": (True, False, 1), "e": (1, 2, None)}
    assert numeric(varied | {"f": ("x", "y", "z"), "g": (0.1, 0.2, 0.4)}) == ["a", "g"]


def test_a_law_that_does_not_exist() -> None:
    found = et.sweep(TINY, {"seq_len": [8, 16, 32]}, "none")
    with pytest.raises(et.InputError, match=r"'kv_byte' by 'seq_len'; did you mean 'kv_bytes'\?"):
        found.law("seq_len", "kv_byte")
    with pytest.raises(et.InputError, match=r"no law of 'kv_bytes' by 'd_ff' .*keys with laws: seq_len"):
        found.law("d_ff", "kv_bytes")


def test_a_plot_without_curves(tmp_path: Path) -> None:
    et.sweep(TINY, {"seq_len": [8, 16]}, "none", plot=tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_values_on_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "tiny.json"
    keys = asdict(TINY) | {"lora_target_modules": ["q_proj"]}
    path.write_text(json.dumps({key: value for key, value in keys.items() if key != "source"}))
    flags = ["--measure", "none", "--json", "--set", "n_layers=1"]
    for text, values in {
        "seq_len=8,16": [8, 16],
        "quantization=null,W8A16": [None, "W8A16"],
        'quantization="W8A16,asymmetric","W4A16g32"': ["W8A16,asymmetric", "W4A16g32"],
        'lora_target_modules=["q_proj"],["q_proj","v_proj"]': [["q_proj"], ["q_proj", "v_proj"]],
        "use_moe=true": [True],
        "rope_base=1e4": [1e4],
    }.items():
        ran = etx("sweep", path, "--vary", text, *flags)
        assert ran.code == 0, ran.err
        assert list(ran.json["varied"].values()) == [values]
    twice = etx("sweep", path, "--vary", "seq_len=8", "--vary", "d_ff=32", "--vary", "seq_len=9", *flags)
    assert twice.json["varied"] == {"seq_len": [8, 9], "d_ff": [32]}
    for words, message in (
        ((), "--vary is empty"),
        (("--vary", "seq_len"), "--vary 'seq_len': expected KEY=V1,V2"),
        (("--vary", "seq_len="), "--vary seq_len has no values"),
        (("--vary", "seq_lne=3"), "--vary has the unknown key 'seq_lne'; did you mean 'seq_len'?"),
        (("--vary", "seq_len=8", "--measure", "both"), "--measure is 'both', expected 'prefill', 'decode'"),
        (("--vary", "seq_len=8", "--csv", "none/a.csv"), "--csv none/a.csv: cannot be written"),
        (("--vary", "seq_len=8", "--set", "a=3"), "unknown key 'a'"),
    ):
        ran = etx("sweep", path, *words)
        assert (ran.code, ran.out) == (2, "")
        assert message in ran.err
        assert ran.err.count("\n") == 1


def test_every_combination_is_a_point() -> None:
    varied = {"n_layers": [1, 2], "use_gqa": [True, False], "n_kv_heads": [2]}
    found = et.sweep(TINY, varied, "none")
    expected = [dict(zip(varied, values)) for values in itertools.product(*varied.values())]
    assert [each.values for each in found.points] == expected
    sizes = [each.kv_bytes for each in found.points]
    assert sizes[1] == 2 * sizes[0]  # use_gqa false: 4 heads of keys and values
