"""The same model in the other layouts that its folders come in."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import einsum_transformer as et
from einsum_transformer.loading.configs import read_config
from golden_files import Golden, Models, load_golden, write_folder

pytestmark = pytest.mark.usefixtures("every_load_is_inspected")
Array = np.ndarray


def assert_same(golden: Golden, folder: Path) -> None:
    """The logits, and the names of the parameters that a save would write."""
    model = et.load(folder)
    np.testing.assert_allclose(model.logits(golden.tokens), golden.logits, rtol=0, atol=1e-4)
    assert set(model.named_parameters()) == set(golden.weights)


def prefixed(prefix: str) -> Callable[[str], str]:
    return lambda name: prefix + name.removeprefix("model.")


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
@pytest.mark.parametrize("name", ["gemma3_text", "gemma3_text_mqa"])
def test_text_part_of_a_multimodal_model(name: str, prefix: str, tmp_path: Path) -> None:
    """The config nests it, older and newer files name its tensors differently, images' tensors stay out."""
    golden = load_golden(name)
    rename = prefixed(prefix)
    weights = {rename(key): array for key, array in golden.weights.items()}
    weights["vision_tower.vision_model.embeddings.patch_embedding.weight"] = np.ones((2, 3), np.float32)
    weights["multi_modal_projector.mm_input_projection_weight"] = np.ones((2, 3), np.float32)
    config = {"model_type": "gemma3", "text_config": golden.config, "vision_config": {"hidden_size": 3}}
    assert_same(golden, write_folder(tmp_path, config, weights))


def test_text_part_with_keys_left_out(tmp_path: Path) -> None:
    """They have the values of the reference's text config, down to the window's pattern."""
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34, "sliding_window": 1024}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "gemma3", "text_config": text}), encoding="utf-8")
    config = read_config(path)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (8, 4, 256)
    assert (config.vocab_size, config.intermediate_size) == (262208, 9216)
    assert [i for i, window in enumerate(config.windows) if window is None] == [5, 11, 17, 23, 29]
    assert [rope.rope_theta for rope in config.ropes] == [1e6, 1e4]
    assert config.tie_word_embeddings


def test_names_without_their_prefix(tmp_path: Path) -> None:
    """The first published checkpoints of this family leave it out, and carry masks as tensors."""
    golden = load_golden("gpt2_plain")
    weights = {key.removeprefix("transformer."): array for key, array in golden.weights.items()}
    weights["h.0.attn.bias"] = np.tri(4, dtype=np.float32)[None, None]
    assert_same(golden, write_folder(tmp_path, golden.config, weights))


@pytest.mark.parametrize("name", ["qwen3_moe_normalized", "qwen2_moe_dense_layer", "deepseek_v2_direct"])
def test_experts_that_share_tensors(name: str, tmp_path: Path) -> None:
    """As transformers holds them in memory: gate above up, and all experts of a layer in one."""
    golden = load_golden(name)
    fused = {key: array for key, array in golden.weights.items() if ".experts." not in key}
    experts = {key.split(".experts.")[0] for key in golden.weights if ".experts." in key}
    count = golden.config.get("num_experts") or golden.config.get("num_local_experts") or 7
    for place in experts:

        def stack(part: str, place: str = place) -> Array:
            names = [f"{place}.experts.{e}.{part}_proj.weight" for e in range(count)]
            return np.stack([golden.weights[each] for each in names])

        fused[f"{place}.experts.gate_up_proj"] = np.concatenate([stack("gate"), stack("up")], axis=1)
        fused[f"{place}.experts.down_proj"] = stack("down")
    folder = write_folder(tmp_path, golden.config, fused)
    assert_same(golden, folder)
    lazy = et.load(folder, weight_budget=0)
    np.testing.assert_allclose(lazy.logits(golden.tokens), golden.logits, rtol=0, atol=1e-4)


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    golden = load_golden("mixtral_window")
    gone = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    rest = {key: array for key, array in golden.weights.items() if key != gone}
    with pytest.raises(et.InputError, match=r"experts\.3\.w2"):
        et.load(write_folder(tmp_path, golden.config, rest))


def test_positions_that_were_never_learned_are_refused(golden_model: Models) -> None:
    model = golden_model("gpt2_plain")
    known = load_golden("gpt2_plain").config["n_positions"]
    with pytest.raises(et.InputError, match=str(known)):
        model.logits(np.zeros((1, known + 1), int))
    assert len(et.generate(model, [1, 2], max_new_tokens=known + 9, ignore_eos=True).tokens) <= known
