"""einsums() returns what einsum returns for each equation, in one product if the weights lie side by side."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import einsum_transformer as et
from einsum_transformer.engine import EquationError, Recorder, ShapeArray, blas, einsum, einsums, side_by_side
from einsum_transformer.leaves.frozen import Frozen
from einsum_transformer.leaves.resident import allocate
from einsum_transformer.tree import named_leaves

Array = np.ndarray
EQUATIONS = ("btd,kghd->btkgh", "btd,khd->btkh", "btd,khd->btkh")
SHAPES = ((3, 2, 4, 10), (3, 4, 10), (3, 4, 10))


def weights(dtype: Any = np.float32, width: int = 10, groups: str = "aaa") -> list[Array]:
    """q, k and v, side by side with one group, apart with several."""
    shapes = [(*shape[:-1], width) for shape in SHAPES]
    flat = [(int(np.prod(shape[:-1])), width) for shape in shapes]
    arrays = allocate(flat, np.dtype(dtype), list(groups))
    rng = np.random.default_rng(0)
    for array in arrays:
        array[...] = rng.integers(-4, 5, array.shape)  # whole numbers, so that sums are exact
    return [array.reshape(shape) for array, shape in zip(arrays, shapes)]


def products(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The shapes of all matrix products from now on."""
    seen: list[Any] = []
    for product in blas.PRODUCTS.values():
        monkeypatch.setattr(
            product, "matmul", lambda a, b: seen.append((a.shape, b.shape)) or np.matmul(a, b)
        )
    return seen


def check(x: Array, terms: Sequence[tuple[str, Any]]) -> list[Array]:
    results = einsums(x, *terms)
    for (equation, weight), result in zip(terms, results, strict=True):
        expected = np.einsum(equation, x, np.asarray(weight))
        assert result.shape == expected.shape
        np.testing.assert_array_equal(result, expected)
    return results


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("width", [10, 1100])
@pytest.mark.parametrize("layout", ["C", "F"])
def test_one_product_for_weights_side_by_side(
    tokens: int, width: int, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("einsum_transformer.leaves.resident._SHORT_ROW", 48)
    terms = tuple(zip(EQUATIONS, weights(width=width)))
    x = np.random.default_rng(1).integers(-4, 5, (2, tokens, width)).astype(np.float32)
    x = x if layout == "C" else np.moveaxis(np.ascontiguousarray(np.moveaxis(x, -1, 0)), 0, -1)
    seen = products(monkeypatch)
    for _ in range(2):
        q, k, v = check(x, terms)
        assert len(seen) == 1
        assert 48 in (seen[0][0][0], seen[0][1][-1])
        seen.clear()
    q[...], v[...] = 1, 2  # the results do not overlap
    np.testing.assert_array_equal(k, np.einsum(EQUATIONS[1], x, terms[1][1]))


def test_weights_that_lie_apart_have_products_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.ones((1, 4, 10), np.float32)
    alone = weights(groups="abc")
    copies = [weight.copy() for weight in weights()]
    swapped = weights()[::-1]
    one, two = weights(), weights()
    seen = products(monkeypatch)
    for q, k, v in (alone, copies, [one[0], two[1], one[2]], [one[0], one[2], one[1]]):
        check(x, list(zip(EQUATIONS, (q, k, v))))
        assert len(seen) == 3
        seen.clear()
    check(x, [(EQUATIONS[1], swapped[0]), (EQUATIONS[1], swapped[1])])
    assert len(seen) == 2


def test_other_equations_and_types_are_computed_one_by_one() -> None:
    q, k, v = weights()
    x = np.random.default_rng(2).integers(-4, 5, (2, 3, 10)).astype(np.float32)
    check(x, [("btd,kghd->tbkgh", q), ("btd,khd->btkh", k)])
    check(x, [("btd,kghd->btkg", q), ("btd,khd->btkh", k)])
    check(x.astype(np.float64), list(zip(EQUATIONS, (q, k, v))))
    check(np.ones((2, 10, 10), np.float32), [("bdd,khd->bkh", k), ("bdd,khd->bkh", v)])
    shapes = einsums(ShapeArray(x.shape, x.dtype), *zip(EQUATIONS, (q, k, v)))
    assert [result.shape for result in shapes] == [(2, 3, 3, 2, 4), (2, 3, 3, 4), (2, 3, 3, 4)]


def test_frozen_weights_are_their_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = weights()
    x = np.random.default_rng(2).integers(-4, 5, (2, 3, 10)).astype(np.float32)
    seen = products(monkeypatch)
    check(x, list(zip(EQUATIONS, (Frozen(q), Frozen(k), v))))
    assert len(seen) == 1
    seen.clear()
    check(x, list(zip(EQUATIONS, (Frozen(q), Frozen(Frozen(k)), v))))
    assert len(seen) == 3


def test_a_wrong_size_is_an_error_that_names_the_equation() -> None:
    terms = tuple(zip(EQUATIONS, weights()))
    for x in (np.ones((2, 3, 9), np.float32), np.ones((3, 10), np.float32)):
        with pytest.raises(EquationError, match="btd,kghd->btkgh"):
            einsums(x, *terms)
    check(np.ones((2, 3, 10), np.float32), terms)


def test_freed_weights_are_forgotten() -> None:
    """Their memory is freed too, and other arrays at the same addresses are not taken for them."""
    x = np.ones((1, 2, 10), np.float32)
    before = len(side_by_side._joined)
    for _ in range(20):
        terms = list(zip(EQUATIONS, weights()))
        check(x, terms)
        memory = weakref.ref(terms[0][1].base)
        del terms
        gc.collect()
        assert memory() is None
    assert len(side_by_side._joined) <= before


@pytest.fixture
def model(tmp_path: Path) -> et.Model:
    """Random weights as the loader allocates them."""
    sizes = {"d_model": 32, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48, "vocab_size": 64}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"arch": "llama", **sizes}))
    return et.load(path)


def test_events_name_each_equation_and_its_weight(model: et.Model) -> None:
    with Recorder(events=True) as recorder:
        model.decoder.forward(np.arange(6)[None])
    first = {event.weight: event for event in recorder.events if event.weight}
    names = [path for path, _ in named_leaves(model.decoder) if path.endswith("_proj")]
    assert set(names) <= set(first)
    q, k = first["layers.0.self_attn.q_proj"], first["layers.0.self_attn.k_proj"]
    assert (q.equation, k.equation) == EQUATIONS[:2]
    assert q.how == k.how == "3 in one gemm 64x32 . 32x6"
    assert (q.flops, k.flops) == (2 * 6 * 32 * 32, 2 * 6 * 32 * 16)
    assert q.seconds == pytest.approx(2 * k.seconds)
    assert first["layers.0.mlp.up_proj"].how.startswith("2 in one gemm")


def test_a_trained_model_keeps_its_weights_side_by_side(
    model: et.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = et.RandomTokens(model.config.vocab_size, 2, 8)
    settings = et.TrainingSettings(et.Schedule(1e-2, 3, "constant"), optimizer=et.AdamW())
    trainer = et.Trainer(model, data, settings)
    list(trainer.run(3))
    attention: Any = trainer.model.decoder.layers[0].self_attn
    terms = list(zip(EQUATIONS, (attention.q_proj, attention.k_proj, attention.v_proj)))
    x = np.random.default_rng(0).standard_normal((1, 3, 32)).astype(np.float32)
    seen = products(monkeypatch)
    results = einsums(x, *terms)
    assert len(seen) == 1
    for (equation, weight), result in zip(terms, results):
        np.testing.assert_allclose(result, einsum(equation, x, weight.copy()), rtol=1e-4, atol=1e-6)
