"""Perplexity and divergence: the same numbers as from whole logits, and texts that cannot be used."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import einsum_transformer as et
from command_line import save_with_tokenizer
from einsum_transformer.analysis import evaluate
from golden_files import FOLDER
from tiny_models import tiny_model

Array = np.ndarray
TEXT = "The quick brown fox jumps over the lazy dog. " * 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> et.Model:
    folder = tmp_path_factory.mktemp("evaluate") / "model"
    base = tiny_model(vocab_size=128, eos_token_id=None, max_position_embeddings=64)
    return et.load(save_with_tokenizer(folder, base))


def log_probabilities(model: et.Model, windows: Array) -> Array:
    logits = model.logits(windows).astype(np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def windows_of(model: et.Model, size: int) -> Array:
    assert model.tokenizer is not None
    ids = model.tokenizer.encode(TEXT, add_special_tokens=False)
    bos = model.tokenizer.bos_id if model.tokenizer.encode("a")[0] == model.tokenizer.bos_id else None
    ids = ids if bos is None else [bos, *ids]
    found = np.array(ids[: len(ids) // size * size]).reshape(-1, size)
    if bos is not None:
        found[:, 0] = bos
    return found


@pytest.mark.parametrize("size", [32, 33])
def test_perplexity(size: int, model: et.Model) -> None:
    windows = windows_of(model, size)
    p = log_probabilities(model, windows)[:, size // 2 : -1]
    scores = -np.take_along_axis(p, windows[:, size // 2 + 1 :, None], axis=-1).ravel()
    done = []
    found = et.perplexity(model, TEXT, ctx_size=size, progress=lambda *numbers: done.append(numbers))
    assert (found.chunks, found.tokens) == (len(windows), scores.size)
    assert found.perplexity == pytest.approx(np.exp(scores.mean()), rel=1e-5)
    error = scores.std(ddof=1) / np.sqrt(scores.size) * found.perplexity
    assert found.standard_error == pytest.approx(error, rel=1e-4)
    assert done == [(i + 1, len(windows)) for i in range(len(windows))]
    first = et.perplexity(model, TEXT, ctx_size=size, chunks=2)
    assert first.tokens == 2 * (size - 1 - size // 2)


def test_divergence(model: et.Model) -> None:
    other = et.quantize(model, "W2A8")
    windows = windows_of(model, 32)
    p, q = (log_probabilities(each, windows)[:, 16:-1] for each in (model, other))
    kl = (np.exp(p) * (p - q)).sum(axis=-1)
    found = et.divergence(other, model, TEXT, ctx_size=32)
    assert found.kl_mean == pytest.approx(kl.mean(), rel=1e-4)
    assert found.kl_max == pytest.approx(kl.max(), rel=1e-4)
    assert found.kl_median == pytest.approx(np.median(kl), rel=1e-4)
    assert found.same_top == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
    assert found.perplexity == pytest.approx(et.perplexity(other, TEXT, ctx_size=32).perplexity)
    assert found.reference_perplexity == pytest.approx(et.perplexity(model, TEXT, ctx_size=32).perplexity)
    assert "weights quantized to W2A8g64 (real)" in str(found)
    same = et.divergence(model, model, TEXT, ctx_size=32)
    assert (same.kl_mean, same.kl_max, same.same_top) == (0, 0, 1)


def test_probabilities_of_the_scored_tokens(model: et.Model) -> None:
    other = et.quantize(model, "W2A8")
    windows = windows_of(model, 32)
    targets = windows[:, 17:, None]
    p, q = (np.take_along_axis(log_probabilities(m, windows)[:, 16:-1], targets, -1) for m in (model, other))
    found = et.divergence(other, model, TEXT, ctx_size=32)
    assert found.probability_rms == pytest.approx(np.sqrt(np.mean((np.exp(p) - np.exp(q)) ** 2)), rel=1e-4)
    assert found.kl_median <= found.kl_p90 <= found.kl_p99 <= found.kl_max


@pytest.mark.parametrize("convention", ["llamacpp", "llamacpp-stride", "hf-stride", "gptq", "lm-eval"])
def test_conventions_are_those_of_other_programs(convention: str) -> None:
    """The perplexities that tools/golden_perplexity.py computed with these programs."""
    golden = json.loads((FOLDER / "perplexity.json").read_text())
    text = (Path(__file__).parents[2] / "examples" / "shakespeare.txt").read_text(encoding="utf-8")
    stride = golden["stride"] if convention.endswith("stride") else None
    found = et.perplexity(
        "smollm2-135m",
        text[: golden["characters"]],
        ctx_size=golden["ctx_size"],
        convention=convention,
        stride=stride,
    )
    assert (found.convention, found.ctx_size, found.stride) == (convention, golden["ctx_size"], stride)
    expected = golden[convention]
    if convention == "lm-eval":
        assert found.word_perplexity == pytest.approx(expected["word_perplexity"], rel=1e-5)
        assert found.bits_per_byte == pytest.approx(expected["bits_per_byte"], rel=1e-5)
        expected = expected["perplexity"]
    # llama.cpp's cache is float16.
    assert found.perplexity == pytest.approx(expected, rel=5e-4 if "llamacpp" in convention else 1e-5)


def test_windows_that_are_computed_in_pieces(model: et.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {
        name: et.perplexity(model, TEXT, 40, convention=name).perplexity for name in ("hf-stride", "gptq")
    }
    monkeypatch.setattr(evaluate, "_PIECE", 7)
    monkeypatch.setattr(evaluate, "_ROWS", 3)
    for name, expected in whole.items():
        assert et.perplexity(model, TEXT, 40, convention=name).perplexity == pytest.approx(expected, rel=1e-6)


def test_a_quantized_cache_counts(model: et.Model) -> None:
    """The predictions of an evaluation are made through the KV cache."""
    keys = replace(model, cache_types=et.quantize(model, "W8A8KV4").cache_types)
    found = et.divergence(keys, model, TEXT, ctx_size=32)
    assert found.kl_mean > 1e-6
    assert "KV cache: keys int4, values int4" in str(found)


def test_what_cannot_be_evaluated(model: et.Model, tmp_path: Path) -> None:
    wrong = tmp_path / "latin.txt"
    wrong.write_bytes("caf\xe9 ".encode("latin-1") * 100)
    with pytest.raises(et.InputError, match="not a text in UTF-8: byte 3"):
        et.perplexity(model, wrong, ctx_size=32)
    with pytest.raises(et.InputError, match=r"the text has \d+ tokens: at least 32 are needed"):
        et.perplexity(model, "short", ctx_size=32)
    with pytest.raises(et.InputError, match="`ctx_size` is 65: expected 4 to the positions of the model, 64"):
        et.perplexity(model, TEXT, ctx_size=65)
    with pytest.raises(et.InputError, match="only one token would be scored"):
        et.perplexity(model, TEXT, ctx_size=4, chunks=1)
    with pytest.raises(et.InputError, match="`convention` is 'wiki': expected llamacpp"):
        et.perplexity(model, TEXT, convention="wiki")
    with pytest.raises(et.InputError, match="`stride` is used by llamacpp-stride and hf-stride, not by gptq"):
        et.perplexity(model, TEXT, convention="gptq", stride=16)
    with pytest.raises(et.InputError, match="`stride` is 33: expected 1 to `ctx_size`, 32"):
        et.perplexity(model, TEXT, ctx_size=32, convention="hf-stride", stride=33)
    with pytest.raises(et.InputError, match=r"the text has \d+ tokens: at least 80 are needed"):
        et.perplexity(model, TEXT[:60], ctx_size=32, convention="llamacpp-stride", stride=16)
    with pytest.raises(et.InputError, match="`chunks` is 0"):
        et.perplexity(model, TEXT, ctx_size=32, chunks=0)
    with pytest.raises(et.InputError, match="no tokenizer"):
        et.perplexity(replace(model, tokenizer=None), TEXT, ctx_size=32)
    with pytest.raises(et.InputError, match="the same vocabulary"):
        et.divergence(model, tiny_model(vocab_size=61), TEXT, ctx_size=32)


def test_an_interrupted_evaluation_continues(model: et.Model, tmp_path: Path) -> None:
    other = replace(model, source="another")
    small = et.quantize(model, "W8A16")
    runs: dict[str, Any] = {
        "perplexity": lambda **more: et.perplexity(model, TEXT, ctx_size=32, **more),
        "divergence": lambda **more: et.divergence(small, model, TEXT, ctx_size=32, **more),
    }
    for name, run in runs.items():
        file = tmp_path / f"{name}.jsonl"
        expected = run()

        def stop(done: int, total: int) -> None:
            if done == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(results=file, progress=stop)
        assert file.read_text().count("\n") == 3
        with file.open("a") as opened:
            opened.write('{"chunk": 2, "scor')  # the process ended while it wrote
        assert run(results=file) == expected
        lines = file.read_text()
        assert lines.count("\n") == 1 + expected.chunks
        assert run(results=file) == expected
        assert run(results=file, chunks=3) == run(chunks=3)
        assert file.read_text() == lines
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(evaluate, "_scored", None)  # nothing is computed again
            assert run(results=file) == expected
    file = tmp_path / "perplexity.jsonl"
    with pytest.raises(et.InputError, match=r"`results` .*none.*: cannot be written"):
        et.perplexity(model, TEXT, ctx_size=32, results=tmp_path / "none" / "a.jsonl")
    for wrong, message in (
        (lambda: et.perplexity(other, TEXT, ctx_size=32, results=file), "with other models: give another"),
        (lambda: et.perplexity(small, TEXT, ctx_size=32, results=file), "with other weights, quantization"),
        (
            lambda: et.perplexity(model, "x" + TEXT, ctx_size=32, results=file),
            "of another text or other chunks",
        ),
        (lambda: et.perplexity(model, TEXT, ctx_size=33, results=file), "of another text or other chunks"),
        (
            lambda: et.perplexity(model, TEXT, ctx_size=32, convention="gptq", results=file),
            "with other convention",
        ),
        (lambda: et.divergence(model, small, TEXT, ctx_size=32, results=file), "with other models"),
    ):
        with pytest.raises(et.InputError, match=message):
            wrong()
    header = file.read_text().splitlines()[0]
    for line in (
        '{"chunk": 0}',
        '{"chunk": "a", "tokens": "", "scores": [[]]}',
        "[]",
        '{"chunk": 0, "tokens": "", "scores": [["x"]]}',
    ):
        file.write_text(f"{header}\n{line}\n")
        with pytest.raises(et.InputError, match="line 2"):
            et.perplexity(model, TEXT, ctx_size=32, results=file)
