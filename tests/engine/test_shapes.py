"""A dry run over arrays without numbers answers with the shapes and types that the real run has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from einsum_transformer.components.kv_cache import KVCache
from einsum_transformer.engine import EquationError, Recorder, ShapeArray, blas, einsum
from einsum_transformer.models.builder import build
from einsum_transformer.tree import named_leaves
from tiny_models import config_of, tiny_model

Array = np.ndarray
IDS = np.random.default_rng(0).integers(0, 61, (2, 11))

OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "arithmetic": lambda a: 2 * a + a / 3 - a**2,
    "comparison": lambda a: a > 0,
    "unary": lambda a: np.exp(-a),
    "with an array": lambda a: a * np.ones((2, 1, 5)),
    "broadcast": lambda a: a[:, :1] + a[0],
    "row": lambda a: a[1],
    "last": lambda a: a[:, -1:],
    "new axis": lambda a: a[..., None],
    "integers": lambda a: a[[0, 1, 1]],
    "reshape": lambda a: a.reshape(6, 5),
    "reshape -1": lambda a: a.reshape(2, -1),
    "reshape tuple": lambda a: a.reshape((5, 6)),
    "transpose": lambda a: a.transpose(2, 0, 1),
    "transpose all": lambda a: a.transpose(),
    "T": lambda a: a.T,
    "swapaxes": lambda a: a.swapaxes(0, 2),
    "astype": lambda a: a.astype(np.float64),
    "sum": lambda a: a.sum(axis=-1, keepdims=True),
    "sum of two": lambda a: a.sum(axis=(0, 2)),
    "sum of all": lambda a: a.sum(),
    "max": lambda a: a.max(axis=1),
    "np.sum": lambda a: np.add.reduce(a, axis=0),
    "concatenate": lambda a: np.concatenate([a, a], axis=-1),
    "take": lambda a: np.take(a, np.array([[0, 1], [1, 0]]), axis=0),
    "empty_like": lambda a: np.empty_like(a),
    "zeros_like float64": lambda a: np.zeros_like(a, dtype=np.float64),
    "broadcast_to": lambda a: np.broadcast_to(a, (4, 2, 3, 5)),
    "in place": lambda a: _in_place(a),
    "row dots": lambda a: einsum("ijk,ijk->ij", a, a),
    "product": lambda a: einsum("ijk,lk->ijl", a, np.ones((7, 5), np.float32)),
    "diagonal": lambda a: einsum("ii->i", a[:, :2, 0]),
    "ellipsis": lambda a: einsum("...k,lk->...l", a, np.ones((7, 5), np.float32)),
    "three": lambda a: einsum("ijk,kl,lm->ijm", a, np.ones((5, 4), np.float32), np.ones((4, 3), np.float32)),
    "mixed types": lambda a: einsum("ijk,lk->ijl", a, np.ones((7, 5), np.float64)),
}


def _in_place(a: Any) -> Any:
    a *= 2
    a += np.ones(5, np.float32)
    a[0] = 1
    return np.maximum(a, 0, out=a)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name: str) -> None:
    real = OPERATIONS[name](np.ones((2, 3, 5), np.float32))
    dry = OPERATIONS[name](ShapeArray((2, 3, 5), np.float32))
    assert isinstance(dry, ShapeArray)
    assert (dry.shape, dry.dtype, dry.size, dry.nbytes) == (real.shape, real.dtype, real.size, real.nbytes)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda a: a + np.ones(4),
        lambda a: a.reshape(7, 5),
        lambda a: a.reshape(4, -1),
        lambda a: a[5],
        lambda a: a[0, 0, 0, 0],
        lambda a: np.broadcast_to(a, (7, 5)),
        lambda a: np.concatenate([a, a[:, :2]], axis=-1),
        lambda a: a.sum(axis=3),
        lambda a: a.__setitem__(0, np.ones((2, 2, 2))),
    ],
)
def test_what_fails_on_numbers_fails_on_shapes(wrong: Callable[[Any], Any]) -> None:
    """A dry run that accepts a wrong program proves nothing."""
    for array in (np.ones((2, 3, 5)), ShapeArray((2, 3, 5), np.float64)):
        with pytest.raises((ValueError, IndexError)):
            wrong(array)


def test_no_memory_is_taken() -> None:
    huge = ShapeArray((10**5, 10**5, 10**4))
    assert einsum("ijk,lk->ijl", huge, ShapeArray((3, 10**4))).shape == (10**5, 10**5, 3)
    assert (huge * 2).nbytes == 4 * 10**14


def test_wrong_equations_are_refused_as_with_numbers() -> None:
    with pytest.raises(EquationError, match="'d' is 4 in operand 0"):
        einsum("btd,fd->btf", ShapeArray((1, 2, 4)), ShapeArray((3, 5)))


def programs(run: Callable[[Any], Any], changes: dict[str, Any]) -> list[Counter[Any]]:
    """What each of two decoders, one of numbers and one of shapes, says it computed: (equation, sizes,
    place)."""
    config = config_of(**changes)
    found = []
    before = blas.get_threads()
    blas.set_threads(1)
    try:
        for decoder in (
            tiny_model(**changes).decoder,
            build(config, lambda weight: ShapeArray(weight.shape)),
        ):
            with Recorder(events=True) as recorder:
                run(decoder)
            found.append(
                Counter(
                    (
                        event.equation,
                        tuple(sorted(event.sizes.items())),
                        event.flops,
                        event.bytes,
                        event.path,
                        event.layer,
                    )
                    for event in recorder.events
                )
            )
    finally:
        blas.set_threads(before)
    return found


@pytest.mark.parametrize(
    "changes", [{}, {"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": True}], ids=str
)
def test_a_dry_forward_pass_is_the_same_program(changes: dict[str, Any]) -> None:
    real, dry = programs(lambda decoder: decoder.forward(IDS), changes)
    assert real == dry
    assert sum(real.values()) > 20


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}], ids=str)
def test_a_dry_backward_pass_is_the_same_program(changes: dict[str, Any]) -> None:
    def run(decoder: Any) -> None:
        logits, saved = decoder.forward(IDS, keep=True)
        decoder.backward(logits, saved)

    real, dry = programs(run, changes)
    assert real == dry


@pytest.mark.parametrize("window", [None, 4])
def test_a_dry_decode_step_is_the_same_program(window: int | None) -> None:
    """Prefill and one token, through a cache."""

    def run(decoder: Any) -> None:
        cache = KVCache([window, window])
        decoder.forward(IDS, cache, "last")
        logits, _ = decoder.forward(IDS[:, :1], cache, "last")
        assert logits.shape == (2, 1, 61)

    real, dry = programs(run, {"model_type": "mistral", "sliding_window": window})
    assert real == dry


def test_gradients_have_the_shapes_of_the_weights() -> None:
    decoder = build(config_of(), lambda weight: ShapeArray(weight.shape))
    logits, saved = decoder.forward(IDS, keep=True)
    assert logits.shape == (2, 11, 61)
    shapes = {path: leaf.shape for path, leaf in named_leaves(decoder)}
    gradient = decoder.backward(logits, saved)
    assert {path: leaf.shape for path, leaf in named_leaves(gradient)} == shapes
