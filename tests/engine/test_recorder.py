"""The recorder: what is timed and reported is what ran, and watching changes nothing."""

from __future__ import annotations

import math
import re
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import einsum_transformer as et
from einsum_transformer.engine import Equation, Recorder, blas, einsum, phase, phases, tap
from einsum_transformer.engine.parallel import for_each
from einsum_transformer.leaves.frozen import Frozen
from einsum_transformer.models.adapters import with_lora
from einsum_transformer.models.lora_config import LoRAConfig
from einsum_transformer.tree import map_named
from golden_files import Folders, load_golden, write_folder
from tiny_models import tiny_model, write_tiny

IDS = np.random.default_rng(0).integers(0, 61, (2, 11))


def test_phases_nest() -> None:
    with Recorder() as recorder, phase("outer"):
        with phase("layer", layer=3), phase("inner"):
            pass
        with phase("later"):
            pass
    spans = [(span.path, span.layer, span.name) for span in recorder.spans]
    assert spans == [
        (("outer", "layer", "inner"), 3, "inner"),
        (("outer", "layer"), 3, "layer"),
        (("outer", "later"), None, "later"),
        (("outer",), None, "outer"),
    ]
    inner, layer, later, outer = recorder.spans
    assert 0 <= inner.seconds <= layer.seconds <= outer.seconds
    assert outer.start <= layer.start <= inner.start <= later.start
    assert layer.seconds + later.seconds <= outer.seconds


def test_an_error_closes_its_phases() -> None:
    """The next phase does not stand inside of the one that failed."""
    with Recorder() as recorder:
        with pytest.raises(KeyError), phase("fails", layer=1), phase("deep"):
            raise KeyError
        with phase("after"):
            pass
    assert [span.path for span in recorder.spans] == [("fails", "deep"), ("fails",), ("after",)]
    assert recorder.spans[-1].layer is None


def test_an_error_ends_the_recording() -> None:
    with pytest.raises(KeyError), Recorder():
        raise KeyError
    with Recorder() as again, phase("x"):
        pass
    assert len(again.spans) == 1


def test_one_at_a_time() -> None:
    """An inner one takes the outer one's place; the same one twice is refused. Then the outer one goes on."""
    with Recorder(events=True) as outer:
        with Recorder(events=True) as inner, phase("inside"):
            einsum("ij->j", np.ones((2, 3)))
        with pytest.raises(RuntimeError, match="active"), outer:
            pass
        einsum("ij->ji", np.ones((2, 3)))
    assert [event.equation for event in outer.events] == ["ij->ji"]
    assert [(event.equation, event.path) for event in inner.events] == [("ij->j", ("inside",))]
    assert outer.spans == []


def test_nothing_is_recorded_unless_asked() -> None:
    einsum("ij,jk->ik", np.ones((2, 3)), np.ones((3, 4)))
    with Recorder() as recorder:
        einsum("ij,jk->ik", np.ones((2, 3)), np.ones((3, 4)))
        tap("x", np.ones(2))
    assert (recorder.spans, recorder.events, recorder.values) == ([], [], {})


@pytest.mark.parametrize(
    "equation", ["ij,jk->ik", "btd,fd->btf", "ij->j", "ii->i", "i,j->ij", "...d,fd->...f", "ij,jk,kl->il"]
)
def test_events(equation: str) -> None:
    """One for each product, with its sizes, its operations and its bytes."""
    sizes = {letter: 2 + i for i, letter in enumerate("ijklbtdf")}
    terms = equation.split("->")[0].split(",")
    operands = [
        np.ones([sizes[c] for c in term if c != "."] if "." not in term else (3, 5, 8), np.float32)
        for term in terms
    ]
    if equation.startswith("..."):
        operands[1] = np.ones((9, 8), np.float32)
    expected = einsum(equation, *operands)
    with Recorder(events=True) as recorder, phase("here", layer=2):
        np.testing.assert_array_equal(einsum(equation, *operands), expected)
    assert recorder.events
    assert {(event.path, event.layer) for event in recorder.events} == {(("here",), 2)}
    assert all(event.seconds >= 0 and event.dtype == "float32" and event.how for event in recorder.events)
    if len(operands) == 2:
        (event,) = recorder.events
        contracted = equation not in ("i,j->ij",)
        spelled = (
            {**dict(zip("xy", (3, 5))), "d": 8, "f": 9}
            if "." in equation
            else {c: sizes[c] for c in set("".join(terms))}
        )
        assert event.flops == (2 if contracted else 1) * math.prod(spelled.values())
        assert event.bytes == 4 * (sum(operand.size for operand in operands) + expected.size)
        assert event.equation == equation


def test_a_chain_reports_every_product() -> None:
    """Three operands are two products, whose FLOPs are reported like those of any other."""
    a, b, c = np.ones((4, 5)), np.ones((5, 6)), np.ones((6, 7))
    with Recorder(events=True) as recorder:
        einsum("ij,jk,kl->il", a, b, c)
    assert len(recorder.events) == 2
    assert sum(event.flops for event in recorder.events) == min(2 * 4 * 6 * (5 + 7), 2 * 7 * 5 * (6 + 4))


def test_taps_are_copies_under_their_place() -> None:
    value = np.zeros(3)
    with Recorder(values="*") as recorder:
        with phase("layer", layer=4), phase("attention"):
            assert tap("pattern", value) is value
            tap("", value)
        assert tap("logits", value) is value
        value += 1
    assert {name: list(array) for name, array in recorder.values.items()} == {
        "layers.4.pattern": [0, 0, 0],
        "layers.4": [0, 0, 0],
        "logits": [0, 0, 0],
    }


def test_watching_changes_no_result() -> None:
    model = tiny_model()
    loss, gradients = model.loss_and_gradients(IDS, IDS)
    with Recorder(events=True, values="*"):
        watched_loss, watched = model.loss_and_gradients(IDS, IDS)
    assert watched_loss == loss
    for name, gradient in gradients.items():
        np.testing.assert_array_equal(watched[name], gradient)


def test_flops_of_a_forward_pass() -> None:
    """Two for each weight of a matrix and token, and the two products of the attention over the keys that
    it reads."""
    model = tiny_model()
    b, t, heads, h = *IDS.shape, 8, 6
    with Recorder(events=True) as recorder:
        model.logits(IDS)
    matrices = sum(
        w.size for name, w in model.named_parameters().items() if w.ndim == 2 and "embed" not in name
    )
    linear = [
        event
        for event in recorder.events
        if any(name in event.equation for name in ("fd", "df", "kghd", "khd", "dkgh", "vd"))
    ]
    assert sum(event.flops for event in linear) == 2 * b * t * matrices
    attention = [
        event for event in recorder.events if event.equation in ("btkgh,bskh->bkgts", "bkgts,bskh->btkgh")
    ]
    assert sum(event.flops for event in attention) == 2 * 2 * 2 * b * t * t * heads * h
    for event in recorder.events:
        equation = Equation.parse(event.equation)
        assert event.flops == equation.flops(event.sizes)
        assert event.bytes == 4 * equation.elements(event.sizes)
    assert {event.layer for event in recorder.events} == {None, 0, 1}


def test_flops_of_the_backward_pass_are_twice_those_of_the_forward() -> None:
    """For the matrices: each has two gradients."""
    model = tiny_model()
    with Recorder(events=True) as recorder:
        model.loss_and_gradients(IDS, IDS)
    flops = {}
    for name in ("forward", "backward"):
        mine = [event for event in recorder.events if event.path[0] == name]
        flops[name] = sum(event.flops for event in mine if len(event.sizes) > 2 and "s" not in event.sizes)
    matrices = sum(
        w.size for name, w in model.named_parameters().items() if w.ndim == 2 and "embed" not in name
    )
    least = 2 * IDS.size * matrices
    assert least <= flops["forward"] < 1.1 * least
    assert 2 * least <= flops["backward"] < 2.2 * least


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_are_tallied(threads: int) -> None:
    """The phases of tasks on threads share the wall time that they took: together no more than the phase
    around them."""

    def task(i: int) -> None:
        with phase("even" if i % 2 == 0 else "odd"):
            einsum("ij,jk->ik", np.ones((90, 90)), np.ones((90, 90)))

    before = blas.get_threads()
    try:
        blas.set_threads(threads)
        with Recorder(events=True) as recorder, phase("around", layer=1):
            for_each(task, [(i,) for i in range(20)])
    finally:
        blas.set_threads(before)
    inside = [span for span in recorder.spans if span.name != "around"]
    assert {span.path for span in inside} == {("around", "even"), ("around", "odd")}
    assert {span.layer for span in inside} == {1}
    assert 0 < sum(span.seconds for span in inside) <= recorder.spans[-1].seconds
    assert len(recorder.events) == 20


@pytest.mark.parametrize("threads", [1, 2])
def test_events_on_threads_know_their_phase(threads: int) -> None:
    def task(i: int) -> None:
        with phase("scores"):
            einsum("ij,jk->ik", np.ones((90, 90)), np.ones((90, 90)))

    before = blas.get_threads()
    try:
        blas.set_threads(threads)
        with Recorder(events=True) as recorder, phase("attention"):
            for_each(task, [(i,) for i in range(20)])
    finally:
        blas.set_threads(before)
    assert {event.path for event in recorder.events} == {("attention", "scores")}


@pytest.mark.parametrize("threads", [1, 2])
def test_phases_nest_on_threads(threads: int) -> None:
    """Paths and layers are those of the phases around, on each thread; the outermost share the wall time, and
    what is inside of a phase is no longer than it."""

    def task(i: int) -> None:
        with phase("step"):
            for layer in (0, 1):
                with phase("layer", layer=layer), phase("norm"):
                    einsum("ij,jk->ik", np.ones((90, 90)), np.ones((90, 90)))
        with phase("sum"):
            pass

    before = blas.get_threads()
    try:
        blas.set_threads(threads)
        with Recorder(events=True) as recorder, phase("around"):
            for_each(task, [(i,) for i in range(8)])
    finally:
        blas.set_threads(before)
    seconds: dict[tuple[tuple[str, ...], int | None], float] = {}
    for span in recorder.spans:
        seconds[span.path, span.layer] = seconds.get((span.path, span.layer), 0.0) + span.seconds
    step, layer = ("around", "step"), ("around", "step", "layer")
    inner = {((*layer, "norm"), 0), ((*layer, "norm"), 1), (layer, 0), (layer, 1), (step, None)}
    assert set(seconds) == inner | {(("around", "sum"), None), (("around",), None)}
    assert {(event.path, event.layer) for event in recorder.events} == {
        ((*layer, "norm"), 0),
        ((*layer, "norm"), 1),
    }
    for i in (0, 1):
        assert 0 < seconds[(*layer, "norm"), i] <= seconds[layer, i]
    # Two sums of the same shares in another order.
    assert seconds[layer, 0] + seconds[layer, 1] <= seconds[step, None] * (1 + 1e-9)
    top = seconds[step, None] + seconds[("around", "sum"), None]
    assert top <= seconds[("around",), None] * (1 + 1e-9)
    ended = [span.path for span in recorder.spans]
    assert ended.index((*layer, "norm")) < ended.index(layer) < ended.index(step)


def test_readers_are_chosen_by_name() -> None:
    """Values by their names, spans and events by the phases around; several readers in one run."""
    values: list[str] = []
    spans: list[tuple[str, ...]] = []
    events: list[str] = []
    recorder = Recorder(spans=False)
    recorder.on_value(lambda name, value: values.append(name), "layers.1.*", "logits")
    recorder.on_span(lambda span: spans.append(span.path), "*/norm")
    recorder.on_event(lambda event: events.append(event.equation), "head")
    with recorder, Recorder() as other:
        tiny_model().logits(IDS)
    assert (values, spans, events, recorder.spans) == ([], [], [], [])  # the inner one records
    assert other.spans
    with recorder.on_value(lambda name, value: values.append(f"again {name}"), "logits"):
        tiny_model().logits(IDS)
    parts = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
    assert values == [*(f"layers.1.{part}" for part in parts), "logits", "again logits"]
    assert spans == [("layer", "norm")] * 4
    assert "btd,vd->btv" in events
    assert "btd,fd->btf" not in events
    assert recorder.spans == recorder.events == []


def test_what_a_reader_returns_is_used_from_there_on() -> None:
    """Another output of a layer gives other logits; the reader's own array is not written to."""
    model = tiny_model()
    with Recorder(values="*") as recorder:
        plain = model.logits(IDS)
    kept = recorder.values["layers.0.mlp"]
    zeros = np.zeros_like(kept)
    with Recorder(values="layers.0").on_value(lambda name, y: zeros, "layers.0.mlp") as changed:
        without = model.logits(IDS)
    assert not np.array_equal(plain, without)
    assert not zeros.any()
    expected = recorder.values["embed_tokens"] + recorder.values["layers.0.self_attn"]
    np.testing.assert_array_equal(changed.values["layers.0"], expected)
    with Recorder().on_value(lambda name, y: kept, "layers.0.mlp"):
        np.testing.assert_array_equal(model.logits(IDS), plain)
    with (
        pytest.raises(ValueError, match=r"layers\.0\.mlp has shape \(2, 11, 32\)"),
        Recorder().on_value(lambda name, y: y[:1], "layers.0.mlp"),
    ):
        model.logits(IDS)


def test_what_a_reader_computes_is_not_recorded() -> None:
    def reads(name: str, value: np.ndarray) -> None:
        einsum("btd,btd->bt", value, value)
        tap("inner", value)

    with Recorder(events=True).on_value(reads, "outer", "inner") as recorder:
        tap("outer", np.ones((1, 2, 3)))
        assert recorder.events == []
        einsum("ij->ji", np.ones((2, 3)))
    assert len(recorder.events) == 1


@pytest.mark.parametrize("window", [None, 4])
def test_patterns_are_whole_only_for_who_asks(window: int | None) -> None:
    """The weights of all values, rows that add up to 1, zero where a query may not look; `*` alone does not
    ask for them, and watching them changes nothing."""
    config = {"model_type": "mistral", "sliding_window": window} if window else {}
    model = tiny_model(**config)
    plain = model.logits(IDS)
    with Recorder(values="*") as nobody, Recorder(values="*.pattern") as recorder:
        np.testing.assert_array_equal(model.logits(IDS), plain)
    assert not nobody.values
    pattern = recorder.values["layers.1.self_attn.pattern"]
    assert sorted(recorder.values) == ["layers.0.self_attn.pattern", "layers.1.self_attn.pattern"]
    assert pattern.shape == (2, 2, 4, 11, 11)
    np.testing.assert_allclose(pattern.sum(axis=-1), 1, rtol=1e-6)
    query, key = np.ogrid[:11, :11]
    visible = (key <= query) & (key > query - (window or 11))
    assert not pattern[..., ~visible].any()
    assert pattern[..., visible].all()


def test_a_pattern_can_be_replaced() -> None:
    """Every query takes the value of the first position alone."""
    model = tiny_model()

    def first(name: str, pattern: np.ndarray) -> np.ndarray:
        only = np.zeros_like(pattern)
        only[..., 0] = 1
        return only

    with Recorder(values="layers.0.self_attn").on_value(first, "layers.0.self_attn.pattern") as recorder:
        model.logits(IDS)
    y = recorder.values["layers.0.self_attn"]
    np.testing.assert_allclose(y, np.broadcast_to(y[:, :1], y.shape), rtol=1e-5)


def test_bytes_count_each_operand_by_its_own_type() -> None:
    a, b = np.ones((3, 4), np.float32), np.ones((4, 5), np.float64)
    with Recorder(events=True) as recorder:
        einsum("ij,jk->ik", a, b)
    (event,) = recorder.events
    assert (event.bytes_read, event.bytes_written, event.dtype) == (12 * 4 + 20 * 8, 15 * 8, "float64")
    assert event.bytes == event.bytes_read + event.bytes_written


@pytest.mark.parametrize("kind", ["arrays", "frozen", "lazy", "lora", "tied", "latent"])
def test_events_know_their_weight(kind: str, tmp_path: Path) -> None:
    """Each matrix in one product of the forward pass, and in one product and one gradient of the backward."""
    if kind == "latent":
        golden = load_golden("deepseek_v2_groups")
        model = et.load(write_folder(tmp_path, golden.config, golden.weights))
    elif kind == "lazy":
        model = et.load(write_tiny(tmp_path)[0], weight_budget=10_000)
    else:
        model = tiny_model(tie_word_embeddings=kind == "tied")
    if kind == "frozen":
        model = replace(model, decoder=map_named(lambda _, w: Frozen(w), model.decoder))
    if kind == "lora":
        model = with_lora(model, LoRAConfig(r=2, target_modules="all-linear"))
    with Recorder(events=True) as recorder:
        model.decoder.loss_and_gradient(IDS, IDS)
    matrices = {w.path for w in model.weights.values() if len(w.stored) > 1} - {"embed_tokens.weight"}
    if kind == "tied":
        matrices.add("embed_tokens.weight")
    used = {direction: Counter() for direction in ("forward", "backward", "gradient")}
    for event in recorder.events:
        if event.weight is not None:
            used["gradient" if event.gradient else event.path[0]][event.weight] += 1
    assert matrices <= set(used["forward"])
    assert matrices <= set(used["backward"])
    if kind == "frozen":
        assert not used["gradient"]
    elif kind == "lora":
        parts = {f"{path}.lora_{part}" for path in model.adapters for part in "AB"}
        assert parts <= set(used["forward"])
        assert set(used["gradient"]) == parts
    else:
        assert matrices <= set(used["gradient"])
    if kind in ("arrays", "tied"):
        plain = matrices - {"embed_tokens.weight"}
        assert all(counts[path] == 1 for counts in used.values() for path in plain)


def test_every_phase_of_the_package_is_listed() -> None:
    """And nothing else is, so that tables and the program agree."""
    sources = Path(et.__file__).parent.rglob("*.py")
    text = "".join(path.read_text(encoding="utf-8") for path in sources)
    assert set(re.findall(r'(?<![.\w])phase\("([^"]+)"', text)) == set(phases.NAMES)


def in_a_phase() -> Iterator[int]:
    with phase("suspended"):
        yield 1
        yield 2


@pytest.mark.parametrize("where", ["here", "another thread"])
def test_a_generator_that_is_closed_afterwards_wakes_nothing(where: str) -> None:
    """A recorder that was left stays left, in this thread and in the one that closes the generator."""
    with Recorder(events=True) as recorder:
        suspended = in_a_phase()
        next(suspended)
    heard: list[int] = []

    def close() -> None:
        suspended.close()
        with phase("later"):
            einsum("ij->ji", np.ones((2, 3)))
        heard.append(len(recorder.spans) + len(recorder.events))

    if where == "here":
        close()
    else:
        thread = threading.Thread(target=close)
        thread.start()
        thread.join(60)
    with phase("later still"):
        einsum("ij->ji", np.ones((2, 3)))
    assert heard == [0]
    assert recorder.spans == recorder.events == []


def test_a_recorder_that_another_thread_leaves_is_left() -> None:
    recorder = Recorder()
    recorder.__enter__()
    thread = threading.Thread(target=recorder.__exit__)
    thread.start()
    thread.join(60)
    with phase("later"):
        tap("x", np.ones(2))
    assert recorder.spans == []


def test_a_reader_may_not_return_another_kind_of_numbers() -> None:
    for wrong in (np.array([1j, 2j]), np.array([None, None])):
        with pytest.raises(TypeError), Recorder().on_value(lambda name, value, wrong=wrong: wrong, "x"):
            tap("x", np.ones(2))


@pytest.mark.parametrize("budget", [None, 1_000])
def test_parts_of_weights_are_known_too(budget: int | None, golden_folder: Folders) -> None:
    """Absorbed latent attention uses the rows of one matrix in two products, in memory or from the file."""
    model = et.load(golden_folder("deepseek_v2_direct"), weight_budget=budget)
    cache = model.cache()
    model.decoder.forward(np.arange(6)[None], cache)
    with Recorder(events=True) as recorder:
        model.decoder.forward(np.array([[3]]), cache)
    named = Counter(event.weight for event in recorder.events if "khc" in event.equation)
    layers = model.config.num_hidden_layers
    assert named == {f"layers.{i}.self_attn.kv_b_proj": 2 for i in range(layers)}


def test_readers_come_before_the_run() -> None:
    with Recorder() as recorder:
        with pytest.raises(RuntimeError, match="before"):
            recorder.on_value(lambda name, value: None)
        with pytest.raises(RuntimeError, match="before"):
            recorder.on_event(lambda event: None)
        with pytest.raises(RuntimeError, match="before"):
            recorder.on_arrays(lambda event, operands, result: None)


def test_readers_of_arrays_see_operands_and_results() -> None:
    found = []
    recorder = Recorder(spans=False).on_arrays(lambda *call: found.append(call), "*/here")
    a, b = np.ones((1, 2, 3)), np.ones((4, 3))
    with recorder, phase("outer"):
        einsum("btd,fd->btf", a, b)
        with phase("here"):
            result = einsum("btd,fd->btf", a, b)
    (event, operands, seen), *others = found
    assert others == []
    assert event.path == ("outer", "here")
    assert operands[0] is a
    assert operands[1] is b
    assert seen is result
    assert event.flops == 2 * 2 * 3 * 4


def test_readers_of_arrays_see_every_decode_step() -> None:
    """Also those that would be replayed, with the same results."""
    model = tiny_model()

    def run(recorder: Recorder) -> tuple[list[np.ndarray], int]:
        cache = model.cache(128)
        with recorder:
            logits = [model.decoder.forward(IDS[:1, i % 11][:, None], cache)[0].copy() for i in range(40)]
        return logits, cache.steps.repeated

    steps = []
    recorder = Recorder(spans=False).on_arrays(lambda event, *_: steps.append(event.equation), "layer/norm")
    expected, repeated = run(Recorder(spans=False, events=True))
    assert repeated > 0
    found, repeated = run(recorder)
    assert repeated == 0
    assert len(steps) == 40 * 4 * model.config.num_hidden_layers  # two equations in each of two norms
    np.testing.assert_array_equal(found, expected)
