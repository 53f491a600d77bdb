"""GPTQ beside its definition, AWQ beside rounding to nearest, and both on whole models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import einsum_transformer as et
from command_line import save_with_tokenizer
from einsum_transformer.engine import Leaf
from einsum_transformer.leaves.calibrated import Calibrated
from einsum_transformer.leaves.quantized import PackedWeight
from einsum_transformer.models.scheme import Quantization
from einsum_transformer.numerics.uniform import dequantize, quantize, short
from einsum_transformer.quantization.awq import awq
from einsum_transformer.quantization.calibrate import METHODS, calibrated
from einsum_transformer.quantization.gptq import DAMPING, gptq, inverse_factor
from einsum_transformer.tree import map_named, named_leaves
from golden_files import MODELS, Models, load_golden
from tiny_models import tiny_model

Array = np.ndarray
TEXT = "The quick brown fox jumps over the lazy dog. " * 40


def problem(seed: int, rows: int = 24, width: int = 96) -> tuple[Array, Array]:
    """A matrix, and the second moments of correlated inputs of different sizes."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((200, width)) @ rng.standard_normal((width, width)) / np.sqrt(width)
    x *= np.exp(rng.standard_normal(width))
    return rng.standard_normal((rows, width)).astype(np.float32), x.T @ x


def change(weight: Array, rounded: Array, hessian: Array) -> float:
    error = rounded - weight.astype(float)
    return float(np.einsum("nk,kl,nl->", error, hessian, error))


def by_definition(weight: Array, hessian: Array, bits: int, group: int | None, symmetric: bool) -> Array:
    """Optimal brain quantization, column by column: each error is spread over the columns that are left by
    the inverse of the Hessian, from which the column is then eliminated."""
    w, h = weight.astype(float), hessian.copy()
    h[np.diag_indices(len(h))] += DAMPING * h.diagonal().mean()
    inverse = np.linalg.inv(h)
    width, out = len(h), np.empty_like(w)
    size = width if group is None else group
    found = quantize(weight, bits, group, symmetric)
    for k in range(width):
        if group is not None and k and k % size == 0:
            own = quantize(w[:, k : k + size], bits, size, symmetric)
        elif k == 0:
            own = found
        scale = (short(own.scales) if found.scales.dtype == np.float16 else own.scales)[:, 0].astype(float)
        zero = 0 if own.zeros is None else own.zeros[:, 0].astype(float)
        half = 1 << bits - 1
        code = np.clip(np.rint(w[:, k] / scale) + zero, 1 - half if symmetric else -half, half - 1)
        out[:, k] = (code - zero) * scale
        error = (w[:, k] - out[:, k]) / inverse[k, k]
        w[:, k + 1 :] -= np.outer(error, inverse[k, k + 1 :])
        inverse -= np.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    return out


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("width", "group"), [(96, 32), (96, None), (96, 96), (300, 64), (300, 128)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq_is_optimal_brain_quantization(
    bits: int, width: int, group: int | None, symmetric: bool
) -> None:
    weight, hessian = problem(bits, width=width)
    found = gptq(weight, inverse_factor(hessian), bits, group, symmetric)
    expected = by_definition(weight, hessian, bits, group, symmetric)
    np.testing.assert_allclose(dequantize(found, np.float64), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 96, None])
@pytest.mark.parametrize("bits", [3, 4])
def test_both_change_the_outputs_less(bits: int, group: int | None, symmetric: bool) -> None:
    weight, hessian = problem(7)
    other = problem(8)[0]
    nearest = [dequantize(quantize(w, bits, group, symmetric), np.float64) for w in (weight, other)]
    before = [change(w, q, hessian) for w, q in zip((weight, other), nearest)]
    by_gptq = dequantize(gptq(weight, inverse_factor(hessian), bits, group, symmetric), np.float64)
    assert change(weight, by_gptq, hessian) < 0.8 * before[0]
    found = awq([weight, other], hessian, bits, group, symmetric)
    assert found[0].divisor is found[1].divisor
    changes = [change(w, dequantize(q, np.float64), hessian) for w, q in zip((weight, other), found)]
    # The grid of both searches contains what rounding to nearest does.
    assert sum(changes) <= (1 if group is None else 0.98) * sum(before)


def test_inputs_that_are_always_zero() -> None:
    weight, hessian = problem(3)
    hessian[5] = hessian[:, 5] = 0
    for found in (gptq(weight, inverse_factor(hessian), 4, 32), awq([weight], hessian, 4, 32)[0]):
        values = dequantize(found)
        assert np.isfinite(values).all()
        assert np.abs(values - weight).max() < 1.5


def test_second_moments(golden_model: Models) -> None:
    model = golden_model("llama_gqa")
    specs = model.weights
    decoder = map_named(
        lambda path, w: Calibrated(w, specs[path].out_axes) if "_proj" in path and w.ndim > 1 else w,
        model.decoder,
    )
    inputs: list[Array] = []
    tokens = load_golden("llama_gqa").tokens
    recorder = et.Recorder()
    recorder.on_value(lambda name, value: inputs.append(value), "*input_layernorm")
    with recorder:
        decoder.forward(tokens)
    leaf = decoder.layers[0].self_attn.q_proj
    x = inputs[0].reshape(-1, inputs[0].shape[-1]).astype(float)
    assert leaf.count == len(x) == tokens.size
    np.testing.assert_allclose(leaf.hessian, x.T @ x, rtol=0, atol=1e-4 * np.abs(leaf.hessian).max())
    out = decoder.layers[0].self_attn.o_proj
    assert out.hessian.shape == (out.shape[1] * out.shape[2] * out.shape[3],) * 2


@pytest.mark.parametrize("method", METHODS[1:])
@pytest.mark.parametrize("name", MODELS)
def test_every_family(name: str, method: str, golden_model: Models) -> None:
    """Real and simulated have the same values, and the outputs on the calibration tokens change less than
    with rounding to nearest, but for the few tokens of a golden."""
    golden, model = load_golden(name), golden_model(name, "float64")
    found = []
    for mode in ("real", "simulated"):
        quantization = Quantization.of("W3A16g32", mode)
        assert quantization is not None
        found.append(calibrated(model, quantization, method, [golden.tokens], lambda done, total: None))
    kinds = [dict(named_leaves(each.decoder)) for each in found]
    assert kinds[0].keys() == kinds[1].keys()
    assert not any(isinstance(leaf, Calibrated) for leaf in kinds[0].values())
    for path, leaf in kinds[0].items():
        other = kinds[1][path]
        if isinstance(leaf, Leaf):
            np.testing.assert_array_equal(leaf.array(), other.array(), err_msg=path)
            assert isinstance(leaf, PackedWeight)
        else:
            np.testing.assert_array_equal(leaf, other, err_msg=path)
    logits = [each.logits(golden.tokens) for each in found]
    np.testing.assert_allclose(logits[0], logits[1], rtol=0, atol=1e-9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tiny_model(vocab_size=128, eos_token_id=None, max_position_embeddings=64)
    return save_with_tokenizer(tmp_path_factory.mktemp("methods") / "model", base)


@pytest.mark.parametrize("method", METHODS[1:])
def test_of_a_text(method: str, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    model, done = et.load(folder), []
    found = [
        et.quantize(model, "W3A8g32", method=method, calibration=text, progress=lambda *n: done.append(n))
        for text in (TEXT, file)
    ]
    assert done == [(1, 2), (2, 2)] * 2
    ids = np.arange(40)[None]
    np.testing.assert_array_equal(found[0].logits(ids), found[1].logits(ids))
    nearest = et.quantize(model, "W3A8g32")
    changes = [et.divergence(each, model, TEXT, ctx_size=64).kl_mean for each in (found[0], nearest)]
    assert changes[0] < changes[1]


def test_mistakes(folder: Path) -> None:
    for message, arguments in {
        "`method` is 'best': expected rtn, gptq, awq": {"method": "best"},
        "`calibration` is needed by gptq: give a text": {"method": "gptq"},
        "`calibration` is used by gptq and awq only": {"calibration": TEXT},
        "the text has 0 tokens: at least 64 are needed": {"method": "awq", "calibration": ""},
        "`calibration_chunks` is 0": {"method": "awq", "calibration": TEXT, "calibration_chunks": 0},
    }.items():
        with pytest.raises(et.InputError, match=message):
            et.quantize(folder, "W4A16", **arguments)
