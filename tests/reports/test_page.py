"""The data of a report are the library's own results, and the page contains them as data, not as markup."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import einsum_transformer as et
from command_line import etx, save_with_tokenizer
from einsum_transformer.analysis import dry_plan
from einsum_transformer.analysis.lens import probabilities, project
from einsum_transformer.reports.arrays import sample
from einsum_transformer.reports.lens import looked_at, predictions
from einsum_transformer.reports.page import embedded
from golden_files import MODELS, Models, load_golden
from tiny_models import tiny_model

IDS = [3, 14, 15, 9, 26, 5]
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\u2028\u2029<!--"


@pytest.fixture(scope="module")
def model() -> et.Model:
    return tiny_model(eos_token_id=None)


@pytest.fixture(scope="module")
def found(model: et.Model) -> et.Report:
    return et.report(model, IDS, training=True, max_new_tokens=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model(vocab_size=128, eos_token_id=None)
    return save_with_tokenizer(tmp_path_factory.mktemp("report") / "model", model)


class Page(HTMLParser):
    """The tags of a page with their attributes, and the text of its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._script = tag == "script"

    def handle_endtag(self, tag: str) -> None:
        self._script = False

    def handle_data(self, data: str) -> None:
        if self._script:
            self.scripts.append(data)
        else:
            self.text += data

    @property
    def data(self) -> Any:
        """The JSON object of the page."""
        return json.loads(self.scripts[0])


def in_json_types(report: et.Report) -> Any:
    return json.loads(json.dumps(report.to_dict(), allow_nan=False))


def test_the_page_contains_the_data(found: et.Report) -> None:
    page = Page(found.html())
    assert page.data == in_json_types(found)
    assert len(page.scripts) == 2
    assert [attributes["id"] for tag, attributes in page.tags if tag == "script" and attributes] == ["data"]


def test_the_program_is_that_of_explain(model: et.Model, found: et.Report) -> None:
    (run,) = found.runs
    assert run.program == et.explain(model, tokens=len(IDS), backward=True)
    assert found.to_dict()["runs"][0]["program"] == run.program.to_dict()


def test_the_counts_are_those_of_the_plan(model: et.Model, found: et.Report) -> None:
    (run,) = found.runs
    prefill, decode = dry_plan.of_run(model, 1, len(IDS), len(IDS) + 2)
    training = dry_plan.of_training(model, 1, len(IDS) + 4, False)
    phases = {"prefill": prefill, "decode": decode, "forward": training, "backward": training}
    assert [stage.name for stage in run.stages] == list(phases)
    for stage in run.stages:
        steps = [step for step in phases[stage.name].steps if step.path[0] == stage.name]
        assert [step.plan for step in stage.steps if step.equation] == steps
        assert steps


def test_the_times_are_those_of_profile(model: et.Model, found: et.Report) -> None:
    """The same rows, with the same calls: the seconds differ from run to run."""
    (run,) = found.runs
    expected = et.profile(model, IDS, max_new_tokens=5, equations=True)
    names = "stage", "role", "equation", "calls", "elements"

    def rows(equations: Any) -> set[tuple[Any, ...]]:
        return {tuple(getattr(row, name) for name in names) for row in equations}

    assert rows(run.measured.equations) == rows(expected.equations)
    own, theirs = run.measured.to_dict(), expected.to_dict()
    assert [set(each) for each in own["stages"]] == [set(each) for each in theirs["stages"]]
    assert set(own["equations"][0]) == {*theirs["equations"][0], "lowering"}
    assert [row.name for row in run.timings.rows] == [row.name for row in expected.report.rows]
    assert [row.calls for row in run.timings.rows] == [row.calls for row in expected.report.rows]
    for row in run.measured.equations:
        assert bool(run.measured.lowerings.get((row.stage, row.role, row.equation))) == bool(row.equation)


def test_the_time_line_is_that_of_the_stages(found: et.Report) -> None:
    (run,) = found.runs
    line = run.measured.to_dict()["timeline"]
    for stage in run.measured.stages:
        own = [each for each in line if each["path"] == stage.stage]
        assert len(own) == stage.calls
        assert sum(each["seconds"] for each in own) == pytest.approx(stage.seconds, abs=1e-6 * len(own))
    assert {"prefill/layer/attention/scores", "decode/layer"} <= {each["path"] for each in line}
    assert run.training is not None
    paths = {each["path"] for each in run.training.to_dict()["timeline"]}
    assert {"forward", "backward/layer", "update"} <= paths


def test_the_memory_is_that_of_profile(model: et.Model, found: et.Report) -> None:
    (run,) = found.runs
    expected = et.profile(model, IDS, max_new_tokens=5, memory=True).memory
    assert expected is not None
    assert run.memory.predicted == expected.predicted
    assert [(each.phase, each.layer, each.weights, each.cache) for each in run.memory.samples] == [
        (each.phase, each.layer, each.weights, each.cache) for each in expected.samples
    ]


def test_training_restores_the_weights(found: et.Report) -> None:
    model = tiny_model(eos_token_id=None)
    before = {name: array.copy() for name, array in model.named_parameters().items()}
    (run,) = et.report(model, IDS, training=True, max_new_tokens=2).runs
    assert run.training is not None
    assert len(run.training.losses) == 3
    assert run.training.losses[0] > run.training.losses[2]
    for name, array in model.named_parameters().items():
        np.testing.assert_array_equal(array, before[name], name)


def test_samples_are_elements_of_the_arrays(model: et.Model, found: et.Report) -> None:
    (run,) = found.runs
    call = "prefill", 1, ("layer", "feed-forward"), "gate_proj", "btd,fd->btf"
    x, weight, y = (run.arrays.samples[i] for i in run.arrays.calls[call][0])
    gate = model.decoder.layers[1].mlp.gate_proj
    assert (weight.term, weight.shape, weight.rows, weight.columns) == ("fd", gate.shape, "f", "d")
    np.testing.assert_allclose(weight.values, gate[:: weight.row_step, :: weight.column_step], rtol=6e-4)
    full = np.array(x.values) if x.column_step == 1 else None
    assert full is not None
    expected = np.einsum("td,fd->tf", full, gate)[:, :: y.column_step]
    np.testing.assert_allclose(y.values, expected, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize(
    ("term", "shape", "rows", "columns"),
    [
        ("btkgh", (2, 40, 2, 3, 16), "t", "kgh"),
        ("bkgts", (1, 2, 3, 40, 70), "t", "s"),
        ("bskh", (1, 50, 2, 16), "s", "kh"),
        ("kghd", (2, 3, 16, 96), "kgh", "d"),
        ("v", (99,), "", "v"),
        ("b", (3,), "", "b"),
        ("bt", (1, 5), "t", ""),
    ],
)
def test_a_sample_describes_its_part(term: str, shape: tuple[int, ...], rows: str, columns: str) -> None:
    array = np.arange(np.prod(shape), dtype=np.float64).reshape(shape) % 1009
    found = sample(term, array)
    assert (found.rows, found.columns, found.shape) == (rows, columns, shape)
    assert len(found.values) <= 32
    assert len(found.values[0]) <= 32
    index = tuple(found.fixed.get(letter, slice(None)) for letter in term)
    matrix = array[index].reshape(found.row_count, found.column_count)
    np.testing.assert_array_equal(found.values, matrix[:: found.row_step, :: found.column_step])


def test_values_that_are_not_finite_are_missing() -> None:
    found = sample("td", np.array([[1.0, np.nan], [np.inf, -2.5]]))
    assert found.values == ((1.0, None), (None, -2.5))
    assert (found.lowest, found.highest) == (-2.5, 1.0)


@pytest.mark.parametrize("name", MODELS)
def test_all_families(name: str, golden_model: Models) -> None:
    """The lens of the last layer gives the model's logits; every step is in a group, measured and sampled."""
    model, ids = golden_model(name), [int(token) for token in load_golden(name).tokens[0][:6]]
    (run,) = et.report(model, ids, max_new_tokens=2, ignore_eos=True).runs
    expected = predictions(model.logits([ids])[0], 5)
    for found, each in zip(run.lens.layers[-1], expected):
        np.testing.assert_allclose(found.probabilities, each.probabilities, rtol=1e-4)
    for stage in run.stages:
        grouped = {i for group in stage.groups for i in group.steps}
        assert grouped == set(range(len(stage.steps)))
        steps = {(stage.name, step.role, step.equation) for step in stage.steps if step.equation}
        assert steps <= {(row.stage, row.role, row.equation) for row in run.measured.equations}
        assert steps <= {(key[0], key[3], key[4]) for key in run.arrays.calls}


def test_the_lens_of_the_last_layer_equals_the_logits(model: et.Model) -> None:
    outputs = {}
    with et.Recorder(values="layers.1") as recorder:
        logits = model.decoder.forward(np.array([IDS]))[0]
    outputs = recorder.values
    np.testing.assert_array_equal(project(model, outputs["layers.1"]), logits)


def test_attention_weights_are_those_of_the_model(model: et.Model) -> None:
    attention, _ = looked_at(model, IDS)
    with et.Recorder(values="layers.*.self_attn.pattern") as recorder:
        model.decoder.forward(np.array([IDS]))
    encoded = attention.to_dict()
    for layer in range(2):
        codes = np.frombuffer(base64.b64decode(encoded["layers"][layer]), np.uint8)
        pattern = recorder.values[f"layers.{layer}.self_attn.pattern"].reshape(-1, len(IDS), len(IDS))
        below = np.tril_indices(len(IDS))
        expected = pattern[:, below[0], below[1]]
        np.testing.assert_allclose(codes.reshape(expected.shape) / 255, expected, atol=0.5 / 255 + 1e-6)


def test_next_tokens_have_the_probabilities_of_the_model(model: et.Model, found: et.Report) -> None:
    (run,) = found.runs
    tokens = [*IDS, *et.generate(model, IDS, max_new_tokens=5).tokens]
    p = probabilities(model.logits([tokens])[0])
    assert [each.chosen for each in run.next_tokens] == tokens[len(IDS) :]
    for each in run.next_tokens:
        assert each.probability == pytest.approx(p[each.position - 1, each.chosen], rel=1e-4)
        assert each.predicted.ids[0] == np.argmax(p[each.position - 1])


def test_hostile_tokens_are_text(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    ids = et.load(folder).tokenizer.encode("<script>&")  # type: ignore[union-attr]
    assert len(ids) == 9
    ran = etx(
        "report", folder, "-p", HOSTILE.replace("\u2028", "").replace("\u2029", ""), "-n", 3, "-o", path
    )
    assert ran.code == 0, ran.err
    page = Page(path.read_text(encoding="utf-8"))
    assert [tag for tag, _ in page.tags if tag in ("script", "img", "iframe", "b")] == ["script", "script"]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert "".join(token["text"] for token in page.data["runs"][0]["tokens"]).startswith("</script><script>")


def test_embedded_json_cannot_end_its_element() -> None:
    text = embedded({HOSTILE: [HOSTILE, "\ud800"]})
    assert not re.search("[<>&\u2028\u2029]", text)
    assert json.loads(text) == {HOSTILE: [HOSTILE, "?"]}


def test_names_of_models_are_text() -> None:
    from dataclasses import replace

    model = replace(tiny_model(eos_token_id=None), source=f"models/{HOSTILE}")
    page = Page(et.report(model, IDS, max_new_tokens=1).html())
    assert [tag for tag, _ in page.tags if tag in ("script", "img")] == ["script", "script"]
    assert page.data["runs"][0]["model"] == f"models/{HOSTILE}"


def test_the_page_needs_no_network(found: et.Report) -> None:
    text = found.html()
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("link", "base", "form", "object", "embed")
        assert "src" not in attributes
        assert attributes.get("href", "#").startswith("#")  # type: ignore[union-attr]
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    script = page.scripts[1]
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function|fetch\(", script
    )
    assert "http" not in script.replace("http://www.w3.org/2000/svg", "")


def test_the_page_is_small(model: et.Model) -> None:
    assert len(et.report(model, IDS, max_new_tokens=4).html()) < 500_000


def test_tables_have_captions_and_headings(found: et.Report) -> None:
    tags = Page(found.html()).tags
    assert sum(tag == "table" for tag, _ in tags) == sum(tag == "caption" for tag, _ in tags) > 5
    assert all(attributes.get("scope") in ("row", "col") for tag, attributes in tags if tag == "th")


def test_a_long_prompt_names_what_is_left_out(folder: Path) -> None:
    found = et.report(folder, "a long story. " * 8, tokens_shown=16, max_new_tokens=20)
    (run,) = found.runs
    count = run.prompt_tokens + run.new_tokens
    assert count > 100
    first = f"attention and logit lens show the first 16 of {count} tokens; the {count - 16} tokens after"
    assert run.left_out[0].startswith(first)
    assert "first 16 of 20 new tokens" in run.left_out[1]
    assert (len(run.tokens), run.attention.tokens, len(run.next_tokens)) == (16, 16, 16)
    assert first in Page(found.html()).text
    assert first in str(found)


def test_layers_without_arrays_are_named() -> None:
    model = tiny_model(num_hidden_layers=6, eos_token_id=None)
    (run,) = et.report(model, IDS, max_new_tokens=1).runs
    assert {key[1] for key in run.arrays.calls} == {None, 0, 2, 5}
    assert "layers 0, 2, 5 of 6" in run.left_out[0]


def test_two_models_side_by_side(model: et.Model) -> None:
    other = tiny_model(num_hidden_layers=3, eos_token_id=None)
    found = et.report(model, IDS, other=other, max_new_tokens=2)
    assert found.names == ("random weights (A)", "random weights (B)")
    assert [run.program.config.num_hidden_layers for run in found.runs] == [2, 3]
    assert found.comparison is not None
    expected = et.diff(model, other, tokens=len(IDS))
    assert asdict(found.comparison) | {"names": 0} == asdict(expected) | {"names": 0}
    page = Page(found.html())
    drawn = [
        attributes["data-run"] for _, attributes in page.tags if attributes.get("data-draw") == "cascade"
    ]
    assert drawn == ["0", "1"]
    assert "num_hidden_layers" in page.text


def test_a_quantized_model_shows_its_errors(model: et.Model) -> None:
    quantized = et.quantize(model, "W4A16g32")
    found = et.report(quantized, IDS, reference=model, max_new_tokens=3)
    expected = et.quantization_report(quantized, model)
    assert found.runs[0].quantization_report == expected
    text = Page(found.html()).text
    assert f"{expected.tensors[0].relative:.3%}" in text
    without = et.report(quantized, IDS, max_new_tokens=1)
    assert "errors need the model without quantization" in Page(without.html()).text


def test_adapters(model: et.Model) -> None:
    adapted = et.with_lora(model, et.LoRAConfig(r=2))
    (run,) = et.report(adapted, IDS, training=True, max_new_tokens=2).runs
    assert any("lora" in step.role for stage in run.stages for step in stage.steps)
    Page(et.Report((run,), et.report(model, IDS, max_new_tokens=0).machine).html())


def test_the_path_is_checked_before_the_run(model: et.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("the model ran")

    monkeypatch.setattr("einsum_transformer.api.report.collect", fail)
    with pytest.raises(et.InputError, match="cannot be written"):
        et.report(model, IDS, "missing/folder/report.html")
    monkeypatch.setattr("einsum_transformer.loading.load.load", fail)
    ran = etx("report", "fast_lora", "-o", "missing/folder/report.html")
    assert ran.code == 2
    assert "--output missing/folder/report.html: cannot be written" in ran.err


def test_wrong_arguments(model: et.Model) -> None:
    for message, prompt, options in (
        ("tokens_shown", IDS, {"tokens_shown": 1}),
        ("one prompt", [IDS, IDS], {}),
        ("speculative", IDS, {"prompt_lookup": 2}),
        ("at least two tokens", [3], {"training": True, "max_new_tokens": 0}),
        ("no gradient", IDS, {"training": True}),
    ):
        given = et.quantize(model, "W8A16") if message == "no gradient" else model
        with pytest.raises(et.InputError, match=message):
            et.report(given, prompt, **options)
    assert "--output is required" in etx("report", "fast_lora").err


def test_the_command_writes_the_page(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    ran = etx("report", folder, folder, "-p", "abc", "-n", 2, "-o", path)
    assert (ran.code, ran.out) == (0, "")
    assert ran.err.splitlines()[-1] == f"wrote {path}"
    assert len(Page(path.read_text(encoding="utf-8")).data["runs"]) == 2
    assert list(tmp_path.iterdir()) == [path]
