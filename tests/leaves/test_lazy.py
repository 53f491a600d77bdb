"""Weights that stay in their files: the same numbers, and never more in memory than the budget allows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import einsum_transformer as et
from einsum_transformer.engine import Leaf, einsum, weight_grad
from einsum_transformer.leaves.lazy import Budget, LazyTensor
from einsum_transformer.leaves.resident import Stored
from einsum_transformer.tree import named_leaves
from memory_source import MemorySource
from tiny_models import write_tiny

Array = np.ndarray
IDS = np.random.default_rng(0).integers(0, 61, (2, 12))
LARGEST = 61 * 32 * 4
BUDGETS = [0, 1, LARGEST, 3 * LARGEST, 10 * LARGEST, 1 << 30]


def lazies(model: et.Model) -> list[LazyTensor]:
    return [leaf for _, leaf in named_leaves(model.decoder) if isinstance(leaf, LazyTensor)]


def budget_of(model: et.Model) -> Budget:
    return lazies(model)[0]._budget


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "attention_bias": True}], ids=str)
@pytest.mark.parametrize("limit", BUDGETS)
def test_same_numbers(limit: int, changes: dict[str, Any], tmp_path: Path) -> None:
    """Scores, loss, gradients, generated tokens and what is saved."""
    folder, _ = write_tiny(tmp_path / "in", **changes)
    eager, lazy = et.load(folder), et.load(folder, weight_budget=limit)
    assert lazies(lazy)
    np.testing.assert_array_equal(lazy.logits(IDS), eager.logits(IDS))
    loss, gradients = eager.loss_and_gradients(IDS, IDS)
    lazy_loss, lazy_gradients = lazy.loss_and_gradients(IDS, IDS)
    assert lazy_loss == loss
    for name, gradient in gradients.items():
        np.testing.assert_allclose(lazy_gradients[name], gradient, rtol=1e-5, atol=1e-7, err_msg=name)
    options: dict[str, Any] = {"max_new_tokens": 5, "temperature": 0.0}
    assert et.generate(lazy, [3, 4], **options) == et.generate(eager, [3, 4], **options)
    lazy.save(tmp_path / "out")
    for name, array in et.load(tmp_path / "out").named_parameters().items():
        np.testing.assert_array_equal(array, eager.named_parameters()[name])


@pytest.mark.parametrize("limit", BUDGETS)
def test_the_budget_is_kept(limit: int, tmp_path: Path) -> None:
    """Unless a single weight is larger than all of it."""
    model = et.load(write_tiny(tmp_path)[0], weight_budget=limit)
    budget = budget_of(model)
    assert budget.held == 0
    model.loss_and_gradients(IDS, IDS)
    et.generate(model, [1, 2, 3], max_new_tokens=3)
    every = sum(4 * int(np.prod(leaf.shape)) for leaf in lazies(model))
    assert 0 < budget.held <= budget.peak <= max(limit, LARGEST)
    assert budget.peak <= every


@settings(max_examples=200, deadline=None, derandomize=True)
@given(limit=st.integers(0, 60), names=st.lists(st.integers(0, 7), max_size=60))
def test_least_recently_used_goes_first(limit: int, names: list[int]) -> None:
    """Against a list that is searched; weight i has i + 1 elements of 4 bytes."""
    budget, model, reads = Budget(4 * limit), [], []
    for i in names:
        got = budget.get(str(i), lambda i=i: reads.append(i) or np.full(i + 1, i, np.float32), 4 * (i + 1))
        np.testing.assert_array_equal(got, np.full(i + 1, i))
        expected_read = i not in model
        if not expected_read:
            model.remove(i)
        while model and sum(j + 1 for j in [*model, i]) > limit:
            model.pop(0)
        model.append(i)
        assert (reads.pop() == i if reads else False) == expected_read
        assert budget.held == 4 * sum(j + 1 for j in model)
        assert budget.held <= max(4 * limit, 4 * (i + 1))
        assert budget.peak >= budget.held


def test_room_is_made_before_a_weight_is_read() -> None:
    """Otherwise old and new are in memory together, beyond the limit."""
    budget = Budget(100)
    budget.get("old", lambda: np.zeros(25, np.float32), 100)
    held_while_reading = []
    budget.get("new", lambda: held_while_reading.append(budget.held) or np.zeros(25, np.float32), 100)
    assert held_while_reading == [0]


def tensor(
    values: Array, limit: int = 0, shape: tuple[int, ...] | None = None
) -> tuple[LazyTensor, MemorySource]:
    """A lazy tensor over `values`, and its file, which notes what is read."""
    source = MemorySource(w=values)
    leaf = LazyTensor(source, Stored("w", values.shape), shape or values.shape, values.dtype, Budget(limit))
    return leaf, source


def test_it_is_a_leaf_of_the_shape_of_its_equation() -> None:
    values = np.random.default_rng(0).standard_normal((6, 4))
    leaf, source = tensor(values, shape=(2, 3, 4))
    assert isinstance(leaf, Leaf)
    assert (leaf.shape, leaf.ndim, leaf.dtype) == ((2, 3, 4), 3, np.float64)
    assert not source.reads
    x = np.random.default_rng(1).standard_normal((2, 5, 4))
    np.testing.assert_array_equal(
        einsum("btd,khd->btkh", x, leaf), einsum("btd,khd->btkh", x, values.reshape(2, 3, 4))
    )
    dy = np.random.default_rng(2).standard_normal((2, 5, 2, 3))
    got = weight_grad(leaf, "btkh,btd->khd", dy, x)
    np.testing.assert_allclose(got, np.einsum("btkh,btd->khd", dy, x))
    assert len(source.reads) == 1  # the gradient does not need the weight


def test_rows_read_only_rows() -> None:
    """An embedding of a large vocabulary is not loaded for three tokens; one that is in memory is not read
    again."""
    values = np.arange(40.0).reshape(10, 4)
    leaf, source = tensor(values, limit=1 << 20)
    ids = np.array([[3, 3], [9, 0]])
    np.testing.assert_array_equal(leaf.rows(ids), values[ids])
    assert source.reads == [("w", (row, row + 1)) for row in (3, 3, 9, 0)]
    leaf.array()
    np.testing.assert_array_equal(leaf.rows(ids), values[ids])
    assert source.reads[4:] == [("w", None)]


def test_two_tensors_of_one_name_are_not_mixed_up() -> None:
    """Two models with a budget each."""
    first, _ = tensor(np.zeros((2, 2)), limit=1000)
    second, _ = tensor(np.ones((2, 2)), limit=1000)
    assert not first.array().any()
    assert second.array().all()
