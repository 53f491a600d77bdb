"""Whole models compared with transformers: logits, loss, gradients, saving, and folders that are rejected."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import einsum_transformer as et
from einsum_transformer.errors import InputError
from golden_files import MODELS, Golden, Models, load_golden, write_folder

pytestmark = pytest.mark.usefixtures("every_load_is_inspected")
LOGITS = 1e-4
LOSS = 1e-5
GRADIENT = 1e-4
# config.json keys that have one spelling only; RoPE, which has two, shows in the logits of the loaded folder
KEPT = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "head_dim",
    "rms_norm_eps",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "sliding_window",
    "use_sliding_window",
    "layer_types",
)
BY_LENGTH = ("llama_rope_dynamic", "phi3_longrope")
"""Models whose RoPE depends on the length of the text."""
DOWN = "model.layers.1.mlp.down_proj.weight"


def assert_logits(ours: np.ndarray, reference: np.ndarray) -> None:
    """Check shape, dtype, and values within the tolerance."""
    assert ours.shape == reference.shape
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, reference, rtol=0, atol=LOGITS)


def assert_gradient(name: str, ours: np.ndarray, reference: np.ndarray) -> None:
    """Compare relative to the reference, in norm and by the largest element."""
    assert ours.shape == reference.shape, name
    difference = np.asarray(ours, np.float64) - reference
    assert np.linalg.norm(difference) <= GRADIENT * np.linalg.norm(reference.astype(np.float64)), name
    assert np.abs(difference).max() <= GRADIENT * np.abs(reference).max(), name


def write_shards(folder: Path, golden: Golden) -> tuple[Path, Path]:
    """Write two shards with an index by the safetensors library; returns the shards."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(golden.config), encoding="utf-8")
    names = sorted(golden.weights)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    shards = tuple(folder / f"model-{number:05d}-of-00002.safetensors" for number in (1, 2))
    for path, half in zip(shards, halves):
        save_file({name: golden.weights[name] for name in half}, path, metadata={"format": "pt"})
    total = sum(array.nbytes for array in golden.weights.values())
    weight_map = {name: path.name for path, half in zip(shards, halves) for name in half}
    index = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    return shards[0], shards[1]


def saved_tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a saved folder, read with the safetensors library."""
    return {key: array for path in folder.glob("*.safetensors") for key, array in load_file(path).items()}


def refusal(folder: Path) -> str:
    """The message of the error that loading the folder raises."""
    with pytest.raises(InputError) as caught:
        et.load(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", MODELS)
def test_logits(name: str, golden_model: Models) -> None:
    """A whole batch."""
    golden, model = load_golden(name), golden_model(name)
    assert_logits(model.logits(golden.tokens), golden.logits)


@pytest.mark.parametrize("name", MODELS)
def test_logits_from_version_4_config(name: str, tmp_path: Path) -> None:
    """rope_theta, rope_scaling and torch_dtype instead of rope_parameters and dtype, without defaults."""
    golden = load_golden(name)
    model = et.load(write_folder(tmp_path, golden.config_v4, golden.weights))
    assert_logits(model.logits(golden.tokens), golden.logits)


@pytest.mark.parametrize("length", [1, 2, 8])
@pytest.mark.parametrize("name", [name for name in MODELS if name not in BY_LENGTH])
def test_logits_of_a_prefix(name: str, length: int, golden_model: Models) -> None:
    """Attention is causal, short inputs give the same logits, and a row gives the same logits alone."""
    golden, model = load_golden(name), golden_model(name)
    for row in (slice(0, 1), slice(1, 2)):
        assert_logits(model.logits(golden.tokens[row, :length]), golden.logits[row, :length])


@pytest.mark.parametrize("name", BY_LENGTH)
def test_rope_forgets_a_longer_input(name: str, golden_model: Models) -> None:
    """After an input beyond the trained length, a short input uses the original frequencies."""
    golden, model = load_golden(name), golden_model(name)
    assert golden.short_logits is not None
    short = golden.tokens[:, : golden.short_logits.shape[1]]
    assert_logits(model.logits(short), golden.short_logits)
    assert_logits(model.logits(golden.tokens), golden.logits)
    assert_logits(model.logits(short), golden.short_logits)


@pytest.mark.parametrize("name", MODELS)
def test_names_and_values_of_parameters(name: str, golden_model: Models) -> None:
    """The parameters are the tensors of the checkpoint."""
    golden, model = load_golden(name), golden_model(name)
    parameters = model.named_parameters()
    assert set(parameters) == set(golden.weights)
    for key, array in parameters.items():
        np.testing.assert_array_equal(np.asarray(array), golden.weights[key], err_msg=key)


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients(name: str, golden_model: Models) -> None:
    """The mean over the targets that are not ignored, and its gradient for every parameter."""
    golden, model = load_golden(name), golden_model(name)
    loss, gradients = model.loss_and_gradients(golden.tokens, golden.targets)
    assert abs(loss - golden.loss) <= LOSS
    assert set(gradients) == set(golden.gradients) == set(model.named_parameters())
    for key, reference in golden.gradients.items():
        assert_gradient(key, np.asarray(gradients[key]), reference)


def test_tokens_that_do_not_occur_have_no_embedding_gradient(golden_model: Models) -> None:
    """Their rows are exactly zero; in a tied model the head gives every row a gradient."""
    golden, model = load_golden("llama_gqa"), golden_model("llama_gqa")
    _, gradients = model.loss_and_gradients(golden.tokens, golden.targets)
    absent = np.setdiff1d(np.arange(golden.config["vocab_size"]), golden.tokens)
    assert absent.size
    assert not np.asarray(gradients["model.embed_tokens.weight"])[absent].any()


@pytest.mark.parametrize("name", MODELS)
def test_saved_folder(name: str, tmp_path: Path, golden_model: Models) -> None:
    """The same config and tensors on disk, and the same logits bit for bit after loading."""
    golden, model = load_golden(name), golden_model(name)
    model.save(tmp_path)
    tensors = saved_tensors(tmp_path)
    assert set(tensors) == set(golden.weights)
    for key, array in tensors.items():
        assert array.dtype == np.float32, key
        np.testing.assert_array_equal(array, golden.weights[key], err_msg=key)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    # A window of 0 and a head_dim of null mean the same as missing keys.
    kept = [key for key in KEPT if golden.config.get(key) not in (None, 0)]
    assert {key: config.get(key) for key in kept} == {key: golden.config[key] for key in kept}
    again = et.load(tmp_path)
    np.testing.assert_array_equal(again.logits(golden.tokens), model.logits(golden.tokens))


@pytest.mark.parametrize("name", ["llama_gqa", "llama_mha_tied"])
def test_two_shards(name: str, tmp_path: Path, golden_model: Models) -> None:
    """Two files with an index give the same logits as one file."""
    golden, model = load_golden(name), golden_model(name)
    write_shards(tmp_path, golden)
    np.testing.assert_array_equal(et.load(tmp_path).logits(golden.tokens), model.logits(golden.tokens))


@pytest.mark.parametrize("kind", [ml_dtypes.bfloat16, np.float16])
def test_sixteen_bit_file(kind: Any, tmp_path: Path, golden_model: Models) -> None:
    """The golden weights are exact in 16 bits, so float32 results are the same bit for bit."""
    golden, model = load_golden("llama_gqa"), golden_model("llama_gqa")
    narrow = {key: array.astype(kind) for key, array in golden.weights.items()}
    folder = write_folder(tmp_path, golden.config, narrow)
    ours = et.load(folder, dtype="float32").logits(golden.tokens)
    np.testing.assert_array_equal(ours, model.logits(golden.tokens))


def test_missing_tensor_is_refused(tmp_path: Path) -> None:
    """The message names it."""
    golden = load_golden("llama_gqa")
    rest = {key: array for key, array in golden.weights.items() if key != DOWN}
    assert DOWN in refusal(write_folder(tmp_path, golden.config, rest))


def test_missing_bias_is_refused(tmp_path: Path) -> None:
    """A bias that the config enables is not replaced with zeros."""
    golden = load_golden("llama_bias")
    gone = "model.layers.0.self_attn.o_proj.bias"
    rest = {key: array for key, array in golden.weights.items() if key != gone}
    assert gone in refusal(write_folder(tmp_path, golden.config, rest))


def test_tensor_that_no_part_takes_is_refused(tmp_path: Path) -> None:
    """An additional layer, and a bias that the config does not enable."""
    golden = load_golden("llama_gqa")
    for extra in ("model.layers.3.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.bias"):
        more = {**golden.weights, extra: golden.weights[DOWN]}
        assert extra in refusal(write_folder(tmp_path / extra, golden.config, more))


def test_transposed_tensor_is_refused(tmp_path: Path) -> None:
    """The message contains its name and both shapes."""
    golden = load_golden("llama_gqa")
    transposed = {**golden.weights, DOWN: np.ascontiguousarray(golden.weights[DOWN].T)}
    message = refusal(write_folder(tmp_path, golden.config, transposed))
    assert DOWN in message
    assert "80" in message
    assert "48" in message


def test_config_that_contradicts_the_tensors_is_refused(tmp_path: Path) -> None:
    """The config has two more key/value heads than the file."""
    golden = load_golden("llama_gqa")
    config = {**golden.config, "num_key_value_heads": 3}
    assert "k_proj" in refusal(write_folder(tmp_path, config, golden.weights))


def test_missing_shard_is_refused(tmp_path: Path) -> None:
    """The message contains its file name."""
    shard = write_shards(tmp_path, load_golden("llama_gqa"))[1]
    shard.unlink()
    assert shard.name in refusal(tmp_path)


def test_tensor_missing_from_its_shard_is_refused(tmp_path: Path) -> None:
    """The index lists it, but the file does not contain it."""
    golden = load_golden("llama_gqa")
    shard = write_shards(tmp_path, golden)[0]
    tensors = load_file(shard)
    gone = sorted(tensors)[-1]
    del tensors[gone]
    save_file(tensors, shard)
    assert gone in refusal(tmp_path)


@pytest.mark.parametrize("flag", [True, False])
def test_head_on_disk_equal_to_the_embedding(flag: bool, tmp_path: Path) -> None:
    """Tied: the copy is not a parameter. Untied: it is one, and both gradients sum to the tied gradient."""
    golden = load_golden("llama_mha_tied")
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    tensors = {**golden.weights, head: golden.weights[embedding].copy()}
    folder = write_folder(tmp_path / "in", {**golden.config, "tie_word_embeddings": flag}, tensors)
    model = et.load(folder)
    assert_logits(model.logits(golden.tokens), golden.logits)
    assert set(model.named_parameters()) == (set(golden.weights) if flag else set(tensors))
    _, gradients = model.loss_and_gradients(golden.tokens, golden.targets)
    whole = gradients[embedding] if flag else gradients[embedding] + gradients[head]
    assert_gradient(embedding, whole, golden.gradients[embedding])
    model.save(tmp_path / "out")
    assert set(saved_tensors(tmp_path / "out")) == set(model.named_parameters())
    again = et.load(tmp_path / "out")
    np.testing.assert_array_equal(again.logits(golden.tokens), model.logits(golden.tokens))


def test_untied_model_without_head_is_refused(tmp_path: Path) -> None:
    """The embedding does not replace it. (llama_mha_tied is tied and has no head on disk.)"""
    golden = load_golden("llama_mha_tied")
    config = {**golden.config, "tie_word_embeddings": False}
    assert "lm_head.weight" in refusal(write_folder(tmp_path, config, golden.weights))
