"""Adapters written by peft: logits, loss and gradients compared with torch."""

import re
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import einsum_transformer as et
from einsum_transformer.errors import InputError
from einsum_transformer.models.adapters import matrices_of, merged, with_lora
from einsum_transformer.models.decoder import Decoder
from einsum_transformer.models.lora_config import LoRAConfig
from einsum_transformer.models.peft import places_of, read_config, save_adapter, with_adapter
from einsum_transformer.models.peft_names import stack_name
from einsum_transformer.models.stacked import stacks_of
from golden_files import (
    ADAPTERS,
    EXPERT_ADAPTERS,
    HEAD_ADAPTERS,
    OLD_ADAPTERS,
    Folders,
    Golden,
    GoldenAdapter,
    Models,
    load_adapter,
    load_expert_adapter,
    load_golden,
    module_names,
    write_adapter_folder,
)
from test_golden_models import LOSS, assert_gradient, assert_logits

PREFIX = "base_model.model."
SAVED_AS = {
    "lm_head.weight": (
        "lm_head.weight",
        "embed_out.weight",
        "model.embed_tokens.weight",
        "transformer.wte.weight",
    )
}
"""Module of transformers -> its possible names in checkpoints, in order of preference."""
RECOMPUTED = ("llama_gqa", "llama_mha_tied", "llama_bias", "llama_rope_dynamic", "mistral_window")


@dataclass(frozen=True, slots=True)
class Bench:
    """A golden adapter with its base model (golden and folder) and its own folder."""

    adapter: GoldenAdapter
    golden: Golden
    base: Path
    folder: Path


def copied(golden: Golden, name: str) -> np.ndarray:
    """The weight of the base model that peft wrote with an adapter under this name."""
    plain = name.removeprefix(PREFIX).replace(".base_layer", "")
    return golden.weights[next(one for one in SAVED_AS.get(plain, (plain,)) if one in golden.weights)]


@pytest.fixture(scope="module")
def bench(
    request: pytest.FixtureRequest, golden_folder: Folders, tmp_path_factory: pytest.TempPathFactory
) -> Bench:
    """The parametrized adapter, in a folder as peft wrote it."""
    tmp_path = tmp_path_factory.mktemp("bench")
    load = load_adapter if request.param in ADAPTERS else load_expert_adapter
    adapter = load(request.param)
    golden, base = load_golden(adapter.base), golden_folder(adapter.base)
    copies = {name: copied(golden, name) for name in adapter.copies}
    kind = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[adapter.dtype]
    tensors = {name: array.astype(kind) for name, array in (adapter.tensors | copies).items()}
    return Bench(adapter, golden, base, write_adapter_folder(tmp_path / "adapter", adapter.config, tensors))


every_adapter = pytest.mark.parametrize("bench", [*ADAPTERS, *EXPERT_ADAPTERS, *HEAD_ADAPTERS], indirect=True)


@every_adapter
def test_logits(bench: Bench) -> None:
    """A whole batch with the unmerged adapter, and without it."""
    model = et.load(bench.base, adapter=bench.folder)
    assert_logits(model.logits(bench.golden.tokens), bench.adapter.logits)
    assert np.abs(bench.golden.logits - bench.adapter.logits).max() > 1e-2


@every_adapter
@pytest.mark.parametrize("recompute", [False, True])
def test_loss_and_gradients(bench: Bench, recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of the adapter's matrices only, by PEFT name, with and without recomputation of blocks."""
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
    """The matrices equal peft's bit for bit, and the logits are the same after reading them."""
    model = with_adapter(et.load(bench.base), bench.folder)
    save_adapter(model, tmp_path / "out")
    written = et.load(bench.base, adapter=tmp_path / "out")
    parameters = written.adapter_parameters()
    assert {f"{PREFIX}{name}" for name in parameters} == bench.adapter.tensors.keys()
    for name, array in parameters.items():
        np.testing.assert_array_equal(array, bench.adapter.tensors[f"{PREFIX}{name}"], err_msg=name)
    np.testing.assert_array_equal(written.logits(bench.golden.tokens), model.logits(bench.golden.tokens))


@every_adapter
def test_settings_mean_what_they_mean_to_peft(bench: Bench) -> None:
    """The settings give adapters on the same modules with the same shapes and scaling as in peft."""
    settings = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in bench.adapter.settings.items()
    }
    model = with_lora(et.load(bench.base), LoRAConfig(**settings))
    shapes = {f"{PREFIX}{name}": array.shape for name, array in model.adapter_parameters().items()}
    expected = {name: array.shape for name, array in bench.adapter.tensors.items()}
    if settings["target_modules"] == "all-linear":
        # peft's all-linear excludes qwen2_moe's experts and router, and deepseek_v2's shared experts and
        # dense layers; ours includes every matrix.
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
    """set_adapter_parameters accepts the arrays of a file."""
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
    """Adapters of transformers 4 give the logits of peft's conversion, and are saved unchanged."""
    model = et.load(bench.base, adapter=bench.folder)
    assert_logits(model.logits(bench.golden.tokens), bench.adapter.logits)
    parameters = model.adapter_parameters()
    assert {f"{PREFIX}{name}" for name in parameters} == bench.adapter.tensors.keys()
    save_adapter(model, tmp_path)
    again = et.load(bench.base, adapter=tmp_path)
    np.testing.assert_array_equal(again.logits(bench.golden.tokens), model.logits(bench.golden.tokens))


POSITIONS = {"transformer.wpe"}
"""Position embeddings, on which adapters are not supported."""


@pytest.mark.parametrize("name", module_names())
def test_modules_have_the_names_of_transformers(name: str, golden_model: Models) -> None:
    """Every matrix of a model of each family, and no other; names of checkpoints are accepted too."""
    model = golden_model(name)
    matrices, family = matrices_of(model), model.family
    stacks = stacks_of(matrices) if family.stacked_experts else {}
    alone = matrices.keys() - {path for stack in stacks.values() for path in stack.paths}
    names = {family.module_name(path) for path in alone} | {stack_name(family, stack) for stack in stacks}
    assert names == set(module_names()[name]) - POSITIONS
    places = places_of(model)
    assert all(places[model.module(path)] == places[family.module_name(path)] == path for path in alone)


@pytest.mark.parametrize("target", ["lm_head", "embed_out"])
def test_the_head_of_gpt_neox_has_two_names(target: str, golden_folder: Folders, tmp_path: Path) -> None:
    """transformers 4 and checkpoints name the module embed_out; both names are accepted."""
    golden, base = load_golden("gpt_neox_parallel"), golden_folder("gpt_neox_parallel")
    model = with_lora(et.load(base), LoRAConfig(2, 3.0, (target,), rank_pattern={"embed_out": 3}))
    for array in model.adapter_parameters().values():
        array[...] = 0.25
    save_adapter(model, tmp_path / "now")
    assert read_config(tmp_path / "now").target_modules == ("lm_head",)
    tensors = {f"{PREFIX}{name}": array for name, array in model.adapter_parameters().items()}
    assert {name: array.shape for name, array in tensors.items()} == {
        f"{PREFIX}lm_head.lora_A.weight": (3, 32),
        f"{PREFIX}lm_head.lora_B.weight": (71, 3),
    }
    old = {name.replace("lm_head", "embed_out"): array for name, array in tensors.items()}
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 3.0, "target_modules": ["embed_out"]}
    write_adapter_folder(tmp_path / "then", config, old)
    for folder in ("now", "then"):
        again = et.load(base, adapter=tmp_path / folder)
        np.testing.assert_array_equal(again.logits(golden.tokens), model.logits(golden.tokens))


def test_a_copy_of_the_heads_bias_must_be_the_models(golden_model: Models, tmp_path: Path) -> None:
    """peft writes the copy for phi; a base model without a bias rejects one."""
    adapter = load_expert_adapter("heads phi")
    name = f"{PREFIX}lm_head.base_layer.bias"
    assert name in adapter.copies
    golden, model = load_golden(adapter.base), golden_model(adapter.base)
    bias = golden.weights["lm_head.bias"]
    for changed, words in (
        (bias + 1, "differs from the base model's"),
        (bias[1:], "the vocabulary was resized"),
    ):
        write_adapter_folder(tmp_path / "a", adapter.config, adapter.tensors | {name: changed})
        with pytest.raises(InputError, match=words):
            with_adapter(model, tmp_path / "a")
    head = load_adapter("lm_head")
    write_adapter_folder(tmp_path / "b", head.config, head.tensors | {name: bias})
    with pytest.raises(InputError, match="is a bias, which the base model does not have"):
        with_adapter(golden_model("llama_gqa"), tmp_path / "b")


@pytest.mark.parametrize("name", RECOMPUTED)
def test_all_gradients_recomputed(name: str, golden_model: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of all weights with recomputed blocks equal the golden gradients."""
    golden, model = load_golden(name), golden_model(name)
    recomputing(monkeypatch)
    loss, gradients = model.loss_and_gradients(golden.tokens, golden.targets)
    assert abs(loss - golden.loss) <= LOSS
    assert gradients.keys() == golden.gradients.keys()
    for key, reference in golden.gradients.items():
        assert_gradient(key, gradients[key], reference)


def recomputing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `loss_and_gradient` recompute blocks in the backward pass."""
    plain = Decoder.loss_and_gradient

    def recomputed(self: Decoder, tokens: np.ndarray, targets: np.ndarray) -> tuple[float, Decoder]:
        return plain(self, tokens, targets, recompute=True)

    monkeypatch.setattr(Decoder, "loss_and_gradient", recomputed)
