"""Data parallelism without Ray: division of rows and shards, decoders without and with arrays."""

from __future__ import annotations

import socket
import sys
from copy import deepcopy
from typing import Any

import numpy as np
import pytest

import einsum_transformer as et
from cluster_runs import input_major
from einsum_transformer.cluster.data_parallel import RayWorkers, _balanced, _shares, _sum
from einsum_transformer.cluster.pool import Connection, _check_reachable
from einsum_transformer.cluster.worker import Shapes
from einsum_transformer.errors import InputError
from einsum_transformer.models.adapters import with_lora
from einsum_transformer.models.lora_config import LoRAConfig
from einsum_transformer.models.parameters import frozen, shapes_of, trainable, with_arrays
from einsum_transformer.models.run_config import parse_run_config
from einsum_transformer.tree import named_leaves
from tiny_models import tiny_model


def test_rows_keep_their_order_and_numbers() -> None:
    tokens = np.arange(9)[:, None] * [1, 1]
    shares = _shares([(tokens[:5], tokens[:5] + 1), (tokens[5:], tokens[5:] + 1)], 3)
    assert [[(first, len(t)) for first, t, _ in share] for share in shares] == [
        [(0, 2), (5, 2)],
        [(2, 2), (7, 1)],
        [(4, 1), (8, 1)],
    ]
    for share in shares:
        for first, t, y in share:
            np.testing.assert_array_equal(t[:, 0], np.arange(first, first + len(t)))
            np.testing.assert_array_equal(y, t + 1)


def test_a_part_with_fewer_rows_than_workers_is_rejected() -> None:
    tokens = np.zeros((3, 4), int)
    with pytest.raises(InputError, match=r"^3 rows cannot be divided over 4 Ray workers"):
        _shares([(tokens, tokens)], 4)


def test_the_sum_is_in_the_order_of_the_workers() -> None:
    shares = [{"w": np.float32([[x]])} for x in (1e8, -1e8, 1.0)]
    assert _sum(shares)["w"] == 1.0
    assert _sum(shares[::-1])["w"] == 0.0
    assert _sum(shares[2:]) is shares[2]


def test_shards_are_of_about_the_same_size() -> None:
    sizes = {"a": 7, "b": 5, "c": 4, "d": 3, "e": 1}
    assert _balanced(sizes, 2) == [["a", "d"], ["b", "c", "e"]]
    assert _balanced(sizes, 6)[5] == []


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_a_decoder_is_rebuilt_from_its_arrays(tied: bool, lora: bool) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    if lora:
        model = with_lora(model, LoRAConfig(r=2, target_modules=["q_proj", "o_proj", "embed_tokens"]))
    constant = {path: np.array(w) for path, w in frozen(model.decoder).items()}
    empty, trained = shapes_of(model.decoder), trainable(model.decoder)
    assert not any(isinstance(leaf, np.ndarray) for _, leaf in named_leaves(empty))
    again = with_arrays(deepcopy(empty), lambda name, _: (constant | trained)[name])
    tokens = np.arange(12).reshape(2, 6)
    np.testing.assert_array_equal(again.forward(tokens)[0], model.decoder.forward(tokens)[0])
    assert trainable(again).keys() == trained.keys()


def test_adapters_on_stacked_experts_are_rebuilt() -> None:
    """Gate and up of an expert share A, which is sent once."""
    sizes = {"d_model": 24, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "head_dim": 6, "vocab_size": 61}
    config = parse_run_config({"arch": "mixtral", "num_experts": 3, "d_ff": 10} | sizes, "config")
    model = with_lora(et.load(config), LoRAConfig(r=2, target_modules="all-linear"))
    constant = {path: np.array(w) for path, w in frozen(model.decoder).items()}
    empty, trained = shapes_of(model.decoder), trainable(model.decoder)
    again = with_arrays(deepcopy(empty), lambda name, _: (constant | trained)[name])
    expert = again.layers[0].mlp.experts[1]
    assert np.shares_memory(expert.gate_proj.a, expert.up_proj.a)
    assert "layers.0.mlp.experts.1.up_proj.lora_A" not in trained
    assert trainable(again).keys() == trained.keys()
    tokens = np.arange(12).reshape(2, 6)
    np.testing.assert_array_equal(again.forward(tokens)[0], model.decoder.forward(tokens)[0])


def test_weights_are_sent_contiguous_and_uncopied() -> None:
    """Also weights that are transposed in memory, whose view in the equations is not contiguous."""
    model = input_major(tiny_model())
    weights = trainable(model.decoder)
    shapes = Shapes(
        {name: w.shape for name, w in weights.items()},
        {name: entry.stored for name, entry in model.weights.items()},
    )
    assert not any(weights["layers.0.self_attn.q_proj"].flags[order] for order in ("C", "F"))
    sent = shapes.sent(weights)
    for name, array in shapes.received(sent).items():
        assert sent[name].flags.forc
        assert np.shares_memory(sent[name], weights[name])
        assert (array.shape, array.strides) == (weights[name].shape, weights[name].strides)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"workers": 0}, "^`workers` is 0: expected 1"),
        ({"workers": 1, "shard_optimizer": True}, "at least 2 Ray `workers`"),
        ({"workers": 2, "threads": 0}, "^`threads` is 0"),
        ({"workers": 2, "timeout": 0.0}, "timeout of Ray workers is 0.0 s"),
    ],
)
def test_wrong_settings_are_rejected(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RayWorkers(**given).compute()


def test_a_missing_ray_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r'pip install "einsum-transformer\[ray\]"'):
        Connection("auto", 2, 0)


def test_an_unreachable_address() -> None:
    with socket.socket() as bound:  # and not listening
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        with pytest.raises(InputError, match=rf"^Ray address '{address}': no connection: .*head node"):
            _check_reachable(address)
