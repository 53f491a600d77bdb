"""Adapters written by peft: our logits, loss and gradients with them against those of torch."""

import re
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import einsum_transformer as et
from einsum_transformer.models.adapters import merged, with_lora
from einsum_transformer.models.decoder import Decoder
from einsum_transformer.models.lora_config import LoRAConfig
from einsum_transformer.models.peft import with_adapter, write_adapter
from golden_files import (
    ADAPTERS,
    EXPERT_ADAPTERS,
    OLD_ADAPTERS,
    Golden,
    GoldenAdapter,
    load_adapter,
    load_expert_adapter,
    load_golden,
    write_adapter_folder,
    write_folder,
)
from test_golden_models import LOSS, assert_gradient, assert_logits

PREFIX = "base_model.model."
EMBEDDING = "model.embed_tokens.weight"
RECOMPUTED = ("llama_gqa", "llama_mha_tied", "llama_bias", "llama_rope_dynamic", "mistral_window")


@dataclass(frozen=True, slots=True)
class Bench:
    """A golden adapter beside the base it is on, as golden and as folder, and its own folder."""

    adapter: GoldenAdapter
    golden: Golden
    base: Path
    folder: Path


@pytest.fixture(scope="module")
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The adapter of that name, in a folder that holds what peft wrote."""
    tmp_path = tmp_path_factory.mktemp("bench")
    load = load_adapter if request.param in ADAPTERS else load_expert_adapter
    adapter = load(request.param)
    golden = load_golden(adapter.base)
    base = write_folder(tmp_path / "base", golden.config, golden.weights)
    copies = dict.fromkeys(adapter.copies, golden.weights[EMBEDDING])
    if adapter.copies and "lm_head.weight" in golden.weights:
        copies |= {name: golden.weights["lm_head.weight"] for name in adapter.copies if "lm_head" in name}
    kind = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[adapter.dtype]
    tensors = {name: array.astype(kind) for name, array in (adapter.tensors | copies).items()}
    return Bench(adapter, golden, base, write_adapter_folder(tmp_path / "adapter", adapter.config, tensors))


every_adapter = pytest.mark.parametrize("bench", [*ADAPTERS, *EXPERT_ADAPTERS], indirect=True)


@every_adapter
def test_logits(bench: Bench) -> None:
    """A whole batch, with the adapter unmerged; without it the logits are the base's."""
    model = et.load(bench.base, adapter=bench.folder)
    assert_logits(model.logits(bench.golden.tokens), bench.adapter.logits)
    assert np.abs(bench.golden.logits - bench.adapter.logits).max() > 1e-2


@every_adapter
@pytest.mark.parametrize("recompute", [False, True])
def test_loss_and_gradients(bench: Bench, recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the adapter's matrices, by PEFT's names, and of nothing else; also if blocks are run again."""
    model = with_adapter(et.load(bench.base), bench.folder)
    if recompute:
        recomputing(monkeypatch)
    loss, gradients = model.loss_and_gradients(bench.golden.tokens, bench.golden.targets)
    assert abs(loss - bench.adapter.loss) <= LOSS
    assert {f"{PREFIX}{name}" for name in gradients} == bench.adapter.gradients.keys()
    for name, gradient in gradients.items():
        assert_gradient(name, gradient, bench.adapter.gradients[f"{PREFIX}{name}"])


@every_adapter
def test_written_folder(bench: Bench, tmp_path: Path) -> None:
    """The matrices that peft wrote, bit for bit, and the same logits after reading them again."""
    model = with_adapter(et.load(bench.base), bench.folder)
    write_adapter(model, tmp_path / "out")
    written = et.load(bench.base, adapter=tmp_path / "out")
    parameters = written.adapter_parameters()
    assert {f"{PREFIX}{name}" for name in parameters} == bench.adapter.tensors.keys()
    for name, array in parameters.items():
        np.testing.assert_array_equal(array, bench.adapter.tensors[f"{PREFIX}{name}"], err_msg=name)
    np.testing.assert_array_equal(written.logits(bench.golden.tokens), model.logits(bench.golden.tokens))


@every_adapter
def test_settings_mean_what_they_mean_to_peft(bench: Bench) -> None:
    """The same settings put matrices of the same shapes on the same modules, scaled alike."""
    settings = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in bench.adapter.settings.items()
    }
    model = with_lora(et.load(bench.base), LoRAConfig(**settings))
    shapes = {f"{PREFIX}{name}": array.shape for name, array in model.adapter_parameters().items()}
    expected = {name: array.shape for name, array in bench.adapter.tensors.items()}
    if settings["target_modules"] == "all-linear":
        # peft leaves out qwen2_moe's experts and router, deepseek_v2's shared experts and dense layers; here
        # all-linear is every matrix.
        left_out = {
            "qwen2_moe_dense_layer": r"\.mlp\.(experts|gate)\.",
            "deepseek_v2_direct": r"\.mlp\..*_proj\.",
        }
        pattern = left_out.get(bench.adapter.base, "(?!)")
        shapes = {
            key: shape for key, shape in shapes.items() if key in expected or not re.search(pattern, key)
        }
    assert shapes == expected
    read = with_adapter(et.load(bench.base), bench.folder).adapters
    scalings = {path: leaf.scaling for path, leaf in model.adapters.items() if path in read}
    assert scalings == {path: leaf.scaling for path, leaf in read.items()}


@pytest.mark.parametrize("bench", EXPERT_ADAPTERS, indirect=True)
def test_training_writes_and_reads_its_own_structure(bench: Bench, tmp_path: Path) -> None:
    """Arrays that are written into the adapters in use are those that a file has."""
    model = with_adapter(et.load(bench.base), bench.folder)
    other = with_adapter(et.load(bench.base), bench.folder)
    for leaf in other.adapters.values():
        leaf.a[...], leaf.b[...] = 0, 0
    other.set_adapter_parameters(model.adapter_parameters())
    np.testing.assert_array_equal(other.logits(bench.golden.tokens), model.logits(bench.golden.tokens))
    whole, report = merged(model)
    assert_logits(whole.logits(bench.golden.tokens), bench.adapter.logits)
    assert len(report) == len(model.adapters)


@pytest.mark.parametrize("bench", OLD_ADAPTERS, indirect=True)
def test_adapters_on_each_expert(bench: Bench, tmp_path: Path) -> None:
    """As transformers 4 had them: the logits of what peft makes of them, and written as they came."""
    model = et.load(bench.base, adapter=bench.folder)
    assert_logits(model.logits(bench.golden.tokens), bench.adapter.logits)
    parameters = model.adapter_parameters()
    assert {f"{PREFIX}{name}" for name in parameters} == bench.adapter.tensors.keys()
    write_adapter(model, tmp_path)
    again = et.load(bench.base, adapter=tmp_path)
    np.testing.assert_array_equal(again.logits(bench.golden.tokens), model.logits(bench.golden.tokens))


@pytest.mark.parametrize("name", RECOMPUTED)
def test_all_gradients_recomputed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full training with blocks that are run again has the golden gradients too."""
    golden = load_golden(name)
    model = et.load(write_folder(tmp_path, golden.config, golden.weights))
    recomputing(monkeypatch)
    loss, gradients = model.loss_and_gradients(golden.tokens, golden.targets)
    assert abs(loss - golden.loss) <= LOSS
    assert gradients.keys() == golden.gradients.keys()
    for key, reference in golden.gradients.items():
        assert_gradient(key, gradients[key], reference)


def recomputing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `loss_and_gradients` keep only what enters each block."""
    plain = Decoder.loss_and_gradient

    def again(self: Decoder, tokens: np.ndarray, targets: np.ndarray) -> tuple[float, Decoder]:
        return plain(self, tokens, targets, recompute=True)

    monkeypatch.setattr(Decoder, "loss_and_gradient", again)
