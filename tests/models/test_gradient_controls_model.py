"""A backward pass that is wrong in a known way fails the comparison with torch, and the one with
differences."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import einsum_transformer as et
from components.gradient import assert_gradient as assert_differences
from components.gradient import replaced
from einsum_transformer.components.attention import Attention
from einsum_transformer.components.gated_mlp import GatedMLP
from einsum_transformer.components.head import Head
from einsum_transformer.components.rmsnorm import RMSNorm
from einsum_transformer.models.blocks import Block
from einsum_transformer.models.decoder import Decoder
from einsum_transformer.models.peft import with_adapter
from einsum_transformer.tree import named_leaves
from golden_files import Folders, load_adapter, load_golden, write_adapter_folder
from test_golden_models import assert_gradient
from tiny_models import tiny_model

Array = np.ndarray
Break = Callable[[pytest.MonkeyPatch], None]
PREFIX = "base_model.model."
TOKENS = np.random.default_rng(0).integers(0, 13, (2, 6))


def residual_through_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """dx = norm.backward(dnormed + dy) in the place of norm.backward(dnormed) + dy, in both halves."""

    def backward(block: Block, dy: Array, saved: tuple[Any, ...], rotation: Any) -> tuple[Array, Block]:
        saved_norm, saved_attn, saved_post, saved_mlp, *_ = saved
        dnormed, dmlp = block.mlp.backward(dy, saved_mlp)
        dx, dpost = block.post_attention_layernorm.backward(dnormed + dy, saved_post)
        dnormed, dattn = block.self_attn.backward(dx, saved_attn, rotation)
        dinput, dnorm = block.input_layernorm.backward(dnormed + dx, saved_norm)
        return dinput, Block(dnorm, dattn, dpost, dmlp)

    monkeypatch.setattr(Block, "backward", backward)


def clipped(kind: type, by: Callable[[Array], Array]) -> Break:
    """Clips the gradient by the input of each component of this kind, on its way down."""

    def apply(monkeypatch: pytest.MonkeyPatch) -> None:
        plain = kind.backward

        def backward(self: Any, dy: Array, *saved: Any) -> tuple[Array, Any]:
            dx, gradient = plain(self, dy, *saved)
            return by(dx), gradient

        monkeypatch.setattr(kind, "backward", backward)

    return apply


def to_range(dx: Array) -> Array:
    """The largest elements cut to half of the largest."""
    limit = np.abs(dx).max() / 2
    return np.clip(dx, -limit, limit)


def to_norm(dx: Array) -> Array:
    """Cut to nine tenths of its norm."""
    return dx * dx.dtype.type(0.9)


BREAKS: dict[str, Break] = {
    "residual through the norm": residual_through_the_norm,
    "range, block": clipped(Block, to_range),
    "range, attention": clipped(Attention, to_range),
    "range, feed-forward": clipped(GatedMLP, to_range),
    "range, norm": clipped(RMSNorm, to_range),
    "range, head": clipped(Head, to_range),
    "norm, block": clipped(Block, to_norm),
    "norm, attention": clipped(Attention, to_norm),
}
every_break = pytest.mark.parametrize("name", BREAKS)


def rejected(check: Callable[[str], None], names: Mapping[str, Any]) -> set[str]:
    """The names of which the check says that their gradient is wrong."""
    found = set()
    for name in names:
        try:
            check(name)
        except AssertionError:
            found.add(name)
    return found


@pytest.fixture(scope="module")
def folders(golden_folder: Folders, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A golden model, and the golden adapter "all-linear" on it."""
    base, adapter = golden_folder("llama_gqa"), load_adapter("all-linear")
    return base, write_adapter_folder(tmp_path_factory.mktemp("adapter"), adapter.config, adapter.tensors)


def full_rejected(folders: tuple[Path, Path]) -> set[str]:
    """What the golden comparison of full training rejects."""
    golden = load_golden("llama_gqa")
    _, gradients = et.load(folders[0]).loss_and_gradients(golden.tokens, golden.targets)
    return rejected(
        lambda name: assert_gradient(name, gradients[name], golden.gradients[name]), golden.gradients
    )


def lora_rejected(folders: tuple[Path, Path]) -> set[str]:
    """What the golden comparison of the adapter rejects."""
    golden, adapter = load_golden("llama_gqa"), load_adapter("all-linear")
    model = with_adapter(et.load(folders[0]), folders[1])
    _, gradients = model.loss_and_gradients(golden.tokens, golden.targets)
    return rejected(
        lambda name: assert_gradient(name, gradients[name], adapter.gradients[f"{PREFIX}{name}"]), gradients
    )


def differences_rejected() -> set[str]:
    """What the comparison with differences of the forward pass rejects."""
    decoder: Decoder = tiny_model(
        "float64", vocab_size=13, hidden_size=12, intermediate_size=10, num_attention_heads=4, head_dim=4
    ).decoder
    logits, saved = decoder.forward(TOKENS, keep=True)
    gradients = dict(named_leaves(decoder.backward(logits, saved)))
    arrays = dict(named_leaves(decoder))

    def check(path: str) -> None:
        assert_differences(
            path,
            lambda p: replaced(decoder, path, p).forward(TOKENS)[0],
            arrays[path],
            gradients[path],
            logits,
        )

    return rejected(check, arrays)


def test_nothing_is_rejected_as_it_is(folders: tuple[Path, Path]) -> None:
    """The three comparisons accept the true backward pass."""
    assert full_rejected(folders) == lora_rejected(folders) == differences_rejected() == set()


@every_break
def test_torch_rejects(name: str, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of the lowest layer are wrong; the head's own, above every break, is not."""
    BREAKS[name](monkeypatch)
    found = full_rejected(folders)
    assert "model.embed_tokens.weight" in found
    assert "model.layers.0.self_attn.q_proj.weight" in found
    assert "lm_head.weight" not in found


@every_break
def test_torch_rejects_with_an_adapter(
    name: str, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapters' gradients are wrong in the lowest layer."""
    BREAKS[name](monkeypatch)
    found = lora_rejected(folders)
    assert "model.layers.0.self_attn.q_proj.lora_A.weight" in found
    assert "model.layers.0.self_attn.q_proj.lora_B.weight" in found


@every_break
def test_differences_reject(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No reference implementation is needed to see it."""
    BREAKS[name](monkeypatch)
    found = differences_rejected()
    assert "embed_tokens.weight" in found
    assert "layers.0.self_attn.q_proj" in found
    assert "lm_head.weight" not in found
