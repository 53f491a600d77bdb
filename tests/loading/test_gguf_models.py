"""A GGUF file, written as llama.cpp's converter writes it, is the model that the Hugging Face folder is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize

import einsum_transformer as et
from einsum_transformer.engine import Leaf
from einsum_transformer.formats import Packed
from einsum_transformer.loading.weights import PACKED
from einsum_transformer.models.builder import WeightSpec
from einsum_transformer.tree import named_leaves
from golden_files import write_folder
from tiny_models import (
    CONFIG,
    LLAMA3,
    Array,
    hf_config,
    permuted,
    random_weights,
    reference_logits,
    write_gguf,
    write_tiny,
)

pytestmark = pytest.mark.usefixtures("every_load_is_inspected")
IDS = np.random.default_rng(3).integers(0, 61, (2, 90))
# Matrices of more than 512 rows are laid out input-major; rows of 32 can be quantized in blocks.
WIDE = {"vocab_size": 640, "intermediate_size": 576, "head_dim": 64, "hidden_size": 32}


def llama3_factors(head_dim: int, theta: float) -> Array:
    """The tensor rope_freqs that the converter derives from rope_scaling."""
    factors = []
    for frequency in theta ** -(np.arange(0, head_dim, 2) / head_dim):
        wavelength, trained = 2 * np.pi / frequency, LLAMA3["original_max_position_embeddings"]
        low, high, factor = (LLAMA3[name] for name in ("low_freq_factor", "high_freq_factor", "factor"))
        smooth = np.clip((trained / wavelength - low) / (high - low), 0, 1)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


SCALING = "llama.rope.scaling."
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grouped heads": ({}, {}),
    "multi-head": ({"num_key_value_heads": 8}, {}),
    "one key/value head": ({"num_key_value_heads": 1}, {}),
    "tied": ({"tie_word_embeddings": True}, {}),
    "biases": ({"attention_bias": True}, {}),
    "head_dim": ({"head_dim": 10}, {}),
    "head_dim not said": (
        {"head_dim": 4},
        {"llama.attention.key_length": None, "llama.rope.dimension_count": None},
    ),
    "wide": (WIDE, {}),
    "wide, tied": (WIDE | {"tie_word_embeddings": True}, {}),
    "window": ({"model_type": "mistral", "sliding_window": 7}, {"llama.attention.sliding_window": 7}),
    "qwen2": ({"model_type": "qwen2"}, {}),
    "qwen2, tied": ({"model_type": "qwen2", "tie_word_embeddings": True, "num_key_value_heads": 1}, {}),
    "theta": ({"rope_theta": 500000.0}, {}),
    "llama3": ({"rope_scaling": LLAMA3}, {"rope_freqs.weight": llama3_factors(6, 1e4)}),
    "linear": (
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {f"{SCALING}type": "linear", f"{SCALING}factor": 4.0},
    ),
    "yarn": (
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
        {f"{SCALING}type": "yarn", f"{SCALING}factor": 4.0, f"{SCALING}original_context_length": 32},
    ),
}


def both(tmp_path: Path, name: str, **options: Any) -> tuple[et.Model, et.Model]:
    changes, keys = CASES[name]
    folder, weights = write_tiny(tmp_path / "folder", **changes)
    file = write_gguf(tmp_path / "model.gguf", hf_config(**changes), weights, **keys)
    return et.load(folder, **options), et.load(file, **options)


@pytest.mark.parametrize(
    "options", [{}, {"weight_budget": 0}, {"dtype": "float64"}, {"max_layers": 1}], ids=str
)
@pytest.mark.parametrize("name", CASES)
def test_same_logits(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    folder, file = both(tmp_path, name, **options)
    expected = folder.logits(IDS)
    np.testing.assert_allclose(file.logits(IDS), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", CASES)
def test_same_parameters(name: str, tmp_path: Path) -> None:
    """Under the same names, row for row."""
    folder, file = (model.named_parameters() for model in both(tmp_path, name))
    assert folder.keys() == file.keys()
    for key, array in folder.items():
        np.testing.assert_array_equal(file[key], array, err_msg=key)


@pytest.mark.parametrize("name", CASES)
def test_saved_as_a_folder(name: str, tmp_path: Path) -> None:
    """Everything the file says about the arithmetic is in the folder; what a folder cannot say is refused."""
    _, file = both(tmp_path, name)
    try:
        file.save(tmp_path / "saved")
    except et.InputError:
        assert name == "llama3"  # factors of no published model
        return
    again = et.load(tmp_path / "saved")
    np.testing.assert_array_equal(again.logits(IDS), file.logits(IDS))


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_published_llama3_factors_are_saved_by_name(factor: float, tmp_path: Path) -> None:
    """The scaling of Llama 3.1 and 3.2 is recognized, so its folder says rope_type llama3."""
    scaling = LLAMA3 | {"factor": factor, "original_max_position_embeddings": 8192}
    config = hf_config(head_dim=64, rope_theta=500000.0, rope_scaling=scaling)
    inv_freq = 500000.0 ** -(np.arange(0, 64, 2) / 64)
    turns = 8192 * inv_freq / (2 * np.pi)
    smooth = np.clip((turns - 1) / 3, 0, 1)
    factors = (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
    weights = random_weights(config)
    model = et.load(write_gguf(tmp_path / "m.gguf", config, weights, **{"rope_freqs.weight": factors}))
    model.save(tmp_path / "saved")
    expected = et.load(write_folder(tmp_path / "folder", config, weights))
    ids = IDS[:1, :40]
    np.testing.assert_allclose(model.logits(ids), expected.logits(ids), rtol=0, atol=2e-5)
    np.testing.assert_array_equal(et.load(tmp_path / "saved").logits(ids), model.logits(ids))


def test_partial_rotation(tmp_path: Path) -> None:
    """rope.dimension_count below the head's size: llama.cpp turns the file's first dimensions as
    neighbouring pairs."""
    config = hf_config(head_dim=8)
    weights = random_weights(config)
    file = write_gguf(tmp_path / "m.gguf", config, weights, **{"llama.rope.dimension_count": 4})
    as_stored = {name: permuted(name, array, config) for name, array in weights.items()}
    expected = reference_logits(
        config | {"partial_rotary_factor": 0.5}, as_stored, list(IDS[0, :30]), interleaved=True
    )
    try:
        model = et.load(file)
    except et.InputError:
        return
    np.testing.assert_allclose(model.logits(IDS[:1, :30])[0], expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_1", "Q5_0"])
@pytest.mark.parametrize("budget", [None, 0])
def test_quantized_matrices(kind: str, budget: int | None, tmp_path: Path) -> None:
    """Blocks of the file give exactly what gguf's own dequantization gives, in every memory layout,
    permuted or not."""
    config = hf_config(**WIDE)
    code = gguf.GGMLQuantizationType[kind]
    weights = random_weights(config)
    exact = {
        name: dequantize(quantize(array, code), code).reshape(array.shape) if array.ndim == 2 else array
        for name, array in weights.items()
    }
    file = write_gguf_quantized(tmp_path / "m.gguf", config, weights, code)
    parameters = et.load(file, weight_budget=budget).named_parameters()
    for name, array in exact.items():
        np.testing.assert_array_equal(parameters[name], array, err_msg=name)
    expected = et.load(write_folder(tmp_path / "folder", config, exact)).logits(IDS)
    np.testing.assert_allclose(et.load(file, weight_budget=budget).logits(IDS), expected, rtol=0, atol=1e-4)


class Halved(Leaf):
    """A leaf of a test: half of what the file holds."""

    def __init__(self, packed: Packed, spec: WeightSpec, dtype: np.dtype) -> None:
        self.tensor, self.shape, self.dtype = packed, spec.shape, dtype

    def array(self) -> Array:
        return dequantize(self.tensor.parts["stored"], gguf.GGMLQuantizationType.Q8_0).reshape(self.shape) / 2


def test_a_kind_of_leaf_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry decides what becomes of a tensor that the file holds packed; its rows are in the order of
    the weight."""
    config, code = hf_config(**WIDE), gguf.GGMLQuantizationType.Q8_0
    file = write_gguf_quantized(tmp_path / "m.gguf", config, random_weights(config), code)
    plain = et.load(file).named_parameters()
    monkeypatch.setitem(PACKED, "Q8_0", Halved)
    halved = et.load(file, packed=True)
    kinds = {path: type(leaf) for path, leaf in named_leaves(halved.decoder)}
    assert kinds["layers.0.mlp.down_proj"] is kinds["layers.0.self_attn.q_proj"] is Halved
    parameters = halved.named_parameters()
    for name, array in plain.items():
        np.testing.assert_array_equal(parameters[name], (0.5 if array.ndim == 2 else 1) * array)
    assert np.isfinite(halved.logits(IDS)).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_matrices_stay_in_the_encoding_of_the_file(tmp_path: Path, kind: str, dtype: str) -> None:
    config, code = hf_config(**WIDE), gguf.GGMLQuantizationType[kind]
    file = write_gguf_quantized(tmp_path / "m.gguf", config, random_weights(config), code)
    plain, packed = et.load(file, dtype=dtype), et.load(file, dtype=dtype, packed=True)
    for _, leaf in named_leaves(packed.decoder):
        assert (leaf.encoding if isinstance(leaf, Leaf) else "") == (kind if leaf.ndim > 1 else "")
    elements, nbytes = gguf.GGML_QUANT_SIZES[code]
    matrices = [leaf for _, leaf in named_leaves(packed.decoder) if isinstance(leaf, Leaf)]
    assert sum(leaf.nbytes for leaf in matrices) * elements == nbytes * sum(
        np.prod(m.shape) for m in matrices
    )
    before = plain.named_parameters()
    for name, array in packed.named_parameters().items():
        np.testing.assert_array_equal(array, before[name])
        assert array.dtype == dtype
    atol = 1e-5 if dtype == "float32" else 1e-11
    expected = plain.logits(IDS)
    np.testing.assert_allclose(packed.logits(IDS), expected, rtol=0, atol=atol)
    cache = packed.cache(90)
    steps = [packed.decoder.forward(IDS[:, i : i + 1], cache)[0] for i in range(90)]
    np.testing.assert_allclose(np.concatenate(steps, axis=1), expected, rtol=0, atol=atol)
    assert packed.save(tmp_path / "saved") is None
    np.testing.assert_allclose(
        et.load(tmp_path / "saved", dtype=dtype).logits(IDS), expected, rtol=0, atol=atol
    )


def test_settings_that_exclude_the_encoding_of_the_file(tmp_path: Path) -> None:
    config, code = hf_config(**WIDE), gguf.GGMLQuantizationType.Q8_0
    file = write_gguf_quantized(tmp_path / "m.gguf", config, random_weights(config), code)
    for settings, named in (
        ({"weight_budget": 1000}, "`weight_budget`"),
        ({"dtype": "bfloat16"}, "`dtype` bfloat16"),
        ({"quantization": "W8A16"}, "`quantization`"),
    ):
        with pytest.raises(et.InputError, match=f"`packed` excludes {named}"):
            et.load(file, packed=True, **settings)
    plain = write_gguf(tmp_path / "plain.gguf", config, random_weights(config))
    with pytest.raises(et.InputError, match="`packed` needs quantized tensors"):
        et.load(plain, packed=True)
    with pytest.raises(et.InputError, match="`packed` needs"):
        et.load("fast_lora", packed=True)


def test_matrices_stay_encoded_if_their_floats_need_too_much_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config, code = hf_config(**WIDE), gguf.GGMLQuantizationType.Q8_0
    file = write_gguf_quantized(tmp_path / "m.gguf", config, random_weights(config), code)
    monkeypatch.setattr("einsum_transformer.loading.load.memory", lambda: 100_000)
    assert et.load(file).decoder.layers[0].mlp.down_proj.encoding == "Q8_0"
    assert "stay in their encoding (Q8_0)" in caplog.text
    assert isinstance(et.load(file, packed=False).decoder.layers[0].mlp.down_proj, np.ndarray)
    assert not isinstance(et.load(file, weight_budget=1000).decoder.layers[0].mlp.down_proj, np.ndarray)


def write_gguf_quantized(path: Path, config: dict[str, Any], weights: dict[str, Array], code: Any) -> Path:
    """`write_gguf` with every matrix of another type."""
    original = gguf.GGUFWriter.add_tensor

    def add(self: Any, name: str, array: Array) -> None:
        if array.ndim == 2:
            original(self, name, quantize(array, code), raw_dtype=code)
        else:
            original(self, name, array)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "add_tensor", add)
        return write_gguf(path, config, weights)


HOSTILE: dict[str, Any] = {
    "llama.block_count": [0, 3, "2", [2, 2], 2.0],
    "llama.context_length": [0, 1 << 31, "x"],
    "llama.embedding_length": [0, 31, 1 << 30],
    "llama.attention.head_count": [0, 3, [8, 8], "8"],
    "llama.attention.head_count_kv": [0, 3, [2, 2], 16],
    "llama.attention.key_length": [0, 3, 4, 1 << 24],
    "llama.attention.value_length": [4],
    "llama.rope.dimension_count": [0, 3, 8, 1 << 24],
    "llama.rope.freq_base": [0.0, -1.0, float("nan"), float("inf"), "x"],
    "llama.rope.scaling.type": ["longrope", "", 3],
    "llama.attention.layer_norm_rms_epsilon": [float("nan"), float("inf"), -1.0, "x"],
    "llama.attention.sliding_window": [0, "x"],
    "llama.vocab_size": [0, 60, 1 << 24],
    "llama.expert_count": [4],
    "general.architecture": ["gpt2", "", "lama"],
    "tokenizer.ggml.eos_token_id": [(1 << 32) - 1, "x"],
    "rope_freqs.weight": [
        *(np.ones(shape, np.float32) for shape in ((1, 3), (3, 3), 4, 256)),
        *(np.full(3, value, np.float32) for value in (0, np.nan, 1e-45)),
        np.ones(3, np.int32),
    ],
    "blk.0.attn_q.scale": [np.ones(1, np.float32)],
}  # fmt: skip


@pytest.mark.parametrize("key", HOSTILE)
def test_hostile_metadata(key: str, tmp_path: Path) -> None:
    """Each value is refused in one line that names the file, or gives finite scores."""
    problems = {}
    for value in HOSTILE[key]:
        file = write_gguf(tmp_path / "m.gguf", CONFIG, random_weights(CONFIG), **{key: value})
        try:
            logits = et.load(file).logits(IDS[:, :5])
            if not np.isfinite(logits).all():
                problems[str(value)[:30]] = "not finite"
        except et.InputError as error:
            if "\n" in str(error) or str(file) not in str(error):
                problems[str(value)[:30]] = str(error)[:100]
        except Exception as error:
            problems[str(value)[:30]] = f"{type(error).__name__}: {error}"[:100]
    assert problems == {}


@pytest.mark.parametrize(
    "missing", ["block_count", "embedding_length", "feed_forward_length", "attention.head_count"]
)
def test_missing_keys(missing: str, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", CONFIG, random_weights(CONFIG), **{f"llama.{missing}": None})
    with pytest.raises(et.InputError, match=missing):
        et.load(file)


def test_layers_are_counted_before_they_are_built(tmp_path: Path) -> None:
    """200,000 layers of a file that has two are refused from the names alone, not after minutes and
    gigabytes."""
    file = write_gguf(tmp_path / "m.gguf", CONFIG, random_weights(CONFIG), **{"llama.block_count": 200_000})
    program = (
        "import resource, sys, einsum_transformer as et\n"
        "resource.setrlimit(resource.RLIMIT_CPU, (3, 3))\n"
        "try:\n    et.load(sys.argv[1])\nexcept et.InputError as error:\n    print('refused:', error)"
    )
    child = subprocess.run([sys.executable, "-c", program, file], capture_output=True, text=True, check=False)
    assert child.stdout.startswith("refused"), f"exit {child.returncode}: {child.stderr[-200:]}"
