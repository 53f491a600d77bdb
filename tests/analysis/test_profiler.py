"""The times of equations: all calls of a run, and predictions by the rates of a machine."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

import einsum_transformer as et
from einsum_transformer.analysis import rates
from einsum_transformer.analysis.dry_plan import inference
from einsum_transformer.analysis.rates import Product, Rates, parsed
from einsum_transformer.engine import Recorder
from einsum_transformer.engine.blas import get_threads
from einsum_transformer.loading import libraries

RATES = Rates(
    threads=2,
    bandwidth=4e10,
    call=2e-6,
    short_call=1e-6,
    products={
        "float32": {1: Product(0.0, 1e10), 16: Product(1e-5, 4e10), 256: Product(1e-5, 16e10)},
        "int8": {1: Product(0.0, 5e10)},
    },
    tile=8e10,
    keys=1e10,
    elements=dict.fromkeys(("multiply", "divide", "exp", "sqrt", "tanh", "copy", "add.reduce"), 1000000000.0),
)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def store() -> None:
    libraries.store(get_threads(), {"choice": {}, "rates": asdict(RATES)})


def test_all_calls_of_a_run() -> None:
    model = et.load("fast_lora", max_layers=2)
    found = et.profile(model, [[5, 6, 7]], max_new_tokens=3, equations=True, ignore_eos=True)
    rows = {(row.stage, row.role, row.equation): row for row in found.equations if row.equation}
    with Recorder(spans=False, events=True) as recorder:
        et.generate(model, [[5, 6, 7]], max_new_tokens=3, ignore_eos=True)
    events = recorder.events
    assert sum(row.calls for row in rows.values()) == len(events)
    assert {row.equation for row in rows.values()} == {event.equation for event in events}
    assert rows["decode", "up_proj", "btd,fd->btf"].calls == 2 * 2
    assert rows["prefill", "up_proj", "btd,fd->btf"].calls == 2
    for stage in ("prefill", "decode"):
        own = [row for row in found.equations if row.stage == stage]
        assert sum(row.share for row in own) == pytest.approx(1)
        assert own == sorted(own, key=lambda row: -row.seconds)
    for row in rows.values():
        assert row.p50 <= row.p90 <= row.p99 <= row.seconds * (1 + 1e-9)
        assert (row.predicted, row.roofline, row.bound) == (None, None, "")
        flops = sum(e.flops for e in events if (e.path[0], e.equation) == (row.stage, row.equation))
        own = sum(
            r.gflops * r.seconds for r in rows.values() if (r.stage, r.equation) == (row.stage, row.equation)
        )
        assert own * 1e9 == pytest.approx(flops)
    assert "up_proj" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["equations"][0]["stage"] == "setup"
    assert et.profile(model, [[5]], max_new_tokens=1).equations == ()


def test_the_rest_of_each_phase() -> None:
    """Equations and rest make up the seconds of a stage, if no phase runs in parallel tasks."""
    model = et.load("fast_lora", max_layers=2)
    with et.Profiler(model) as profiler:
        et.generate(model, [[5, 6, 7]], max_new_tokens=30, ignore_eos=True)
    stages = {stage.stage: stage for stage in profiler.stages()}
    rows = profiler.rows()
    assert stages["decode"].calls == 29
    for stage in stages.values():
        assert stage.equations + stage.rest == pytest.approx(stage.seconds, rel=0.02)
        own = [row for row in rows if row.stage == stage.stage]
        assert sum(row.seconds for row in own if row.equation) == pytest.approx(stage.equations)
        assert (stage.predicted, stage.residual) == (None, None)
    rest = {(row.stage, row.role): row for row in rows if not row.equation}
    assert rest["decode", "norm"].calls == 29 * 2 * 2
    assert rest["decode", "norm"].elements is None
    assert rest["decode", "norm"].bound == ""
    assert all(row.gflops == 0 and row.roofline is None for row in rest.values())
    assert "(elementwise, Python)" in str(profiler)


def test_elementwise_operations_are_those_of_dry_runs() -> None:
    store()
    model = et.load("fast_lora", max_layers=2)
    found = et.profile(model, [[5, 6, 7]], max_new_tokens=5, equations=True, ignore_eos=True)
    rest = {(row.stage, row.role): row for row in found.equations if not row.equation}
    plan = inference(model.config, None, 3)
    for stage, times in (("prefill", 1), ("decode", 4)):
        norms = [each for each in plan[stage].elementwise if each.path[-1] == "norm"]
        row = rest[stage, "norm"]
        assert row.elements == times * sum(each.times * each.elements for each in norms)
        assert row.predicted == pytest.approx(times * sum(each.times * RATES.of_pass(each) for each in norms))
        assert row.bound == "elementwise"
    scores = sum(row.elements or 0 for row in rest.values() if row.role == "scores")
    assert scores > 0
    stages = {stage.stage: stage for stage in found.stages}
    assert stages["prefill"].predicted == pytest.approx(RATES.seconds(plan["prefill"]))
    residual = stages["prefill"].seconds / RATES.seconds(plan["prefill"]) - 1
    assert stages["prefill"].residual == pytest.approx(residual)
    assert stages["setup"].predicted is None


def test_passes_without_a_stage() -> None:
    model = et.load("fast_lora", max_layers=1)
    with et.Profiler(model) as profiler:
        model.logits([[5, 6, 7]])
        et.einsum("ij,jk->ik", np.ones((2, 3)), np.ones((3, 4)))
    assert {stage.stage for stage in profiler.stages()} == {"pass"}
    assert ("pass", "", "ij,jk->ik") in {(row.stage, row.role, row.equation) for row in profiler.rows()}


def test_predictions_of_a_measured_machine() -> None:
    store()
    model = et.load("fast_lora", max_layers=2)
    found = et.profile(model, [[5, 6, 7]], max_new_tokens=3, equations=True, ignore_eos=True)
    row = next(row for row in found.equations if (row.stage, row.role) == ("decode", "up_proj"))
    flops = 2 * model.config.hidden_size * model.config.intermediate_size
    assert row.predicted == pytest.approx(row.calls * flops / 1e10)
    nbytes = 4 * (flops // 2 + model.config.hidden_size + model.config.intermediate_size)
    assert row.roofline == pytest.approx(row.calls * nbytes / 4e10 / row.seconds)
    assert row.bound == "memory"
    assert "of roofline" in str(found)
    small = et.quantize(model, "W8A8")
    quick = et.profile(small, [[5, 6, 7]], max_new_tokens=3, equations=True, ignore_eos=True)
    faster = next(row for row in quick.equations if (row.stage, row.role) == ("decode", "up_proj"))
    assert faster.predicted == pytest.approx(faster.calls * flops / 5e10)


def test_seconds_of_a_plan() -> None:
    store()
    config = et.load("fast_lora", max_layers=2).config
    plan = et.plan(config, 1, 16)
    step = next(step for step in plan.phase("prefill").steps if step.role == "up_proj")
    assert step.seconds == pytest.approx(1e-5 + step.flops / 4e10)
    assert (step.times, step.bound) == (2, "memory")
    norm = next(step for step in plan.phase("decode").steps if step.equation == "btd,btd->bt")
    assert norm.bound == "Python"
    total = plan.phase("decode").seconds
    decode = inference(config, None, 16)["decode"]
    assert total == pytest.approx(RATES.seconds(decode))
    assert total is not None
    larger = et.plan(config, 1, 16, quantization="W8A8").phase("decode").seconds
    assert larger is not None
    assert larger < total
    assert "predicted" in str(plan)


def test_rates_between_measured_rows() -> None:
    assert RATES.product("float32", 1) == Product(0.0, 1e10)
    assert RATES.product("float32", 4096) == Product(1e-5, 16e10)
    between = RATES.product("float32", 64)
    assert between.rate == pytest.approx(8e10)
    assert between.overhead == pytest.approx(1e-5)
    assert RATES.product("bfloat16", 1) == RATES.product("float32", 1)
    assert RATES.peak == 16e10


def test_overhead_and_rate_of_two_models() -> None:
    small, large = (10, 10_000, 10 * 3e-6 + 10_000 / 1e9), (5, 90_000, 5 * 3e-6 + 90_000 / 1e9)
    found = rates._solved(small, large)
    assert found.overhead == pytest.approx(3e-6)
    assert found.rate == pytest.approx(1e9)
    assert rates._solved((1, 100, 1.0), (1, 200, 3.0)) == Product(0.0, 75.0)  # a negative overhead


def test_stored_rates_are_checked() -> None:
    stored = json.loads(json.dumps(asdict(RATES)))
    assert parsed(stored) == RATES
    for change in (
        {"tile": -1.0},
        {"keys": None},
        {"bandwidth": float("nan")},
        {"call": "fast"},
        {"elements": {}},
        {"products": {"int8": {}}},
        {"products": {"float32": {"x": {"overhead": 0, "rate": 1}}}},
        {"products": {"float32": {"1": {"overhead": 0, "rate": 0}}}},
        {"threads": None},
    ):
        with pytest.raises(et.InputError, match="run `etx machine`"):
            parsed(stored | change)


def test_a_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "_SECONDS", 1e-4)
    monkeypatch.setattr(rates, "_MODELS", ((128, 1), (256, 1)))
    done: list[tuple[int, int]] = []
    found = rates.measure(2, 1e10, lambda *numbers: done.append(numbers))
    assert done[-1] == (rates.STEPS, rates.STEPS)
    assert set(found.products) == {"float32", "int8"}
    for by_rows in found.products.values():
        assert list(by_rows) == list(rates.ROWS)
        assert all(each.rate > 0 and each.overhead >= 0 for each in by_rows.values())
    assert np.isfinite([found.tile, found.call, found.short_call, *found.elements.values()]).all()
    assert parsed(json.loads(json.dumps(asdict(found)))) == found
