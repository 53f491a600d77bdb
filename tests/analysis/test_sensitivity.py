"""Sensitivity: each part alone, mixed schemes within a budget, and results from which a run continues."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

import einsum_transformer as et
from command_line import save_with_tokenizer
from einsum_transformer.analysis import sensitivity as analysis
from einsum_transformer.analysis.sensitivity import choose
from einsum_transformer.tree import map_named, named_leaves
from golden_files import MODELS, Models
from tiny_models import tiny_model

TEXT = "The quick brown fox jumps over the lazy dog. " * 20
SCHEMES = ("W8A16", "W4A16g32", "W2A16g32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> et.Model:
    folder = tmp_path_factory.mktemp("sensitivity") / "model"
    base = tiny_model(vocab_size=128, eos_token_id=None, max_position_embeddings=64)
    return et.load(save_with_tokenizer(folder, base))


def only(model: et.Model, scheme: str, part: str) -> et.Model:
    """The model with the matrices quantized whose path contains `part`, made by `et.quantize`."""
    whole = dict(named_leaves(et.quantize(model, scheme).decoder))
    decoder = map_named(lambda path, w: whole[path] if f".{part}." in f".{path}." else w, model.decoder)
    return replace(model, decoder=decoder)


@pytest.mark.parametrize(
    ("by", "part", "name"),
    [
        ("kind", "down_proj", "down_proj"),
        ("layer", "layers.1", "layers.1"),
        ("layer", "lm_head", "lm_head"),
        ("tensor", "layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"),
    ],
)
def test_a_part_is_quantized_alone(by: str, part: str, name: str, model: et.Model) -> None:
    found = et.sensitivity(model, TEXT, SCHEMES, by=by, ctx_size=32, chunks=3)
    for scheme in SCHEMES:
        row = next(row for row in found.parts if row.part == name and row.scheme.startswith(scheme))
        alone = only(model, scheme, part)
        expected = et.divergence(alone, model, TEXT, ctx_size=32, chunks=3)
        assert row.kl_mean == pytest.approx(expected.kl_mean, rel=1e-9, abs=1e-12)
        assert row.kl_standard_error == pytest.approx(expected.kl_standard_error, rel=0.02, abs=1e-12)
        assert row.same_top == expected.same_top
        before, after = (dict(named_leaves(each.decoder)) for each in (model, alone))
        own = [path for path in before if before[path] is not after[path]]
        if name != "lm_head":  # a norm keeps its type
            assert (row.bytes, row.bytes_before) == (
                sum(after[path].nbytes for path in own if before[path].ndim > 1),
                sum(before[path].nbytes for path in own if before[path].ndim > 1),
            )


def test_whole_models(model: et.Model) -> None:
    found = et.sensitivity(model, TEXT, SCHEMES, ctx_size=32, chunks=3)
    for each, scheme in zip(found.uniform, SCHEMES, strict=True):
        whole = et.quantize(model, scheme)
        assert each.kl_mean == pytest.approx(et.divergence(whole, model, TEXT, 32, 3).kl_mean, rel=1e-9)
        assert each.bytes == sum(leaf.nbytes for _, leaf in named_leaves(whole.decoder))
        alone = [row.kl_mean for row in found.parts if row.scheme == each.scheme]
        assert each.kl_sum == pytest.approx(sum(alone))
    assert found.bytes_before == sum(leaf.nbytes for _, leaf in named_leaves(model.decoder))
    assert found.mixed is None


@pytest.mark.parametrize("by", ["tensor", "layer", "kind"])
def test_the_mixed_scheme_is_that_of_quantize(by: str, model: et.Model) -> None:
    sizes = {each.scheme: each.bytes for each in et.sensitivity(model, TEXT, SCHEMES, ctx_size=32).uniform}
    budget = (min(sizes.values()) + max(sizes.values())) // 2
    found = et.sensitivity(model, TEXT, SCHEMES, by=by, budget=budget, ctx_size=32, chunks=3)
    assert found.mixed is not None
    assert found.rival is not None
    assert found.mixed.by_name
    assert found.mixed.bytes <= budget
    same = et.quantize(model, found.mixed.scheme, by_name=found.mixed.by_name)
    assert found.mixed.bytes == sum(leaf.nbytes for _, leaf in named_leaves(same.decoder))
    assert found.mixed.kl_mean == pytest.approx(et.divergence(same, model, TEXT, 32, 3).kl_mean, rel=1e-6)
    assert found.mixed.kl_mean < found.rival.kl_mean
    assert min(size for size, _ in found.curve) == found.curve[0][0]
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in zip(found.curve, found.curve[1:]))


@pytest.mark.parametrize("name", MODELS)
def test_parts_of_every_family(name: str, golden_model: Models) -> None:
    """The patterns match exactly the weights of the part."""
    model = golden_model(name)
    quantized = dict(named_leaves(et.quantize(model, "W8A16").decoder))
    paths = [path for path, leaf in quantized.items() if not isinstance(leaf, np.ndarray)]
    for by in analysis.BY:
        parts = analysis._parts(model, by, paths)
        assert sorted(path for part in parts for path in part.paths) == sorted(paths)
        for part in parts[:3] + parts[-3:]:
            given = {} if len(part.paths) == len(paths) else {part.pattern: "W2A16g32"}
            mixed = et.quantize(model, "W8A16", by_name=given)
            low = [
                path
                for path, leaf in named_leaves(mixed.decoder)
                if path in paths and (leaf.bits, leaf.group) != (quantized[path].bits, quantized[path].group)
            ]
            ends = [path for path in part.paths if path.split(".")[0] in ("embed_tokens", "lm_head")]
            assert sorted({*low, *ends}) == sorted(part.paths) if given else not low


def test_choose() -> None:
    costs = {
        "a": {"2": (10, 1.0), "4": (20, 0.1), "8": (40, 0.0)},
        "b": {"2": (10, 0.2), "4": (20, 0.19), "8": (40, 0.18)},
        "c": {"2": (10, 0.5), "4": (20, 0.6), "8": (40, 0.1)},
    }
    assert choose(costs, 30)[0] == {"a": "2", "b": "2", "c": "2"}
    assert choose(costs, 45)[0] == {"a": "4", "b": "2", "c": "2"}
    assert choose(costs, 70)[0] == {"a": "4", "b": "2", "c": "8"}
    every, steps = choose(costs, 1000)
    assert every == {"a": "8", "b": "8", "c": "8"}
    assert steps[0] == (30, 1.7)
    assert steps[-1] == (120, pytest.approx(0.28))
    for budget in range(30, 121, 5):
        chosen, steps = choose(costs, budget)
        size = sum(costs[part][scheme][0] for part, scheme in chosen.items())
        total = sum(costs[part][scheme][1] for part, scheme in chosen.items())
        assert size <= budget
        assert steps[-1] == (size, pytest.approx(total))
        best = min(
            sum(costs[part][scheme][1] for part, scheme in zip(costs, schemes))
            for schemes in product("248", repeat=3)
            if sum(costs[part][scheme][0] for part, scheme in zip(costs, schemes)) <= budget
        )
        assert total <= best + 0.45  # greedy is not always the best


def test_an_interrupted_run_continues(
    model: et.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "results.jsonl"
    settings = {"schemes": SCHEMES[:2], "ctx_size": 32, "budget": 40_000}
    whole = et.sensitivity(model, TEXT, chunks=3, **settings)
    counts: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        counts.append((done, total))
        if done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        et.sensitivity(model, TEXT, chunks=2, results=file, progress=stop, **settings)
    lines = file.read_text().splitlines()
    assert len(lines) == 1 + 9
    counts.clear()
    after = et.sensitivity(
        model, TEXT, chunks=2, results=file, progress=lambda *n: counts.append(n), **settings
    )
    assert file.read_text().splitlines()[:10] == lines
    assert len(set(file.read_text().splitlines())) == len(file.read_text().splitlines())
    more = et.sensitivity(model, TEXT, chunks=3, results=file, **settings)
    assert more == whole
    assert more.parts != after.parts
    monkeypatch.setattr(analysis, "scored_logits", None)  # nothing is left to measure
    assert et.sensitivity(model, TEXT, chunks=3, results=file, **settings) == whole
    assert et.sensitivity(model, TEXT, chunks=2, results=file, **settings) == after


def test_files_of_other_results(model: et.Model, tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    et.sensitivity(model, TEXT, ["W8A16"], ctx_size=32, chunks=1, results=file)
    changed = tiny_model(vocab_size=128, eos_token_id=None, max_position_embeddings=64, seed=1)
    other = replace(model, decoder=changed.decoder)
    before = file.read_bytes()
    for call, words in (
        (lambda: et.sensitivity(other, TEXT, ctx_size=32, results=file), "other weights: give another file"),
        (lambda: et.sensitivity(model, TEXT + "x" * 40, ctx_size=32, results=file), "with other text"),
        (lambda: et.sensitivity(model, TEXT, ctx_size=16, results=file), "with other (text, )?ctx_size"),
    ):
        with pytest.raises(et.InputError, match=words):
            call()
    assert file.read_bytes() == before
    for change, words in (
        (lambda lines: ["not JSON", *lines[1:]], "line 1 is not valid JSON"),
        (lambda lines: [*lines[:-1], lines[-1][:-9]], "is not valid JSON"),
        (lambda lines: [*lines, '{"part": "x"}'], "is not a measurement"),
        (
            lambda lines: [*lines, json.dumps(json.loads(lines[-1]) | {"kl": float("nan")})],
            "not a measurement",
        ),
    ):
        file.write_text("\n".join(change(before.decode().splitlines())) + "\n")
        with pytest.raises(et.InputError, match=words):
            et.sensitivity(model, TEXT, ctx_size=32, results=file)


def test_what_is_rejected(model: et.Model) -> None:
    for arguments, words in (
        ({"by": "row"}, "`by` is 'row': expected tensor, layer, kind"),
        ({"schemes": []}, "`schemes` is empty"),
        ({"schemes": ["none"]}, "`schemes` contains 'none'"),
        ({"schemes": ["W8A16", "W8A8"]}, "different bits of activations"),
        ({"budget": 100}, "`budget` is 100 B: the weights have"),
    ):
        with pytest.raises(et.InputError, match=words):
            et.sensitivity(model, TEXT, ctx_size=32, **arguments)
    with pytest.raises(et.InputError, match="already quantized"):
        et.sensitivity(et.quantize(model, "W8A16"), TEXT, ctx_size=32)


def test_the_table_and_the_plot(model: et.Model, tmp_path: Path) -> None:
    found = et.sensitivity(model, TEXT, SCHEMES, by="tensor", budget=40_000, ctx_size=32, chunks=1)
    text = str(found)
    assert found.parts[0].part in text
    assert "mixed within 40.0 kB" in text
    assert "times that of the whole model in" in text
    count = len({row.part for row in found.parts})
    assert (f"and {count - 20} more" in text) == (count > 20)
    assert all(row.part in found.text(every=True) for row in found.parts)
    found.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_an_unwritable_file_of_results_is_found_before_the_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(et.InputError, match="`results`"):
        et.sensitivity("no-such-model", "text", results=tmp_path / "missing" / "results.jsonl")
