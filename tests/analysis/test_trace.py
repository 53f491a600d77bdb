"""The trace of a run: its format, its sums, and its size."""

from __future__ import annotations

import json
import logging
import math
import os
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import einsum_transformer as et
from command_line import etx, save_with_tokenizer
from einsum_transformer.analysis import trace
from einsum_transformer.analysis.trace import Trace
from einsum_transformer.engine import Recorder, blas, einsum, einsums, phase
from einsum_transformer.engine.parallel import for_each
from einsum_transformer.engine.recorder import Event, Span
from tiny_models import tiny_model

PROMPT = [[1, 2, 3, 4, 5]]
NEW = 6
EINSUM_ARGS = {
    "equation": str,
    "sizes": dict,
    "dtype": str,
    "phase": str,
    "flops": int,
    "bytes_read": int,
    "bytes_written": int,
    "gflops": float,
    "gbps": float,
    "lowering": str,
}


def read(path: str | Path) -> dict[str, Any]:
    """The file as strict JSON."""

    def fail(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=fail)


def intervals(found: dict[str, Any], category: str | None = None) -> list[dict[str, Any]]:
    return [
        each
        for each in found["traceEvents"]
        if each["ph"] == "X" and category in (None, each["cat"])
    ]  # fmt: skip


def check_nesting(found: dict[str, Any]) -> None:
    """Two intervals of a thread are disjoint, or one is inside of another that comes first in the file."""
    threads = defaultdict(list)
    for each in intervals(found):
        begin = round(1000 * each["ts"])
        threads[each["tid"]].append((begin, begin + round(1000 * each["dur"]), each))
    for known in threads.values():
        assert [begin for begin, _, _ in known] == sorted(begin for begin, _, _ in known)
        around: list[tuple[int, dict[str, Any]]] = []
        for begin, end, each in known:
            while around and around[-1][0] <= begin:
                around.pop()
            if around:
                assert end <= around[-1][0], (each, around[-1][1])
                inner = each["args"]["phase"]
                assert inner.startswith(around[-1][1]["args"]["phase"])
                assert around[-1][1]["cat"] == "phase"
            around.append((end, each))


def check_schema(found: dict[str, Any]) -> None:
    """Every event has the fields of its kind, and every thread a name."""
    assert set(found) == {"displayTimeUnit", "otherData", "traceEvents"}
    assert found["displayTimeUnit"] == "ms"
    named, used = set(), set()
    for each in found["traceEvents"]:
        assert each["pid"] == os.getpid()
        used.add(each["tid"])
        if each["ph"] == "M":
            assert each["name"] in ("process_name", "thread_name", "thread_sort_index")
            named |= {each["tid"]} if each["name"] == "thread_name" else set()
        elif each["ph"] == "C":
            assert set(each) == {"ph", "name", "ts", "pid", "tid", "args"}
            ((unit, value),) = each["args"].items()
            assert unit in ("bytes", "tokens")
            assert isinstance(value, int)
        else:
            assert set(each) == {"ph", "name", "cat", "ts", "dur", "pid", "tid", "args"}
            assert each["ts"] >= 0
            assert each["dur"] >= 0
            if each["cat"] == "phase":
                assert each["args"]["phase"].split("/")[-1] == each["name"]
                assert set(each["args"]) <= {"phase", "layer", "divided"}
            else:
                assert each["cat"] == "einsum"
                for name, kind in EINSUM_ARGS.items():
                    assert isinstance(each["args"][name], kind), name
                assert set(each["args"]) <= {*EINSUM_ARGS, "layer", "weight", "gradient"}
                assert each["name"] == each["args"]["equation"]
    assert used == named == set(range(len(named)))


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Event | Span]:
    """All events and spans of the recorders that traces are attached to."""
    found: list[Event | Span] = []
    attach = Trace.record

    def record(self: Trace, recorder: Recorder) -> Recorder:
        return attach(self, recorder).on_event(found.append).on_span(found.append)

    monkeypatch.setattr(Trace, "record", record)
    return found


def test_a_run(tmp_path: Path, events: list[Event | Span]) -> None:
    """The phases add up to the table of the profile, the FLOPs to those of the recorder."""
    path = tmp_path / "trace.json"
    model = tiny_model(eos_token_id=None)
    profile = et.profile(model, PROMPT, max_new_tokens=NEW, trace=path)
    plain = et.profile(model, PROMPT, max_new_tokens=NEW)
    assert profile.generations[0].tokens == plain.generations[0].tokens
    assert list(tmp_path.iterdir()) == [path]
    found = read(path)
    check_schema(found)
    check_nesting(found)
    seconds: defaultdict[str, float] = defaultdict(float)
    calls: defaultdict[str, int] = defaultdict(int)
    for each in intervals(found, "phase"):
        seconds[each["name"]] += each["dur"] / 1e6
        calls[each["name"]] += 1
    assert seconds["decode"] > 0
    labels = {"head": "output head", "qkv": "QKV projection", "rope": "RoPE", "layer": "layers"}
    labels |= {"scores": "scores + softmax", "output": "output (mix + projection)", "cache": "KV cache"}
    table = {row.name: row for row in profile.report.rows}
    for name in ("prefill", "decode", "sampling", "embedding", "norm", "attention", "feed-forward", *labels):
        row = table[labels.get(name, name)]
        # `mix` is counted as output, and the norm before the head as head: see COUNTED_AS and _line.
        expected = seconds[name] + (seconds["mix"] if name == "output" else 0)
        assert math.isclose(expected, row.seconds, abs_tol=1e-9 * (calls[name] + calls["mix"])), name
    recorded = [each for each in events if isinstance(each, Event)]
    einsums = intervals(found, "einsum")
    assert len(einsums) == len(recorded) > 0
    assert sum(each["args"]["flops"] for each in einsums) == sum(each.flops for each in recorded) > 0
    assert {each["args"].get("weight") for each in einsums} >= {
        "layers.0.mlp.gate_proj",
        "lm_head.weight",
        None,
    }
    assert {each["args"].get("layer") for each in einsums} == {None, 0, 1}
    about = found["otherData"]
    assert about["model"] == model.source
    assert (about["threads"], about["blas"]) == (blas.get_threads(), blas.description())
    assert about["steps"] == about["steps_with_einsum_calls"] == NEW  # prefill and the other tokens
    assert set(about["left_out"].values()) == {0}
    counters = [each for each in found["traceEvents"] if each["ph"] == "C"]
    tokens = [each["args"]["tokens"] for each in counters if each["name"] == "generated"]
    assert tokens == list(range(NEW))
    assert {each["args"]["bytes"] for each in counters if each["name"] == "KV cache"} == {
        profile.report.kv_cache_bytes
    }


def test_a_draft_is_part_of_its_decode_step(tmp_path: Path) -> None:
    model = tiny_model(eos_token_id=None)
    options: dict[str, Any] = {"max_new_tokens": 9, "draft_layers": 1, "num_draft_tokens": 3}
    et.profile(model, PROMPT, trace=tmp_path / "trace.json", **options)
    found = read(tmp_path / "trace.json")
    check_schema(found)
    check_nesting(found)
    names = [each["name"] for each in intervals(found, "phase") if "/" not in each["args"]["phase"]]
    assert "draft" in names
    assert found["otherData"]["steps"] == 1 + names.count("decode")


def test_an_event_knows_when_and_where_it_ran() -> None:
    recorder = Recorder(events=True)
    with recorder, phase("outer"):
        einsum("ij,jk->ik", np.ones((40, 40)), np.ones((40, 40)))
        einsum("ij,jk,kl->il", *[np.ones((40, 40))] * 3)
    (span,) = recorder.spans
    last = span.start
    for event in recorder.events:
        assert last <= event.start
        last = event.start + event.seconds
        assert event.thread == threading.get_ident()
    assert last <= span.start + span.seconds


def test_parts_of_one_product_are_consecutive() -> None:
    memory = np.ones(48 * 64, np.float32)
    weights = memory[: 16 * 64].reshape(16, 64), memory[16 * 64 :].reshape(32, 64)
    with Recorder(events=True) as recorder:
        einsums(np.ones((2, 3, 64), np.float32), *[("btd,fd->btf", weight) for weight in weights])
    first, second = recorder.events
    assert first.how.startswith("2 in one")
    assert second.start == first.start + first.seconds
    assert math.isclose(second.seconds, 2 * first.seconds)


def test_worker_threads_have_their_own_tracks(tmp_path: Path) -> None:
    """Intervals of parallel tasks are real ones on their thread; their phases, which are shares of the wall
    time, are apart from those of the main thread."""
    both = threading.Barrier(2)

    def task(i: int) -> None:
        both.wait(30)
        with phase("step"):
            for layer in (0, 1):
                with phase("layer", layer=layer), phase("norm"):
                    einsum("ij,jk->ik", np.ones((90, 90)), np.ones((90, 90)))
        with phase("sum"):
            pass

    before = blas.get_threads()
    tracing = Trace()
    try:
        blas.set_threads(2)
        with tracing.record(Recorder()) as recorder, phase("around"):
            for_each(task, [(i,) for i in range(8)])
    finally:
        blas.set_threads(before)
    tracing.write(tmp_path / "trace.json", "tasks")
    found = read(tmp_path / "trace.json")
    check_schema(found)
    check_nesting(found)
    assert {each["tid"] for each in intervals(found, "einsum")} == {0, 1}
    assert {each["name"] for each in intervals(found, "phase") if each["tid"] == 0} == {"around"}
    shares = [each for each in intervals(found, "phase") if each["tid"] == 2]
    assert all("divided" in each["args"] for each in shares)
    assert {each["name"] for each in shares} == {"step", "layer", "norm", "sum"}
    wall = sum(span.seconds for span in recorder.spans if span.name in ("step", "sum"))
    assert math.isclose(sum(each["dur"] for each in shares if each["name"] in ("step", "sum")), 1e6 * wall,
                        abs_tol=0.01)  # fmt: skip
    names = {each["args"]["name"] for each in found["traceEvents"] if each["name"] == "thread_name"}
    assert names == {"main thread", "worker thread 1", "phases of parallel tasks: shares of the wall time"}


def test_a_training(tmp_path: Path, events: list[Event | Span]) -> None:
    path = tmp_path / "trace.json"
    model = tiny_model(eos_token_id=None)
    training = et.train(model, fix_batch=True, steps=5, batch_size=2, seq_len=8, trace=path)
    found = read(path)
    check_schema(found)
    check_nesting(found)
    seconds: defaultdict[str, float] = defaultdict(float)
    for each in intervals(found, "phase"):
        if "/" not in each["args"]["phase"]:
            seconds[each["name"]] += each["dur"] / 1e6
    assert {"batch", "forward", "loss", "backward", "clipping", "update"} == set(seconds)
    for stage in training.report.stages:
        assert math.isclose(seconds[stage.name], stage.seconds, abs_tol=1e-7)
    flops = [each["args"]["flops"] for each in intervals(found, "einsum")]
    assert sum(flops) == sum(each.flops for each in events if isinstance(each, Event)) > 0
    assert any("gradient" in each["args"] for each in intervals(found, "einsum"))
    assert found["otherData"]["steps"] == found["otherData"]["steps_with_einsum_calls"] == 5
    if trace.rss_bytes() is not None:
        assert sum(each["name"] == "resident memory" for each in found["traceEvents"]) == 5


@pytest.mark.parametrize("limit", [10, 100, 700, 2000])
def test_a_trace_is_not_larger_than_its_limit(
    limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Memory and file; the file and a note report what is left out."""
    largest, tracings = 0, []

    class Small(Trace):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given, limit=limit)
            tracings.append(self)

        def _add(self, *given: Any) -> None:
            super()._add(*given)
            nonlocal largest
            largest = max(
                largest, sum(len(step) for each in self._samples.values() for step in each.by_step.values())
            )

    monkeypatch.setattr("einsum_transformer.api.profile.Trace", Small)
    path, new = tmp_path / "trace.json", 80
    with caplog.at_level(logging.WARNING):
        et.profile(tiny_model(eos_token_id=None), PROMPT, max_new_tokens=new, trace=path)
    found = read(path)
    check_schema(found)
    check_nesting(found)
    written = [each for each in found["traceEvents"] if each["ph"] != "M"]
    assert len(written) <= largest <= limit
    about = found["otherData"]
    assert about["steps"] == new
    assert about["recorded"]["einsum_calls"] == len(intervals(found, "einsum"))
    phases = about["recorded"]["inner_phases"] + about["recorded"]["outer_phases"]
    assert phases == len(intervals(found, "phase"))
    assert about["left_out"]["einsum_calls"] > 0
    (message,) = [each for each in caplog.messages if "at most" in each]
    assert f"at most {limit:,} events" in message
    assert f"of {new:,} steps" in message
    if limit >= 700:
        assert len(written) > limit // 3
        assert about["steps_with_einsum_calls"] >= 4
        # The recorded steps are spread over the whole run.
        decodes = [each for each in intervals(found, "phase") if each["name"] == "decode"]
        assert max(each["ts"] for each in intervals(found, "einsum")) > decodes[len(decodes) // 2]["ts"]
        assert len(decodes) == new - 1 or limit < 2000


def test_the_first_steps_and_every_kth_are_complete() -> None:
    tracing = Trace(limit=1000)
    for step in range(200):
        for layer in range(10):
            tracing._span(Span(("decode", "layer"), layer, step + layer / 20, 0.01))
        tracing._span(Span(("decode",), None, float(step), 0.5))
    inner = tracing._samples["inner phase"].by_step
    assert {len(step) for step in inner.values()} == {10}
    assert {0, 1, 2, 3} < set(inner)
    (stride,) = {b - a for a, b in zip(sorted(inner)[4:], sorted(inner)[5:])}
    assert stride == tracing._samples["inner phase"].stride > 1
    assert max(inner) > 200 - 2 * stride


def test_a_step_with_too_many_events_leaves_space_for_outer_phases() -> None:
    tracing = Trace(limit=100)
    for step in range(3):
        for i in range(1000):
            tracing._span(Span(("decode", "layer"), i, step + i / 2000, 1e-4))
        tracing._span(Span(("decode",), None, float(step), 0.5))
    samples = tracing._samples
    assert samples["outer phase"].seen == tracing._written("outer phase") == 3
    assert tracing._written("inner phase") == 100 - 100 // 8
    assert samples["inner phase"].seen == 3000


def test_an_unwritable_path_is_found_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("einsum_transformer.api.profile.model_of", fail)
    monkeypatch.setattr("einsum_transformer.api.train.model_of", fail)
    monkeypatch.setattr("einsum_transformer.loading.load.load", fail)
    absent = tmp_path / "absent" / "trace.json"
    for path, why in ((absent, "No such file or directory"), (tmp_path, "is a folder")):
        for call in (et.profile, et.train):
            with pytest.raises(et.InputError, match=f"`trace` {path}: .*{why}"):
                call("smollm2-135m", trace=path)
        for command in ("run", "train"):
            ran = etx(command, "fast_lora", "--trace", path)
            assert (ran.code, ran.out) == (2, "")
            assert ran.err.startswith(f"error: --trace {path}: ")
            assert ran.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "trace.json"
    path.write_text("earlier")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("einsum_transformer.formats.files.sync", full)
    with pytest.raises(et.InputError, match=r"trace\.json: cannot be written: No space left on device"):
        et.profile(tiny_model(eos_token_id=None), PROMPT, max_new_tokens=2, trace=path)
    assert path.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_without_proc_there_is_no_memory_counter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "rss_bytes", lambda: None)
    et.profile(tiny_model(eos_token_id=None), PROMPT, max_new_tokens=2, trace=tmp_path / "trace.json")
    found = read(tmp_path / "trace.json")
    check_schema(found)
    assert "resident memory" not in {each["name"] for each in found["traceEvents"]}


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = save_with_tokenizer(tmp_path / "model", tiny_model(vocab_size=128, eos_token_id=None))
    ran = etx("run", folder, "-p", "abc", "-n", 3, "--trace", "run.json")
    assert ran.code == 0
    assert ran.err.endswith("wrote run.json\n")
    found = read("run.json")
    assert found["otherData"]["steps"] == 3
    check_schema(found)
    check_nesting(found)
    ran = etx("run", folder, "-p", "abc", "--prefill-only", "--trace", "run.json", "--json")
    assert ran.code == 0
    assert ran.json["model"] == str(folder)
    assert read("run.json")["otherData"]["steps"] == 1
    ran = etx("train", folder, "--steps", 2, "-b", 1, "--seq-len", 8, "--trace", "train.json")
    assert ran.code == 0
    assert "wrote train.json" in ran.err
    assert read("train.json")["otherData"]["steps"] == 2
