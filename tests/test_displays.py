"""Results show themselves in notebooks: well-formed HTML, in which all text is escaped."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np

import einsum_transformer as et
from einsum_transformer.displays import as_html, curve, heat_map, with_colours
from einsum_transformer.tables import terminal_table
from golden_files import Models, load_golden


def parsed(html: str) -> ElementTree.Element:
    """HTML of this package is XML, apart from the root."""
    return ElementTree.fromstring(f"<div>{html}</div>")


def text_of(html: str) -> str:
    return "".join(parsed(html).itertext())


def test_letters_of_equations_are_marked() -> None:
    shown = with_colours("y = btd,fd->btf, not a-b or 3 -> 4")
    assert text_of(shown) == "y = btd,fd->btf, not a-b or 3 -> 4"
    assert shown.count("<span") == 8
    colours = re.findall(r"solid (#\w+)\">(\w)", shown)
    assert len({letter for _, letter in colours}) == 4
    assert len(set(colours)) == 4


def test_text_is_escaped() -> None:
    hostile = "<script>alert(1)</script> & \"'"
    table = terminal_table([hostile])
    table.add_row(hostile)
    html = as_html(hostile, table, heat_map([[1.0]], [hostile], [hostile], hostile, [[hostile]]))
    assert "<script" not in html
    assert text_of(html).count("<script>alert(1)</script>") >= 5


def test_a_heat_map_shows_at_most_64_rows() -> None:
    values = np.arange(100.0 * 70).reshape(100, 70)
    values[0, 0], values[1, 0] = np.nan, -np.inf
    shown = heat_map(values, [str(i) for i in range(100)], [str(i) for i in range(70)], "large")
    assert len(parsed(shown).findall(".//rect")) == 64 * 64
    assert "the first 64 x 64" in text_of(shown)
    assert len(parsed(heat_map(np.zeros((2, 3)), "ab", "cde", "zero")).findall(".//rect")) == 6


def test_a_curve_leaves_out_what_is_not_finite() -> None:
    points = parsed(curve({1: 2.0, 2: np.nan, 3: 1.0}, "loss")).find(".//polyline")
    assert points is not None
    assert len(points.attrib["points"].split()) == 2
    assert curve({1: np.inf}, "loss") == ""
    assert curve({}, "loss") == ""


def test_all_results(golden_model: Models) -> None:
    model = golden_model("llama_gqa")
    tokens = load_golden("llama_gqa").tokens[:1, :6]
    config = et.RunConfig("llama", d_model=64, n_layers=2, n_heads=4, d_ff=128, vocab_size=256)
    with et.Profiler(model) as profiler:
        model.logits(tokens)
    results = (
        profiler,
        et.profile(model, tokens.tolist(), max_new_tokens=2, equations=True, memory=True),
        et.plan(config, 1, 8),
        et.explain(config),
        et.diff(config, config),
        et.sweep(config, {"seq_len": [8, 16, 32]}, "none"),
        et.train(config, steps=3, batch_size=1, seq_len=8),
        et.capture(model, tokens, ["layers.0", "blocks.0.attn.hook_pattern", "layers.0.self_attn.q"]),
        et.logit_lens(model, tokens),
        et.logit_attribution(model, tokens),
        et.head_summary(model, tokens),
        et.ablate_heads(model, tokens),
        et.next_tokens(model, tokens),
    )
    for found in results:
        html = found._repr_html_()
        assert len(text_of(html)) > 50, type(found)


def test_hostile_tokens() -> None:
    model = et.load()
    found = et.capture(model, "<script>alert(1)</script>", "layers.0.self_attn.pattern")
    html = found._repr_html_()
    assert "<script" not in html
    assert "script" in text_of(html)
